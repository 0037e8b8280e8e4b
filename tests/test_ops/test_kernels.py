"""The kernels for a GPU, on the CPU by Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/test_ops/test_kernels.py

as tools/run_tests.sh does, in an environment that has Triton. There, too, in
about two minutes: that errors in low precision are at most twice those of the
formula, and none at beta = 0, of tests/test_ops/test_precision.py -k 'twice or
overflows'.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    HALF_TOLERANCE,
    after_conv,
    assert_all_near,
    assert_near,
    behind,
    count_flops,
    gradients,
    make_inputs,
    make_pair,
    on_x,
    strided,
)
from oracles import poly_nl_loop, poly_sa_loop
from torch.utils._python_dispatch import TorchDispatchMode

from polynl_mm.attention import PolySA
from polynl_mm.fusion import fuse_poly_nl
from polynl_mm.layers import PolyNL2d
from polynl_mm.ops.choice import BEHIND, ON_X, cost
from polynl_mm.ops.precision import policy

if os.environ.get('TRITON_INTERPRET') != '1':
    pytest.skip(
        "kernels run on a CPU by Triton's interpreter only, see run_tests.sh",
        allow_module_level=True,
    )

from polynl_mm.ops import operators, triton  # noqa: E402

both_forms = pytest.mark.parametrize('form', ['gram', 'direct'])
each_form = pytest.mark.parametrize('form', ON_X + BEHIND, ids=str)
each_way = pytest.mark.parametrize('backward', [False, True])
each_bias = pytest.mark.parametrize('bias', [False, True])
OPERATORS = triton.__all__
# TF32 has the mantissa of float16.
TOLERANCE = {torch.float32: 4e-3, **HALF_TOLERANCE}


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Kernels and products, in the order in which they are launched."""
    names, launch, multiply = [], triton.launch, triton.multiply

    def record(kernel, grid, *args, **meta):
        names.append(kernel.__name__)
        # What the interpreter does is none of the operation's.
        with torch.utils._python_dispatch._disable_current_modes():
            launch(kernel, grid, *args, **meta)

    def record_product(*args, **options):
        names.append('multiply')
        with torch.utils._python_dispatch._disable_current_modes():
            return multiply(*args, **options)

    monkeypatch.setattr(triton, 'launch', record)
    monkeypatch.setattr(triton, 'multiply', record_product)
    return names


@pytest.fixture
def inside(monkeypatch):
    """What an operator does shows to modes, as if it were called plainly."""
    for name in OPERATORS:
        monkeypatch.setattr(operators, f'_{name}', getattr(triton, name))


# ---------------------------------------------------- against a slow truth


@both_forms
@each_bias
@pytest.mark.parametrize(
    'shape',
    [(2, 7, 3), (2, 5, 7, 3), (0, 5, 3, 2), (3, 1, 2), (1, 3, 2, 3, 7)],
)
def test_on_x(form, bias, shape, launched):
    inputs = make_inputs(shape, bias)
    truth = poly_nl_loop(*inputs)
    dy = torch.randn_like(truth)
    y = on_x(*inputs, form=form)
    assert_near(y, truth, 1e-13)
    assert_all_near(
        gradients(y, inputs, dy), gradients(truth, inputs, dy), 1e-12
    )
    assert 'fold_kernel' in launched
    assert ('gate_kernel' in launched) == (form == 'gram')


@both_forms
@each_bias
@pytest.mark.parametrize('shape, c', [((2, 5, 7, 3), 7), ((2, 7, 3), 5)])
def test_behind_a_convolution(form, bias, shape, c):
    inputs = make_pair(shape, c, bias)
    truth = after_conv(*inputs)
    dy = torch.randn_like(truth)
    y = behind(*inputs, form=form)
    assert_near(y, truth, 1e-13)
    assert_all_near(
        gradients(y, inputs, dy), gradients(truth, inputs, dy), 1e-12
    )


@both_forms
@pytest.mark.parametrize('door', [on_x, behind])
def test_more_than_a_block_of_each(form, door):
    """Channels of no power of two, over several tiles."""
    if door is on_x:
        inputs = make_inputs((2, 67, 1301), bias=True)
    else:
        inputs = make_pair((2, 67, 1301), 131, bias=True)
    exact = [t.detach().requires_grad_() for t in inputs]
    truth = plain(door, exact)
    dy = torch.randn_like(truth)
    y = door(*inputs, form=form)
    assert_near(y, truth, 1e-12)
    assert_all_near(
        gradients(y, inputs, dy), gradients(truth, exact, dy), 1e-11
    )


