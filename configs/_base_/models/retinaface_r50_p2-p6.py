# RetinaFace on ResNet-50 with the pyramid P2 to P6 of its paper: three anchors
# of ratio 1 per position, from 16 to 406 pixels, and a context module per
# level.
norm_cfg = dict(type='SyncBN', requires_grad=True)
num_levels = 5
model = dict(
    type='SingleStageDetector',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_cfg=norm_cfg,
        norm_eval=False,
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    neck=[
        dict(
            type='FPN',
            in_channels=[256, 512, 1024, 2048],
            out_channels=256,
            num_outs=num_levels,
            add_extra_convs='on_input',
            norm_cfg=norm_cfg,
            act_cfg=dict(type='ReLU'),
        ),
        dict(
            type='SSH',
            num_scales=num_levels,
            in_channels=[256] * num_levels,
            out_channels=[256] * num_levels,
            norm_cfg=norm_cfg,
        ),
    ],
    bbox_head=dict(
        type='polynl_mm.RetinaFaceHead',
        num_classes=1,
        in_channels=256,
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=4,
            scales_per_octave=3,
            ratios=[1.0],
            strides=[4, 8, 16, 32, 64],
        ),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder',
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[0.1, 0.1, 0.2, 0.2],
        ),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
        loss_bbox=dict(type='SmoothL1Loss', loss_weight=2.0),
        loss_landmark=dict(type='SmoothL1Loss'),
        landmark_coder=dict(type='polynl_mm.LandmarkCoder', std=0.1),
    ),
    train_cfg=dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=0.35,
            neg_iou_thr=0.35,
            min_pos_iou=0.2,
            gt_max_assign_all=False,
            ignore_iof_thr=0.5,
            # The overlaps of 800 faces and 102,300 anchors take about 3 GB
            # of a GPU. On the CPU, where more are matched, all processes wait
            # seconds for one.
            gpu_assign_thr=800,
        ),
        sampler=dict(type='PseudoSampler'),
        neg_pos_ratio=7,
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(
        # For every level. Of a crowd, one picture has more than 20,000 anchors
        # on faces.
        nms_pre=50000,
        score_thr=0.02,
        min_bbox_size=0,
        nms=dict(type='nms', iou_threshold=0.4),
        max_per_img=5000,
    ),
)
