"""Poly-SA in the place of the hosts' attention, by path."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hosts import build
from mmengine.config import ConfigDict
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.testing import assert_close

from polynl_mm import replace_attention
from polynl_mm.attention import PolySA

pytestmark = pytest.mark.usefixtures('quiet_and_quick')

SA = dict(type='polynl_mm.PolySA')
DEPTHS = dict(num_layers=[1, 1, 1, 1], num_heads=[1, 2, 2, 2])
SWIN = dict(
    type='SwinTransformer',
    embed_dims=8,
    depths=(2, 1, 1, 1),
    num_heads=(1, 2, 2, 2),
    window_size=4,
    drop_path_rate=0.0,
)
VIT = dict(
    type='VisionTransformer',
    embed_dims=8,
    num_layers=2,
    num_heads=2,
    img_size=64,
    patch_size=16,
)
# Host -> scope, config, where its attention is, how the keys there begin that
# go.
HOSTS = {
    'Swin': ('mmdet', SWIN, 'stages.*.blocks.*.attn', 'w_msa.rel'),
    'Swin, windows': (
        *('mmseg', SWIN, 'stages.*.blocks.0.attn.w_msa', 'relative_'),
    ),
    'MiT': (
        'mmseg',
        dict(type='MixVisionTransformer', embed_dims=8, **DEPTHS),
        *('layers.*.1.*.attn', ('sr.', 'norm.')),
    ),
    'PVTv2': (
        'mmdet',
        dict(type='PyramidVisionTransformerV2', embed_dims=8, **DEPTHS),
        *('layers.*.1.*.attn', ('sr.', 'norm.')),
    ),
    'Twins': (
        'mmseg',
        dict(
            type='SVT',
            embed_dims=[8, 16, 16, 16],
            num_heads=[1, 2, 2, 2],
            depths=[2, 1, 1, 1],
            mlp_ratios=[2, 2, 2, 2],
            sr_ratios=[8, 4, 2, 1],
            windiow_sizes=[4, 4, 4, 4],
            norm_after_stage=[True] * 4,
        ),
        *('layers.*.*.attn', ('sr.', 'norm.')),
    ),
    'ViT': ('mmseg', VIT, 'layers.*.attn', ()),
    'BEiT': (
        'mmseg',
        dict(VIT, type='BEiT', qv_bias=True),
        *('layers.*.attn', 'relative_'),
    ),
    'MAE': (*('mmseg', dict(VIT, type='MAE'), 'layers.*.attn', 'relative_'),),
}
each_host = pytest.mark.parametrize('name', HOSTS)


def plain_host(name, **kwargs):
    scope, cfg, *_ = HOSTS[name]
    return build({**cfg, **kwargs}, scope=scope)


def with_poly_sa(name, at=None, layer=None, **kwargs):
    scope, cfg, path, _ = HOSTS[name]
    entry = dict(at=at or path, cfg={**SA, **(layer or {})})
    cfg = {**cfg, **kwargs, 'type': 'polynl_mm.Replace', 'into': cfg['type']}
    return build({**cfg, 'attention': [entry]}, scope=scope)


def randomize(model):
    """As if it were trained: what starts at 0 or 1 would hide mistakes."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def evaluated(model):
    """Not chained: the eval() of some hosts returns nothing."""
    model.eval()
    return model


def cores_of(model):
    return {k: m for k, m in model.named_modules() if isinstance(m, PolySA)}


def picture(dtype=torch.float):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 64, 64, generator=generator).to(dtype)


def slow(x, state, norm, heads):
    """Poly-SA of one picture (N, C), head by head, from the host's weights."""
    if 'in_proj_weight' in state:
        w, b = state['in_proj_weight'], state.get('in_proj_bias')
        wo, bo = state['out_proj.weight'], state.get('out_proj.bias')
    else:
        w, b = state['qkv.weight'], state.get('qkv.bias')
        wo, bo = state['proj.weight'], state['proj.bias']
        if 'q_bias' in state:
            q, v = state['q_bias'], state['v_bias']
            b = torch.cat((q, 0 * q, v))
    out, (n, c) = torch.zeros_like(x), x.shape
    d = c // heads
    for head in range(heads):
        q, k, v = (
            x @ w[i : i + d].T + (0 if b is None else b[i : i + d])
            for i in (head * d, c + head * d, 2 * c + head * d)
        )
        g = sum(k[i] * v[i] for i in range(n)) / n
        if norm is not None:
            weight, bias = norm
            spread = (g - g.mean()).square().mean() + 1e-6
            g = (g - g.mean()) / spread.sqrt() * weight + bias
        out += (g * q) @ wo[:, head * d : (head + 1) * d].T
    return out if bo is None else out + bo


