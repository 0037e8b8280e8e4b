_base_ = './r50-plain_8xb32-100e_in1k.py'
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
