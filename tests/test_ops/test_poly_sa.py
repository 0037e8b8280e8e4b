"""Poly-SA of tokens against slow loops, in every form."""

from functools import partial

import pytest
import torch
from helpers import (
    HALF_TOLERANCE,
    OLD_TORCH,
    assert_all_near,
    assert_near,
    count_flops,
    randn,
)
from oracles import poly_sa_loop
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from polynl_mm.ops.attention import (
    HeadNorm,
    SAParams,
    poly_sa,
    poly_sa_calling,
)
from polynl_mm.ops.choice import TOKENS, choose

FORMS = ('direct', 'gram')
WEIGHTS = ('wq', 'wk', 'wv', 'wo')
BIASES = ('bq', 'bk', 'bv', 'bo')
EPS = 1e-6


def make_tokens(shape, *, bias=True, norm=True, learnt=False, seed=0):
    """x and what acts on it by name, with gradients; shape is B, N, H, d."""
    b, n, heads, width = shape
    gen, c = torch.Generator().manual_seed(seed), heads * width
    sizes = dict(x=(b, n, c), **dict.fromkeys(WEIGHTS, (c, c)))
    if bias:
        sizes.update(dict.fromkeys(BIASES, (c,)))
    if norm:
        sizes.update(gain=(width,), offset=(width,))
    if learnt:
        sizes.update(p1=(heads, n), p2=(heads, n))
    tensors = {k: randn(*size, generator=gen) for k, size in sizes.items()}
    for name in WEIGHTS:
        tensors[name] /= c**0.5
    return {k: t.requires_grad_() for k, t in tensors.items()}


def run(tensors, heads, kind='direct', weights=None, pool=None):
    """By a form, or, called, by linear layers."""
    t = dict(tensors)
    options = dict(num_heads=heads, weights=weights, pool=pool)
    if 'gain' in t:
        options['norm'] = HeadNorm(t.pop('gain'), t.pop('offset'), EPS)
    if 'p1' in t:
        options['positions'] = t.pop('p1'), t.pop('p2')
    x = t.pop('x')
    if kind != 'called':
        return poly_sa(x, SAParams(**t), form=kind, **options)

    def qkv(x):
        pairs = zip('qkv', WEIGHTS)
        return torch.cat(
            [F.linear(x, t[w], t.get(f'b{k}')) for k, w in pairs], -1
        )

    return poly_sa_calling(
        x, qkv, lambda z: F.linear(z, t['wo'], t.get('bo')), **options
    )


def loop(tensors, heads, weights=None):
    t = dict(tensors)
    norm = None
    if 'gain' in t:
        norm = t.pop('gain'), t.pop('offset'), EPS
    return poly_sa_loop(**t, heads=heads, norm=norm, weights=weights)


def gradients(y, tensors, dy):
    found = torch.autograd.grad(y, list(tensors.values()), dy)
    return dict(zip(tensors, found))


SHAPES = {
    'odd': (3, 11, 5, 3),
    'N<C': (2, 3, 3, 7),
    'N=1': (3, 1, 2, 5),
    'H=1': (2, 7, 1, 5),
    'B=1': (1, 13, 2, 5),
    'B=0': (0, 5, 2, 3),
}
KINDS = {
    'direct': dict(kind='direct'),
    'gram': dict(kind='gram'),
    'called': dict(kind='called'),
    'learnt': dict(kind='direct', learnt=True),
    'learnt, called': dict(kind='called', learnt=True),
}
each_kind = pytest.mark.parametrize('kind', KINDS)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def made(kind, shape, **options):
    """Tensors, and a function of them, for one of KINDS."""
    kind = dict(KINDS[kind])
    call = partial(run, heads=shape[2], kind=kind.pop('kind'))
    return make_tokens(shape, **kind, **options), call