def plain(door, inputs):
    """The paper's formula in a line."""
    x, *params = inputs
    if door is behind:
        a, b, *params = params
        x = torch.einsum('oc,bcn->bon', a, x) + b[:, None]
    w1, w2, w3, alpha, beta, b1, b2, b3 = params

    def project(w, x, b):
        y = torch.einsum('oc,bcn->bon', w, x)
        return y if b is None else y + b[:, None]

    gate = (project(w1, x, b1) * project(w2, x, b2)).mean(2, keepdim=True)
    return alpha * x + beta * project(w3, gate * x, b3)


@both_forms
@pytest.mark.parametrize('kind', ['channels_last', 'sliced', 'transposed'])
@pytest.mark.parametrize('door', [on_x, behind])
def test_any_memory_layout(form, kind, door):
    inputs = (
        make_inputs((2, 5, 7, 3), bias=True)
        if door is on_x
        else make_pair((2, 5, 7, 3), 9, bias=True)
    )
    laid = [strided(kind, inputs[0].detach()).requires_grad_(), *inputs[1:]]
    want, got = door(*inputs, form=form), door(*laid, form=form)
    dy = torch.randn_like(want)
    assert_near(got, want, 1e-13)
    assert_all_near(
        gradients(got, laid, strided(kind, dy)),
        gradients(want, inputs, dy),
        1e-12,
    )
    if kind == 'channels_last':
        assert got.is_contiguous(memory_format=torch.channels_last)


@both_forms
@pytest.mark.parametrize('door', [on_x, behind])
def test_weights_and_biases_of_any_stride(form, door):
    inputs = (
        make_inputs((2, 5, 7, 3), bias=True)
        if door is on_x
        else make_pair((2, 5, 7, 3), 9, bias=True)
    )
    want = door(*inputs, form=form)
    apart = [torch.stack([t, t + 1], -1)[..., 0] for t in inputs[1:]]
    assert not apart[-1].is_contiguous()
    assert_near(door(inputs[0], *apart, form=form), want, 1e-13)


def tf32(t):
    """The nearest number of TF32."""
    bits = t.contiguous().view(torch.int32) + 0x1000
    return (bits & -0x2000).view(torch.float32)


@both_forms
@pytest.mark.parametrize(
    'dtype', [torch.float16, torch.bfloat16, torch.float32]
)
@pytest.mark.parametrize('door', [on_x, behind])
def test_in_the_precision_of_a_card(form, dtype, door, monkeypatch):
    """Against float64, all gradients; float32 in TF32."""
    multiply = triton.multiply

    def multiply_in_tf32(y, a, b, precision, add=False):
        if precision == 'tf32' and a.dtype == torch.float32:
            a, b = tf32(a), tf32(b)
        return multiply(y, a, b, precision, add)

    monkeypatch.setattr(
        triton, 'precision_for', lambda x: policy(x.dtype, (9, 0), True)
    )
    monkeypatch.setattr(triton, 'multiply', multiply_in_tf32)
    inputs = (
        make_inputs((2, 21, 90), True, torch.float32)
        if door is on_x
        else make_pair((2, 21, 90), 37, True, torch.float32)
    )
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with torch.no_grad():
        exact[0].copy_(exact[0].to(dtype))
    truth = plain(door, exact)
    dy = torch.randn_like(truth).to(dtype)
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        y = door(*inputs, form=form)
    assert y.dtype == dtype
    wants = gradients(truth, exact, dy.double())
    gots = gradients(y, inputs, dy)
    for name, want in {'y': truth, **wants}.items():
        got = y if name == 'y' else gots[name]
        size = want.norm()
        if want.numel() == 1:  # a sum of both signs, small by chance
            size = torch.maximum(size, dy.double().norm())
        error = (got.double() - want).norm() / size
        assert error < TOLERANCE[dtype], (name, error)


