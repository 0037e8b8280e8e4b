# Over the whole map in each block, without windows.
_base_ = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    '../_base_/polynl.py',
]
model = dict(
    backbone=dict(
        type='polynl_mm.Replace',
        into='SwinTransformer',
        attention=[
            dict(
                at='stages.*.blocks.*.attn',
                cfg=dict(type='polynl_mm.PolySA'),
            )
        ],
    )
)
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
default_hooks = _base_.polynl_default_hooks
optim_wrapper = _base_.polynl_optim
