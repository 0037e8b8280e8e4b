_base_ = [
    'mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py',
    '../_base_/polynl.py',
]
model = dict(
    backbone=dict(
        type='polynl_mm.Insert',
        into='CSPNeXt',
        blocks=[dict(after='stage3', cfg=dict(type='polynl_mm.PolyNL2d'))],
    )
)
custom_imports = _base_.polynl_imports
custom_hooks = _base_.custom_hooks + _base_.polynl_hooks
default_hooks = _base_.polynl_default_hooks
optim_wrapper = _base_.polynl_optim
# mmdet leaves 16 here, though its rate is for 8 GPUs with 32 pictures.
auto_scale_lr = dict(base_batch_size=256)
