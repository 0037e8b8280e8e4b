"""The layer Poly-SA: parameters, padding, parts of images, state dicts."""

from copy import deepcopy

import pytest
import torch
from helpers import OLD_TORCH, assert_near
from mmengine.analysis import get_model_complexity_info
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import BaseDataElement
from oracles import poly_sa_loop
from torch import nn
from torch.ao.quantization import get_default_qconfig, prepare
from torch.nn.functional import interpolate

from polynl_mm import PolySA, shared_context
from polynl_mm.context import Crops, Frames, Windows, grid
from polynl_mm.layers import StateDictMismatch
from polynl_mm.padding import Pictures, pictures_in

KEYS = [
    *('norm.bias', 'norm.weight', 'proj.bias', 'proj.weight'),
    *('qkv.bias', 'qkv.weight'),
]
LEARNT = dict(pooling='learnt', num_tokens=13, num_extra_tokens=1)
each_form = pytest.mark.parametrize('form', ['direct', 'gram'])


def made(*args, **kwargs):
    """In double precision, with parameters that matter."""
    torch.manual_seed(0)
    layer = PolySA(*args, **kwargs).double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def oracle(layer, x, weights=None):
    """The layer's parameters through the loops."""
    p = {k: v.detach() for k, v in layer.state_dict().items()}
    biases = (None,) * 3
    if 'qkv.bias' in p:
        biases = p['qkv.bias'].chunk(3)
    norm = None
    if 'norm.bias' in p:
        norm = p['norm.weight'], p['norm.bias'], 1e-6
    return poly_sa_loop(
        x,
        *(*p['qkv.weight'].chunk(3), p['proj.weight']),
        *(*biases, p['proj.bias']),
        **dict(heads=layer.num_heads, norm=norm, weights=weights),
        **{k: p.get(k) for k in ('p1', 'p2')},
    )


@pytest.mark.parametrize(
    'options, changed',
    [
        (dict(), []),
        (dict(form='direct', qkv_bias=False), ['qkv.bias']),
        (dict(form='gram', norm=False), ['norm.bias', 'norm.weight']),
        (LEARNT, ['p1', 'p2']),
    ],
    ids=['auto', 'direct', 'gram', 'learnt'],
)
def test_layer_is_the_operation(options, changed):
    layer = made(10, 2, **options)
    assert set(layer.state_dict()) ^ set(KEYS) == set(changed)
    x = torch.randn(3, 13, 10, dtype=torch.float64)
    mask = torch.rand(3, 13) < 0.3
    assert_near(layer(x), oracle(layer, x), 1e-12)
    y = layer(x, key_padding_mask=mask)
    assert_near(y, oracle(layer, x, (~mask).double()), 1e-12)
    assert y.is_contiguous()
    y.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_initial_values():
    layer = PolySA(64, 4, **LEARNT)
    for p in (layer.qkv.weight, layer.proj.weight, layer.p1, layer.p2):
        assert p.std().item() == pytest.approx(0.02, rel=0.3)
    assert not layer.qkv.bias.any() and not layer.proj.bias.any()
    nn.init.ones_(layer.p1)
    layer.init_weights()
    assert layer.p1.std().item() == pytest.approx(0.02, rel=0.3)


def test_by_config():
    layer = MODELS.build(
        dict(type='polynl_mm.PolySA', embed_dims=8, num_heads=2)
    )
    assert type(layer) is PolySA and layer.norm.eps == 1e-6


@pytest.mark.parametrize('host', ['mmdet', 'mmseg'])
def test_takes_the_weights_of_the_attention_of_swin(host):
    backbones = pytest.importorskip(f'{host}.models.backbones.swin')
    attention = backbones.WindowMSA(8, 2, (3, 3))
    layer = PolySA(8, 2)
    keys = layer.load_state_dict(attention.state_dict(), strict=False)
    assert keys.missing_keys == ['norm.weight', 'norm.bias']
    assert all('relative_position' in k for k in keys.unexpected_keys)
    assert torch.equal(layer.qkv.weight, attention.qkv.weight)


