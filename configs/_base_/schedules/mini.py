# How the small data sets are trained, from scratch. Rates, lengths and where
# gradients are clipped are each config's own.
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    # Fused (on a CPU from torch 2.4 on): one group per parameter costs time.
    optimizer=dict(type='AdamW', fused=True),
    paramwise_cfg=dict(
        norm_decay_mult=0,
        bias_decay_mult=0,
        custom_keys={
            'poly_nl.alpha': dict(decay_mult=0),
            'poly_nl.beta': dict(decay_mult=0),
        },
    ),
)
randomness = dict(seed=0)
