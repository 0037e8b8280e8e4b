# mmseg has it with 80k only.
_base_ = [
    'mmseg::_base_/models/emanet_r50-d8.py',
    'mmseg::_base_/datasets/cityscapes.py',
    'mmseg::_base_/schedules/schedule_40k.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/polynl.py',
]
data_preprocessor = dict(size=(512, 1024))
model = dict(data_preprocessor=data_preprocessor)
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
default_hooks = _base_.polynl_default_hooks
optim_wrapper = _base_.polynl_optim
