"""The operation against a slow truth. beta is never 0: there all agree."""

import math

import pytest
import torch
from oracles import poly_nl_loop
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from polynl_mm import ops
from polynl_mm.ops import (
    behind_pays,
    choose_form,
    poly_nl,
    poly_nl_behind,
    poly_nl_direct,
    poly_nl_gram,
    project,
)

FORMS = {'direct': poly_nl_direct, 'gram': poly_nl_gram}
NAMES = ('x', 'w1', 'w2', 'w3', 'alpha', 'beta', 'b1', 'b2', 'b3')

OLD_TORCH = tuple(map(int, torch.__version__.split('.')[:2])) < (2, 5)
HALF_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}

cuda = pytest.param(
    'cuda',
    marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason='needs a GPU'
    ),
)
both_forms = pytest.mark.parametrize('form', FORMS)
all_forms = pytest.mark.parametrize('form', ops.FORMS)


def make_inputs(shape, bias=False, dtype=torch.float64, device='cpu', seed=0):
    """x, three weights, alpha, beta and three biases, all with gradients."""
    gen = torch.Generator().manual_seed(seed)
    c = shape[1]
    sizes = [shape, *[(c, c)] * 3, (1,), (1,), *[(c,)] * 3]
    tensors = [
        torch.randn(size, generator=gen, dtype=torch.float64) for size in sizes
    ]
    for w in tensors[1:4]:
        w /= math.sqrt(c)
    tensors[0] += 0.5
    tensors[4].fill_(0.7)
    tensors[5].fill_(-1.3)
    tensors = [t.to(device, dtype).requires_grad_() for t in tensors]
    return tensors if bias else [*tensors[:6], None, None, None]


def gradients(y, inputs, dy):
    """Of each input by name, zeros where y does not depend on it."""
    named = {k: t for k, t in zip(NAMES, inputs) if t is not None}
    grads = torch.autograd.grad(y, list(named.values()), dy, allow_unused=True)
    return {
        k: torch.zeros_like(t) if g is None else g
        for (k, t), g in zip(named.items(), grads)
    }


def assert_near(got, want, tolerance, name=''):
    """Largest error, relative to the largest value of the truth."""
    assert got.shape == want.shape, name
    if want.numel() == 0:
        return
    assert torch.isfinite(got).all(), name
    error = (got.double().cpu() - want.double().cpu()).abs().max()
    assert error <= tolerance * want.double().abs().max().clamp_min(1e-30), (
        f'{name}: error {error:.3g}, largest value {want.abs().max():.3g}'
    )


SHAPES = [
    pytest.param((2, 7, 3), id='N<C'),
    pytest.param((2, 5, 5), id='N=C'),
    pytest.param((2, 5, 7, 3), id='N>C'),
    pytest.param((1, 3, 11), id='B=1'),
    pytest.param((0, 5, 3, 2), id='B=0'),
    pytest.param((3, 1, 2), id='C=1'),
    pytest.param((3, 5, 2, 3, 7), id='3d'),
]


@both_forms
@pytest.mark.parametrize('bias', [False, True], ids=['no bias', 'bias'])
@pytest.mark.parametrize('shape', SHAPES)
def test_values_and_all_gradients(form, shape, bias):
    inputs = make_inputs(shape, bias)
    truth = poly_nl_loop(*inputs)
    dy = torch.randn_like(truth)
    y = FORMS[form](*inputs)
    assert_near(y, truth, 1e-13)
    wants, gots = gradients(truth, inputs, dy), gradients(y, inputs, dy)
    for name, want in wants.items():
        assert_near(gots[name], want, 1e-12, name)
    with torch.no_grad():
        assert_near(FORMS[form](*inputs), truth, 1e-13, 'no_grad')