@both_forms
@pytest.mark.parametrize('door', [on_x, behind])
def test_gradient_does_not_see_autocast(form, door, monkeypatch):
    inputs = (
        make_inputs((2, 5, 7, 3), True, torch.float32)
        if door is on_x
        else make_pair((2, 5, 7, 3), 9, True, torch.float32)
    )
    y = door(*inputs, form=form)
    launch, seen = triton.launch, []

    def look(kernel, *args, **meta):
        seen.append((kernel.__name__, torch.is_autocast_enabled('cpu')))
        launch(kernel, *args, **meta)

    monkeypatch.setattr(triton, 'launch', look)
    with torch.autocast('cpu', torch.bfloat16):
        torch.autograd.grad(y, [inputs[0], inputs[3]], torch.randn_like(y))
    # The projections know no features that could tell.
    behind_x = [on for name, on in seen if name.startswith(('fold', 'gate'))]
    assert behind_x and not any(behind_x)


@both_forms
@pytest.mark.filterwarnings('ignore:.*encountered in:RuntimeWarning')
def test_identity_of_features_whose_gate_overflows(form, launched):
    """At beta = 0, where 0 times infinity would be NaN."""
    inputs = [t.detach().float() for t in make_inputs((2, 16, 3, 5), True)]
    inputs[0] = inputs[0].sign() * 1e25
    inputs[4].fill_(1)
    inputs[5].fill_(0)
    assert torch.equal(on_x(*inputs, form=form), inputs[0])
    assert 'fold_kernel' in launched


@both_forms
@pytest.mark.parametrize('shared', [False, True])
def test_weights_of_positions_and_a_pool(form, shared):
    inputs = make_inputs((2, 5, 7, 3), bias=True)
    weights = torch.rand(1 if shared else 2, 7, 3, dtype=torch.float64)
    weights[:, 2] = 0
    x, *params = inputs
    b, c, *_ = x.shape
    flat = (weights / weights.flatten(1).sum(1)[:, None, None]).flatten(1)

    def mean(g):
        return g.mean(0, keepdim=True).expand_as(g)

    def project(w, x, bias):
        return torch.einsum('oc,bcn->bon', w, x) + bias[:, None]

    w1, w2, w3, alpha, beta, b1, b2, b3 = params
    xf = x.flatten(2)
    gate = project(w1, xf, b1) * project(w2, xf, b2) * flat[:, None]
    gate = mean(gate.sum(2))
    truth = alpha * xf + beta * project(w3, gate[:, :, None] * xf, b3)
    y = on_x(*inputs, form=form, weights=weights, pool=mean)
    dy = torch.randn_like(y)
    assert_near(y.flatten(2), truth, 1e-13)
    assert_all_near(
        gradients(y, inputs, dy),
        gradients(truth, inputs, dy.flatten(2)),
        1e-12,
    )


@both_forms
def test_tokens(form, launched):
    """Poly-SA, of padded images: rows of channels in, and out."""
    torch.manual_seed(0)
    layer = PolySA(6, 2, form=form).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(7) > torch.tensor([[6], [3]])
    y = layer(x, key_padding_mask=mask)
    assert launched and y.is_contiguous()
    weights = [t.detach() for t in layer.params]
    norm = layer.norm.weight, layer.norm.bias, layer.norm.eps
    loop = dict(heads=2, norm=norm, weights=(~mask).double())
    truth = poly_sa_loop(x, *weights, **loop)
    assert_near(y, truth, 1e-12)
    dy = torch.randn_like(y)
    (got,), (want,) = (torch.autograd.grad(t, x, dy) for t in (y, truth))
    assert_near(got, want, 1e-11)


@pytest.mark.parametrize('door', [on_x, behind])
def test_second_derivatives(door):
    """Those of direct; the gram form has none, and says so."""
    inputs = (
        make_inputs((1, 3, 4), bias=True)
        if door is on_x
        else make_pair((1, 2, 4), 3, bias=True)
    )

    def penalty(y):
        (dx,) = torch.autograd.grad(
            y.square().sum(), inputs[:1], create_graph=True
        )
        return torch.autograd.grad(dx.square().sum(), inputs)

    wants = penalty(plain(door, inputs))
    for got, want in zip(penalty(door(*inputs, form='direct')), wants):
        assert_near(got, want, 1e-11)
    with pytest.raises(RuntimeError, match="use form='direct'"):
        penalty(door(*inputs, form='gram'))


