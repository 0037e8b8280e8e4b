# What our configs add to one of mmdet or mmseg, beside the blocks. A base may
# not set what another base sets, so a config takes these by name:
#     _base_ = ['mmdet::...', '../_base_/polynl.py']
#     custom_imports = _base_.polynl_imports
#     custom_hooks = _base_.polynl_hooks
#     default_hooks = _base_.polynl_default_hooks
#     optim_wrapper = _base_.polynl_optim
# Rivals take all of them, too: nothing but the block differs.

# Lets torch's safe loader read mmengine's checkpoints, for the hosts, too.
polynl_imports = dict(
    imports=['polynl_mm.engine.safe_load'], allow_failed_imports=False
)
polynl_hooks = [dict(type='polynl_mm.PolyNLHook')]
# Nothing is lost by a kill, a resumed training is the unbroken one, and a loss
# that is not finite stops it (default_hooks.finite_loss.stop=False: it does
# not).
polynl_default_hooks = dict(
    checkpoint=dict(type='polynl_mm.CheckpointHook'),
    resume=dict(type='polynl_mm.ResumeHook'),
    finite_loss=dict(type='polynl_mm.FiniteLossHook'),
)
polynl_optim = dict(
    paramwise_cfg=dict(
        custom_keys={
            'poly_nl.alpha': dict(decay_mult=0),
            'poly_nl.beta': dict(decay_mult=0),
        }
    )
)
