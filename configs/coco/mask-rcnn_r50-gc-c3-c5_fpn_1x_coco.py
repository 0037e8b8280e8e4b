# mmdet's gcnet/mask-rcnn_r50-gcb-r16-c3-c5_fpn_1x_coco.py.
_base_ = './mask-rcnn_r50-plain_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        plugins=[
            dict(
                cfg=dict(type='ContextBlock', ratio=1.0 / 16),
                stages=(False, True, True, True),
                position='after_conv3',
            )
        ]
    )
)
