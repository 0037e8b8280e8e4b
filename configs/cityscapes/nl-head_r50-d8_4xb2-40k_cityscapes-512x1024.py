_base_ = [
    'mmseg::nonlocal_net/nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    '../_base_/polynl.py',
]
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
default_hooks = _base_.polynl_default_hooks
optim_wrapper = _base_.polynl_optim
