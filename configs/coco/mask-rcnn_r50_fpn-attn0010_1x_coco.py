# On each level of the pyramid, P2 to P5; P6 is taken from P5.
_base_ = './mask-rcnn_r50-plain_fpn_1x_coco.py'
model = dict(
    neck=dict(
        type='polynl_mm.Insert',
        into='FPN',
        blocks=[
            dict(
                after='fpn_convs.*',
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
