# TinaFace's head, anchors, losses, learning rate and rule for ignored faces:
# towers, an IoU branch, DIoU and focal loss, no landmarks; six levels, P7 by
# one more convolution. Not TinaFace's: the normalisation of the pyramid (GN
# there), a context module for each level (shared there), the test scale (1100)
# and the schedule (630 epochs).
_base_ = './retinaface_r50_p2-p6_8xb4-100e_wider-face.py'
neck = _base_.model.neck
neck[0].update(num_outs=6)
neck[1].update(num_scales=6, in_channels=[256] * 6, out_channels=[256] * 6)
model = dict(
    neck=neck,
    bbox_head=dict(
        stacked_convs=4,
        kernel_size=3,
        norm_cfg=dict(type='GN', num_groups=32, requires_grad=True),
        anchor_generator=dict(
            octave_base_scale=2 ** (4 / 3),
            ratios=[1.3],
            strides=[4, 8, 16, 32, 64, 128],
        ),
        reg_decoded_bbox=True,
        loss_cls=dict(
            _delete_=True,
            type='FocalLoss',
            use_sigmoid=True,
            gamma=2.0,
            alpha=0.25,
        ),
        loss_bbox=dict(_delete_=True, type='DIoULoss', loss_weight=2.0),
        loss_landmark=None,
        loss_iou=dict(type='CrossEntropyLoss', use_sigmoid=True),
    ),
    train_cfg=dict(
        assigner=dict(min_pos_iou=0.35, ignore_iof_thr=-1), neg_pos_ratio=None
    ),
    test_cfg=dict(min_height=9, nms=dict(iou_threshold=0.45), score_thr=0.01),
)
# The landmarks are not needed.
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(with_keypoints=False)
train_dataloader = dict(
    dataset=dict(landmark_file=None, pipeline=train_pipeline)
)
# 3.75e-3 for 12 pictures per step.
optim_wrapper = dict(optimizer=dict(lr=0.01))
