_base_ = [
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    '../_base_/polynl.py',
]
# Where ASPP's branches have become one map of 512 channels, at stride 8.
model = dict(
    decode_head=dict(
        type='polynl_mm.Insert',
        into='DepthwiseSeparableASPPHead',
        blocks=[dict(after='bottleneck', cfg=dict(type='polynl_mm.PolyNL2d'))],
    )
)
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
default_hooks = _base_.polynl_default_hooks
optim_wrapper = _base_.polynl_optim
