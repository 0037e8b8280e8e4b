_base_ = './mask-rcnn_r50-plain_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        plugins=[
            dict(
                cfg=dict(type='ContextBlock', ratio=1.0 / 16),
                stages=(False, False, True, False),
                position='after_conv3',
            )
        ]
    )
)
