"""The layer behind a 1x1 convolution against the slow way round."""

import pytest
import torch
from helpers import (
    BEHIND,
    FORMS,
    HALF_TOLERANCE,
    OLD_TORCH,
    after_conv,
    assert_near,
    behind,
    gradients,
    make_pair,
    projected,
    strided,
)
from oracles import poly_nl_loop
from torch.utils.checkpoint import checkpoint

from polynl_mm import ops
from polynl_mm.ops import Conv, Params, poly_nl_behind

both_forms = pytest.mark.parametrize('form', FORMS)


@both_forms
@pytest.mark.parametrize('bias', [False, True], ids=['no bias', 'bias'])
@pytest.mark.parametrize(
    'shape, c',
    [
        pytest.param((3, 4, 2), 9, id='N<c'),
        pytest.param((1, 4, 11), 9, id='B=1'),
        pytest.param((3, 4, 5, 3), 9, id='2d'),
        pytest.param((3, 7, 5, 3), 3, id='C<c'),
        pytest.param((1, 4, 2, 3, 5), 9, id='3d'),
        pytest.param((0, 4, 3, 3), 9, id='B=0'),
        pytest.param((2, 1, 5), 1, id='C=c=1'),
    ],
)
def test_behind_a_convolution(shape, c, bias, form):
    inputs = make_pair(shape, c, bias)
    truth = after_conv(*inputs)
    y = behind(*inputs, form=form)
    assert_near(y, truth, 1e-12)
    if truth.numel():
        branch = truth - inputs[6] * after_conv(*inputs[:6], 1.0, 0.0)
        assert branch.norm() > truth.norm() / 10
    dy = torch.randn_like(truth)
    wants = gradients(truth, inputs, dy)
    gots = gradients(y, inputs, dy)
    assert gots.keys() == wants.keys()
    for name, want in wants.items():
        assert_near(gots[name], want, 1e-11, name)
    with torch.no_grad():
        assert_near(behind(*inputs, form=form), truth, 1e-12, 'no_grad')
        floats = [None if t is None else t.float() for t in inputs]
        assert_near(behind(*floats, form=form), truth, 1e-5, 'float32')


def test_behind_a_convolution_by_loops():
    """Against the loops: what the truth above is built on."""
    inputs = make_pair((2, 4, 3, 2), 5, bias=True)
    h, a, b, *params = inputs
    x = torch.stack(
        [
            torch.stack([a @ v + b for v in image.flatten(1).T], 1)
            for image in h
        ]
    )
    truth = poly_nl_loop(x, *params)
    for form in ops.FORMS:
        assert_near(
            behind(*inputs, form=form), truth.unflatten(2, (3, 2)), 1e-12
        )


@both_forms
@pytest.mark.parametrize('given', [(8,), (9,), (10,), (8, 10)])
def test_behind_with_some_biases(given, form):
    inputs = make_pair((2, 4, 3, 2), 5, bias=True)
    inputs = [t if i < 8 or i in given else None for i, t in enumerate(inputs)]
    assert_near(behind(*inputs, form=form), after_conv(*inputs), 1e-12)


@both_forms
@pytest.mark.parametrize('bias', [False, True])
def test_behind_gradcheck(bias, form):
    inputs = [t for t in make_pair((2, 2, 3), 3, bias) if t is not None]
    assert torch.autograd.gradcheck(
        lambda *args: behind(*args, form=form), inputs
    )


@pytest.mark.parametrize('wanted', BEHIND)
@both_forms
def test_behind_frozen_inputs(wanted, form):
    inputs = make_pair((2, 4, 5, 3), 6, bias=True)
    truth = after_conv(*inputs)
    dy = torch.randn_like(truth)
    want = gradients(truth, inputs, dy)[wanted]
    frozen = [
        t.detach().requires_grad_(k == wanted) for k, t in zip(BEHIND, inputs)
    ]
    behind(*frozen, form=form).backward(dy)
    for name, t in zip(BEHIND, frozen):
        if name == wanted:
            assert_near(t.grad, want, 1e-11, name)
        else:
            assert t.grad is None


@both_forms
@pytest.mark.parametrize('wanted', BEHIND)
def test_frozen_beside_constant_projections(wanted, form):
    """w1 and the rest are P here, so that a and b act by the fold alone."""
    h, conv, p = projected(*make_pair((2, 4, 5, 3), 6, bias=True))
    tensors = dict(zip(BEHIND, (h, *conv, *p)))
    tensors = {
        k: t.detach().requires_grad_(k == wanted) for k, t in tensors.items()
    }
    results = []
    for kind in ('direct', form):
        h, a, b, *p = tensors.values()
        y = poly_nl_behind(h, Conv(a, b), Params(*p), form=kind)
        dy = torch.arange(y.numel()).reshape(y.shape).to(y) / y.numel()
        results.append(torch.autograd.grad(y, tensors[wanted], dy)[0])
    assert_near(results[1], results[0], 1e-11, wanted)


