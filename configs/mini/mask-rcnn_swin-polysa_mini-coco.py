# A narrow Mask R-CNN on a Swin with Poly-SA in the place of its attention,
# from scratch, in minutes on a CPU:
#   python tools/make_mini_data.py coco --out data/mini_coco --seed 0
#   python tools/train.py configs/mini/mask-rcnn_swin-polysa_mini-coco.py
# The host's own attention: --cfg-options "model.backbone.attention=[]"
_base_ = './mask-rcnn_r50-polynl_mini-coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='polynl_mm.Replace',
        into='SwinTransformer',
        attention=[
            dict(
                at='stages.*.blocks.*.attn', cfg=dict(type='polynl_mm.PolySA')
            )
        ],
        embed_dims=16,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=7,
        mlp_ratio=2,
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[16, 32, 64, 128]),
)
optim_wrapper = dict(
    optimizer=dict(lr=0.003),
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0, bias_decay_mult=0),
)
max_epochs = 4
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        eta_min_ratio=0.01,
        by_epoch=True,
        begin=0,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
