_base_ = './mask-rcnn_r50-plain_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        type='polynl_mm.Insert',
        into='ResNet',
        blocks=[
            dict(
                after='layer3',
                cfg=dict(
                    type='GeneralizedAttention',
                    spatial_range=-1,
                    num_heads=8,
                    attention_type='0010',
                    kv_stride=2,
                ),
            )
        ],
    )
)