# --------------------------------------------------------------------- hosts


@each_host
def test_what_the_host_has_is_kept(name):
    """The keys of the projections, and what the host computes around."""
    plain = randomize(plain_host(name)).double()
    model = evaluated(with_poly_sa(name).double())
    assert type(model) is type(plain)
    gone = HOSTS[name][-1]
    placed = {
        path: next(m for m in module.modules() if isinstance(m, PolySA))
        for path, module in model.named_modules()
        if 'gone' in vars(module)
    }
    assert len(placed) >= 2
    before, after = plain.state_dict(), model.state_dict()
    lost, new = set(before) - set(after), set(after) - set(before)
    assert new == {
        f'{path}.norm.{key}'
        for path in cores_of(model)
        for key in ('weight', 'bias')
    }
    for key in lost:
        path = max(path for path in placed if key.startswith(f'{path}.'))
        assert key.removeprefix(f'{path}.').startswith(gone), key
    assert bool(lost) == (name != 'ViT')

    model.load_state_dict(before)
    for key in set(after) & set(before):
        assert torch.equal(model.state_dict()[key], before[key]), key
    randomize(model)
    calls = {}
    for path in placed:

        def note(module, args, kwargs, output, path=path):
            calls[path] = args, kwargs, output

        module = model.get_submodule(path)
        module.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(picture(torch.double))
    assert calls.keys() == placed.keys()
    for path, ((x, *_), kwargs, output) in calls.items():
        layer = placed[path]
        state = layer.state_dict()
        norm = state['norm.weight'], state['norm.bias']
        expected = torch.stack(
            [slow(each, state, norm, layer.num_heads) for each in x]
        )
        expected = expected + kwargs.get('identity', 0)
        assert_close(output, expected, rtol=1e-9, atol=1e-9)


@each_host
@pytest.mark.parametrize('layer', [{}, dict(norm=False)])
def test_every_parameter_learns(name, layer):
    model = randomize(with_poly_sa(name, layer=layer))
    model.train()
    sum(y.square().sum() for y in model(picture())).backward()
    idle = [k for k, p in model.named_parameters() if p.grad is None]
    assert not idle
    for path, core in cores_of(model).items():
        for key, p in core.named_parameters():
            assert p.grad.isfinite().all() and p.grad.any(), (path, key)


@pytest.mark.parametrize('name', ['ViT', 'BEiT', 'Swin, windows'])
def test_number_of_tokens_is_the_hosts(name):
    model = with_poly_sa(name, layer=dict(pooling='learnt'))
    tokens = {core.p1.shape[1] for core in cores_of(model).values()}
    assert tokens == {16 if name == 'Swin, windows' else 17}
    extra = {core.num_extra_tokens for core in cores_of(model).values()}
    assert extra == {0 if name == 'Swin, windows' else 1}
    assert all(core.grid == (4, 4) for core in cores_of(model).values())
    loss = sum(y.square().sum() for y in model(picture()))
    loss.backward()
    for core in cores_of(model).values():
        assert core.p1.grad.any() and core.p2.grad.any()


def test_plain_vit_without_a_class_token():
    model = with_poly_sa(
        'ViT', layer=dict(pooling='learnt'), with_cls_token=False
    )
    for core in cores_of(model).values():
        assert (core.p1.shape[1], core.num_extra_tokens) == (16, 0)


def test_class_token_is_a_token():
    """What it holds reaches all others."""
    model = evaluated(randomize(with_poly_sa('ViT')))
    with torch.no_grad():
        (before,) = model(picture())
        model.cls_token += torch.randn(8)
        (after,) = model(picture())
    assert ((before - after).abs().amax(1) > 1e-6).all()