@both_forms
@pytest.mark.parametrize('given', [(6,), (7,), (8,), (6, 8)])
def test_some_biases(form, given):
    inputs = make_inputs((2, 5, 3, 2), bias=True)
    inputs = [t if i < 6 or i in given else None for i, t in enumerate(inputs)]
    truth = poly_nl_loop(*inputs)
    dy = torch.randn_like(truth)
    y = FORMS[form](*inputs)
    assert_near(y, truth, 1e-13)
    wants, gots = gradients(truth, inputs, dy), gradients(y, inputs, dy)
    assert gots.keys() == wants.keys()
    for name, want in wants.items():
        assert_near(gots[name], want, 1e-12, name)


# From here on "direct", which the loops above prove, is the truth where the
# loops would be slow.
@pytest.mark.parametrize('c', [511, 512, 515, 1030])
@pytest.mark.parametrize('n', [37, 129])
def test_panels_of_the_second_moment(c, n):
    inputs = make_inputs((2, c, n))
    dy = torch.randn_like(inputs[0])
    want, got = poly_nl_direct(*inputs), poly_nl_gram(*inputs)
    assert_near(got, want.detach(), 1e-12)
    wants, gots = gradients(want, inputs, dy), gradients(got, inputs, dy)
    for name in wants:
        assert_near(gots[name], wants[name], 1e-11, name)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_panels_in_low_precision(dtype):
    """X X^T alone exceeds float16 here."""
    if OLD_TORCH and dtype == torch.float16:
        pytest.skip('this torch has no float16 on a CPU')
    c, n = 512, 64
    inputs = [t for t in make_inputs((1, c, n)) if t is not None]
    scales = (100, 0.2, 0.2, 0.2, 1, 1)
    inputs = [(t * k).detach().to(dtype) for t, k in zip(inputs, scales)]
    exact = poly_nl_direct(*[t.double() for t in inputs])
    assert (exact - inputs[4].double() * inputs[0]).norm() > exact.norm() / 2
    assert inputs[0].double().square().sum(-1).min() > 65504
    assert_near(poly_nl_gram(*inputs), exact, HALF_TOLERANCE[dtype])


def strided(kind, x):
    """The same values in another memory layout."""
    if kind == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if kind == 'sliced':
        return torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
    if kind == 'transposed':
        return x.mT.contiguous().mT
    if kind == 'expanded':
        return x[:, :, :1, :1].expand(x.shape)
    raise AssertionError(kind)


@both_forms
@pytest.mark.parametrize('grad_layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize(
    'kind', ['channels_last', 'sliced', 'transposed', 'expanded']
)
def test_memory_layouts(form, kind, grad_layout):
    inputs = make_inputs((2, 5, 7, 3), bias=True)
    x = strided(kind, inputs[0].detach()).requires_grad_()
    assert not x.is_contiguous()
    inputs[0] = x
    truth = poly_nl_loop(*inputs)
    dy = torch.randn_like(truth)
    if grad_layout == 'channels_last':
        dy = dy.contiguous(memory_format=torch.channels_last)
    y = FORMS[form](*inputs)
    assert_near(y, truth, 1e-13)
    wants, gots = gradients(truth, inputs, dy), gradients(y, inputs, dy)
    for name, want in wants.items():
        assert_near(gots[name], want, 1e-12, name)
    if kind == 'channels_last':
        assert y.is_contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            y = FORMS[form](*inputs)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_tokens_stay_tokens():
    """(B, N, C) features, seen as (B, C, N), come back as (B, N, C)."""
    inputs = make_inputs((2, 5, 7))
    inputs[0] = inputs[0].detach().mT.contiguous().mT
    y = poly_nl_gram(*inputs)
    assert y.mT.is_contiguous()
    assert_near(y, poly_nl_loop(*inputs), 1e-13)


@both_forms
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape', [(2, 3, 2), (2, 3, 5, 2)])
def test_gradcheck(form, shape, bias):
    inputs = [t for t in make_inputs(shape, bias) if t is not None]
    assert torch.autograd.gradcheck(FORMS[form], inputs)


