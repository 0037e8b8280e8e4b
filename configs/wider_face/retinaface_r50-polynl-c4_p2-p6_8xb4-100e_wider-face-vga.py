_base_ = './retinaface_r50-polynl-c4_p2-p6_8xb4-100e_wider-face.py'
# Not for --tta, whose views it would pad to multiples of 640, too.
model = dict(data_preprocessor=dict(pad_size_divisor=640))
val_dataloader = dict(dataset=dict(pipeline=_base_.vga_pipeline))
test_dataloader = val_dataloader
