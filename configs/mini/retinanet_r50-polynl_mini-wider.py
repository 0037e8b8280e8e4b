# A narrow RetinaNet with Poly-NL in its ResNet-50, from scratch, in a few
# minutes on two CPU processes:
#   python tools/make_mini_data.py wider_face --out data/mini_wider --seed 0
#   bash tools/dist_train.sh configs/mini/retinanet_r50-polynl_mini-wider.py 2
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        base_channels=8,
        stem_channels=16,
        # From scratch, so nothing is frozen, and the branches must not start
        # at zero: Poly-NL behind a zero learns nothing.
        frozen_stages=-1,
        norm_eval=False,
        zero_init_residual=False,
        init_cfg=None,
        plugins=[
            dict(
                cfg=dict(type='polynl_mm.PolyNL2d'),
                stages=(False, False, True, False),
                position='after_conv3',
            )
        ],
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=48, num_outs=3),
    bbox_head=dict(
        num_classes=1,
        in_channels=48,
        feat_channels=48,
        stacked_convs=1,
        norm_cfg=dict(type='GN', num_groups=8),
        # Squares of 16 to 102 pixels, made a little higher than wide.
        anchor_generator=dict(
            octave_base_scale=2, ratios=[1.2], strides=[8, 16, 32]
        ),
    ),
)

dataset_type = 'polynl_mm.WiderFaceDataset'
data_root = 'data/mini_wider'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=1.0, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        # CocoMetric takes the ground truth from 'instances'.
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'instances',
        ),
    ),
]

# The pictures are small: a worker would only take time from the training.
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='wider_face_split/wider_face_train_bbx_gt.txt',
        data_prefix=dict(img='WIDER_train/images'),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
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

val_evaluator = dict(type='CocoMetric', metric='bbox')
test_evaluator = val_evaluator

# Validates after epochs 1, 4, 8, 12 and 16.
max_epochs = 16
train_cfg = dict(
    type='EpochBasedTrainLoop',
    max_epochs=max_epochs,
    val_interval=1,
    dynamic_intervals=[(3, 4)],
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    # Fused: one parameter group per parameter costs time on a CPU.
    optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.05, fused=True),
    paramwise_cfg=dict(
        norm_decay_mult=0,
        bias_decay_mult=0,
        custom_keys={
            'poly_nl.alpha': dict(decay_mult=0),
            'poly_nl.beta': dict(decay_mult=0),
        },
    ),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        eta_min_ratio=0.01,
        by_epoch=True,
        begin=0,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=8)

default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(max_keep_ckpts=1, save_best='coco/bbox_mAP'),
    visualization=dict(score_thr=0.5),
)
randomness = dict(seed=0)