@both_forms
def test_behind_a_norm_that_takes_most_away(form):
    """The mean of A h ten times its spread, and b the negative of it."""
    h, a, _, *params = make_pair((2, 16, 20, 20), 64)
    shift = torch.randn(16, 1, 1, dtype=h.dtype)
    a, h = a.detach(), h.detach()
    spread = (a @ (h - h.mean((0, 2, 3), True)).flatten(2)).std()
    h = h + shift * 10 * spread / (a @ shift[:, 0]).std()
    b = -(a @ h.flatten(2)).mean((0, 2))
    params = [t if t is None else t.detach() for t in params]
    x, y = (after_conv(h, a, b, *params[:3], 1.0, beta) for beta in (0, 1.0))
    params[4] = x.norm() / (y - x).norm()
    truth = after_conv(h, a, b, *params)
    h, conv, p = projected(h, a, b, *params)
    floats = [
        type(t)(*(None if v is None else v.float() for v in t))
        for t in (conv, p)
    ]
    y = poly_nl_behind(h.float(), *floats, form=form)
    assert_near(y, truth, 1e-5)


@both_forms
@pytest.mark.parametrize('grads', [False, True])
def test_behind_keeps_channels_last(grads, form, device):
    if (device, form) == ('cuda', 'direct'):
        pytest.skip('cuDNN convolves float64 in the order of channels')
    inputs = make_pair((2, 4, 5, 3), 6, bias=True)
    truth = after_conv(*inputs)
    h = strided('channels_last', inputs[0].detach())
    inputs[0] = h.requires_grad_(grads)
    with torch.set_grad_enabled(grads):
        y = behind(*inputs, form=form)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_near(y, truth, 1e-12)
    if grads:
        dy = torch.randn_like(y)
        wants = gradients(after_conv(*inputs), inputs, dy)
        for name, got in gradients(y, inputs, dy).items():
            assert_near(got, wants[name], 1e-11, name)


@both_forms
def test_behind_result_may_be_changed_in_place(form):
    inputs = make_pair((2, 4, 5, 3), 6, bias=True)

    def run(*args):
        return behind(*args, form=form)

    dy = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    wants = gradients(after_conv(*inputs) * 3 + 1, inputs, dy)
    y = run(*inputs)
    assert not y._is_view()
    y *= 3
    y += 1
    for name, got in gradients(y, inputs, dy).items():
        assert_near(got, wants[name], 1e-11, name)
    y = checkpoint(run, *inputs, use_reentrant=True)
    y *= 3
    y += 1
    y.backward(dy)
    for name, t in zip(BEHIND, inputs):
        assert_near(t.grad, wants[name], 1e-11, name)
    with torch.no_grad():
        assert not run(*inputs)._is_view()


@both_forms
@pytest.mark.parametrize('dtype', HALF_TOLERANCE, ids=str)
def test_behind_under_autocast(dtype, form, device):
    """Of magnitude 300, where the product of projections exceeds float16."""
    if OLD_TORCH:
        pytest.skip('this torch has no float16 on a CPU')
    inputs = make_pair((2, 8, 20, 20), 24, bias=True)
    scales = dict(h=300, b=300, beta=2e-5)
    inputs = [
        (t.detach() * scales.get(k, 1)).to(dtype).float()
        for k, t in zip(BEHIND, inputs)
    ]
    truth = after_conv(*[t.double() for t in inputs])
    x = torch.einsum('oi,bihw->bohw', inputs[1], inputs[0])
    x = x + inputs[2].view(-1, 1, 1)
    u, v = (torch.einsum('oi,bihw->bohw', w, x) for w in inputs[3:5])
    assert (u * v).abs().max() > 65504
    assert (truth - inputs[6] * x).norm() > truth.norm() / 10
    params = [t.requires_grad_() for t in inputs[1:]]
    # What comes may already be of low precision, as a layer before left it.
    for h in (inputs[0], inputs[0].to(dtype)):
        h = h.requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            y = behind(h, *params, form=form)
        assert y.dtype == torch.bfloat16
        assert_near(y, truth, 2 * HALF_TOLERANCE[torch.bfloat16])
        y.float().mean().backward()
        assert h.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in params)


