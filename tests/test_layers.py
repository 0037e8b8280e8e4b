"""The layers: parameters, initial values, errors. Hosts: test_hosts.py."""

import warnings

import pytest
import torch
from helpers import HALF_TOLERANCE, OLD_TORCH, assert_near, count_flops
from mmcv.cnn import build_plugin_layer
from mmengine.analysis import get_model_complexity_info
from mmengine.model import kaiming_init
from oracles import poly_nl_loop
from torch import nn
from torch.ao.nn.qat import Conv2d as FakeQuantised
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import prune

from polynl_mm.layers import PolyNL1d, PolyNL2d, PolyNL3d
from polynl_mm.ops import FORMS

LAYERS = {1: PolyNL1d, 2: PolyNL2d, 3: PolyNL3d}
SPATIAL = {1: (11,), 2: (7, 3), 3: (3, 2, 5)}
KEYS = ['alpha', 'beta', 'w1.weight', 'w2.weight', 'w3.weight']

each_layer = pytest.mark.parametrize('dims', LAYERS)


def oracle(layer, x):
    """The layer's parameters through the float64 loop."""
    p = {k: v.detach().double() for k, v in layer.state_dict().items()}
    weights = [p[f'w{i}.weight'].flatten(1) for i in (1, 2, 3)]
    biases = [p.get(f'w{i}.bias') for i in (1, 2, 3)]
    return poly_nl_loop(x.double(), *weights, p['alpha'], p['beta'], *biases)


@each_layer
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('form', FORMS)
def test_layer_is_the_operation(dims, bias, form):
    layer = LAYERS[dims](
        5, alpha_init=0.7, beta_init=-1.3, bias=bias, form=form
    )
    biases = ['w1.bias', 'w2.bias', 'w3.bias'] if bias else []
    assert sorted(layer.state_dict()) == sorted(KEYS + biases)
    if bias:
        for conv in (layer.w1, layer.w2, layer.w3):
            nn.init.normal_(conv.bias)
    x = torch.randn(2, 5, *SPATIAL[dims])
    y = layer(x)
    assert_near(y, oracle(layer, x), 1e-5)
    y.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_parts_of_a_state_dict_are_taken():
    """What is missing or unknown is torch's to tell, by strict."""
    layer = PolyNL2d(5)
    keys = layer.load_state_dict(
        {'alpha': torch.tensor([3.0]), 'other': torch.zeros(1)}, strict=False
    )
    assert keys.unexpected_keys == ['other'] and layer.alpha.item() == 3


def test_checkpoint_fits_every_form():
    layers = [PolyNL2d(5, beta_init=0.5, form=form) for form in FORMS]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 5, 7, 3)
    for layer in layers[1:]:
        assert_near(layer(x), layers[0](x).detach(), 1e-5)


def test_the_form_asked_for_runs():
    c, n = 8, 64
    x = torch.randn(1, c, 8, 8)
    with torch.no_grad():
        macs = {
            form: count_flops(PolyNL2d(c, form=form), x)[0] // 2
            for form in ('direct', 'gram')
        }
    assert macs == dict(direct=3 * n * c**2, gram=2 * n * c**2 + c**3)