def test_second_derivatives():
    inputs = make_inputs((2, 3, 5))[:6]
    assert torch.autograd.gradgradcheck(poly_nl_direct, inputs)
    y = poly_nl_gram(*inputs)
    with pytest.raises(RuntimeError, match="second.*use form='direct'"):
        torch.autograd.grad(y.sum(), inputs[0], create_graph=True)


@both_forms
@pytest.mark.parametrize('device', ['cpu', cuda])
@pytest.mark.parametrize('autocast', [False, True], ids=['plain', 'autocast'])
@pytest.mark.parametrize('n', [3 * 5, 31 * 17], ids=['N<C', 'N>C'])
@pytest.mark.parametrize('dtype', HALF_TOLERANCE, ids=str)
def test_low_precision_beyond_float16(form, dtype, n, autocast, device):
    """u * v exceeds 65504 while the output and its gradients do not."""
    if device == 'cpu' and OLD_TORCH and dtype == torch.float16:
        pytest.skip('this torch has no float16 on a CPU')
    c = 24
    gen = torch.Generator().manual_seed(0)
    randn = lambda *size: torch.randn(size, generator=gen)  # noqa: E731
    # A common part makes u and v about 300 everywhere.
    x = 3 + randn(2, c, n)
    w1, w2 = (300 / (3 * c) + randn(c, c) for _ in range(2))
    w3 = randn(c, c) / math.sqrt(c) * 1e-3
    inputs = [x, w1, w2, w3, torch.tensor([0.5]), torch.tensor([0.01])]
    dy = randn(2, c, n) / 16
    stored = torch.float32 if autocast else dtype
    # What autocast or the host casts to low precision is equal for both.
    inputs = [t.to(dtype).to(stored).to(device) for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    truth = poly_nl_loop(*exact)
    u, v = (torch.einsum('oi,bin->bon', w, exact[0]) for w in exact[1:3])
    assert (u * v).mean(-1).abs().min() > 65504
    branch = truth - exact[4] * exact[0]
    assert branch.norm() > truth.norm() / 2

    with torch.autocast(device, dtype=dtype, enabled=autocast):
        y = FORMS[form](*inputs)
    assert y.dtype == dtype
    assert_near(y, truth, HALF_TOLERANCE[dtype])
    dy = dy.to(dtype)
    gots = gradients(y, inputs, dy.to(device))
    for name, want in gradients(truth, exact, dy.double()).items():
        assert gots[name].dtype == stored
        assert_near(gots[name], want, 2 * HALF_TOLERANCE[dtype], name)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=autocast):
        assert_near(FORMS[form](*inputs), truth, HALF_TOLERANCE[dtype])


@both_forms
def test_backward_does_not_see_autocast(form):
    """mm calls backward within autocast under gradient checkpointing."""
    inputs = make_inputs((2, 5, 7, 3), bias=True, dtype=torch.float32)
    y = FORMS[form](*inputs)
    dy = torch.randn_like(y)
    wants = gradients(y, inputs, dy)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = FORMS[form](*[t.double() for t in inputs])
        assert y.dtype == torch.float64
    y = FORMS[form](*inputs)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        gots = gradients(y, inputs, dy)
    if form == 'gram':  # direct is autograd's own
        for name, want in wants.items():
            assert torch.equal(gots[name], want), name


@both_forms
@pytest.mark.parametrize('bias', [False, True])
def test_result_may_be_changed_in_place(form, bias):
    inputs = make_inputs((2, 5, 7, 3), bias)
    dy = torch.randn_like(inputs[0])
    wants = gradients(FORMS[form](*inputs) * 3 + 1, inputs, dy)
    y = FORMS[form](*inputs)
    assert not y._is_view()
    y *= 3
    y += 1
    for name, got in gradients(y, inputs, dy).items():
        assert_near(got, wants[name], 1e-12, name)

    def run(*inputs):
        return FORMS[form](*inputs)

    y = checkpoint(run, *inputs, use_reentrant=True)
    y *= 3
    y += 1
    for name, got in gradients_by_backward(y, inputs, dy).items():
        assert_near(got, wants[name], 1e-12, name)
    with torch.no_grad():
        assert not FORMS[form](*inputs)._is_view()


