# For 8 GPUs with 32 pictures each: Goyal et al. (arXiv:1706.02677), 0.1 per
# 256 pictures and 5 epochs of warm-up, and a cosine to zero. Mixed precision
# by --amp, another number of pictures by --auto-scale-lr.
max_epochs = 100
warm_up = 5
train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(
        norm_decay_mult=0,
        bias_decay_mult=0,
        custom_keys={
            'poly_nl.alpha': dict(decay_mult=0),
            'poly_nl.beta': dict(decay_mult=0),
        },
    ),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.01,
        by_epoch=True,
        begin=0,
        end=warm_up,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs - warm_up,
        eta_min=0,
        by_epoch=True,
        begin=warm_up,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=256)
