# Windows of the size of the training crops, which overlap by a third.
_base_ = './polynl_r50-d8_4xb2-40k_cityscapes-512x1024.py'
model = dict(
    test_cfg=dict(mode='slide', crop_size=(512, 1024), stride=(341, 683))
)
