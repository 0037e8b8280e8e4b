# Half of a narrow ResNet-18, with Poly-NL, from scratch, in seconds on a CPU:
#   python tools/make_mini_data.py digits --out data/mini_digits --seed 0
#   python tools/train.py configs/mini/resnet18-polynl_mini-digits.py
#   bash tools/dist_train.sh configs/mini/resnet18-polynl_mini-digits.py 2
# Rivals: --cfg-options model.backbone.blocks.0.cfg.type=ContextBlock
#     model.backbone.blocks.0.cfg.ratio=0.25
# (or polynl_mm.SELayer, NonLocal2d), and none: model.backbone.blocks=[]
_base_ = [
    '../_base_/schedules/mini.py',
    '../_base_/classification_runtime.py',
]

model = dict(
    type='polynl_mm.Classifier',
    data_preprocessor=dict(
        type='polynl_mm.ClsDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3
    ),
    # Pictures of 32 x 32 are maps of 8 x 8 in both stages.
    backbone=dict(
        type='polynl_mm.Insert',
        into='mmdet.ResNet',
        depth=18,
        base_channels=16,
        stem_channels=16,
        num_stages=2,
        strides=(1, 1),
        dilations=(1, 1),
        out_indices=(1,),
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        blocks=[
            dict(after='layer2.*', cfg=dict(type='polynl_mm.PolyNL2d')),
        ],
    ),
    in_channels=32,
    num_classes=10,
    label_smoothing=0.1,
)

data_root = 'data/mini_digits/'
# No mirror images: those of digits are none.
train_pipeline = [
    dict(type='polynl_mm.LoadImageFromFile'),
    dict(type='polynl_mm.RandomResizedCrop', size=32, area=(0.6, 1.0)),
    dict(type='polynl_mm.PackClsInputs'),
]
test_pipeline = [
    dict(type='polynl_mm.LoadImageFromFile'),
    dict(type='mmengine.Resize', scale=(32, 32), keep_ratio=False),
    dict(type='polynl_mm.PackClsInputs'),
]
# The pictures are small: a worker would only take time from the training.
train_dataloader = dict(
    batch_size=20,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='polynl_mm.ImageFolder',
        data_root=data_root,
        data_prefix=dict(img_path='train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='polynl_mm.ImageFolder',
        data_root=data_root,
        data_prefix=dict(img_path='val'),
        class_folder='train',
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='polynl_mm.Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

max_iters = 200
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters
)

optim_wrapper = dict(
    optimizer=dict(lr=0.01, weight_decay=0.05),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(
        type='CosineAnnealingLR',
        T_max=max_iters,
        eta_min_ratio=0.01,
        by_epoch=False,
        begin=0,
        end=max_iters,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=20)

log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=max_iters, max_keep_ckpts=1),
)
