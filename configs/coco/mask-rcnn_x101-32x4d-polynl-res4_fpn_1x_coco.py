_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_x101-32x4d_fpn_1x_coco.py',
    '../_base_/polynl.py',
]
model = dict(
    backbone=dict(
        type='polynl_mm.Insert',
        into='ResNeXt',
        blocks=[dict(after='layer3', cfg=dict(type='polynl_mm.PolyNL2d'))],
    )
)
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
default_hooks = _base_.polynl_default_hooks
optim_wrapper = _base_.polynl_optim