def test_whole_map_in_the_place_of_windows():
    """A corner of the picture reaches the other in the first block."""
    for make, reaches in ((plain_host, False), (with_poly_sa, True)):
        model = evaluated(randomize(make('Swin')))
        block = model.stages[0].blocks[0]
        x = torch.randn(1, 10 * 13, 8)
        with torch.no_grad():
            y = block(x, (10, 13))
            x[0, 0] = torch.randn(8)
            z = block(x, (10, 13))
        assert ((y - z)[0, -1].abs().max() > 1e-6) == reaches


def test_drop_path_of_the_host_stays():
    model = with_poly_sa('Swin', drop_path_rate=0.5, drop_rate=0.25)
    attn = model.stages[3].blocks[0].attn
    assert attn.drop.drop_prob == 0.5
    assert attn.w_msa.proj_drop.p == 0.25
    model = with_poly_sa('MiT', drop_path_rate=0.5, drop_rate=0.25)
    attn = model.layers[3][1][0].attn
    assert attn.dropout_layer.drop_prob == 0.5 and attn.proj_drop.p == 0.25


def test_copies_and_pickles():
    model = evaluated(randomize(with_poly_sa('MiT')))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.init_weights()
        # As the model itself takes it.
        twin.load_state_dict(plain_host('MiT').state_dict())
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            for y, z in zip(twin(picture()), model(picture())):
                assert torch.equal(y, z)


# --------------------------------------------------------------- checkpoints


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(
        'polynl_mm.replacement.print_log', lambda text, *_: lines.append(text)
    )
    return lines


@pytest.mark.parametrize('load', ['torch', 'mmengine', 'init_weights'])
@pytest.mark.parametrize('name', ['Swin', 'MiT', 'BEiT'])
def test_checkpoint_of_the_host(name, load, said, tmp_path):
    """Its projections load, and one line names what does not, and what new."""
    plain = randomize(plain_host(name))
    state = plain.state_dict()
    if load == 'init_weights':
        cut = {f'backbone.{k}': v for k, v in state.items()}
        torch.save(
            dict(state_dict=cut if name == 'Swin' else state),
            tmp_path / 'host.pth',
        )
        model = with_poly_sa(
            name,
            layer=dict(norm=True),
            init_cfg=ConfigDict(
                type='Pretrained', checkpoint=str(tmp_path / 'host.pth')
            ),
        )
        model.init_weights()
    elif load == 'torch':
        model = with_poly_sa(name)
        model.load_state_dict(state)
    else:
        model = with_poly_sa(name)
        load_state_dict(model, state, strict=True)
    got = model.state_dict()
    for key in set(got) & set(state):
        assert torch.equal(got[key], state[key]), key
    for core in cores_of(model).values():
        assert (core.norm.weight == 1).all() and not core.norm.bias.any()
    (line,) = said
    assert '\n' not in line
    gone, new = dict(
        Swin=('w_msa.relative_position_bias_table', 'w_msa.norm.weight'),
        MiT=('sr.weight, sr.bias, norm.weight', 'attn.norm.weight'),
        BEiT=('relative_position_bias_table', 'norm.weight'),
    )[name]
    assert f'not taken: {gone}' in line
    assert f'at their initial values: {new}' in line


def test_own_checkpoint_says_nothing(said, tmp_path):
    model = randomize(with_poly_sa('MiT'))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'own.pth')
    checkpoint = str(tmp_path / 'own.pth')
    twin = with_poly_sa(
        'MiT', init_cfg=dict(type='Pretrained', checkpoint=checkpoint)
    )
    twin.init_weights()
    for key, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key
    assert not said


def test_damaged_checkpoint_is_an_error():
    """One that has a part of what is new is not the host's."""
    model = with_poly_sa('MiT')
    state = model.state_dict()
    del state['layers.0.1.0.attn.attn.norm.bias']
    with pytest.raises(RuntimeError, match='Missing.*attn.attn.norm.bias'):
        model.load_state_dict(state)