def gradients_by_backward(y, inputs, dy):
    """A reentrant checkpoint only knows ``backward``."""
    y.backward(dy)
    return {k: t.grad for k, t in zip(NAMES, inputs) if t is not None}


def test_shapes_on_the_meta_device():
    inputs = [t.detach().to('meta') for t in make_inputs((2, 5, 7, 3))[:6]]
    for form in ops.FORMS:
        assert poly_nl(*inputs, form=form).shape == (2, 5, 7, 3)


def count_flops(f, *args):
    with FlopCounterMode(display=False) as counter:
        out = f(*args)
    return counter.get_total_flops(), out


def test_which_form_ran():
    """By the multiply-adds of each form, and by its node in the graph."""
    c, n = 16, 128
    inputs = make_inputs((1, c, n))
    with torch.no_grad():
        direct = count_flops(poly_nl_direct, *inputs)[0] / 2
        gram = count_flops(poly_nl_gram, *inputs)[0] / 2
        assert direct == 3 * n * c**2
        assert gram == 2 * n * c**2 + c**3
        flops = {
            form: count_flops(lambda f=form: poly_nl(*inputs, form=f))[0] / 2
            for form in ops.FORMS
        }
    assert flops == {'direct': direct, 'gram': gram, 'auto': gram}
    node = type(poly_nl(*inputs, form='gram').grad_fn).__name__
    assert node == '_PolyNLGramBackward'
    assert 'PolyNL' not in type(poly_nl_direct(*inputs).grad_fn).__name__


def test_auto_follows_the_chooser(monkeypatch):
    inputs = make_inputs((2, 5, 7, 3), dtype=torch.float32)
    asked = []

    def choose(n, c, backward, itemsize):
        asked.append((n, c, backward, itemsize))
        return 'direct' if backward else 'gram'

    monkeypatch.setattr(ops, 'choose_form', choose)
    y = poly_nl(*inputs)
    assert 'PolyNL' not in type(y.grad_fn).__name__
    with torch.no_grad():
        flops = count_flops(poly_nl, *inputs)[0] / 2
    assert flops == 2 * (2 * 21 * 5**2 + 5**3)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        poly_nl(*inputs)
    assert asked == [(21, 5, True, 4), (21, 5, False, 4), (21, 5, False, 2)]