@pytest.mark.parametrize(
    'start',
    [dict(), dict(beta_init=1.0, zero_init_w3=True)],
    ids=['beta=0', 'w3=0'],
)
def test_identity_at_start_which_can_learn(start):
    layer = PolyNL2d(5, **start)
    x = torch.randn(2, 5, 7, 3)
    assert torch.equal(layer(x), x)
    # A host without a checkpoint initialises every convolution, then calls
    # init_weights of the children that have one.
    for conv in (layer.w1, layer.w2, layer.w3):
        kaiming_init(conv)
    layer.init_weights()
    assert torch.equal(layer(x), x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (layer(x) - x.roll(1, 0)).square().mean().backward()
        optimizer.step()
    moved = [n for n, p in layer.named_parameters() if p.grad.abs().max() > 0]
    assert sorted(moved) == KEYS
    assert not torch.equal(layer(x), x)


def test_initial_values_by_argument():
    layer = PolyNL2d(256, alpha_init=0.5, beta_init=0.25)
    assert layer.alpha.shape == layer.beta.shape == (1,)
    assert layer.alpha.item() == 0.5 and layer.beta.item() == 0.25
    for conv in (layer.w1, layer.w2, layer.w3):
        # Keeps the variance of a vector: 1 / C.
        assert conv.weight.var().item() == pytest.approx(1 / 256, rel=0.05)


@pytest.mark.parametrize('form', ['direct', 'gram'])
def test_norm_of_the_branch(form):
    layer = PolyNL2d(
        6,
        alpha_init=0.7,
        beta_init=-1.3,
        norm_cfg=dict(type='GN', num_groups=2),
        form=form,
    )
    assert sorted(layer.state_dict()) == sorted(
        [*KEYS, 'norm.weight', 'norm.bias']
    )
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    x = torch.randn(2, 6, 7, 3)
    plain = PolyNL2d(6, alpha_init=0.0, beta_init=1.0)
    plain.load_state_dict(
        {
            **{k: v for k, v in layer.state_dict().items() if k[0] == 'w'},
            'alpha': torch.zeros(1),
            'beta': torch.ones(1),
        }
    )
    branch = oracle(plain, x)
    norm = layer.norm.double()
    want = 0.7 * x.double() - 1.3 * norm(branch)
    norm.float()
    assert_near(layer(x), want.detach(), 1e-5)


@pytest.mark.parametrize('form', ['direct', 'gram'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_norm_of_a_branch_beyond_float16(form, dtype):
    if dtype == torch.float16 and OLD_TORCH:
        pytest.skip('this torch has no float16 on a CPU')
    norm_cfg = dict(type='GN', num_groups=2)
    layer = PolyNL2d(6, beta_init=1.0, norm_cfg=norm_cfg, form=form)
    plain = PolyNL2d(6, alpha_init=0.0, beta_init=1.0)
    plain.load_state_dict(
        {**layer.state_dict(), **plain.state_dict()}
        | {k: v for k, v in layer.state_dict().items() if k[0] == 'w'},
        strict=False,
    )
    x = (100 * torch.randn(2, 6, 7, 3)).to(dtype)
    branch = oracle(plain, x)
    assert branch.abs().max() > 65504
    want = x.double() + torch.nn.functional.group_norm(branch, 2)
    with torch.autocast('cpu', dtype=dtype):
        y = layer(x)
        assert y.dtype == plain(x).dtype == dtype
    assert_near(y, want, HALF_TOLERANCE[dtype])


@pytest.mark.parametrize('norm', [None, dict(type='GN', num_groups=2)])
def test_pool_is_given_the_gate(norm):
    layer = PolyNL2d(6, beta_init=0.5, norm_cfg=norm)
    x, gates = torch.randn(2, 6, 7, 3), []
    plain = layer(x)

    def pool(g):
        gates.append(g)
        return g.roll(1, 1)

    layer.around = lambda layer, x: (pool, None)
    assert not torch.allclose(layer(x), plain, atol=1e-2)
    assert [g.shape for g in gates] == [(2, 6)]


@pytest.mark.parametrize('norm', [None, dict(type='GN', num_groups=2)])
@pytest.mark.parametrize('pool', [None, lambda g: g.roll(1, 1)])
def test_watched_it_is_the_same(norm, pool):
    """To the last bit, and its gate is the one that was pooled."""
    layer = PolyNL2d(6, beta_init=0.5, norm_cfg=norm)
    x, calls = torch.randn(2, 6, 7, 3), []
    layer.watch = calls.append
    layer(x)
    if pool is not None:
        layer.around = lambda layer, x: (pool, None)
    watched = layer(x)
    layer.watch = None
    assert torch.equal(watched, layer(x))
    alone, pooled = (call.gate for call in calls)
    assert torch.equal(pooled, alone if pool is None else pool(alone))
    assert [call.pooled for call in calls] == [False, pool is not None]


@each_layer
@pytest.mark.parametrize('kind', ['BN', 'IN'])
def test_norm_of_the_right_dimension(dims, kind):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        layer = LAYERS[dims](6, norm_cfg=dict(type=kind))
    x = torch.randn(2, 6, *SPATIAL[dims])
    assert torch.equal(layer(x), x)


class Adapter(nn.Module):
    """A convolution and what was learnt beside it (LoRA)."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.up = conv.requires_grad_(False), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return self.conv(x) + self.up(x)


def observed(conv):
    """As quantisation begins, with an observer of what comes out."""
    conv.qconfig = torch.ao.quantization.get_default_qconfig('x86')
    return torch.ao.quantization.prepare(nn.Sequential(conv))[0]


def pruned(conv):
    return prune.l1_unstructured(conv, 'weight', amount=0.5)


def for_quantisation(conv):
    return FakeQuantised(6, 6, 1, qconfig=get_default_qat_qconfig('x86'))


# What hangs on convolutions, and whether they are called for it.
MORE = {
    'weight_norm, old': (nn.utils.weight_norm, True),
    'spectral_norm, old': (nn.utils.spectral_norm, True),
    'weight_norm': (nn.utils.parametrizations.weight_norm, False),
    'spectral_norm': (nn.utils.parametrizations.spectral_norm, False),
    'pruned': (pruned, True),
    'adapter': (Adapter, True),
    'observed': (observed, True),
    'for quantisation': (for_quantisation, True),
}


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.filterwarnings('ignore:.*weight_norm.*:UserWarning')
@pytest.mark.parametrize('kind', MORE)
@pytest.mark.parametrize('normed', [False, True])
def test_convolutions_that_are_more_than_their_weights(kind, normed):
    """What they compute enters, in steps that each learn all of it."""
    change, calls = MORE[kind]
    torch.manual_seed(0)
    norm_cfg = dict(type='GN', num_groups=2) if normed else None
    layer = PolyNL2d(6, 0.7, -1.3, bias=True, norm_cfg=norm_cfg)
    for name in ('w1', 'w2', 'w3'):
        setattr(layer, name, change(getattr(layer, name)))
    assert layer.calls_convolutions is calls
    x = torch.randn(2, 6, 7, 3)
    weights = torch.rand(2, 7, 3)
    layer.around = lambda layer, x: (None, weights)
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    for _ in range(2):
        layer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    for name, p in layer.named_parameters():
        assert not p.requires_grad or p.grad.abs().max() > 0, name
    layer.eval().apply(torch.ao.quantization.disable_observer)
    with torch.no_grad():
        y = layer(x)
        means = weights[:, None] / weights.sum((1, 2))[:, None, None, None]
        g = (layer.w1(x) * layer.w2(x) * means).sum((2, 3), keepdim=True)
        branch = layer.w3(g * x)
        branch = layer.norm(branch) if normed else branch
        assert_near(y, layer.alpha * x + layer.beta * branch, 1e-5)


@pytest.mark.parametrize('dtype', HALF_TOLERANCE, ids=str)
def test_called_convolutions_under_autocast(dtype):
    layer = PolyNL2d(6, 1, 0, bias=True)
    layer.w1.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 6, 7, 3).sign() * (3e4 if dtype == torch.float16 else 1)
    with torch.autocast('cpu', dtype=dtype):
        assert torch.equal(layer(x), x.to(dtype))
    layer.beta.data.fill_(0.7)
    with torch.autocast('cpu', dtype=dtype):
        y = layer(x / x.abs().max())
    want = oracle(layer, x / x.abs().max())
    assert_near(y.float(), want, HALF_TOLERANCE[dtype])


def test_flops_that_counters_with_hooks_see():
    """Those of the formula as it is written: the hooks see convolutions."""
    c, n = 16, 128
    counted = get_model_complexity_info(
        PolyNL2d(c), (c, 16, n // 16), show_table=False, show_arch=False
    )
    assert counted['flops'] == 3 * n * c**2


def test_batch_norm_warns_and_layer_norm_is_refused():
    with pytest.warns(UserWarning, match='norm_eval=True'):
        PolyNL2d(6, norm_cfg=dict(type='BN'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        PolyNL2d(6, norm_cfg=dict(type='GN', num_groups=2))
    with pytest.raises(ValueError, match="'LN'.*last axis.*GN"):
        PolyNL2d(6, norm_cfg=dict(type='LN'))


def test_plugin_contract():
    name, layer = build_plugin_layer(
        dict(type='polynl_mm.PolyNL2d', beta_init=0.5),
        in_channels=5,
        postfix='_1',
    )
    assert name == 'poly_nl_1'
    assert isinstance(layer, PolyNL2d) and layer.beta.item() == 0.5


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(in_channels=0), 'in_channels .*positive int, got 0'),
        (dict(in_channels=2.5), 'in_channels .*positive int, got 2.5'),
        (dict(in_channels=5, form='fast'), "form must be .*'fast'"),
        (
            dict(in_channels=5, zero_init_w3=True),
            'beta_init=0 with zero_init_w3=True can never learn',
        ),
        (
            dict(
                in_channels=6,
                beta_init=1.0,
                zero_init_w3=True,
                norm_cfg=dict(type='GN', num_groups=2),
            ),
            "norm_cfg=.*'GN'.* with zero_init_w3=True",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PolyNL2d(**arguments)


@each_layer
def test_bad_input_is_named(dims):
    layer = LAYERS[dims](5)
    name = type(layer).__name__
    with pytest.raises(ValueError, match=rf'{name} .*in_channels=5.*\(2, 6,'):
        layer(torch.randn(2, 6, *SPATIAL[dims]))
    with pytest.raises(ValueError, match=rf'{dims} spatial axes.*\(2, 5\)'):
        layer(torch.randn(2, 5))
