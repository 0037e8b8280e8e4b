_base_ = './retinaface_r50-polynl-c4_p2-p6_8xb4-100e_wider-face.py'
train_dataloader = dict(batch_size=8)
