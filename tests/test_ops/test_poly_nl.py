"""The layer on X against a slow truth. beta is never 0: there all agree."""

import math
from functools import partial

import pytest
import torch
from helpers import (
    FORMS,
    HALF_TOLERANCE,
    NAMES,
    OLD_TORCH,
    assert_all_near,
    assert_near,
    count_flops,
    gradients,
    make_inputs,
    nodes_of,
    on_x,
    strided,
)
from oracles import poly_nl_loop
from torch.utils.checkpoint import checkpoint

from polynl_mm import ops

both_forms = pytest.mark.parametrize('form', FORMS)

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
    assert_all_near(gots, wants, 1e-12)
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
    want, got = FORMS['direct'](*inputs), FORMS['gram'](*inputs)
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
    exact = FORMS['direct'](*[t.double() for t in inputs])
    assert (exact - inputs[4].double() * inputs[0]).norm() > exact.norm() / 2
    assert inputs[0].double().square().sum(-1).min() > 65504
    assert_near(FORMS['gram'](*inputs), exact, HALF_TOLERANCE[dtype])


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
    assert_all_near(gots, wants, 1e-12)
    if kind == 'channels_last':
        assert y.is_contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            y = FORMS[form](*inputs)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_tokens_stay_tokens():
    """(B, N, C) features, seen as (B, C, N), come back as (B, N, C)."""
    inputs = make_inputs((2, 5, 7))
    inputs[0] = inputs[0].detach().mT.contiguous().mT
    y = FORMS['gram'](*inputs)
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
    assert torch.autograd.gradgradcheck(FORMS['direct'], inputs)
    y = FORMS['gram'](*inputs)
    with pytest.raises(RuntimeError, match="second.*use form='direct'"):
        torch.autograd.grad(y.sum(), inputs[0], create_graph=True)


@both_forms
@pytest.mark.parametrize('autocast', [False, True], ids=['plain', 'autocast'])
@pytest.mark.parametrize('n', [3 * 5, 31 * 17], ids=['N<C', 'N>C'])
@pytest.mark.parametrize('dtype', HALF_TOLERANCE, ids=str)
def test_low_precision_beyond_float16(form, dtype, n, autocast, device):
    """u * v exceeds 65504 while the output and its gradients do not."""
    if device == 'cpu' and OLD_TORCH and dtype == torch.float16:
        pytest.skip('this torch has no float16 on a CPU')
    c = 24
    gen = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=gen, device='cpu')
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
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = poly_nl_loop(*exact)
    u, v = (torch.einsum('oi,bin->bon', w, exact[0]) for w in exact[1:3])
    assert (u * v).mean(-1).abs().min() > 65504
    branch = truth - exact[4] * exact[0]
    assert branch.norm() > truth.norm() / 2

    with torch.autocast(device, dtype=dtype, enabled=autocast):
        y = FORMS[form](*inputs)
    assert y.dtype == dtype
    assert_near(y, truth, HALF_TOLERANCE[dtype])
    dy = dy.to(device, dtype)
    gots = gradients(y, inputs, dy)
    for name, want in gradients(truth, exact, dy.double()).items():
        assert gots[name].dtype == stored
        assert_near(gots[name], want, 2 * HALF_TOLERANCE[dtype], name)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=autocast):
        assert_near(FORMS[form](*inputs), truth, HALF_TOLERANCE[dtype])


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
        assert on_x(*inputs, form=form).shape == (2, 5, 7, 3)


def test_which_form_ran():
    """By the multiply-adds of each form, and by its node in the graph."""
    c, n = 16, 128
    inputs = make_inputs((1, c, n))
    with torch.no_grad():
        direct = count_flops(FORMS['direct'], *inputs)[0] / 2
        gram = count_flops(FORMS['gram'], *inputs)[0] / 2
        assert direct == 3 * n * c**2
        assert gram == 2 * n * c**2 + c**3
        flops = {
            form: count_flops(lambda f=form: on_x(*inputs, form=f))[0] / 2
            for form in ops.FORMS
        }
    assert flops == {'direct': direct, 'gram': gram, 'auto': gram}
    moments = '_GateOfBackward'
    assert moments in nodes_of(FORMS['gram'](*inputs))
    assert moments not in nodes_of(FORMS['direct'](*inputs))


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
    wants = gradients(FORMS['gram'](*inputs), inputs, dy)
    frozen = [
        t.detach().requires_grad_(k in wanted) for k, t in zip(NAMES, inputs)
    ]
    y = FORMS['gram'](*frozen)
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
        y = FORMS['gram'](*inputs)
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
    kept = saved_tensors(FORMS['gram'], inputs)
    large = [t for t in kept if t.numel() * t.element_size() >= size / 2]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    assert sum(t.numel() * t.element_size() for t in large) <= 1.1 * size
    # The direct form shows that the measure sees what is kept.
    direct = saved_tensors(FORMS['direct'], inputs)
    assert len([t for t in direct if t.numel() >= x.numel() / 2]) >= 4


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
        inputs.update(change)
        form = inputs.pop('form', 'auto')
        on_x(*inputs.values(), form=form)
