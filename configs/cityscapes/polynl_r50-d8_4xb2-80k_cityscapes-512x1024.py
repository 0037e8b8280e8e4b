_base_ = [
    'mmseg::fcn/fcn_r50-d8_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/polynl.py',
]
model = dict(decode_head=dict(type='polynl_mm.PolyNLHead'))
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'poly_nl.alpha': dict(decay_mult=0),
            'poly_nl.beta': dict(decay_mult=0),
        }
    )
)
