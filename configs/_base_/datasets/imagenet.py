# ImageNet-1k (ILSVRC2012): data/imagenet/train with a folder of each class,
# data/imagenet/val with all 50,000 pictures in it, and the official
# development kit, which has their labels. With other labels:
#     val_dataloader.dataset.ann_file=meta/val.txt (lines of "name index")
# or, where the pictures of val are in class folders, with none:
#     val_dataloader.dataset.ann_file=''
# and the same for test_dataloader.
data_root = 'data/imagenet/'
dataset_type = 'polynl_mm.ImageFolder'

train_pipeline = [
    dict(type='polynl_mm.LoadImageFromFile'),
    dict(type='polynl_mm.RandomResizedCrop', size=224),
    dict(type='RandomFlip', prob=0.5),
    dict(type='polynl_mm.PackClsInputs'),
]
test_pipeline = [
    dict(type='polynl_mm.LoadImageFromFile'),
    # The shorter side to 256; mmcv's, whose scale bounds both sides.
    dict(type='mmengine.Resize', scale=(256, 100000), keep_ratio=True),
    dict(type='CenterCrop', crop_size=224),
    dict(type='polynl_mm.PackClsInputs'),
]

train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='val'),
        class_folder='train',
        ann_file='ILSVRC2012_devkit_t12/data/'
        'ILSVRC2012_validation_ground_truth.txt',
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='polynl_mm.Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
