"""Poly-NL layers in mmengine's mixed precision, with a scaled loss.

On a CPU: mmengine's wrapper as it is, but for its question for a GPU.
"""

from functools import partial

import pytest
import torch
from helpers import OLD_TORCH, randomize
from mmengine.optim.optimizer import amp_optimizer_wrapper
from torch import nn

from polynl_mm import fuse_poly_nl, layers
from polynl_mm.layers import PolyNL2d

pytestmark = [
    pytest.mark.skipif(OLD_TORCH, reason='this torch scales no loss on a CPU'),
    pytest.mark.usefixtures('quiet_and_quick', 'launches_cost_nothing'),
]
# Of the loss, for the first step: beyond what both types hold.
HUGE = 2.0**127


@pytest.fixture
def wrapper(monkeypatch):
    """Give a function that wraps an optimizer, for mixed precision."""
    scaler = partial(torch.amp.GradScaler, 'cpu')
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', scaler)
    monkeypatch.setattr(
        amp_optimizer_wrapper, 'is_cuda_available', lambda: True
    )
    return partial(
        amp_optimizer_wrapper.AmpOptimWrapper,
        loss_scale=dict(init_scale=HUGE, backoff_factor=1 / HUGE),
    )


@pytest.mark.parametrize('clip', [None, dict(max_norm=3)], ids=['', 'clip'])
@pytest.mark.parametrize('in_one_kernel', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('fused', [False, True])
def test_step_with_infinite_gradients(
    wrapper, monkeypatch, fused, dtype, in_one_kernel, clip
):
    """It changes nothing, and the next one changes every parameter."""
    norm = nn.BatchNorm2d(12).eval()
    layer = PolyNL2d(12, beta_init=0.5, bias=True)
    model = randomize(nn.Sequential(nn.Conv2d(5, 12, 1), norm, layer))
    behind = []
    if fused:
        assert fuse_poly_nl(model, trainable=True)[1].fused == ['2']
        run = layers.poly_nl_behind
        monkeypatch.setattr(
            layers,
            'poly_nl_behind',
            lambda *args: behind.append(args) or run(*args),
        )
    # One of them does not update by what the scaler does, but by itself.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, fused=in_one_kernel
    )
    steps = wrapper(optimizer=optimizer, clip_grad=clip)
    x = torch.randn(2, 5, 9, 7)

    def step():
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        with torch.autocast('cpu', dtype):
            y = model(x)
        steps.update_params(y.float().square().sum())
        assert all(p.isfinite().all() for p in model.parameters())
        return {
            k for k, p in model.named_parameters() if (p != before[k]).any()
        }

    assert step() == set()
    assert steps.loss_scaler.get_scale() == 1
    assert step() == {name for name, _ in model.named_parameters()}
    assert steps.loss_scaler.get_scale() == 1
    assert len(behind) == 2 * fused