@both_forms
@pytest.mark.parametrize('dtype', HALF_TOLERANCE, ids=str)
def test_behind_in_low_precision(dtype, form):
    """The parameters low, too, as model.half() makes them."""
    if OLD_TORCH:
        pytest.skip('this torch has no float16 on a CPU')
    h, (a, b), p = projected(*make_pair((2, 8, 20, 20), 24, bias=True))
    # The gate is square in h: x within float16, u v beyond.
    p = p._replace(beta=p.beta * 2e-5, b1=p.b1 * 300, b2=p.b2 * 300)
    args = [t.detach().to(dtype) for t in (h * 300, a, b * 300, *p)]

    def run(h, a, b, *p):
        return poly_nl_behind(h, Conv(a, b), Params(*p), form=form)

    exact = [t.double() for t in args]
    truth = run(*exact)
    x = torch.einsum('oi,bihw->bohw', exact[1], exact[0])
    x = x + exact[2].view(-1, 1, 1)
    assert (truth - args[6] * x).norm() > truth.norm() / 10
    y = run(*args)
    assert y.dtype == dtype
    assert_near(y, truth, HALF_TOLERANCE[dtype])


def test_behind_direct_has_second_derivatives():
    inputs = [t for t in make_pair((1, 2, 2), 2, bias=True) if t is not None]
    assert torch.autograd.gradgradcheck(
        lambda *args: behind(*args, form='direct'), inputs
    )


@pytest.mark.parametrize('wanted', [('h',), ('w3',)])
def test_behind_has_no_second_derivative(wanted):
    inputs = [
        t if t is None else t.detach().requires_grad_(k in wanted)
        for k, t in zip(BEHIND, make_pair((2, 2, 5), 3))
    ]
    y = behind(*inputs, form='gram')
    inputs = [t for t in inputs if t is not None and t.requires_grad]
    with pytest.raises(RuntimeError, match='second derivative'):
        torch.autograd.grad(y.sum(), inputs, create_graph=True)


def test_what_is_no_conv_and_no_params_is_named():
    h, conv, p = projected(*make_pair((2, 4, 3), 5))
    with pytest.raises(ValueError, match='conv must be a Conv, got None'):
        poly_nl_behind(h, None, p)
    with pytest.raises(ValueError, match='p must be Params, got a tuple'):
        poly_nl_behind(h, conv, tuple(p))


@both_forms
def test_projections_under_autocast_of_mixed_dtypes(form, device):
    """A host's convolution may be of low precision, the layer not."""
    inputs = make_pair((2, 8, 9, 9), 12, dtype=torch.float32)
    h, a, b, *p = inputs
    with torch.autocast(device, torch.bfloat16):
        y = behind(h, a.bfloat16(), b.bfloat16(), *p, form=form)
    want = after_conv(*[t if t is None else t.double() for t in inputs])
    assert_near(y, want.detach(), 2 * HALF_TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(h=torch.ones(2, 4)), r'\(B, C, \*spatial\).*\(2, 4\)'),
        (dict(h=torch.ones(2, 3, 2).double()), r'^a .*\(5, 3\).*\(5, 4\)'),
        (dict(a=torch.ones(5).double()), r'^a .*\(5, 4\).*\(5,\)'),
        (dict(a=None), '^a must be a tensor, got None'),
        (dict(b=torch.ones(4).double()), r'^b .*\(5,\).*\(4,\)'),
        (dict(b=None), '^b must be a tensor, got None'),
        (dict(w1=torch.ones(5, 5).double()), r'^w1 .*\(5, 4\).*\(5, 5\)'),
        (dict(w2=torch.ones(4, 4).double()), r'^w2 .*\(5, 4\).*\(4, 4\)'),
        (dict(w3=torch.ones(5, 4).double()), r'^w3 .*\(5, 5\).*\(5, 4\)'),
        (dict(b1=torch.ones(4).double()), r'^b1 .*\(5,\).*\(4,\)'),
        (dict(b1=None), '^b1 must be a tensor, got None'),
        (dict(b2=None), '^b2 must be a tensor, got None'),
        (dict(b3=torch.ones(4).double()), r'^b3 .*\(5,\).*\(4,\)'),
        (dict(beta=torch.ones(5).double()), r'^beta .*one element.*\(5,\)'),
        (dict(a=torch.ones(5, 4)), '^a has dtype torch.float32 .*float64'),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else '',
)
def test_behind_bad_input_is_named(change, message):
    h, conv, p = projected(*make_pair((2, 4, 3), 5))
    tensors = {**dict(zip(BEHIND, (h, *conv, *p))), **change}
    h, a, b, *p = tensors.values()
    with pytest.raises(ValueError, match=message):
        poly_nl_behind(h, Conv(a, b), Params(*p))
