_base_ = './r50-plain_8xb32-100e_in1k.py'
model = dict(
    backbone=dict(
        plugins=[
            dict(
                cfg=dict(type='polynl_mm.ContextBlock', ratio=1.0 / 16),
                stages=(False, True, True, True),
                position='after_conv3',
            )
        ]
    )
)