@each_kind
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('norm', [False, True], ids=['', 'norm'])
def test_values_and_gradients(shape, kind, norm):
    shape = SHAPES[shape]
    for bias, counted in ((True, False), (False, True), (True, True)):
        tensors, call = made(kind, shape, bias=bias, norm=norm)
        weights = None
        if counted:  # neither of the loop's scale nor of its dtype
            weights = torch.arange(shape[0] * shape[1]).reshape(shape[:2]) % 3
            weights = weights.clamp_min(shape[1] == 1)
        scaled = weights
        if counted and 'p1' in tensors and weights.numel():
            largest = weights.amax(1, keepdim=True).clamp_min(1)
            scaled = weights / largest
        truth = loop(tensors, shape[2], scaled)
        y = call(tensors, weights=weights)
        assert y.is_contiguous()
        assert_near(y, truth, 1e-12)
        dy = torch.randn_like(truth)
        if truth.numel():
            wants = gradients(truth, tensors, dy)
            assert_all_near(gradients(y, tensors, dy), wants, 1e-9)
            assert all(w.abs().max() > 1e-6 for w in wants.values())
        with torch.no_grad():
            assert_near(call(tensors, weights=weights), truth, 1e-12)
            floats = {k: t.float() for k, t in tensors.items()}
            assert_near(call(floats, weights=weights), truth, 2e-4)


@each_kind
@pytest.mark.parametrize('only', ['x', 'wq', 'wv', 'bk', 'gain'])
def test_gradient_of_one_alone(kind, only):
    tensors, call = made(kind, (2, 5, 2, 3))
    y = call(tensors)
    dy = torch.randn_like(y)
    want = gradients(y, tensors, dy)[only]
    frozen = {
        k: t.detach().requires_grad_(k == only) for k, t in tensors.items()
    }
    call(frozen).backward(dy)
    assert_near(frozen[only].grad, want, 1e-11)
    assert all(t.grad is None for k, t in frozen.items() if k != only)


@each_kind
def test_gradcheck(kind):
    tensors, call = made(kind, (2, 3, 2, 3))
    weights = torch.tensor([[1.0, 0.5, 1.0], [1.0, 1.0, 0.0]])

    def of(*values):
        return call(dict(zip(tensors, values)), weights=weights)

    assert torch.autograd.gradcheck(of, tuple(tensors.values()))


@pytest.mark.parametrize('kind', ['direct', 'learnt'])
def test_direct_has_second_derivatives(kind):
    tensors, call = made(kind, (1, 2, 1, 3))
    assert torch.autograd.gradgradcheck(
        lambda *values: call(dict(zip(tensors, values))),
        tuple(tensors.values()),
    )


def test_gram_has_no_second_derivative():
    tensors, call = made('gram', (1, 2, 1, 3))
    with pytest.raises(RuntimeError, match='second derivative'):
        torch.autograd.grad(
            call(tensors).sum(), tensors['x'], create_graph=True
        )


@each_kind
def test_an_image_of_a_padded_batch_is_what_it_is_alone(kind):
    tensors, call = made(kind, (3, 11, 2, 3))
    lengths = (11, 4, 7)
    own = torch.arange(11) < torch.tensor(lengths)[:, None]
    y = call(tensors, weights=own)
    for i, n in enumerate(lengths):
        alone = {**tensors, 'x': tensors['x'][i : i + 1, :n]}
        for name in {'p1', 'p2'} & alone.keys():
            alone[name] = alone[name][:, :n]
        assert_near(y[i : i + 1, :n], call(alone).detach(), 1e-12)
    assert (y - call(tensors)).abs().max() > 1e-2
    # Where all is padding there is nothing to be pooled.
    own[1] = False
    y = call(tensors, weights=own)
    want = loop(tensors, 2, own)
    assert_near(y, want, 1e-12)


