_base_ = './mask-rcnn_r50-plain_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        plugins=[
            dict(
                cfg=dict(type='NonLocal2d'),
                stages=(False, True, True, True),
                position='after_conv3',
            )
        ]
    )
)
