# Evaluated and saved, too, with the mean of the weights over training.
_base_ = './r50-polynl-c4_8xb32-100e_in1k.py'
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL'),
]