@each_kind
def test_pool_comes_before_the_norm(kind):
    tensors, call = made(kind, (2, 7, 2, 3))
    seen = []

    def pool(g):
        seen.append(g.shape)
        return g.mean(0, keepdim=True).expand_as(g) * 3

    y = call(tensors, pool=pool)
    assert seen == [(2, 6)]
    # Scaled before a norm, nothing of it is left; both images as one.
    image = tensors['x'].flatten(0, 1).unsqueeze(0)
    if 'p1' in tensors:
        twice = {k: tensors[k].repeat(1, 2) for k in ('p1', 'p2')}
        want = call({**tensors, **twice, 'x': image})
    else:
        want = call({**tensors, 'x': image})
    assert_near(y.flatten(0, 1), want[0].detach(), 1e-4)


# ------------------------------------------------------------ memory, layout


LAYOUTS = {
    'sliced': lambda x: torch.stack([x, x + 1], -1)[..., 0],
    'of a map': lambda x: x.mT.contiguous().mT,
    'expanded': lambda x: x[:, :1].expand_as(x),
}


@each_kind
@pytest.mark.parametrize('layout', LAYOUTS)
def test_any_strides(kind, layout):
    tensors, call = made(kind, (2, 7, 2, 3))
    x = LAYOUTS[layout](tensors['x'].detach())
    assert not x.is_contiguous()
    strided = {**tensors, 'x': x.requires_grad_()}
    plain = {**tensors, 'x': x.detach().contiguous().requires_grad_()}
    y, truth = call(strided), call(plain)
    assert_near(y, truth.detach(), 1e-12)
    dy = torch.randn_like(truth)
    assert_all_near(
        gradients(y, strided, dy), gradients(truth, plain, dy), 1e-11
    )


@each_kind
def test_result_may_be_changed_in_place(kind):
    tensors, call = made(kind, (2, 5, 2, 3))
    y = call(tensors)
    dy = torch.randn_like(y)
    wants = gradients(call(tensors) * 3 + 1, tensors, dy)
    y *= 3
    y += 1
    assert_all_near(gradients(y, tensors, dy), wants, 1e-11)


class Seen(TorchDispatchMode):
    """The largest tensor, and the copies of at least half a map."""

    def __init__(self, size):
        super().__init__()
        self.size, self.largest, self.copies = size, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_flatten(found)[0]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
                name = func.overloadpacket.__name__
                is_copy = name in ('clone', 'copy_', '_to_copy', 'contiguous')
                if is_copy and t.numel() >= self.size / 2:
                    self.copies.append(name)
        return found


@each_kind
def test_nothing_is_of_n_by_n_or_copied(kind, device):
    """Contiguous tokens are taken, and given, as they are."""
    n, heads, width = 512, 2, 4
    tensors, call = made(kind, (1, n, heads, width))
    size = tensors['x'].numel()
    with Seen(size) as seen:
        y = call(tensors)
        y.backward(torch.ones_like(y))
    called = 3 if kind.endswith('called') else 1  # q, k and v in one
    assert seen.largest <= called * size * 8
    assert seen.copies == []
    assert tensors['x'].grad.is_contiguous()


