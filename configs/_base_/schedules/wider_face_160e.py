# For 32 pictures per step, as 8 GPUs with 4 each. RetinaFace's own code calls
# two passes over the pictures an epoch: its 80 epochs are these 160.
max_epochs = 160
train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=20
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4),
    paramwise_cfg=dict(
        custom_keys={
            'poly_nl.alpha': dict(decay_mult=0),
            'poly_nl.beta': dict(decay_mult=0),
        }
    ),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.1,
        by_epoch=True,
        begin=0,
        end=10,
        convert_to_iter_based=True,
    ),
    dict(
        type='MultiStepLR',
        by_epoch=True,
        begin=0,
        end=max_epochs,
        milestones=[110, 136],
        gamma=0.1,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=32)
