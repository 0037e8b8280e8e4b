_base_ = './polynl_r50-d8_4xb2-40k_cityscapes-769x769.py'
model = dict(test_cfg=dict(_delete_=True, mode='whole'))
