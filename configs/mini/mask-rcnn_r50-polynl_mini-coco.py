# A narrow Mask R-CNN with Poly-NL in its ResNet-50, from scratch, in a few
# minutes on two CPU processes:
#   python tools/make_mini_data.py coco --out data/mini_coco --seed 0
#   bash tools/dist_train.sh configs/mini/mask-rcnn_r50-polynl_mini-coco.py 2
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/schedules/mini.py',
    '../_base_/polynl.py',
]

norm_cfg = dict(type='BN', requires_grad=True)
channels = 32
classes = tuple('0123456789')
model = dict(
    backbone=dict(
        base_channels=8,
        stem_channels=16,
        frozen_stages=-1,
        norm_eval=False,
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
    neck=dict(
        in_channels=[32, 64, 128, 256],
        out_channels=channels,
        num_outs=4,
        norm_cfg=norm_cfg,
    ),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        # 12, 24, 48 and 96 pixels, made higher than wide.
        anchor_generator=dict(
            scales=[3], ratios=[1.4], strides=[4, 8, 16, 32]
        ),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=1),
            out_channels=channels,
            finest_scale=28,
        ),
        bbox_head=dict(
            in_channels=channels, fc_out_channels=128, num_classes=10
        ),
        mask_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=1),
            out_channels=channels,
            finest_scale=28,
        ),
        mask_head=dict(
            in_channels=channels,
            conv_out_channels=32,
            num_convs=2,
            norm_cfg=norm_cfg,
            num_classes=10,
        ),
    ),
    train_cfg=dict(
        rpn=dict(assigner=dict(pos_iou_thr=0.5), sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=64),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=200, max_per_img=64),
        rcnn=dict(max_per_img=30),
    ),
)

data_root = 'data/mini_coco/'
# No mirror images: those of digits are none.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    # For the scale factor that the heads ask for.
    dict(type='Resize', scale_factor=1.0),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs'),
]
# The pictures are small: a worker would only take time from the training.
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        metainfo=dict(classes=classes),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

max_epochs = 14
train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=7
)

optim_wrapper = dict(
    optimizer=dict(lr=0.005, weight_decay=0.05),
    clip_grad=dict(max_norm=3),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
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
        save_best='coco/segm_mAP',
    ),
)
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