class Adapter(nn.Module):
    """A linear layer and what was learnt beside it (LoRA)."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.up = nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x):
        return self.linear(x) + self.up(x)


def observed(linear):
    """As quantisation begins, with an observer of what comes out."""
    linear.qconfig = get_default_qconfig('x86')
    return prepare(nn.Sequential(linear))[0]


# What hangs on linear layers, and whether they are called for it.
MORE = {
    'adapter': (Adapter, True),
    'weight_norm, old': (nn.utils.weight_norm, True),
    'weight_norm': (nn.utils.parametrizations.weight_norm, False),
    'observed': (observed, True),
}


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('options', [{}, LEARNT], ids=['mean', 'learnt'])
@pytest.mark.parametrize('kind', MORE)
def test_linears_that_are_more_than_their_weights(kind, options):
    """What they compute enters, in steps that each learn all of it."""
    change, calls = MORE[kind]
    layer = PolySA(6, 2, **options)
    nn.init.normal_(layer.qkv.weight)
    for name in ('qkv', 'proj'):
        setattr(layer, name, change(getattr(layer, name)))
    assert layer.calls_linears is calls
    x = torch.randn(2, 13, 6)
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    for _ in range(2):
        layer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    for name, p in layer.named_parameters():
        assert not p.requires_grad or p.grad.abs().max() > 0, name
    layer.eval().apply(torch.ao.quantization.disable_observer)
    with torch.no_grad():
        q, k, v = layer.qkv(x).chunk(3, -1)
        kv = (k * v).unflatten(2, (2, 3))
        if options:
            kv = kv * layer.p2.mT.unsqueeze(2) * x.shape[1]
            q = (q.unflatten(2, (2, 3)) * layer.p1.mT.unsqueeze(2)).flatten(2)
        g = layer.norm(kv.mean(1, keepdim=True)).flatten(2)
        assert_near(layer(x), layer.proj(g * q), 1e-5)


class SideBySide(nn.ModuleList):
    """Several layers on the same tokens, as one program."""

    def forward(self, x, hw_shape=None, mask=None):
        return torch.stack([layer(x, hw_shape, mask) for layer in self])


@pytest.mark.skipif(OLD_TORCH, reason='both came of age in 2.5')
def test_compiled_and_exported():
    torch._dynamo.reset()
    # What has learnt vectors takes the direct form.
    options = dict(form='gram'), dict(pooling='learnt', num_tokens=12)
    layers = SideBySide([made(6, 2, **each) for each in options])
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    mask = torch.rand(2, 12) < 0.3

    def assert_right(y, x, weights=None):
        for layer, got in zip(layers, y):
            assert_near(got, oracle(layer, x, weights), 1e-12)

    compiled = torch.compile(layers, fullgraph=True, backend='aot_eager')
    y = compiled(x, (3, 4), mask)
    assert_right(y, x, (~mask).double())
    params = list(layers.parameters())
    dy = torch.randn_like(y)
    gots = torch.autograd.grad(y, params, dy)
    wants = torch.autograd.grad(layers(x, (3, 4), mask), params, dy)
    for got, want in zip(gots, wants):
        assert_near(got, want, 1e-11)
    layers[1] = made(6, 2)  # for any number of tokens
    auto = torch.export.Dim.AUTO
    sizes = {'x': {0: auto, 1: auto}}
    program = torch.export.export(layers, (x,), dynamic_shapes=sizes)
    other = x.repeat(2, 3, 1)[1:, 5:]
    assert_right(program.module()(other), other)


def test_flops_that_counters_with_hooks_see():
    """Those of the formula as it is written: the hooks see linear layers."""
    n, c = 64, 16
    for options in ({}, dict(form='gram')):
        counted = get_model_complexity_info(
            PolySA(c, 2, **options), (n, c), show_table=False, show_arch=False
        )
        assert counted['flops'] == pytest.approx(4 * n * c**2, rel=0.01)


# --------------------------------------------------------------- state dicts


def test_a_state_dict_of_other_tokens_is_told():
    small, large = (
        PolySA(8, 2, **LEARNT),
        PolySA(8, 2, pooling='learnt', num_tokens=21, num_extra_tokens=1),
    )
    model = nn.Sequential(large)
    state = nn.Sequential(small).state_dict()
    message = (
        r"^'0.p1' is for 13 tokens in the state dict, for 21 in the model: "
        'resize_on_load=True resizes it$'
    )
    with pytest.raises(StateDictMismatch, match=message):
        model.load_state_dict(state)
    with pytest.raises(StateDictMismatch, match=message):
        load_state_dict(model, state)  # mmengine's
    nn.Sequential(small).load_state_dict(state)


@pytest.mark.parametrize('load', [nn.Module.load_state_dict, load_state_dict])
@pytest.mark.parametrize(
    'old, new, options',
    [
        ((3, 3), (5, 5), dict(resize_on_load=True)),
        ((3, 4), (5, 2), dict(resize_on_load=(3, 4), grid=(5, 2))),
    ],
    ids=['square', 'given'],
)
def test_resized_on_load(old, new, options, load):
    before, after = (
        dict(pooling='learnt', num_tokens=2 + h * w, num_extra_tokens=2)
        for h, w in (old, new)
    )
    before = PolySA(8, 2, **before)
    after = PolySA(8, 2, **after, **options)
    state = before.state_dict()
    load(after, state)
    for name in ('p1', 'p2'):
        vectors, resized = getattr(before, name), getattr(after, name)
        assert torch.equal(vectors[:, :2], resized[:, :2])
        maps = vectors[:, 2:].view(1, 2, *old)
        maps = interpolate(maps, new, mode='bicubic', align_corners=False)
        assert torch.equal(resized[:, 2:], maps.view(2, -1))
    assert torch.equal(before.qkv.weight, after.qkv.weight)
    # What was given is left as it was, and the same N is taken as it is.
    assert state['p1'].shape == before.p1.shape
    again = deepcopy(after.state_dict())
    load(after, again)
    assert torch.equal(after.p1, again['p1'])


@pytest.mark.parametrize(
    'old, options, message',
    [
        (13, dict(), '13 tokens without num_extra_tokens=1 are no square; .*'),
        (17, dict(num_tokens=14), '14 tokens .* no square; .* by grid'),
        (17, dict(resize_on_load=(3, 5)), r'17 .* no map of \(3, 5\); .*'),
    ],
)
def test_what_can_not_be_resized_is_told(old, options, message):
    given = {**LEARNT, 'num_tokens': 26, 'resize_on_load': True, **options}
    state = PolySA(8, 2, **{**LEARNT, 'num_tokens': old}).state_dict()
    layer = PolySA(8, 2, **given)
    with pytest.raises(
        StateDictMismatch, match=f"^'p1' can not be resized: {message}"
    ):
        layer.load_state_dict(state)


# ---------------------------------------------------------- padding and parts


class Tokens(nn.Module):
    """A map as tokens, attended to, and back; with class tokens of its own."""

    def __init__(self, c, heads, **options):
        super().__init__()
        self.attn = PolySA(c, heads, **options)
        extra = self.attn.num_extra_tokens
        self.extra = nn.Parameter(torch.randn(1, extra, c))

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat((self.extra.expand(len(x), -1, -1), tokens), 1)
        y = self.attn(tokens, x.shape[2:])[:, self.extra.shape[1] :]
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


def network(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 4, 4),
        Tokens(12, 2, **options),
        nn.ReLU(),
        Tokens(12, 3, **options),
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model.double()


class Model(BaseModel):
    def __init__(self, **options):
        super().__init__()
        self.backbone = network(**options)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.backbone(inputs)


@pytest.mark.parametrize(
    'options',
    [
        dict(form='direct'),
        dict(form='gram'),
        dict(form='gram', num_extra_tokens=2),
    ],
    ids=['direct', 'gram', 'extra tokens'],
)
def test_a_picture_is_what_it_is_alone(options):
    """Whatever it is padded by: its tokens are known by their map."""
    model, sizes = Model(**options), [(12, 20), (24, 8), (24, 28)]
    x = torch.randn(3, 3, 24, 28, dtype=torch.float64)
    record = dict(batch_input_shape=(24, 28))
    samples = [
        BaseDataElement(metainfo=dict(img_shape=s, **record)) for s in sizes
    ]
    y = model(x, samples)
    for i, (h, w) in enumerate(sizes):
        alone = model(x[i : i + 1, :, :h, :w])
        own = y[i : i + 1, :, : h // 4, : w // 4]
        assert_near(own, alone, 1e-12)
    assert (y - model(x)).abs().max() > 1e-2


def test_padding_does_not_count_in_learnt_vectors():
    model = Model(pooling='learnt', num_tokens=12)
    x = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    record = dict(batch_input_shape=(12, 16))
    samples = [
        BaseDataElement(metainfo=dict(img_shape=s, **record))
        for s in [(12, 16), (8, 12)]
    ]
    y = model(x, samples)
    other = x.clone()
    other[1, :, 8:] = 9
    other[1, :, :, 12:] = 9
    got = model(other, samples)
    assert_near(got[0], y[0].detach(), 1e-13)
    assert_near(got[1, :, :2, :3], y[1, :, :2, :3].detach(), 1e-13)
    assert (got[1] - y[1]).abs().max() > 1


def cut(x, window):
    x1, y1, x2, y2 = window.box
    return x[..., y1:y2, x1:x2]


@each_form
@pytest.mark.parametrize('norm', [False, True], ids=['', 'norm'])
def test_windows_equal_the_whole_image(form, norm):
    """In value and in all gradients, though windows overlap."""
    model = network(form=form, norm=norm)
    x = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    x = x + torch.linspace(-1, 2, 40)
    windows = grid((32, 40), (16, 16), (8, 12))
    truth = model(x)
    dy = torch.randn_like(truth)
    params = list(model.parameters())
    wants = torch.autograd.grad(truth, params, dy)
    with shared_context(model, Windows(None, images=2)) as over:
        parts = over(lambda window: model(cut(x, window)), windows)
    y = torch.full_like(truth, torch.nan)
    for window, part in zip(windows, parts):
        x1, y1, x2, y2 = (v // 4 for v in window.box)
        y[..., y1:y2, x1:x2] = part
    assert_near(y, truth, 1e-12)
    for got, want in zip(torch.autograd.grad(y, params, dy), wants):
        assert_near(got, want, 1e-11)
    alone = model(cut(x, windows[0]))
    assert (alone - truth[..., :4, :4]).abs().max() > 1e-2


@torch.no_grad()
def test_crops_and_frames():
    model = network()
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    crops = torch.cat(x.chunk(2, 3))
    with shared_context(model, Crops('abab')):
        y = torch.cat(model(crops).chunk(2), 3)
    assert_near(y, model(x), 1e-12)
    model, both = model[:2], (x, x.flip(0))
    with shared_context(model, Frames()) as frames:
        y = [frames(model, each) for each in both][1]
    with shared_context(model, Crops('abab')):
        assert_near(y, model(torch.cat(both))[2:], 1e-12)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(pooling='learnt', num_tokens=12), "pooling='mean' has none"),
        (dict(num_extra_tokens=1), 'num_extra_tokens=1 of its tokens'),
    ],
)
def test_what_is_of_a_whole_image_is_not_shared(options, message):
    model = network(**options)
    message = f"^'1.attn' can not share its gate: .*{message}.* by exclude$"
    with pytest.raises(ValueError, match=message):
        with shared_context(model, Windows()):
            pass


# ----------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(embed_dims=0), 'embed_dims .*at least 1, got 0'),
        (dict(num_heads=2.0), 'num_heads .*at least 1, got 2.0'),
        (dict(num_heads=4), 'embed_dims=6 .*num_heads=4'),
        (dict(num_heads=6), 'norm=True with num_heads=6=6 .*norm=False'),
        (dict(num_extra_tokens=-1), 'num_extra_tokens .*at least 0, got -1'),
        (dict(form='fast'), "form must be .*'fast'"),
        (dict(pooling='max'), "pooling must be .*'max'"),
        (dict(num_tokens=9), "num_tokens.*pooling='learnt'.*any number"),
        (dict(resize_on_load=True), "resize_on_load are .*pooling='learnt'"),
        (
            {**LEARNT, 'resize_on_load': (1, LEARNT['num_tokens'] - 1)},
            'has as many positions as num_tokens',
        ),
        (dict(LEARNT, num_tokens=None), "wants num_tokens.*got None.*'mean'"),
        (dict(LEARNT, num_tokens=1), 'more than num_extra_tokens=1, got 1'),
        (dict(LEARNT, grid=(3, 3)), r'grid=\(3, 3\) .*10 tokens, .*=13'),
        (dict(LEARNT, form='gram'), "form='gram' is for pooling='mean'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PolySA(**{'embed_dims': 6, 'num_heads': 2, **arguments})


@pytest.mark.parametrize(
    'shape, arguments, message',
    [
        ((2, 6, 13), {}, r'\(B, N, 6\).*embed_dims=6, got \(2, 6, 13\)'),
        ((2, 3, 4, 6), {}, r'embed_dims=6, got \(2, 3, 4, 6\)'),
        ((2, 9, 6), {}, "num_tokens=13, got 9 tokens; pooling='mean'"),
        (
            (2, 13, 6),
            dict(hw_shape=(2, 5)),
            r'13 tokens, but hw_shape=\(2, 5\) and num_extra_tokens=1 are 11',
        ),
        (
            (2, 13, 6),
            dict(attn_mask=torch.ones(13, 13)),
            'no pairs of tokens.*attn_mask',
        ),
        (
            (2, 13, 6),
            dict(key_padding_mask=torch.ones(2, 13)),
            r'key_padding_mask .*torch.bool .*\(2, 13\).*float32',
        ),
        (
            (2, 13, 6),
            dict(key_padding_mask=torch.ones(2, 12).bool()),
            r'key_padding_mask .*\(2, 13\).*bool of shape \(2, 12\)',
        ),
    ],
)
def test_bad_input_is_named(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        PolySA(6, 2, **LEARNT)(torch.randn(shape), **arguments)


def test_a_mask_in_a_context_is_refused():
    layer = PolySA(6, 2)
    layer.around = lambda layer, x: (lambda g: g, None)
    x = torch.randn(2, 5, 6)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    layer(x)
    with pytest.raises(ValueError, match='within shared_context'):
        layer(x, key_padding_mask=mask)


def test_padded_tokens_without_a_map_warn():
    attn = PolySA(6, 2)
    with pictures_in(Pictures((8, 8), [(4, 8), (8, 8)])):
        with pytest.warns(UserWarning, match='padding of pictures'):
            attn(torch.randn(2, 16, 6))
