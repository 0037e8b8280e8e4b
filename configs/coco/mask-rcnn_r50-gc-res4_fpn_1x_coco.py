_base_ = './mask-rcnn_r50-plain_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        type='polynl_mm.Insert',
        into='ResNet',
        blocks=[
            dict(after='layer3', cfg=dict(type='ContextBlock', ratio=1.0 / 16))
        ],
    )
)
