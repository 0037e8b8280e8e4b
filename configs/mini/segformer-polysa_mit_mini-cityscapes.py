# A narrow SegFormer with Poly-SA in the place of its attention, from scratch,
# in a minute on a CPU:
#   python tools/make_mini_data.py cityscapes \
#       --out data/mini_cityscapes --seed 0
#   python tools/train.py configs/mini/segformer-polysa_mit_mini-cityscapes.py
# The host's own attention: --cfg-options "model.backbone.attention=[]"
_base_ = './polynl_r18-d4_mini-cityscapes.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(
        _delete_=True,
        type='polynl_mm.Replace',
        into='MixVisionTransformer',
        attention=[
            dict(at='layers.*.1.*.attn', cfg=dict(type='polynl_mm.PolySA'))
        ],
        embed_dims=16,
        num_stages=3,
        num_layers=[1, 2, 2],
        num_heads=[1, 2, 4],
        patch_sizes=[7, 3, 3],
        strides=[4, 2, 2],
        sr_ratios=[4, 2, 1],
        out_indices=(0, 1, 2),
        mlp_ratio=2,
    ),
    decode_head=dict(
        _delete_=True,
        type='SegformerHead',
        in_channels=[16, 32, 64],
        in_index=[0, 1, 2],
        channels=32,
        dropout_ratio=0,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True),
    ),
)
optim_wrapper = dict(
    optimizer=dict(lr=0.003),
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0, bias_decay_mult=0),
)
max_iters = 400
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR',
        T_max=max_iters,
        eta_min_ratio=0.01,
        by_epoch=False,
        begin=0,
        end=max_iters,
    ),
]
