_base_ = './retinaface_r50_p3-p5_8xb4-100e_wider-face.py'
model = dict(
    type='polynl_mm.Insert',
    into='SingleStageDetector',
    blocks=[
        dict(after='backbone.layer3.5', cfg=dict(type='polynl_mm.PolyNL2d')),
        dict(after='neck.0.fpn_convs.*', cfg=dict(type='polynl_mm.PolyNL2d')),
    ],
)
