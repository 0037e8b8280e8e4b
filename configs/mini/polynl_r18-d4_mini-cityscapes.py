# A head with Poly-NL on the first stage of a narrow ResNet-18, from scratch,
# in minutes on a CPU:
#   python tools/make_mini_data.py cityscapes \
#       --out data/mini_cityscapes --seed 0
#   python tools/train.py configs/mini/polynl_r18-d4_mini-cityscapes.py
#   bash tools/dist_train.sh configs/mini/polynl_r18-d4_mini-cityscapes.py 2
# Rivals: --cfg-options model.decode_head.type=FCNHead (or NLHead, GCHead)
_base_ = [
    'mmseg::_base_/datasets/cityscapes.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/mini.py',
    '../_base_/polynl.py',
]

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=(128, 256),
        pad_val=0,
        seg_pad_val=255,
    ),
    # Without its block the network sees 71 x 71 pixels from a position of its
    # map, 4 further with the upsampling: 39 to either side. What decides the
    # class of a texture is more than 48 pixels away from it.
    backbone=dict(
        type='ResNetV1c',
        depth=18,
        num_stages=1,
        strides=(1,),
        dilations=(1,),
        out_indices=(0,),
        stem_channels=16,
        base_channels=32,
        norm_cfg=norm_cfg,
        zero_init_residual=False,
    ),
    decode_head=dict(
        type='polynl_mm.PolyNLHead',
        in_channels=32,
        channels=32,
        in_index=0,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
        dropout_ratio=0,
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

data_root = 'data/mini_cityscapes/'
# No crop: it could cut off what decides.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=test_pipeline),
)
test_dataloader = val_dataloader

max_iters = 800
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=max_iters, val_interval=200
)

optim_wrapper = dict(
    optimizer=dict(lr=0.01, weight_decay=0.01),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR',
        T_max=max_iters,
        eta_min_ratio=0.01,
        by_epoch=False,
        begin=0,
        end=max_iters,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=4)

default_hooks = dict(
    _base_.polynl_default_hooks,
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='polynl_mm.CheckpointHook',
        by_epoch=False,
        interval=200,
        max_keep_ckpts=1,
        save_best='mIoU',
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