@pytest.mark.parametrize('of_x', [False, True])
@both_forms
def test_only_what_is_wanted_is_computed(form, of_x, launched):
    inputs = make_inputs((2, 5, 7))
    for t in inputs[:6]:
        t.requires_grad_((t is inputs[0]) == of_x)
    truth = plain(on_x, inputs)
    y = on_x(*inputs, form=form)
    dy, wanted = (
        torch.randn_like(y),
        [t for t in inputs[:6] if t.requires_grad],
    )
    launched.clear()
    gots = torch.autograd.grad(y, wanted, dy)
    for got, want in zip(gots, torch.autograd.grad(truth, wanted, dy)):
        assert_near(got, want, 1e-12)
    # The gate's gradient, through which that of x goes, is one of the matrix.
    products = launched.count('multiply')
    assert products == {(0, 'gram'): 1, (1, 'gram'): 4}.get(
        (of_x, form), products
    )


# --------------------------------------------------- launches, operations


VIEWS = {
    '_unsafe_view', 'alias', 'as_strided', 'detach', 'empty', 'empty_like',
    'expand', 'new_empty', 'new_empty_strided', 'select', 'slice', 'split',
    'squeeze', 't', 'transpose', 'unbind', 'unsqueeze', 'view',
}  # fmt: skip