@pytest.mark.parametrize('backward', [False, True])
@pytest.mark.parametrize('c', [64, 256, 512, 1024, 2048])
def test_chooser(c, backward):
    assert choose_form(16 * c, c, backward) == 'gram'
    assert choose_form(max(c // 64, 1), c, backward) == 'direct'
    forms = [choose_form(n, c, backward) for n in range(1, 4 * c, c // 16)]
    # One crossing: more positions never bring direct back.
    assert forms == sorted(forms)


@pytest.mark.parametrize(
    'wanted',
    [('x',), ('w1',), ('w2',), ('w3',), ('alpha',), ('beta',)]
    + [('b1',), ('b2',), ('b3',), ('x', 'b3'), ('w1', 'w2', 'w3')],
    ids='+'.join,
)
def test_frozen_inputs(wanted):
    """Gradients of some, equal to those of all; none of the others."""
    inputs = make_inputs((2, 8, 100), bias=True)
    dy = torch.randn_like(inputs[0])
    wants = gradients(poly_nl_gram(*inputs), inputs, dy)
    frozen = [
        t.detach().requires_grad_(k in wanted) for k, t in zip(NAMES, inputs)
    ]
    y = poly_nl_gram(*frozen)
    y.backward(dy)
    for name, t in zip(NAMES, frozen):
        if name in wanted:
            assert_near(t.grad, wants[name], 1e-12, name)
        else:
            assert t.grad is None


def test_frozen_inputs_cost_nothing():
    c, n = 8, 100

    def backward_macs(wanted):
        inputs = [
            t.detach().requires_grad_(k in wanted)
            for k, t in zip(NAMES[:6], make_inputs((1, c, n)))
        ]
        y = poly_nl_gram(*inputs)
        return count_flops(y.backward, torch.ones_like(y))[0] / 2

    product = n * c**2
    assert backward_macs(NAMES) == 3 * product + 2 * c**3
    assert backward_macs(('x',)) == 3 * product + c**3
    assert backward_macs(('w1',)) == product + c**3
    assert backward_macs(('w2',)) == product
    assert backward_macs(('w3', 'alpha', 'beta')) == product


def saved_tensors(f, inputs):
    """What autograd keeps for backward, leaving out the parameters."""
    saved = []
    pointers = {t.data_ptr() for t in inputs[1:] if t is not None}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t) or t, lambda t: t
    ):
        y = f(*inputs)
    assert y.requires_grad
    unique = {t.data_ptr(): t for t in saved if t.data_ptr() not in pointers}
    return list(unique.values())


def test_only_x_is_kept_for_backward():
    inputs = make_inputs((2, 8, 31, 17), dtype=torch.float32)
    x = inputs[0]
    size = x.numel() * x.element_size()
    kept = saved_tensors(poly_nl_gram, inputs)
    large = [t for t in kept if t.numel() * t.element_size() >= size / 2]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    assert sum(t.numel() * t.element_size() for t in large) <= 1.1 * size
    # The direct form shows that the measure sees what is kept.
    direct = saved_tensors(poly_nl_direct, inputs)
    assert len([t for t in direct if t.numel() >= x.numel() / 2]) >= 4


class InPlace(torch.nn.Module):
    """As a host's block: the parameters want gradients; it adds in place."""

    def __init__(self, inputs, form):
        super().__init__()
        self.form = form
        self.params = torch.nn.ParameterList(inputs[1:6])

    def forward(self, x):
        y = poly_nl(x, *self.params, form=self.form)
        y += x
        return y


@all_forms
def test_traced_at_one_size_runs_at_another(form, tmp_path):
    inputs = make_inputs((2, 5, 7, 3))
    other = make_inputs((1, 5, 2, 1), seed=1)[0].detach()
    traced = torch.jit.trace(
        InPlace(inputs, form), inputs[0].detach(), check_trace=False
    )
    traced.save(tmp_path / 'traced.pt')
    traced = torch.jit.load(tmp_path / 'traced.pt')
    want = poly_nl_loop(other, *inputs[1:]) + other
    assert_near(traced(other), want, 1e-13)


@all_forms
@pytest.mark.skipif(OLD_TORCH, reason='torch.compile came of age in 2.5')
def test_compiled_in_one_graph(form):
    inputs = make_inputs((2, 5, 7, 3))
    model = InPlace(inputs, form)
    inputs = [inputs[0], *model.params, None, None, None]
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    truth = poly_nl_loop(*inputs) + inputs[0]
    dy = torch.randn_like(truth)
    # Not a leaf, as x is not one within a network.
    y = compiled(inputs[0] * 1)
    assert_near(y, truth, 1e-13)
    wants, gots = gradients(truth, inputs, dy), gradients(y, inputs, dy)
    for name, want in wants.items():
        assert_near(gots[name], want, 1e-12, name)


@all_forms
@pytest.mark.skipif(OLD_TORCH, reason='torch.export came of age in 2.5')
def test_exported_with_dynamic_size(form):
    inputs = make_inputs((2, 5, 7, 3))
    other = make_inputs((3, 5, 1, 2), seed=1)[0].detach()
    model = InPlace(inputs, form).eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        model,
        (inputs[0].detach(),),
        dynamic_shapes=[{0: auto, 2: auto, 3: auto}],
    )
    want = poly_nl_loop(other, *inputs[1:]) + other
    assert_near(program.module()(other), want, 1e-13)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(x=torch.ones(2, 5)), r'\(B, C, \*spatial\).*\(2, 5\)'),
        (dict(x=torch.ones(2, 5, 1, 1, 1, 1)), 'one to three spatial'),
        (dict(x=torch.ones(2, 5, 0)), r'none of them empty.*\(2, 5, 0\)'),
        (dict(x=torch.ones(2, 5, 3).long()), 'floating point.*int64'),
        (dict(x=torch.ones(2, 7, 3).double()), r'w1 .*\(7, 7\).*\(5, 5\)'),
        (dict(w3=torch.ones(5, 4).double()), r'w3 .*\(5, 5\).*\(5, 4\)'),
        (dict(b2=torch.ones(4).double()), r'b2 .*\(5,\).*\(4,\)'),
        (dict(beta=torch.ones(5).double()), r'beta .*one element.*\(5,\)'),
        (dict(w2=torch.ones(5, 5)), 'w2 has dtype torch.float32 .*float64'),
        (dict(w2=None), 'w2 must be a tensor, got None'),
        (dict(beta='1'), "beta must be a tensor, got '1'"),
        (dict(form='fast'), "form must be one of .*'fast'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else '',
)
def test_bad_input_is_named(change, message):
    inputs = dict(zip(NAMES, make_inputs((2, 5, 3), bias=True)))
    with pytest.raises(ValueError, match=message):
        poly_nl(**{**inputs, **change})


