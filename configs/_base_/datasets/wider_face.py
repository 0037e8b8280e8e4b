# WIDER Face as it is unzipped, and RetinaFace's landmarks for training. Four
# ways to test; a config takes another one so:
#     val_dataloader = dict(dataset=dict(pipeline=_base_.vga_pipeline))
#     test_dataloader = val_dataloader
data_root = 'data/WIDERFace/'
dataset_type = 'polynl_mm.WiderFaceDataset'
image_size = (640, 640)

train_pipeline = [
    dict(type='polynl_mm.LoadImageFromFile'),
    dict(
        type='polynl_mm.LoadAnnotations', with_bbox=True, with_keypoints=True
    ),
    dict(
        type='polynl_mm.RandomSquareCrop',
        crop_choice=[0.3, 0.45, 0.6, 0.8, 1.0],
        bbox_clip_border=True,
    ),
    dict(type='polynl_mm.Resize', scale=image_size, keep_ratio=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='polynl_mm.PhotoMetricDistortion'),
    dict(type='polynl_mm.PackDetInputs'),
]

# RetinaFace's single-scale protocol: the shorter side to 1600, unless the
# longer one would pass 2150, which bounds the memory. Annotation is loaded for
# the pictures that are drawn; the metric reads its own. The loader is this
# package's, under the name that mmdet's inferencer looks for.
test_pipeline = [
    dict(type='LoadImageFromFile', _scope_='polynl_mm'),
    dict(type='Resize', scale=(1600, 2150), keep_ratio=True),
    dict(type='polynl_mm.LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs'),
]
# VGA: the longer side to 640. Padding to 640 x 640 is the preprocessor's:
#     model = dict(data_preprocessor=dict(pad_size_divisor=640))
vga_pipeline = [
    dict(type='LoadImageFromFile', _scope_='polynl_mm'),
    dict(type='Resize', scale=(640, 640), keep_ratio=True),
    dict(type='polynl_mm.LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs'),
]
# Original size. WIDER Face is 1024 pixels wide; of larger pictures the longer
# side becomes 4096, or they could exhaust the memory.
original_pipeline = [
    dict(type='LoadImageFromFile', _scope_='polynl_mm'),
    dict(type='polynl_mm.Resize', scale_factor=1.0, max_side=4096),
    dict(type='polynl_mm.LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs'),
]
# By `tools/test.py --tta`: the five scales of RetinaFace's multi-scale
# protocol, plain and mirrored, and box voting over all of them. Unlike there,
# every view has been through NMS before, and faces of one view count.
tta_model = dict(type='polynl_mm.BoxVotingTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile', _scope_='polynl_mm'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=scale, keep_ratio=True)
                for scale in [
                    (500, 750),
                    (800, 1200),
                    (1100, 1650),
                    (1400, 2100),
                    (1700, 2550),
                ]
            ],
            [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)],
            [dict(type='PackDetInputs')],
        ],
    ),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='wider_face_split/wider_face_train_bbx_gt.txt',
        landmark_file='retinaface_gt_v1.1/train/label.txt',
        data_prefix=dict(img='WIDER_train/images'),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='wider_face_split/wider_face_val_bbx_gt.txt',
        data_prefix=dict(img='WIDER_val/images'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

# Where the .mat files of the official evaluation are.
val_evaluator = dict(
    type='polynl_mm.WiderFaceMetric', gt_dir=data_root + 'ground_truth'
)
test_evaluator = val_evaluator