def test_vectors_of_another_number_of_tokens():
    """Not without being asked to be resized."""
    learnt = dict(pooling='learnt')
    state = with_poly_sa('ViT', layer=learnt, img_size=96).state_dict()
    del state['pos_embed']
    with pytest.raises(RuntimeError, match="p1' is for 37 .* for 17 in the"):
        load_state_dict(with_poly_sa('ViT', layer=learnt), state)
    model = with_poly_sa('ViT', layer=dict(learnt, resize_on_load=True))
    load_state_dict(model, state)
    vectors = state['layers.0.attn.attn.p1']
    resized = F.interpolate(
        vectors[:, 1:].reshape(1, 2, 6, 6), size=(4, 4), mode='bicubic'
    )
    got = model.layers[0].attn.attn.p1
    assert torch.equal(got[:, :1], vectors[:, :1])
    assert_close(got[:, 1:], resized.reshape(2, 16))


def test_new_parameters_after_the_init_of_the_host():
    """Some hosts draw every matrix, whatever it is part of."""

    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = plain_host('ViT')

        def init_weights(self):
            for p in self.parameters():
                nn.init.constant_(p, 7.0)

    learnt = dict(SA, pooling='learnt')
    model = replace_attention(
        Drawn(), [dict(at='body.layers.*.attn', cfg=learnt)]
    )
    model.init_weights()
    core = model.body.layers[0].attn.attn
    assert (core.in_proj_weight == 7).all()
    assert core.p1.abs().max() < 1 and core.p1.any()
    assert (core.norm.weight == 1).all()


# ------------------------------------------------------------- with others


INSERTED = dict(type='polynl_mm.PolyNL2d', beta_init=0.5)


@pytest.mark.parametrize('first', ['Insert', 'Replace'])
def test_together_with_insert(first):
    """Each may be the host of the other; a block stays where it is."""
    scope, cfg, at, _ = HOSTS['Swin']
    blocks = [
        dict(after='stages.0.blocks.0.attn', cfg=INSERTED),
        dict(after='stages.2.blocks.0', cfg=INSERTED),
    ]
    attention = [dict(at=at, cfg=SA)]
    kinds = dict(Insert=dict(blocks=blocks), Replace=dict(attention=attention))
    (second,) = kinds.keys() - {first}
    inner = dict(
        type=f'polynl_mm.{first}', into='SwinTransformer', **kinds[first]
    )
    cfg = dict(cfg, type=f'polynl_mm.{second}', into=inner, **kinds[second])
    model = build(cfg, scope=scope)
    model.init_weights()
    layer = model.stages[0].blocks[0].attn.poly_nl
    assert layer.beta.item() == 0.5
    assert len(cores_of(model)) == 5
    sum(y.square().sum() for y in model(picture())).backward()
    assert layer.beta.grad.any()
    assert model.stages[2].blocks[0].poly_nl.beta.grad.any()
    assert model.stages[0].blocks[0].attn.w_msa.norm.weight.grad.any()


def test_block_that_would_be_lost():
    model = plain_host('MiT')
    from polynl_mm import insert_blocks

    insert_blocks(
        model,
        [
            dict(
                after='layers.0.1.0.attn.sr',
                cfg=dict(type='polynl_mm.PolyNL2d'),
            )
        ],
    )
    with pytest.raises(ValueError, match="poly_nl' after 'layers.*attn.sr'"):
        replace_attention(model, [dict(at='layers.*.1.*.attn', cfg=SA)])


def test_padding_does_not_count():
    """A picture beside a larger one gives what it gives alone."""
    from polynl_mm.padding import Pictures, pictures_in

    core = randomize(with_poly_sa('Swin')).double().stages[0].blocks[0].attn
    x = torch.randn(2, 16 * 16, 8, dtype=torch.double)
    own = torch.zeros(16, 16, dtype=torch.bool)
    own[:9, :12] = True
    with (
        torch.no_grad(),
        pictures_in(Pictures((64, 64), [(34, 48), (64, 64)])),
    ):
        both = core(x, (16, 16))
    with torch.no_grad():
        alone = core(x[:1, own.flatten()], (9, 12))
        whole = core(x[1:], (16, 16))
    assert_close(both[:1, own.flatten()], alone)
    assert_close(both[1:], whole)