# ------------------------------------------------- behind a 1x1 convolution

BEHIND = ('h', 'a', 'b', 'w1', 'w2', 'w3', 'alpha', 'beta', 'b1', 'b2', 'b3')


def make_pair(shape, c, bias=False, dtype=torch.float64, seed=0):
    """h, a, b of the convolution, then what make_inputs has after x."""
    gen = torch.Generator().manual_seed(seed)
    h, a, b = (
        torch.randn(size, generator=gen, dtype=torch.float64)
        for size in (shape, (c, shape[1]), (c,))
    )
    h, a = h + 0.5, a / math.sqrt(shape[1])
    inputs = [h, a, b, *make_inputs((1, c, 1), bias, seed=seed + 1)[1:]]
    with torch.no_grad():  # the branch as large as the rest
        y, x = after_conv(*inputs), after_conv(*inputs[:6], 1.0, 0.0)
        inputs[7] *= 1 if not y.numel() else x.norm() / (y - 0.7 * x).norm()
    return [
        t if t is None else t.detach().to(dtype).requires_grad_()
        for t in inputs
    ]


def behind(h, a, b, w1, w2, w3, alpha, beta, b1=None, b2=None, b3=None, **kw):
    w1, w2, b1, b2 = project(a, b, w1, w2, b1, b2)
    return poly_nl_behind(h, a, b, w1, w2, w3, alpha, beta, b1, b2, b3, **kw)


def after_conv(h, a, b, *params):
    """The slow way round: the convolution, then the layer."""
    x = torch.einsum('oi,bin->bon', a, h.flatten(2)) + b[:, None]
    return poly_nl_direct(x.unflatten(2, h.shape[2:]), *params)


def behind_gradients(y, inputs, dy):
    named = {k: t for k, t in zip(BEHIND, inputs) if t is not None}
    grads = torch.autograd.grad(y, list(named.values()), dy, allow_unused=True)
    return {
        k: torch.zeros_like(t) if g is None else g
        for (k, t), g in zip(named.items(), grads)
    }


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
    wants = behind_gradients(truth, inputs, dy)
    gots = behind_gradients(y, inputs, dy)
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
    want = behind_gradients(truth, inputs, dy)[wanted]
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
    w1, w2, b1, b2 = project(a, b, *params[:2])
    args = (h, a, b, w1, w2, *params[2:5], b1, b2)
    y = poly_nl_behind(*[t.float() for t in args], form=form)
    assert_near(y, truth, 1e-5)


def behind_macs(n, c, out, form='auto'):
    h, a, b, w1, w2, *rest = [
        t if t is None else t.detach() for t in make_pair((1, c, n), out)
    ]
    w1, w2, b1, b2 = project(a, b, w1, w2)
    args = (h, a, b, w1, w2, *rest[:3], b1, b2)
    return count_flops(lambda: poly_nl_behind(*args, form=form))[0] // 2


