# mmdet itself puts it after conv2, too, but in c4 and c5 only.
_base_ = './mask-rcnn_r50-plain_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        plugins=[
            dict(
                cfg=dict(
                    type='GeneralizedAttention',
                    spatial_range=-1,
                    num_heads=8,
                    attention_type='0010',
                    kv_stride=2,
                ),
                stages=(False, True, True, True),
                position='after_conv2',
            )
        ]
    )
)
