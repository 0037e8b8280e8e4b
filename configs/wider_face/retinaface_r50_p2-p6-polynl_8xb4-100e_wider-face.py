# On every level of the pyramid, before its context module.
_base_ = './retinaface_r50_p2-p6_8xb4-100e_wider-face.py'
model = dict(
    type='polynl_mm.Insert',
    into='SingleStageDetector',
    blocks=[
        dict(after='neck.0.fpn_convs.*', cfg=dict(type='polynl_mm.PolyNL2d'))
    ],
)
