"""In which precision the operation runs, and its gradient."""

import pytest
import torch
from helpers import (
    BEHIND,
    FORMS,
    NAMES,
    OLD_TORCH,
    behind,
    gradients,
    make_inputs,
    make_pair,
    on_x,
)
from torch import nn

from polynl_mm.ops.precision import matmul

DOORS = {'on X': on_x, 'behind': behind}
each_door = pytest.mark.parametrize('door', DOORS)
both_forms = pytest.mark.parametrize('form', FORMS)


def inputs_of(door, dtype=torch.float32, seed=0):
    if door == 'behind':
        return make_pair((2, 16, 9, 20), 24, True, dtype, seed)
    return make_inputs((2, 24, 9, 20), True, dtype, seed)


@both_forms
@each_door
def test_backward_does_not_see_autocast(form, door, device):
    """mm calls backward within autocast under gradient checkpointing."""
    inputs = inputs_of(door)
    y = DOORS[door](*inputs, form=form)
    dy = torch.randn_like(y)
    wants = gradients(y, inputs, dy)
    y = DOORS[door](*inputs, form=form)
    with torch.autocast(device, dtype=torch.bfloat16):
        gots = gradients(y, inputs, dy)
    assert gots.keys() == set(BEHIND if door == 'behind' else NAMES)
    for name, want in wants.items():
        assert torch.equal(gots[name], want), name


@each_door
def test_float64_is_left_alone_by_autocast(door, device):
    inputs = inputs_of(door, torch.float64)
    y = DOORS[door](*inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(DOORS[door](*inputs), y)


def formula(z, *params):
    """The paper's formula in plain PyTorch, by modules that autocast knows."""
    if len(params) > 8:
        a, b, *params = params
        z = nn.functional.conv2d(z, a[..., None, None], b)
    w1, w2, w3, alpha, beta, b1, b2, b3 = params
    u, v = (
        nn.functional.conv2d(z, w[..., None, None], b)
        for w, b in ((w1, b1), (w2, b2))
    )
    gated = (u * v).mean((2, 3), keepdim=True) * z
    return alpha * z + beta * nn.functional.conv2d(
        gated, w3[..., None, None], b3
    )


@pytest.mark.parametrize('autocast', [False, True], ids=['plain', 'autocast'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@both_forms
@each_door
def test_at_most_twice_the_error_of_the_formula(
    door, form, dtype, autocast, device
):
    """Against float64, in value and in every gradient."""
    if OLD_TORCH and device == 'cpu' and dtype == torch.float16:
        pytest.skip('this torch has no float16 on a CPU')
    forms = (formula, lambda *args: DOORS[door](*args, form=form))
    totals = [0, 0, 0]
    for seed in range(8):  # one number, as beta's gradient, may be lucky
        low = [t.detach().to(dtype) for t in inputs_of(door, seed=seed)]
        exact = [t.double().requires_grad_() for t in low]
        truth = formula(*exact)
        generator = torch.Generator().manual_seed(seed)
        dy = torch.randn(truth.shape, generator=generator, device='cpu')
        dy = dy.to(truth.device, dtype) / 16
        wants = everything(truth, exact, dy.double())
        totals[0] = totals[0] + torch.stack([w.norm() for w in wants]) ** 2
        for k, run in enumerate(forms, 1):
            stored = torch.float32 if autocast else dtype
            inputs = [t.to(stored).requires_grad_() for t in low]
            with torch.autocast(device, dtype=dtype, enabled=autocast):
                y = run(*inputs)
            gots = everything(y, inputs, dy.to(y.dtype))
            errors = [(g - w).norm() for g, w in zip(gots, wants)]
            totals[k] = totals[k] + torch.stack(errors) ** 2
    # Half a unit in the last place is what anybody has.
    least = torch.finfo(dtype).eps / 4 * totals[0].sqrt()
    plain, ours = (t.sqrt() for t in totals[1:])
    ratios = ours / plain.maximum(least)
    names = ('y', *(BEHIND if door == 'behind' else NAMES))
    assert ratios.max() <= 2, dict(zip(names, ratios.tolist()))


def everything(y, inputs, dy):
    return [t.double() for t in (y, *gradients(y, inputs, dy).values())]


def test_product():
    one, batch = torch.randn(3, 4), torch.randn(2, 4, 5)
    for a, b in ((one, batch), (torch.randn(2, 3, 4), batch), (one, batch[0])):
        torch.testing.assert_close(matmul(a, b), a @ b)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_product_of_low_precision_is_float32(dtype):
    a = torch.full((1, 2, 300), 300.0).to(dtype)
    y = matmul(a, a.transpose(1, 2))
    assert y.dtype == torch.float32
    # Beyond float16, and each term with all its digits.
    assert (y == 300 * 300.0**2).all()