class Counted(TorchDispatchMode):
    """What reaches the device beside kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f.overloadpacket.__name__ not in VIEWS:
            self.names.append(f.overloadpacket.__name__)
        return f(*args, **(kwargs or {}))


def runner(form, backward, dtype=torch.bfloat16, n=40, c=16, out=24):
    """A call under autocast, with all gradients or the forward alone."""
    door, make = (behind, make_pair) if form.behind else (on_x, make_inputs)
    shape = (2, c if form.behind else out, n)
    args = (out,) if form.behind else ()
    inputs = make(shape, *args, dtype=torch.float32)
    x = inputs[0].detach().to(dtype).requires_grad_()
    dy = torch.randn(2, out, n, dtype=dtype)

    def run():
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            y = door(x, *inputs[1:], form=form.name)
        if backward:
            y.backward(dy)

    def forward():
        with torch.no_grad():
            run()

    return run if backward else forward


@each_way
@each_form
def test_launches(form, backward, launched, inside):
    """As choice has them, casts included."""
    run = runner(form, backward)
    launched.clear()
    with Counted() as counter:
        run()
    found = len(launched) + len(counter.names)
    narrow = 16 if form.behind else None
    want = cost(form, narrow, 24, backward, lean=True).launches
    if form.behind and not backward:
        want += 3  # the projections, which a trained model has once for all
    assert found == want, (launched, counter.names)
    assert found <= (34 if form.behind else 20)


def test_launches_of_a_fused_layer_with_its_norm(
    launched, inside, launches_cost_nothing
):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 16, 1, bias=False),
        torch.nn.BatchNorm2d(16).eval(),
        PolyNL2d(16, beta_init=0.5, form='gram'),
    )
    assert len(fuse_poly_nl(model, trainable=True)[1].fused) == 1
    h = torch.randn(2, 4, 40, 5, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(2, 16, 40, 5, dtype=torch.bfloat16)
    counts = []
    with Counted() as counter:
        with torch.autocast('cpu', torch.bfloat16):
            y = model(h)
        counts.append(len(launched) + len(counter.names))
        y.backward(dy)
        counts.append(len(launched) + len(counter.names))
    assert launched.count('evaluated_kernel') == 1
    assert counts == [14, 36], (launched, counter.names)


@each_way
@each_form
def test_counters_see_the_products(form, backward):
    images, c, out, n = 2, 16, 24, 40
    run = runner(form, backward)
    macs = count_flops(run)[0] / 2
    narrow = c if form.behind else out
    projections = 2 * out**2 * c if form.behind else 0
    if form.name == 'direct':
        want = n * 2 * out * narrow  # u, v
    else:
        want = n * narrow**2 + (1 + backward) * out * narrow**2
    if backward:
        if form.name == 'direct':
            want += n * 4 * out * narrow
        else:
            want += n * narrow**2 + out * narrow**2
    steps = 3 if backward else 1
    want += steps * n * out * narrow
    if form.behind:
        want += steps * out**2 * c
        projections *= 3 if backward else 1
    assert macs == images * want + projections


# ---------------------------------------------------- operators, programs


@each_bias
@each_form
def test_operators_are_what_they_say(form, bias, monkeypatch):
    """Schemas, fake kernels and what is traced of every operator called."""
    calls = {}
    for name in OPERATORS:
        operator = getattr(operators, f'_{name}')

        def call(*args, name=name, operator=operator):
            kept = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: t.detach().clone(), args
            )
            calls[name] = operator, kept
            return operator(*args)

        monkeypatch.setattr(operators, f'_{name}', call)
    make, door = (make_pair, behind) if form.behind else (make_inputs, on_x)
    args = ((2, 3, 4), 5, bias) if form.behind else ((2, 3, 4), bias)
    inputs = make(*args, dtype=torch.float32)
    door(*inputs, form=form.name).sum().backward()
    wanted = {'gate', 'gate_adjoint', 'add_product'}
    wanted |= {'apply_gate', 'apply_gate_adjoint'}
    if form.behind:
        wanted |= {'project', 'project_adjoint'}
    assert set(calls) == wanted
    torch.use_deterministic_algorithms(False)  # NaN of fresh memory differ
    for operator, args in calls.values():
        torch.library.opcheck(operator, args)


@pytest.mark.parametrize('affine', [False, True])
@each_bias
def test_an_evaluated_norm_in_the_convolution(affine, bias):
    norm = torch.nn.BatchNorm1d(5, affine=affine).double().eval()
    conv = torch.nn.Conv1d(3, 5, 1, bias=bias).double()
    for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        if t is not None:
            t.data.uniform_(0.5, 2)
    w = conv.weight.flatten(1)
    args = (w, conv.bias, norm.running_mean, norm.running_var, norm.eps)
    a, b = operators.evaluated(*args, norm.weight, norm.bias)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    want = norm(conv(x))
    got = torch.einsum('oc,bcn->bon', a, x) + b[:, None]
    assert_near(got, want, 1e-13)
    wanted = [*conv.parameters(), *norm.parameters()]
    dy = torch.randn_like(want)
    for one, two in zip(
        torch.autograd.grad(got, wanted, dy, retain_graph=True),
        torch.autograd.grad(want, wanted, dy, retain_graph=True),
    ):
        assert_near(one, two, 1e-12)
    second = []
    for y in (got, want):
        dw, *_ = torch.autograd.grad(
            y.square().sum(), wanted, create_graph=True
        )
        second.append(torch.autograd.grad(dw.square().sum(), wanted))
    for one, two in zip(*second):
        assert_near(one, two, 1e-11)
    kept = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    norms = [None if t is None else t.detach() for t in norm.parameters()]
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(
        operators._evaluated, (*kept, *(norms or (None, None)))
    )


@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
@pytest.mark.parametrize('fused', [False, True])
@both_forms
def test_compiled_in_one_graph(form, fused, backend, launches_cost_nothing):
    """Within a network, by operators, the same as without a compiler."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 1),
        torch.nn.BatchNorm2d(12).eval(),
        PolyNL2d(12, beta_init=0.5, form=form),
        torch.nn.ReLU(),
        PolyNL2d(12, beta_init=0.5, form=form),
    )
    if fused:
        assert len(fuse_poly_nl(model, trainable=True)[1].fused) == 1
    model, x = model.double(), torch.randn(2, 3, 40, 2).double()
    graphs = []

    def backend_of(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend_of)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    for got, want in zip(*results):
        assert_near(got, want, 1e-12)
    assert len(graphs) == 1
    code = graphs[0].print_readable(False)
    assert 'polynl_mm.gate' in code
    assert ('polynl_mm.project' in code) == fused
    assert ('polynl_mm.evaluated' in code) == fused


# ------------------------------------------------------------ what is built


def test_what_a_card_would_run():
    """Compiled for sm_80 and sm_90: no spills, no atomics."""
    environment = {**os.environ}
    del environment['TRITON_INTERPRET']
    told = subprocess.run(
        [sys.executable, Path(__file__).with_name('builds.py')],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    rows = [json.loads(line) for line in told.stdout.splitlines()]
    kernels = {name for name in vars(triton) if name.endswith('_kernel')}
    for capability in (80, 90):
        built = [row for row in rows if row['capability'] == capability]
        assert {row['kernel'] for row in built} == kernels
    for row in rows:
        assert row['spilled'] == 0 and not row['atomics'], row
        # What a block may have on a card of the sort of an RTX 3090, too.
        assert row['shared'] <= 99 * 1024, row
