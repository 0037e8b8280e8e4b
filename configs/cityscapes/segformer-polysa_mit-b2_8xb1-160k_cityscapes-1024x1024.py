_base_ = [
    'mmseg::segformer/segformer_mit-b2_8xb1-160k_cityscapes-1024x1024.py',
    '../_base_/polynl.py',
]
# Keys and values of all tokens, without spatial reduction.
model = dict(
    backbone=dict(
        type='polynl_mm.Replace',
        into='MixVisionTransformer',
        attention=[
            dict(at='layers.*.1.*.attn', cfg=dict(type='polynl_mm.PolySA'))
        ],
    )
)
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
default_hooks = _base_.polynl_default_hooks
