_base_ = './retinaface_r50-polynl-c4_p2-p6_8xb4-100e_wider-face.py'
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=0.001 * 8 / 24))
auto_scale_lr = dict(base_batch_size=8)
