# With the losses and the matching of the model, the best-known PyTorch port of
# RetinaFace: 1e-3 for 24 pictures per step and 100 epochs, here for 32 as 8
# GPUs with 4 each. Warm-up and clipping are ours.
max_epochs = 100
train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=10
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(
        type='SGD', lr=0.001 * 32 / 24, momentum=0.9, weight_decay=5e-4
    ),
    paramwise_cfg=dict(
        custom_keys={
            'poly_nl.alpha': dict(decay_mult=0),
            'poly_nl.beta': dict(decay_mult=0),
        }
    ),
    clip_grad=dict(max_norm=35),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500),
    dict(
        type='MultiStepLR',
        by_epoch=True,
        begin=0,
        end=max_epochs,
        milestones=[70, 90],
        gamma=0.1,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=32)
