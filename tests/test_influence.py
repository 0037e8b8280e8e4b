"""What each position adds: against a loop over positions, and the branch."""

from functools import partial

import pytest
import torch
from helpers import assert_near, make_inputs, make_pair
from oracles import contributions_loop, poly_nl_loop
from torch import nn

from polynl_mm.attention import PolySA
from polynl_mm.context import Frames, shared_context
from polynl_mm.fusion import fuse_poly_nl
from polynl_mm.influence import (
    gate_spread,
    influence,
    layer_at,
    looking,
    share,
)
from polynl_mm.layers import PolyNL1d, PolyNL2d, PolyNL3d
from polynl_mm.padding import Pictures, pictures_in

CELLS = [(0, 0), (2, 6), (1, 3)]


def layer_of(inputs, kind=PolyNL2d):
    """A layer with the weights of helpers.make_inputs, and its input."""
    x, w1, w2, w3, alpha, beta, b1, b2, b3 = (
        t if t is None else t.detach() for t in inputs
    )
    layer = kind(x.shape[1], bias=b1 is not None).double()
    with torch.no_grad():
        for name, w, b in (('w1', w1, b1), ('w2', w2, b2), ('w3', w3, b3)):
            conv = getattr(layer, name)
            conv.weight.copy_(w.reshape(conv.weight.shape))
            if b is not None:
                conv.bias.copy_(b)
        layer.alpha.copy_(alpha)
        layer.beta.copy_(beta)
    return layer, x


def wanted(inputs, image, cell, weights=None):
    """(C, H, W) vectors by the loop, and the branch with b3 there."""
    x, w1, w2, w3, alpha, beta, b1, b2, b3 = (
        t if t is None else t.detach() for t in inputs
    )
    n = cell[0] * x.shape[3] + cell[1]
    rows = x[image].flatten(1)
    flat = None if weights is None else weights.flatten()
    added = contributions_loop(rows, n, w1, w2, w3, beta, b1, b2, flat)
    return added.t().unflatten(1, x.shape[2:])


@pytest.mark.parametrize('bias', (False, True))
@pytest.mark.parametrize('padded', (False, True))
def test_maps_are_those_of_the_loop(bias, padded):
    """Their vectors, one by one; and in sum the branch of the layer."""
    inputs = make_inputs((2, 5, 3, 7), bias)
    layer, x = layer_of(inputs)
    pictures, weights = None, None
    if padded:
        pictures = Pictures((3, 7), [(3, 7), (2, 5)])
        weights = pictures.weights(x)[1]
    units = torch.eye(5, dtype=torch.float64)
    for image in (1,) if padded else (0, 1):
        for cell in CELLS:
            with pictures_in(pictures):
                maps = [
                    influence(layer, x, at=[cell], image=image, direction=d)
                    for d in units
                ]
                y = layer(x)[image]
            maps = torch.cat(maps)
            want = wanted(inputs, image, cell, weights)
            assert_near(maps, want, 1e-10)
            added = maps.sum((1, 2))
            if bias:
                added = added + layer.beta * layer.w3.bias
            at = (image, slice(None), *cell)
            branch = y[(slice(None), *cell)] - layer.alpha * x[at]
            assert_near(added, branch.detach(), 1e-10)
            if not padded:
                truth = poly_nl_loop(*inputs).detach()[at] - (
                    layer.alpha * x[at]
                )
                assert_near(added.detach(), truth.detach(), 1e-10)


@pytest.mark.parametrize('way', ('inference', 'training', 'wide'))
def test_fused_layers_have_the_maps_of_others(way, launches_cost_nothing):
    """Of the features, which are never made."""
    narrow, wide = (8, 4) if way == 'wide' else (3, 8)
    h, a, b, *rest = make_pair((2, narrow, 9, 7), wide, True)
    model = nn.Sequential(
        nn.Conv2d(narrow, wide, 1).double(),
        layer_of((torch.empty(1, wide, 1, 1), *rest))[0],
    ).eval()
    with torch.no_grad():
        model[0].weight.copy_(a[..., None, None])
        model[0].bias.copy_(b)
    args = dict(at=[(0, 0), (8, 2)], image=1)
    with torch.no_grad():
        want = influence(model, h, **args)
        y = model(h)
    fused, report = fuse_poly_nl(model, trainable=way == 'training')
    assert report.fused == ['1']
    with looking(fused) as looks, torch.no_grad():
        assert_near(fused(h), y, 1e-9)
    assert (looks[0]._call.conv is None) == (way == 'wide')
    assert_near(influence(fused, h, **args), want, 1e-9)


def test_by_default_the_sum_is_the_length_of_the_branch():
    layer, x = layer_of(make_inputs((1, 5, 3, 7), True))
    maps = influence(layer, x, at=CELLS)
    assert maps.shape == (3, 3, 7)
    branch = (layer(x) - layer.alpha * x).detach()[0]
    # That comes from no position.
    branch -= (layer.beta * layer.w3.bias).detach()[:, None, None]
    lengths = torch.stack([branch[(slice(None), *c)].norm() for c in CELLS])
    assert_near(maps.sum((1, 2)), lengths, 1e-10)
    nn.init.zeros_(layer.beta)
    assert influence(layer, x, at=CELLS).abs().max() == 0


