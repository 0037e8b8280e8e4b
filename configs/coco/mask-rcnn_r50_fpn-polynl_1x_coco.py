# On each level of the pyramid, P2 to P5; P6 is taken from P5.
_base_ = './mask-rcnn_r50-plain_fpn_1x_coco.py'
model = dict(
    neck=dict(
        type='polynl_mm.Insert',
        into='FPN',
        blocks=[
            dict(after='fpn_convs.*', cfg=dict(type='polynl_mm.PolyNL2d'))
        ],
    )
)
