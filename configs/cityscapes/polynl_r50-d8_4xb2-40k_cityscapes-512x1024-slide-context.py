# The same windows, with the gate of the whole image.
_base_ = './polynl_r50-d8_4xb2-40k_cityscapes-512x1024-slide.py'
model = dict(test_cfg=dict(context='image'))
