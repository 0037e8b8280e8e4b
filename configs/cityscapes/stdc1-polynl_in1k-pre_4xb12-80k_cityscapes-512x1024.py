_base_ = [
    'mmseg::stdc/stdc1_in1k-pre_4xb12-80k_cityscapes-512x1024.py',
    '../_base_/polynl.py',
]
# For real time. STDC's own global context is average pooling, of first order.
model = dict(decode_head=dict(type='polynl_mm.PolyNLHead'))
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
default_hooks = _base_.polynl_default_hooks
optim_wrapper = _base_.polynl_optim
