# Its stages are counted from 0 in mmdet: the third one, of stride 16.
_base_ = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    '../_base_/polynl.py',
]
model = dict(
    backbone=dict(
        type='polynl_mm.Insert',
        into='SwinTransformer',
        blocks=[
            dict(
                after='stages.2.blocks.5', cfg=dict(type='polynl_mm.PolyNL2d')
            )
        ],
    )
)
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
default_hooks = _base_.polynl_default_hooks
optim_wrapper = _base_.polynl_optim