def test_windows_of_an_image_share_their_context():
    """Those of mmseg's slide inference, which overlap here."""
    _, cfg, at, _ = HOSTS['MiT']
    backbone = dict(
        cfg,
        type='polynl_mm.Replace',
        into=cfg['type'],
        attention=[dict(at=at, cfg=SA)],
    )
    head = dict(
        type='SegformerHead',
        in_channels=[8, 16, 16, 16],
        in_index=[0, 1, 2, 3],
        channels=8,
        num_classes=4,
        norm_cfg=dict(type='BN'),
    )
    slide = dict(mode='slide', crop_size=(64, 64), stride=(64, 32))
    cfg = dict(type='EncoderDecoder', backbone=backbone, decode_head=head)
    model = build(dict(cfg, test_cfg=slide), scope='mmseg').double().eval()
    randomize(model)
    x = torch.randn(1, 3, 64, 128, dtype=torch.double)
    meta = [dict(ori_shape=(64, 128), img_shape=(64, 128))]

    def right_changes(**test_cfg):
        model.test_cfg = ConfigDict(slide, **test_cfg)
        changed = x.clone()
        changed[..., 64:] += 1
        with torch.no_grad():
            y, z = (model.inference(each, meta) for each in (x, changed))
        return (y - z)[..., :24].abs().max().item()

    assert right_changes() == 0
    assert right_changes(context='image') > 1e-4


class Detr(nn.Module):
    """Layers of mmdet's, encoder and decoder."""

    def __init__(self):
        from mmdet.models.layers.transformer.detr_layers import (
            DetrTransformerDecoderLayer,
            DetrTransformerEncoderLayer,
        )

        super().__init__()
        size = dict(embed_dims=8, num_heads=2, batch_first=True)
        ffn = dict(embed_dims=8, feedforward_channels=8)
        self.encoder = DetrTransformerEncoderLayer(dict(size), dict(ffn))
        self.decoder = DetrTransformerDecoderLayer(
            dict(size), dict(size), dict(ffn)
        )


def test_positions_and_padding_of_a_detr():
    pytest.importorskip('mmdet')
    model = Detr()
    replace_attention(model, [dict(at='encoder.self_attn', cfg=SA)])
    attn = randomize(model).double().encoder.self_attn
    x, pos = torch.randn(2, 2, 7, 8, dtype=torch.double)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 4:] = True
    with torch.no_grad():
        got = attn(x, x, x, query_pos=pos, key_pos=pos, key_padding_mask=mask)
    core = attn.attn
    w, b = core.in_proj_weight, core.in_proj_bias
    for i, count in enumerate((7, 4)):
        q = (x[i] + pos[i]) @ w[:8].T + b[:8]
        k = (x[i] + pos[i]) @ w[8:16].T + b[8:16]
        v = x[i] @ w[16:].T + b[16:]
        g = (k * v)[:count].mean(0).reshape(2, 4)
        g = F.layer_norm(
            g, (4,), core.norm.weight, core.norm.bias, 1e-6
        ).flatten()
        out = (g * q) @ core.out_proj.weight.T + core.out_proj.bias
        assert_close(got[i], x[i] + out)
    # As the layer of the host calls it, tokens first or pictures first.
    model.encoder(x, pos, mask)
    attn.batch_first = False
    with torch.no_grad():
        turned = attn(
            x.transpose(0, 1),
            query_pos=pos.transpose(0, 1),
            key_padding_mask=mask,
        )
    assert_close(turned.transpose(0, 1), got)


def test_attention_to_others_is_refused():
    pytest.importorskip('mmdet')
    x, memory = torch.randn(2, 1, 5, 8)
    model = replace_attention(Detr(), [dict(at='decoder.*_attn', cfg=SA)])
    with pytest.raises(ValueError, match='key is not query.*leave it out'):
        model.decoder(x, memory, memory, x, memory)
    pairs = torch.zeros(5, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match='attn_mask'):
        model.decoder(x, x, x, x, x, self_attn_mask=pairs)
    with pytest.raises(ValueError, match='is_causal is no mask'):
        model.decoder.self_attn(x, is_causal=True)
    model.decoder.self_attn(x, is_causal=False, reference_points=x)


