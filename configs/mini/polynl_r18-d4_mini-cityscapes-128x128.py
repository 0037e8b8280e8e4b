# Trained on crops, of which the 4 of each image in a batch share their gate:
#   python tools/train.py \
#       configs/mini/polynl_r18-d4_mini-cityscapes-128x128.py
# Without that, on one crop of each of 16 images:
#   --cfg-options train_cfg.crops_per_image=1
_base_ = './polynl_r18-d4_mini-cityscapes.py'

crop_size = (128, 128)
model = dict(data_preprocessor=dict(size=crop_size))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=16, dataset=dict(pipeline=train_pipeline))
train_cfg = dict(type='polynl_mm.IterBasedTrainLoop', crops_per_image=4)
auto_scale_lr = dict(base_batch_size=16)
