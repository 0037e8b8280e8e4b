# A narrow RetinaFace with Poly-NL in its ResNet-50, from scratch, in a few
# minutes on two CPU processes:
#   python tools/make_mini_data.py wider_face --out data/mini_wider --seed 0
#   bash tools/dist_train.sh configs/mini/retinaface_r50-polynl_mini-wider.py 2
_base_ = [
    '../_base_/models/retinaface_r50_p2-p6.py',
    '../_base_/datasets/wider_face.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/schedules/mini.py',
    '../_base_/polynl.py',
]

norm_cfg = dict(type='BN', requires_grad=True)
neck = _base_.model.neck
neck[0].update(
    in_channels=[32, 64, 128, 256],
    start_level=1,
    num_outs=3,
    add_extra_convs=False,
    out_channels=48,
    norm_cfg=norm_cfg,
)
neck[1].update(
    num_scales=3,
    in_channels=[48, 48, 48],
    out_channels=[48, 48, 48],
    norm_cfg=norm_cfg,
)
model = dict(
    backbone=dict(
        base_channels=8,
        stem_channels=16,
        norm_cfg=norm_cfg,
        # From scratch the branches must not start at zero: Poly-NL behind a
        # zero learns nothing.
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
    neck=neck,
    bbox_head=dict(
        in_channels=48,
        # Squares of 16 to 102 pixels, made a little higher than wide.
        anchor_generator=dict(
            octave_base_scale=2, ratios=[1.2], strides=[8, 16, 32]
        ),
    ),
)

data_root = 'data/mini_wider/'
train_pipeline = [
    dict(type='polynl_mm.LoadImageFromFile'),
    dict(
        type='polynl_mm.LoadAnnotations', with_bbox=True, with_keypoints=True
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='polynl_mm.PackDetInputs'),
]
# The pictures are small: a worker would only take time from the training.
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=_base_.original_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(gt_dir=data_root + 'ground_truth')
test_evaluator = val_evaluator

# Validates after epochs 1, 4, 8, 12 and 16.
max_epochs = 16
train_cfg = dict(
    type='EpochBasedTrainLoop',
    max_epochs=max_epochs,
    val_interval=1,
    dynamic_intervals=[(3, 4)],
)

optim_wrapper = dict(
    optimizer=dict(lr=0.01, weight_decay=0.05),
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
auto_scale_lr = dict(enable=False, base_batch_size=8)

default_hooks = dict(
    _base_.polynl_default_hooks,
    logger=dict(interval=10),
    checkpoint=dict(
        type='polynl_mm.CheckpointHook',
        max_keep_ckpts=1,
        save_best='wider_face/hard',
        rule='greater',
    ),
    visualization=dict(score_thr=0.5),
)
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
visualizer = dict(type='polynl_mm.FaceVisualizer')
