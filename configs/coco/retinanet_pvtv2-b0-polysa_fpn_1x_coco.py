# Keys and values of all tokens, without spatial reduction.
_base_ = [
    'mmdet::pvt/retinanet_pvtv2-b0_fpn_1x_coco.py',
    '../_base_/polynl.py',
]
model = dict(
    backbone=dict(
        type='polynl_mm.Replace',
        into='PyramidVisionTransformerV2',
        attention=[
            dict(at='layers.*.1.*.attn', cfg=dict(type='polynl_mm.PolySA'))
        ],
    )
)
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
default_hooks = _base_.polynl_default_hooks
optim_wrapper = _base_.polynl_optim
