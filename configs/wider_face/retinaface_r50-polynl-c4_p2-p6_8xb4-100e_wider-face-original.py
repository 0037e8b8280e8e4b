_base_ = './retinaface_r50-polynl-c4_p2-p6_8xb4-100e_wider-face.py'
val_dataloader = dict(dataset=dict(pipeline=_base_.original_pipeline))
test_dataloader = val_dataloader