@pytest.mark.parametrize('fused', (False, True))
def test_of_a_score_the_sum_is_its_derivative(fused):
    """By a factor before the branch; and nothing later writes into it."""
    layer, x = layer_of(make_inputs((2, 5, 3, 7)))
    conv = nn.Conv2d(5, 5, 1).double()
    tail = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(5, 2, 3)).double()
    model = nn.Sequential(nn.Sequential(conv, layer), tail).eval()
    with looking(model) as looks:
        score = model(x)[1, 0, 0, 2].tanh()
    (slope,) = torch.autograd.grad(score, layer.beta, retain_graph=True)
    if fused:
        fuse_poly_nl(model)
        with looking(model) as looks:
            score = model(x)[1, 0, 0, 2].tanh()
    added = looks[0].map_of(score, 1)
    assert added.shape == (3, 7)
    assert_near(added.sum(), (slope * layer.beta).detach().squeeze(), 1e-9)
    with pytest.raises(ValueError, match='does not depend on it'):
        looks[0].map_of(torch.ones(1, requires_grad=True) * 2)


def test_other_numbers_of_axes_and_precisions():
    for kind, shape, at in (
        (PolyNL1d, (1, 4, 6), (5,)),
        (PolyNL3d, (1, 4, 2, 3, 2), (1, 2, 0)),
    ):
        layer, x = layer_of(make_inputs(shape), kind)
        want = influence(layer, x, at=[at])[0]
        assert want.shape == shape[2:]
        for dtype in (torch.float32, torch.bfloat16):
            got = influence(layer.to(dtype), x.to(dtype), at=[at])[0]
            assert got.dtype == torch.float32
            assert_near(got, want, 1e-5 if dtype == torch.float32 else 0.1)
        with torch.autocast('cpu', torch.bfloat16):
            got = influence(layer.float(), x.float(), at=[at])[0]
        assert_near(got, want, 0.1)


# ------------------------------------------------------- what can not be seen


class Levels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = PolyNL2d(4), PolyNL2d(4, norm_cfg=None)

    def forward(self, x):
        return self.b(self.a(x)), self.b(x[..., 1:])


def test_which_layer_and_which_call():
    model, x = Levels(), torch.randn(1, 4, 3, 3)
    assert layer_at(model) == ('b', model.b)
    with pytest.raises(
        ValueError, match="no Poly-NL layer 'c'; there are a, b"
    ):
        influence(model, x, at=[(0, 0)], layer='c')
    with pytest.raises(ValueError, match='b was called 2 times') as caught:
        influence(model, x, at=[(0, 0)])
    assert '(3, 3), (3, 2): call must be one of 0..1' in str(caught.value)
    assert influence(model, x, at=[(0, 0)], call=1).shape == (1, 3, 2)
    with pytest.raises(ValueError, match=r'cell \(3, 0\) is not on its map'):
        influence(model, x, at=[(3, 0)], layer='a')
    with pytest.raises(ValueError, match='called 0 times'):
        influence(Idle(), x, at=[(0, 0)])
    with pytest.raises(ValueError, match='PolySA has no Poly-NL layer'):
        layer_at(PolySA(4, 2))
    # Whoever watched before still does.
    watch = model.a.watch = lambda call: None
    with looking(model, 'a'):
        assert model.a.watch is not watch
    assert model.a.watch is watch and not model.a._forward_hooks


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = PolyNL2d(4)

    def forward(self, x):
        return x


def test_what_is_not_known_is_refused():
    pytest.importorskip('mmcv')
    x = torch.randn(1, 4, 3, 3)
    normed = PolyNL2d(4, norm_cfg=dict(type='GN', num_groups=1))
    with pytest.raises(ValueError, match='its branch is normalised'):
        influence(normed, x, at=[(0, 0)])
    layer = PolyNL2d(4)
    layer.w1.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match='more than their weights'):
        influence(layer, x, at=[(0, 0)])
    layer = PolyNL2d(4)
    with shared_context(nn.Sequential(layer), Frames()) as frames:
        look = partial(influence, layer, at=[(0, 0)])
        with pytest.raises(ValueError, match='that of several calls'):
            frames(look, x)


# ----------------------------------------------------------------- summaries


def calls_of(model, *args):
    found = []
    layer_at(model)[1].watch = found.append
    model(*args)
    layer_at(model)[1].watch = None
    return found


def test_share_is_that_of_what_counts():
    layer, x = layer_of(make_inputs((2, 5, 3, 7), True))
    (call,) = calls_of(layer, x)
    y = layer(x).detach()
    branch = y - layer.alpha.detach() * x
    assert_near(share(call), branch.norm() / y.norm(), 1e-10)
    pictures = Pictures((3, 7), [(3, 7), (2, 5)])
    with pictures_in(pictures):
        (call,) = calls_of(layer, x)
        y = layer(x).detach()
    mask = pictures.weights(x).unsqueeze(1)
    branch = y - layer.alpha.detach() * x
    want = (branch * mask).norm() / (y * mask).norm()
    assert_near(share(call), want, 1e-10)


def test_spread_of_gates_counted_by_hand():
    gate = torch.tensor([[2.0, 2.0, 2.0], [3.0, -3.0, 0.0]])
    # Nothing; the root of 6 by 2.
    assert gate_spread(gate).item() == pytest.approx(6**0.5 / 2 / 2)
    assert gate_spread(torch.zeros(1, 3)) == 0


def test_low_precision_is_summed_in_float32():
    """A square of 300 is no float16."""
    layer = PolyNL2d(3, beta_init=1e-6).half()
    (call,) = calls_of(layer, 300 * torch.ones(1, 3, 8, 8).half())
    assert 0 < share(call) < 1 and share(call).isfinite()
