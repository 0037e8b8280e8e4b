_base_ = './retinaface_r50_p2-p6_8xb4-100e_wider-face.py'
model = dict(
    backbone=dict(
        plugins=[
            dict(
                cfg=dict(type='NonLocal2d'),
                stages=(False, False, True, False),
                position='after_conv3',
            )
        ]
    )
)
