_base_ = './r50-plain_8xb32-100e_in1k.py'
model = dict(
    backbone=dict(
        type='polynl_mm.Insert',
        into='mmdet.ResNet',
        blocks=[
            dict(
                after='layer3',
                cfg=dict(type='polynl_mm.ContextBlock', ratio=1.0 / 16),
            )
        ],
    )
)