# ----------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'entry, message',
    [
        (3, 'attention must be a list of dicts.*got .3'),
        (dict(cfg=SA), r'attention\[0\]=.* must have the keys at and cfg'),
        (dict(at='', cfg=SA), 'at must be a path'),
        (dict(at='stages.*', cfg=3), 'cfg a dict'),
        (
            dict(at='stages.*', cfg=dict(type='polynl_mm.PolyNL2d')),
            "type of cfg must be 'polynl_mm.PolySA', got 'polynl_mm.PolyNL2d'",
        ),
        (
            dict(at='stages.0.blocks.0.atn', cfg=SA),
            "no module 'stages.0.blocks.0.atn' in SwinTransformer; nearest: "
            r"\['stages.0.blocks.0.attn'",
        ),
        (
            dict(at='stages.0.blocks.0', cfg=SA),
            "'stages.0.blocks.0' is a SwinBlock, which is no attention that is"
            ' known; known: BEiTAttention, .*WindowMSA; there is one at '
            "'stages.0.blocks.0.attn'",
        ),
        (
            dict(at='stages.0.blocks.0.ffn', cfg=SA),
            r"ffn' is a FFN, which is no attention .*WindowMSA$",
        ),
        (
            dict(at='stages.1.blocks.0.attn', cfg=dict(SA, num_heads=4)),
            "for 'stages.1.blocks.0.attn': num_heads=4, but the host has 2",
        ),
        (
            dict(at='stages.1.blocks.0.attn', cfg=dict(SA, embed_dims=8)),
            'embed_dims=8, but the host has 16',
        ),
        (
            dict(at='stages.0.*.*.attn', cfg=dict(SA, pooling='learnt')),
            "blocks.0.attn': pooling='learnt' wants num_tokens",
        ),
        (
            dict(at='stages.0.blocks.0.attn', cfg=dict(SA, heads=2)),
            "argument 'heads'",
        ),
        (
            dict(at='stages.*.blocks.*.attn.w_msa', cfg=SA),
            "'stages.0.blocks.1.attn.w_msa': where windows are shifted",
        ),
    ],
)
def test_bad_entry_is_named(entry, message):
    cfg = dict(SWIN, type='polynl_mm.Replace', into='SwinTransformer')
    with pytest.raises(ValueError, match=message):
        build(dict(cfg, attention=[entry]))


def test_nothing_is_replaced_when_an_entry_is_wrong():
    model = plain_host('Swin')
    before = list(model.state_dict())
    good = dict(at='stages.*.blocks.*.attn', cfg=SA)
    for bad, message in (
        (dict(at='norm1', cfg=SA), 'no module|LayerNorm'),
        (good, 'an entry before is for'),
        (
            dict(at='stages.0.blocks.0.attn.w_msa', cfg=SA),
            'which is replaced as well',
        ),
    ):
        with pytest.raises(ValueError, match=message):
            replace_attention(model, [good, bad])
    assert list(model.state_dict()) == before
    replace_attention(model, [good])
    with pytest.raises(ValueError, match="blocks.0.attn' is Poly-SA already"):
        replace_attention(model, [good])


def test_mask_of_windows_is_refused():
    model = with_poly_sa('Swin, windows')
    core = model.stages[0].blocks[0].attn.w_msa
    with pytest.raises(ValueError, match='pairs of tokens are masked'):
        core(torch.zeros(2, 16, 8), mask=torch.zeros(1, 16, 16))


def test_windows_of_attention_share_no_context():
    from polynl_mm.context import Crops, shared_context

    model = with_poly_sa('Swin, windows')
    with pytest.raises(ValueError, match='a gate for each window'):
        with shared_context(model, Crops()):
            pass


def test_keys_of_another_width():
    from mmcv.cnn.bricks.transformer import MultiheadAttention

    model = nn.Sequential(MultiheadAttention(8, 2, kdim=4, vdim=4))
    with pytest.raises(ValueError, match='kdim, vdim'):
        replace_attention(model, [dict(at='0', cfg=SA)])


def test_warnings_of_what_will_not_be():
    with pytest.warns(
        UserWarning, match="'stages.0.blocks.0.attn' will never"
    ):
        with_poly_sa('Swin', frozen_stages=1)
    with pytest.warns(UserWarning, match='attn_drop.*stages.0.*4 more places'):
        with_poly_sa('Swin', attn_drop_rate=0.1)
    with pytest.warns(UserWarning, match='dropout of attention'):
        with_poly_sa('ViT', attn_drop_rate=0.1)