@pytest.mark.parametrize('c, out', [(8, 32), (12, 24), (16, 16)])
def test_behind_takes_the_cheaper_form(c, out):
    """By the multiply-adds; at most a tenth more than of any mixture."""
    vectors = 4 * out * c + out**2
    taken = set()
    for n in (1, 2, 6, 7, 9, 11, 13, 16, 17, 40):
        moments, fold = n * c**2 + out * c**2, out**2 * c
        projections, gated = 2 * n * out * c, n * out**2
        conv = n * out * c
        gram = behind_macs(n, c, out, 'gram')
        direct = behind_macs(n, c, out, 'direct')
        assert abs(gram - moments - fold - conv) <= vectors
        assert abs(direct - projections - gated - conv) <= vectors
        auto = behind_macs(n, c, out)
        taken.add('gram' if auto == gram else 'direct')
        best = min(moments, projections) + min(fold, gated) + conv
        assert auto in (gram, direct) and auto <= 1.1 * best + vectors
    assert taken == {'gram', 'direct'}


@pytest.mark.parametrize(
    'n, c, out, training, inference',
    [
        (10, 64, 256, False, False),
        (60, 64, 256, False, True),
        (80, 64, 256, True, True),
        (100, 64, 64, False, True),
        (250, 64, 64, True, True),
        (10**9, 64, 48, True, True),
        (10**9, 64, 44, True, False),
        (10**9, 64, 32, False, False),
    ],
)
def test_when_it_pays(n, c, out, training, inference):
    assert behind_pays(n, c, out, backward=True) == training
    assert behind_pays(n, c, out, backward=False) == inference


@both_forms
@pytest.mark.parametrize('grads', [False, True])
def test_behind_keeps_channels_last(grads, form):
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
        wants = behind_gradients(after_conv(*inputs), inputs, dy)
        for name, got in behind_gradients(y, inputs, dy).items():
            assert_near(got, wants[name], 1e-11, name)


@both_forms
def test_behind_result_may_be_changed_in_place(form):
    inputs = make_pair((2, 4, 5, 3), 6, bias=True)

    def run(*args):
        return behind(*args, form=form)

    dy = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    wants = behind_gradients(after_conv(*inputs) * 3 + 1, inputs, dy)
    y = run(*inputs)
    assert not y._is_view()
    y *= 3
    y += 1
    for name, got in behind_gradients(y, inputs, dy).items():
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
def test_behind_under_autocast(dtype, form):
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
        with torch.autocast('cpu', torch.bfloat16):
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
    h, a, b, w1, w2, w3, alpha, beta, b1, b2, b3 = make_pair(
        (2, 8, 20, 20), 24, bias=True
    )
    w1, w2, b1, b2 = project(a, b, w1, w2, b1, b2)
    # The gate is square in h: x within float16, u v beyond.
    args = [h * 300, a, b * 300, w1, w2, w3, alpha, beta * 2e-5]
    args += [b1 * 300, b2 * 300, b3]
    args = [t.detach().to(dtype) for t in args]
    truth = poly_nl_behind(*[t.double() for t in args], form=form)
    x = torch.einsum('oi,bihw->bohw', args[1].double(), args[0].double())
    x = x + args[2].double().view(-1, 1, 1)
    assert (truth - args[6] * x).norm() > truth.norm() / 10
    y = poly_nl_behind(*args, form=form)
    assert y.dtype == dtype
    assert_near(y, truth, HALF_TOLERANCE[dtype])


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
    h, a, b, w1, w2, w3, alpha, beta, b1, b2, b3 = make_pair((2, 4, 3), 5)
    w1, w2, b1, b2 = project(a, b, w1, w2)
    args = (h, a, b, w1, w2, w3, alpha, beta, b1, b2, b3)
    with pytest.raises(ValueError, match=message):
        poly_nl_behind(**{**dict(zip(BEHIND, args)), **change})
