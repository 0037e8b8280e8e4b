# mmseg has it with 80k only.
_base_ = [
    'mmseg::_base_/models/emanet_r50-d8.py',
    'mmseg::_base_/datasets/cityscapes.py',
    'mmseg::_base_/schedules/schedule_40k.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/polynl.py',
]
model = dict(data_preprocessor=dict(size=(512, 1024)))