@pytest.mark.parametrize('kind', ['direct', 'gram', 'learnt'])
def test_flops(kind):
    n, c = 32, 8
    tensors, call = made(kind, (1, n, 2, c // 2))
    direct = 4 * n * c**2
    want = 2 * n * c**2 + 2 * c**3 if kind == 'gram' else direct
    with torch.no_grad():
        flops, _ = count_flops(call, tensors)
    # Some n of the biases: C x C products with vectors.
    assert 0 <= flops - 2 * want <= 2 * 4 * c**2
    dy = torch.randn(1, n, c, dtype=torch.float64)
    flops, _ = count_flops(lambda: call(tensors).backward(dy))
    if kind != 'gram':
        assert flops == 3 * 2 * direct
    else:
        assert flops < 2 * (5 * n * c**2 + 13 * c**3)


def test_auto_takes_what_is_expected_to_be_faster():
    taken = []
    for n in (4, 4096):
        tensors, call = made('direct', (1, n, 2, 32))
        with torch.no_grad():
            counts = {
                form: count_flops(partial(run, tensors, 2, form))[0]
                for form in (*FORMS, 'auto')
            }
        auto = counts.pop('auto')
        taken += [form for form, count in counts.items() if count == auto]
    assert taken == ['direct', 'gram']


@pytest.mark.parametrize('backward', [False, True])
def test_what_is_expected_to_be_faster(backward):
    """As it was measured, projects/layer_cost/README.md."""
    taken = [
        choose(TOKENS, n, 256, 256, backward).name for n in (196, 784, 3136)
    ]
    assert taken == ['direct', 'gram', 'gram']


# ----------------------------------------------------------------- precision


def formula(t, heads):
    """The same in plain PyTorch, by functions that autocast knows."""
    x = t['x']
    q, k, v = (F.linear(x, t['w' + i], t['b' + i]) for i in 'qkv')
    kv = (k * v).unflatten(2, (heads, -1))
    if 'p1' in t:
        g = (kv * t['p2'].mT.unsqueeze(2)).sum(1)
    else:
        g = kv.mean(1)
    g = F.layer_norm(g, g.shape[2:], t['gain'], t['offset'], EPS)
    q = q.unflatten(2, (heads, -1))
    if 'p1' in t:
        q = q * t['p1'].mT.unsqueeze(2)
    return F.linear((q * g.unsqueeze(1)).flatten(2), t['wo'], t['bo'])


@pytest.mark.parametrize('autocast', [False, True], ids=['plain', 'autocast'])
@pytest.mark.parametrize('dtype', HALF_TOLERANCE, ids=str)
@pytest.mark.parametrize('kind', ['direct', 'gram', 'learnt'])
def test_at_most_twice_the_error_of_the_formula(kind, dtype, autocast, device):
    """Against float64, in value and in every gradient."""
    if OLD_TORCH and device == 'cpu' and dtype == torch.float16:
        pytest.skip('this torch has no float16 on a CPU')
    shape, names, totals = (2, 64, 3, 8), [], [0, 0, 0]
    for seed in range(6):
        tensors, call = made(kind, shape, seed=seed)
        low = {k: t.detach().to(dtype) for k, t in tensors.items()}
        exact = {k: t.double().requires_grad_() for k, t in low.items()}
        truth = formula(exact, shape[2])
        dy = torch.randn_like(truth).to(dtype)
        wants = {'y': truth, **gradients(truth, exact, dy.double())}
        names = list(wants)
        totals[0] += torch.stack([w.norm() for w in wants.values()]) ** 2
        runs = (partial(formula, heads=shape[2]), call)
        for which, f in enumerate(runs, 1):
            stored = torch.float32 if autocast else dtype
            t = {k: v.to(stored).requires_grad_() for k, v in low.items()}
            with torch.autocast(device, dtype=dtype, enabled=autocast):
                y = f(t)
            assert y.dtype == dtype
            gots = {'y': y, **gradients(y, t, dy.to(y.dtype))}
            errors = [(gots[k] - wants[k]).norm() for k in names]
            totals[which] += torch.stack(errors) ** 2
    least = torch.finfo(dtype).eps / 4 * totals[0].sqrt()
    plain, ours = (t.sqrt() for t in totals[1:])
    ratios = dict(zip(names, (ours / plain.maximum(least)).tolist()))
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize('autocast', [False, True], ids=['plain', 'autocast'])
@pytest.mark.parametrize('norm', [False, True], ids=['', 'norm'])
@each_kind
def test_products_beyond_float16(kind, norm, autocast, device):
    """k v, and q g without a norm, exceed it; what comes out does not."""
    if OLD_TORCH and device == 'cpu':
        pytest.skip('this torch has no float16 on a CPU')
    shape = (2, 12, 2, 4)
    tensors, call = made(kind, shape, norm=norm)
    scales = dict(x=300.0, p2=1.0 if norm else 100.0)
    scales['wo'] = 1e-3 if norm else 1e-7
    half = {
        k: (t.detach() * scales.get(k, 1)).half() for k, t in tensors.items()
    }
    if not norm and kind.endswith('called'):
        pytest.skip('what a called projection is given is of float16')
    exact = {k: t.double() for k, t in half.items()}
    k, v = (F.linear(exact['x'], exact['w' + i]) for i in 'kv')
    assert (k * v).abs().max() > 65504
    truth = loop(exact, shape[2])
    stored = {k: t.float() if autocast else t for k, t in half.items()}
    stored = {k: t.requires_grad_() for k, t in stored.items()}
    with torch.autocast(device, dtype=torch.float16, enabled=autocast):
        y = call(stored)
    assert y.dtype == torch.float16
    assert_near(y, truth, 2 * HALF_TOLERANCE[torch.float16])
    (y.float() * 1e-3).sum().backward()
    if norm:
        assert all(t.grad.isfinite().all() for t in stored.values())


def test_backward_of_gram_does_not_see_autocast(device):
    """That of direct does as that of any linear layer."""
    tensors, call = made('gram', (2, 7, 2, 3))
    tensors = {k: t.detach().float() for k, t in tensors.items()}
    tensors = {k: t.requires_grad_() for k, t in tensors.items()}
    y = call(tensors)
    dy = torch.randn_like(y)
    wants = gradients(y, tensors, dy)
    y = call(tensors)
    with torch.autocast(device, dtype=torch.bfloat16):
        gots = gradients(y, tensors, dy)
    for name, want in wants.items():
        assert torch.equal(gots[name], want), name


# ----------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(x=torch.ones(2, 6)), r'^x .*\(B, N, C\).*\(2, 6\)'),
        (dict(x=torch.ones(2, 0, 6)), r'^x .*\(2, 0, 6\)'),
        (dict(x=None), r'^x .* got None'),
        (dict(x=torch.ones(2, 5, 6, dtype=torch.int32)), 'floating point'),
        (dict(x=torch.ones(2, 5, 6)), '^wq has dtype torch.float64 .*float32'),
        (dict(wo=torch.ones(6, 5).double()), r'^wo .*\(6, 6\).*\(6, 5\)'),
        (dict(wk=None), '^wk must be a tensor, got None'),
        (dict(bv=torch.ones(5).double()), r'^bv .*\(6,\).*\(5,\)'),
        (dict(gain=torch.ones(2).double()), r'^weight of norm .*\(3,\)'),
        (dict(p2=torch.ones(2, 4).double()), r'^p2 of positions .*\(2, 5\)'),
        (dict(heads=4), 'num_heads .*divisor of the 6 channels.* got 4'),
        (dict(heads=2.0), 'num_heads .* got 2.0'),
        (dict(kind='gram'), "form='gram' is for the mean"),
        (dict(kind='fast'), "form must be one of .*'fast'"),
        (dict(weights=torch.ones(2, 4)), r'weights .*\(2, 5\).*\(2, 4\)'),
        (dict(pool=lambda g: g[:1]), r'pool must return.*\(2, 6\).*\(1, 6\)'),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else '',
)
def test_bad_input_is_named(change, message):
    tensors = make_tokens((2, 5, 2, 3), learnt=True)
    options = {'heads': 2}
    for key, value in change.items():
        (tensors if key in tensors else options)[key] = value
    with pytest.raises(ValueError, match=message):
        run(tensors, **options)


def test_what_is_no_params_is_named():
    tensors = make_tokens((2, 5, 2, 3), norm=False)
    x, *p = tensors.values()
    with pytest.raises(ValueError, match='p must be SAParams, got a tuple'):
        poly_sa(x, tuple(p), 2)
