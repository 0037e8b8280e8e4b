_base_ = [
    'mmseg::segformer/segformer_mit-b2_8xb1-160k_cityscapes-1024x1024.py',
    '../_base_/polynl.py',
]
# Where the four stages have become one map of 256 channels, at stride 4.
model = dict(
    decode_head=dict(
        type='polynl_mm.Insert',
        into='SegformerHead',
        blocks=[
            dict(after='fusion_conv', cfg=dict(type='polynl_mm.PolyNL2d'))
        ],
    )
)
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
default_hooks = _base_.polynl_default_hooks
# The head learns ten times as fast. Of several keys that match, the longest
# alone counts.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'poly_nl.alpha': dict(lr_mult=10.0, decay_mult=0),
            'poly_nl.beta': dict(lr_mult=10.0, decay_mult=0),
        }
    )
)
