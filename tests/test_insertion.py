"""Blocks after sub-modules of the hosts, by path."""

import copy
import pickle
import warnings
from collections import namedtuple

import pytest
import torch
from helpers import layers_of
from hosts import (
    CONTEXT,
    HOSTS,
    NON_LOCAL,
    POLY,
    POLY1D,
    RESNET,
    build,
    build_host,
    inputs,
)
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.plugin import infer_abbr
from mmengine.config import Config, ConfigDict
from mmengine.model import (
    BaseModule,
    ExponentialMovingAverage,
    revert_sync_batchnorm,
)
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.testing import assert_close

from polynl_mm.insertion import insert_blocks
from polynl_mm.layers import PolyNL2d

pytestmark = pytest.mark.usefixtures('quiet_and_quick')
each_host = pytest.mark.parametrize('name', HOSTS)


def outputs(model, name):
    out = model(*inputs(name))
    return list(out) if isinstance(out, (tuple, list)) else [out]


def scalar(tensors):
    """A number on which every tensor has its own random influence."""
    generator = torch.Generator().manual_seed(2)
    return sum(
        (y * torch.randn(y.shape, generator=generator)).sum() for y in tensors
    )


def set_beta(model, value):
    for layer in layers_of(model).values():
        nn.init.constant_(layer.beta, value)


def assert_same(model, plain, name):
    """Same outputs, at inference."""
    model.eval()
    plain.eval()
    with torch.no_grad():
        got, expected = outputs(model, name), outputs(plain, name)
    for y, z in zip(got, expected, strict=True):
        assert_close(y, z, rtol=1e-5, atol=1e-5)


def block_keys(model):
    return {
        f'{name}.{key}'
        for name, layer in layers_of(model).items()
        for key in layer.state_dict()
    }


# ------------------------------------------------------------------- hosts


@each_host
def test_host_keeps_its_keys_and_trains_the_blocks(name):
    plain = build_host(name)
    model = build_host(name, POLY)
    assert type(model) is type(plain)
    places = HOSTS[name][2]
    assert sorted(layers_of(model)) == sorted(places.values())
    new = block_keys(model)
    assert [k for k in model.state_dict() if k not in new] == list(
        plain.state_dict()
    )
    plain.init_weights()
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(result.missing_keys) == new and not result.unexpected_keys
    assert_same(model, plain, name)

    set_beta(model, 0.5)
    model.train()
    plain.train()
    torch.manual_seed(4)
    got = outputs(model, name)
    torch.manual_seed(4)
    expected = outputs(plain, name)
    pairs = zip(got, expected)
    assert any(not torch.allclose(y, z, rtol=0.01) for y, z in pairs)
    scalar(got).backward()
    for key, parameter in model.named_parameters():
        if key in new:
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().max() > 0, key


@each_host
def test_identity_after_the_init_of_the_host(name):
    """Hosts initialise every convolution; here zero is what must survive."""
    torch.manual_seed(3)
    model = build_host(name, POLY, CONTEXT, NON_LOCAL)
    model.init_weights()
    blocks = [
        f'{layer.rpartition("poly_nl")[0]}{block}.'
        for layer in layers_of(model)
        for block in ('poly_nl', 'context_block', 'nonlocal_block')
    ]
    plain = build_host(name)
    plain.load_state_dict(
        {
            key: value
            for key, value in model.state_dict().items()
            if not key.startswith(tuple(blocks))
        }
    )
    assert_same(model, plain, name)


@each_host
@pytest.mark.parametrize('with_blocks', [False, True])
def test_checkpoint_of_the_host(name, with_blocks, tmp_path):
    """One without the blocks' parameters, and one with trained ones."""
    if name == 'RoI extractor' and not with_blocks:
        pytest.skip('has no parameters of its own')
    donor = build_host(name, *[POLY] * with_blocks)
    donor.init_weights()
    set_beta(donor, 0.3)
    state = donor.state_dict()
    if name == 'Swin':  # loads in a way of its own
        state = {f'backbone.{key}': value for key, value in state.items()}
    torch.save(dict(state_dict=state), tmp_path / 'host.pth')
    checkpoint = str(tmp_path / 'host.pth')
    init_cfg = ConfigDict(type='Pretrained', checkpoint=checkpoint)
    model = build_host(name, POLY, init_cfg=init_cfg)
    model.init_weights()
    for key, value in donor.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    for layer in layers_of(model).values():
        assert layer.beta.item() == pytest.approx(0.3 * with_blocks)
    assert_same(model, donor, name)


def demo(with_mask=False):
    from mmdet.testing import demo_mm_inputs

    data = demo_mm_inputs(
        2, [[3, 64, 64]] * 2, num_classes=3, with_mask=with_mask
    )
    return [x.float() for x in data['inputs']], data['data_samples']


def loss_of(model, with_mask=False):
    images, samples = demo(with_mask)
    data = model.data_preprocessor(
        dict(inputs=images, data_samples=samples), True
    )
    losses = model(**data, mode='loss')
    return model.parse_losses(losses)[0]


def mask_rcnn(tmp_path, text):
    """A child config over mmdet's own, as a user would write it."""
    pytest.importorskip('mmdet')
    path = tmp_path / 'child.py'
    path.write_text(
        "_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'\n"
        'model = dict(\n'
        '    backbone=dict(base_channels=8, init_cfg=None),\n'
        '    neck=dict(in_channels=[32, 64, 128, 256], out_channels=16),\n'
        '    rpn_head=dict(in_channels=16, feat_channels=16),\n'
        '    roi_head=dict(\n'
        '        bbox_roi_extractor=dict(out_channels=16),\n'
        '        mask_roi_extractor=dict(out_channels=16),\n'
        '        bbox_head=dict(in_channels=16, fc_out_channels=16),\n'
        '        mask_head=dict(in_channels=16, num_convs=1)))\n' + text
    )
    return Config.fromfile(path)


def test_parts_of_a_detector_by_config(tmp_path):
    text = """
insert = dict(type='polynl_mm.Insert')
poly = dict(type='polynl_mm.PolyNL2d')
model['backbone'].update(
    insert, into='ResNet', blocks=[dict(after='layer3.5', cfg=poly)])
model['rpn_head'].update(
    insert, into='RPNHead', blocks=[dict(after='rpn_conv', cfg=poly)])
model['roi_head']['bbox_head'].update(
    insert, into='Shared2FCBBoxHead', blocks=[])
"""
    cfg = mask_rcnn(tmp_path, text)
    cfg.merge_from_dict({'model.backbone.blocks.0.cfg.form': 'direct'})
    model = build(cfg.model)
    layers = layers_of(model)
    assert sorted(layers) == [
        'backbone.layer3.5.poly_nl',
        'rpn_head.rpn_conv.poly_nl',
    ]
    assert layers['backbone.layer3.5.poly_nl'].form == 'direct'
    assert type(model.backbone).__name__ == 'ResNet'
    # Base keys and what the detector hands to its parts have arrived.
    assert model.backbone.frozen_stages == 1
    assert model.rpn_head.test_cfg.nms_pre == 1000
    assert model.rpn_head.train_cfg.pos_weight == -1
    calls = []
    layers['rpn_head.rpn_conv.poly_nl'].register_forward_hook(
        lambda *_: calls.append(1)
    )
    set_beta(model, 0.1)
    loss_of(model, with_mask=True).backward()
    assert len(calls) == 5  # levels of the pyramid share the head
    for layer in layers.values():
        assert layer.w1.weight.grad.abs().max() > 0


def test_whole_detector_as_host(tmp_path):
    text = """
poly = dict(type='polynl_mm.PolyNL2d')
model.update(
    type='polynl_mm.Insert', into='MaskRCNN', blocks=[
        dict(after='backbone.layer3.5', cfg=poly),
        dict(after='neck.fpn_convs.*', cfg=poly),
        dict(after='roi_head.bbox_roi_extractor', cfg=poly)])
"""
    plain = build(mask_rcnn(tmp_path, '').model)
    model = build(mask_rcnn(tmp_path, text).model)
    assert type(model) is type(plain)
    assert sorted(layers_of(model)) == [
        'backbone.layer3.5.poly_nl',
        *[f'neck.fpn_convs.{i}.poly_nl' for i in range(4)],
        'roi_head.bbox_roi_extractor.poly_nl',
    ]
    new = block_keys(model)
    kept = [key for key in model.state_dict() if key not in new]
    assert kept == list(plain.state_dict())
    model.init_weights()
    assert all(y.beta == 0 for y in layers_of(model).values())
    set_beta(model, 0.1)
    loss_of(model, with_mask=True).backward()
    for name, layer in layers_of(model).items():
        assert layer.w1.weight.grad.abs().max() > 0, name


def test_transformer_detector():
    pytest.importorskip('mmdet')
    from mmengine.hub import get_config

    cfg = get_config(
        'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
    ).model
    cfg.backbone.update(base_channels=8, init_cfg=None)
    cfg.neck.in_channels = [64, 128, 256]
    cfg.encoder.num_layers = cfg.decoder.num_layers = 1
    cfg.num_queries = 5
    model = build(cfg, [('neck.convs.*', POLY), ('encoder.layers.0', POLY1D)])
    assert sorted(layers_of(model)) == [
        'encoder.layers.0.poly_nl',
        *[f'neck.convs.{i}.poly_nl' for i in range(3)],
    ]
    # This host reinitialises the matrices of its encoder at the very end.
    model.init_weights()
    spread = layers_of(model)['encoder.layers.0.poly_nl'].w1.weight.std()
    assert spread.item() == pytest.approx(256**-0.5, rel=0.05)
    set_beta(model, 0.1)
    loss_of(model).backward()
    for name, layer in layers_of(model).items():
        assert layer.w1.weight.grad.abs().max() > 0, name


def test_scope_of_the_host():
    """The bare name is that of the scope, the prefixed one its own."""
    for scope in ('mmdet', 'mmseg'):
        model = build(RESNET, [('layer1', POLY)], scope)
        assert type(model).__module__.startswith(scope)
    model = build(
        dict(RESNET, type='mmseg.ResNet'), [('layer1', POLY)], 'mmdet'
    )
    assert type(model).__module__.startswith('mmseg')


# ---------------------------------------------------- life of such a model


def resnet(beta=0.5, training=False):
    cfg = dict(RESNET, norm_eval=False)
    model = build(cfg, [('layer2', POLY), ('layer3.5', POLY)])
    model.init_weights()
    set_beta(model, beta)
    model.train(training)
    return model


def total(model, x=None):
    x = inputs('ResNet')[0].detach() if x is None else x
    with torch.no_grad():
        return sum(y.sum() for y in model(x)).item()


def reloaded(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize('copied', [copy.deepcopy, reloaded])
def test_copy_runs_its_own_block(copied):
    model = resnet()
    before = total(model)
    twin = copied(model)
    assert total(twin) == before
    set_beta(twin, 0.0)
    assert total(twin) != before and total(model) == before
    set_beta(model, 0.0)
    assert total(twin) == total(model)
    # Initialising the copy does not touch the model.
    set_beta(model, 0.5)
    set_beta(twin, 0.5)
    for module in twin.modules():
        if hasattr(module, '_is_init'):
            module._is_init = False
    twin.init_weights()
    assert all(y.beta == 0 for y in layers_of(twin).values())
    assert all(y.beta == 0.5 for y in layers_of(model).values())


def test_second_init_keeps_what_was_learnt():
    model = resnet(beta=0.5)
    model.init_weights()  # mmengine warns and does nothing
    assert all(y.beta == 0.5 for y in layers_of(model).values())


class ZeroConv(BaseModule):
    """Initialises itself in mmengine's way, which happens once only."""

    def __init__(self, in_channels):
        super().__init__(dict(type='Constant', layer='Conv2d', val=0))
        self.conv = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x):
        return x + self.conv(x)


def test_host_that_initialises_again_at_the_end():
    class Late(BaseModule):
        def __init__(self):
            super().__init__()
            self.conv = ConvModule(3, 5, 1)

        def init_weights(self):
            super().init_weights()
            for parameter in self.parameters():
                nn.init.constant_(parameter, 1)

        def forward(self, x):
            return self.conv(x)

    model = insert_blocks(Late(), [dict(after='', cfg=dict(type=ZeroConv))])
    model.init_weights()
    assert (model.conv.conv.weight == 1).all()
    assert (model.zero_conv.conv.weight == 0).all()


def test_moving_average_has_its_own_blocks():
    model = resnet()
    average = ExponentialMovingAverage(model, momentum=0.5)
    average.update_parameters(model)
    set_beta(model, 0.0)
    average.update_parameters(model)
    betas = {y.beta.item() for y in layers_of(average.module).values()}
    assert betas == {0.25}
    assert total(average.module) != total(model)


def test_the_class_elsewhere_is_unaffected():
    resnet()
    plain = build(RESNET)
    assert not layers_of(plain)
    assert not any(m._forward_hooks for m in plain.modules())
    assert 'init_weights' not in vars(plain)


@pytest.mark.parametrize('after', ['layer3.5', 'layer3.5.conv3'])
def test_activation_checkpointing(after):
    grads, calls = [], []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = build(
            dict(RESNET, zero_init_residual=False, with_cp=with_cp),
            [(after, POLY)],
        )
        model.init_weights()
        model.double().train()
        set_beta(model, 0.5)
        (layer,) = layers_of(model).values()
        layer.register_forward_hook(lambda *_, w=with_cp: calls.append(w))
        x = inputs('ResNet')[0].detach().double().requires_grad_()
        scalar(model(x)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    # Within the recomputed part the block runs again, after it it does not.
    assert calls == [False, True] + [True] * (after != 'layer3.5')
    for key, grad in grads[0].items():
        assert_close(grads[1][key], grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compile(backend):
    model = small(POLY).eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for parameter in (0.5, 0.2):
        set_beta(model, parameter)
        x = torch.randn(2, 3, 16, 12)
        assert_close(compiled(x), model(x))


def small(layer, **kwargs):
    """A map, then tokens with their shape: what exporters must follow."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            shape = (x.shape[2], x.shape[3])
            return self.norm(x.flatten(2).transpose(1, 2)), shape

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(ConvModule(3, 8, 3, padding=1))
            self.embed = Tokens()

        def forward(self, x):
            tokens, (h, w) = self.embed(self.stem(x))
            return tokens.view(-1, h, w, 8)

    entries = [dict(after=name, cfg=layer) for name in ('stem', 'embed')]
    model = insert_blocks(Small(), entries)
    set_beta(model, 0.5)
    return model


def test_export_with_dynamic_size():
    model = small(POLY).eval()
    dim = torch.export.Dim
    program = torch.export.export(
        model,
        (torch.randn(2, 3, 16, 12),),
        dynamic_shapes=[{2: dim('h', min=4), 3: dim('w', min=4)}],
    )
    assert {k for k in program.state_dict if 'poly_nl.beta' in k} == {
        'stem.0.poly_nl.beta',
        'embed.poly_nl.beta',
    }
    x = torch.randn(2, 3, 9, 21)
    assert_close(program.module()(x), model(x))


def test_trace():
    model = small(POLY).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(model, torch.randn(2, 3, 16, 12))
    x = torch.randn(2, 3, 9, 21)
    assert_close(traced(x), model(x))


def test_symbolic_trace_of_what_has_no_shapes():
    """Of a leaf nothing is asked; in any other module it is said in a line."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()))
    insert_blocks(model, [dict(after='0.0', cfg=POLY)])
    x = torch.randn(2, 3, 6, 5)
    assert_close(torch.fx.symbolic_trace(model)(x), model(x))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.conv(x)

    model = nn.Sequential(Block())
    cfg = dict(POLY, in_channels=8)
    insert_blocks(model, [dict(after='0', cfg=cfg)])
    with pytest.raises(ValueError, match="shapes.* after '0'.*leaf") as error:
        torch.fx.symbolic_trace(model)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('static', [False, True])
def test_distributed(static, tmp_path):
    alone = resnet(training=True)
    model = copy.deepcopy(alone)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(
            model, static_graph=static
        )
        for _ in range(2):
            scalar(wrapped(inputs('ResNet')[0])).backward()
    finally:
        torch.distributed.destroy_process_group()
    for _ in range(2):
        scalar(alone(inputs('ResNet')[0])).backward()
    for (key, p), q in zip(model.named_parameters(), alone.parameters()):
        assert_close(p.grad, q.grad, msg=key)


def test_autocast():
    model = small(POLY)
    with torch.autocast('cpu', torch.bfloat16):
        y = model(torch.randn(2, 3, 16, 12))
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_sync_bn_conversion_keeps_the_blocks():
    model = build(
        dict(RESNET, norm_cfg=dict(type='SyncBN')), [('layer3.5', POLY)]
    )
    set_beta(model, 0.5)
    model = revert_sync_batchnorm(model)
    model.eval()
    before = total(model)
    set_beta(model, 0.0)
    assert total(model) != before


def test_weight_decay_by_name():
    model = build(RESNET, [('layer3', POLY), ('layer2.*', POLY)])
    keys = {k: dict(decay_mult=0) for k in ('poly_nl.alpha', 'poly_nl.beta')}
    cfg = dict(
        type='OptimWrapper',
        optimizer=dict(type='SGD', lr=0.1, weight_decay=1e-2),
        paramwise_cfg=dict(custom_keys=keys),
    )
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    free = {
        id(p) for g in groups if g['weight_decay'] == 0 for p in g['params']
    }
    expected = {
        id(p) for y in layers_of(model).values() for p in (y.alpha, y.beta)
    }
    assert free == expected and len(free) == 2 * (1 + 4)


@pytest.mark.parametrize(
    'cfg, after, frozen',
    [
        (dict(RESNET, frozen_stages=2), 'layer2.3', True),
        (dict(RESNET, frozen_stages=2), 'layer3.5', False),
        (dict(HOSTS['Swin'][1], frozen_stages=2), 'stages.1.blocks.1', True),
        (dict(HOSTS['Swin'][1], frozen_stages=2), 'stages.2.blocks.1', False),
    ],
)
def test_warns_of_a_frozen_block(cfg, after, frozen):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = build(cfg, [(after, POLY)])
    messages = [str(w.message) for w in caught if 'learn' in str(w.message)]
    assert len(messages) == frozen
    (layer,) = layers_of(model).values()
    if frozen:
        assert f"'poly_nl' after '{after}' will never learn" in messages[0]
    # The model itself was not touched.
    assert all(y.beta.requires_grad for y in layers_of(model).values())
    model.train()
    assert layer.beta.requires_grad != frozen
    assert layer.training != frozen


# ---------------------------------------------- what the block is shown


class Returns(nn.Module):
    """Stands for a module: returns what it was made with."""

    def __init__(self, output, batch_first=True):
        super().__init__()
        self.output = output
        self.batch_first = batch_first

    def forward(self, *args, **kwargs):
        return self.output


class Host(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def run_in_host(output, layer, *args, item=None, batch_first=True, **kwargs):
    """Output of the host with the block, and the block."""
    layer = dict(layer, in_channels=5, beta_init=0.5)
    entry = dict(after='inner', cfg=layer)
    if item is not None:
        entry['item'] = item
    model = Host(Returns(output, batch_first))
    insert_blocks(model, [entry])
    return model(*args, **kwargs), model.inner.poly_nl


def test_map_to_a_1d_block():
    x = torch.randn(2, 5, 3, 7)
    y, block = run_in_host(x, POLY1D)
    assert_close(y, block(x.flatten(2)).view(2, 5, 3, 7))


@pytest.mark.parametrize('batch_first', [True, False])
def test_tokens_to_a_1d_block(batch_first):
    x = torch.randn(2, 21, 5)
    given = x if batch_first else x.transpose(0, 1).contiguous()
    y, block = run_in_host(given, POLY1D, batch_first=batch_first)
    expected = block(x.transpose(1, 2)).transpose(1, 2)
    assert_close(y, expected if batch_first else expected.transpose(0, 1))
    assert y.is_contiguous()


class CountsRows(PolyNL2d):
    """Not the same for a map and its transpose."""

    def forward(self, x):
        # Blocks written for maps take views.
        assert x.is_contiguous()
        return x + torch.arange(x.shape[2])[:, None]


@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('where', ['output', 'argument', 'keyword'])
def test_tokens_to_a_2d_block(where, batch_first):
    x = torch.randn(2, 21, 5)
    given = x if batch_first else x.transpose(0, 1).contiguous()
    output = (given, (3, 7)) if where == 'output' else given
    args = [torch.zeros(1), (3, 7)] if where == 'argument' else []
    kwargs = dict(hw_shape=[3, 7]) if where == 'keyword' else {}
    y, _ = run_in_host(
        output,
        dict(type=CountsRows),
        *args,
        batch_first=batch_first,
        **kwargs,
    )
    if where == 'output':
        y, shape = y
        assert shape == (3, 7)
    rows = torch.arange(3).repeat_interleave(7)[:, None]
    assert_close(y if batch_first else y.transpose(0, 1), x + rows)
    assert y.is_contiguous()


def test_the_rest_of_a_tuple_passes():
    x, other = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 4, 4)
    (got, passed), block = run_in_host([other, x], POLY, item=1)
    assert got is other
    assert_close(passed, block(x))
    # Swin's last stage returns one feature twice.
    tokens = torch.randn(2, 21, 5)
    out, block = run_in_host((tokens, (3, 7), tokens, (3, 7)), POLY)
    assert type(out) is tuple and out[1] == out[3] == (3, 7)
    assert out[0] is out[2] and not torch.equal(out[0], tokens)
    pair = namedtuple('pair', 'x size')
    out, _ = run_in_host(pair(x, 9), POLY)
    assert type(out) is pair and out.size == 9


def test_stage_of_swin_and_one_of_its_outputs():
    scope, cfg, _ = HOSTS['Swin']
    entry = dict(after='stages.1', item=2, cfg=POLY)
    cfg = dict(cfg, type='polynl_mm.Insert', into=cfg['type'], blocks=[entry])
    model = build(cfg, scope=scope)
    model.eval()
    (layer,) = layers_of(model).values()
    assert layer.in_channels == 16
    plain = outputs(model, 'Swin')
    set_beta(model, 0.5)
    changed = [
        not torch.allclose(y, z) for y, z in zip(outputs(model, 'Swin'), plain)
    ]
    assert changed == [False, True, False, False]


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class PlusOne(nn.Module):
    def forward(self, x):
        return x + 1


@pytest.mark.parametrize('order', [(Twice, PlusOne), (PlusOne, Twice)])
def test_several_blocks_run_in_order(order):
    model = Host(Returns(torch.ones(2, 5, 3, 3)))
    insert_blocks(
        model, [dict(after='inner', cfg=dict(type=t)) for t in order]
    )
    assert [name for name, _ in model.inner.named_children()] == [
        infer_abbr(t) for t in order
    ]
    assert model()[0, 0, 0, 0] == (3 if order[0] is Twice else 4)


def test_second_block_of_a_type():
    twice = [('layer3.5', POLY), ('layer3.5', dict(POLY, postfix='_2'))]
    model = build(RESNET, twice)
    assert sorted(layers_of(model)) == [
        'layer3.5.poly_nl',
        'layer3.5.poly_nl_2',
    ]


def test_pattern_stays_within_a_component():
    model = build(RESNET, [('layer[23].*', POLY)])
    assert list(layers_of(model)) == [
        f'layer{stage}.{block}.poly_nl'
        for stage, count in ((2, 4), (3, 6))
        for block in range(count)
    ]


def test_pattern_does_not_mean_the_model_itself():
    model = Host(nn.Conv2d(3, 5, 1))
    insert_blocks(model, [dict(after='*', cfg=POLY)])
    assert list(layers_of(model)) == ['inner.poly_nl']


def test_channels_that_are_stated():
    model = Host(Returns(torch.randn(2, 5, 3, 3)))
    insert_blocks(model, [dict(after='inner', cfg=dict(POLY, in_channels=5))])
    assert model().shape == (2, 5, 3, 3)


# --------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'entry, message',
    [
        (dict(cfg=POLY), r'blocks\[0\].*missing: \[.after.\]'),
        (dict(after='layer3.5', cfg=POLY, at=1), r'unknown: \[.at.\]'),
        (dict(after=3, cfg=POLY), 'after must be a path'),
        (3, 'blocks must be a list of dicts.*got .3'),
        ('layer3.5', 'blocks must be a list of dicts'),
        (dict(after='layer3.5', cfg=3), 'cfg a dict with a type'),
        (dict(after='layer3.5', cfg='type'), 'cfg a dict with a type'),
        (dict(after='layer3.5', cfg=dict(type=3)), 'cfg a dict with a type'),
        (dict(after='layer3.5', cfg=POLY, item='0'), 'item a number'),
        (dict(after='layer3.5', cfg=dict(POLY, postfix=0.5)), 'a postfix'),
        (dict(after='layer3.5', cfg=dict(POLY, postfix='a.b')), 'a postfix'),
        (
            dict(after='layer3.5', cfg=dict(POLY, foo=1)),
            "can not be built after 'layer3.5': .* argument 'foo'",
        ),
        (dict(after='layer3.5', cfg=dict(in_channels=8)), 'dict with a type'),
        (dict(after='layer3.6', cfg=POLY), r"'layer3.6' in ResNet.*layer3.5"),
        (dict(after='layer9.*', cfg=POLY), r"no module 'layer9.\*'"),
        (dict(after='bn1', cfg=POLY), "'bn1' is a BatchNorm2d"),
        (
            dict(after='layer3.5', cfg=dict(POLY, in_channels=7)),
            "'layer3.5', 'poly_nl' was built with in_channels=7.*128 channels",
        ),
        (
            dict(after='layer3.5', cfg=dict(type='polynl_mm.PolyNL3d')),
            "PolyNL3d after 'layer3.5' has 3d",
        ),
        (dict(after='layer3.5', item=1, cfg=POLY), "item=1 .*'layer3.5'"),
        (dict(after='', cfg=POLY), r"'' is a tuple of .*item.*\[0, 1, 2, 3\]"),
        (
            dict(after='layer3.5.downsample', cfg=POLY),
            "no module 'layer3.5.downsample'",
        ),
        (dict(after='layer3.0.downsample', cfg=POLY), 'downsample.1. is a Ba'),
    ],
)
def test_bad_entry_is_named(entry, message):
    cfg = dict(RESNET, type='polynl_mm.Insert', into='ResNet', blocks=[entry])
    with pytest.raises(ValueError, match=message):
        build(cfg)


@pytest.mark.parametrize(
    'name, after, layer, message',
    [
        ('Swin', 'stages.1', POLY, r"'stages.1' is a tuple of .*\[0, 2\]"),
        ('Swin', 'stages', POLY, "'stages' is a ModuleList.*never called"),
        (
            'Swin',
            'stages.1.blocks.0.attn.w_msa',
            POLY,
            "'stages.1.blocks.0.attn.w_msa', 'poly_nl' needs a map.*PolyNL1d",
        ),
        ('HRNet', 'stage3', POLY, r"'stage3.0' is a list of .*\[0, 1, 2\]"),
        ('ResNet', 'layer3.5', dict(type='NoBlock'), 'NoBlock'),
    ],
)
def test_bad_place_is_named(name, after, layer, message):
    scope, cfg, _ = HOSTS[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        build(cfg, [(after, layer)], scope)


def test_place_a_dry_run_does_not_reach():
    model = build(HOSTS['FPN'][1], [('', POLY)])
    with pytest.raises(ValueError, match=r"'' is a tuple of .*\[0, 1, 2\]"):
        outputs(model, 'FPN')


def test_two_blocks_of_one_name():
    for second in ('layer3.5', 'layer3', 'layer3.*'):
        with pytest.raises(ValueError, match="layer3.5. has a 'poly_nl'.*_2"):
            build(RESNET, [('layer3.5', POLY), (second, POLY)])
    plugin = dict(cfg=dict(POLY), position='after_conv3')
    with pytest.raises(ValueError, match="layer3.5. has a 'poly_nl'"):
        build(dict(RESNET, plugins=[plugin]), [('layer3.5', POLY)])


def test_module_of_two_paths():
    shared = nn.Conv2d(3, 3, 1)
    model = nn.Sequential()
    model.add_module('a', Host(shared))
    model.add_module('b', Host(shared))
    entries = [dict(after=f'{path}.inner', cfg=POLY) for path in 'ab']
    with pytest.raises(ValueError, match="'b.inner' has a 'poly_nl'"):
        insert_blocks(model, entries)
    insert_blocks(model, [dict(after='*.inner', cfg=POLY)])
    assert len(layers_of(model)) == 1


def test_module_that_is_never_called():
    class Idle(Host):
        def forward(self, x):
            return self.inner(x)

    model = Idle(nn.Conv2d(3, 5, 1))
    model.idle = nn.Conv2d(3, 5, 1)
    with pytest.raises(ValueError, match="Idle never calls 'idle'"):
        insert_blocks(model, [dict(after='idle', cfg=POLY)])


def test_module_called_past_its_hooks():
    """mmseg calls ``decode_head.forward``; its auxiliary head only trains."""
    head = dict(
        type='FCNHead',
        in_channels=64,
        channels=8,
        num_convs=1,
        in_index=1,
        num_classes=4,
    )
    cfg = dict(
        type='EncoderDecoder',
        backbone=RESNET,
        decode_head=dict(head, num_convs=2),
        auxiliary_head=head,
    )
    model = build(
        cfg,
        [('decode_head.convs', POLY), ('auxiliary_head.convs', POLY)],
        'mmseg',
    )
    assert sorted(layers_of(model)) == [
        'auxiliary_head.convs.0.poly_nl',
        'decode_head.convs.1.poly_nl',
    ]
    with pytest.raises(ValueError, match="'decode_head', or its forward only"):
        build(cfg, [('decode_head', POLY)], 'mmseg')


def test_container_that_runs_its_items():
    head = dict(type='PSPHead', in_channels=8, channels=8, num_classes=4)
    with pytest.raises(
        ValueError, match="'psp_modules' is a PPM, .*modules.0"
    ):
        build(head, [('psp_modules', POLY)], 'mmseg')


def test_block_in_the_mode_of_its_module():
    model = Host(nn.Conv2d(3, 5, 1)).eval()
    insert_blocks(model, [dict(after='inner', cfg=POLY)])
    assert not model.inner.poly_nl.training


def test_sequential_whose_end_is_shared():
    act = nn.ReLU()
    first = nn.Sequential(nn.Conv2d(3, 5, 1), act)
    second = nn.Sequential(nn.Conv2d(5, 5, 1), act)
    model = nn.Sequential(first, second)
    with pytest.raises(ValueError, match="'0.1' is used elsewhere"):
        insert_blocks(model, [dict(after='0', cfg=POLY)])


def test_channels_that_cannot_be_told():
    model = Host(Returns(torch.randn(2, 5, 3, 3)))
    with pytest.raises(ValueError, match="after 'inner' .Returns.*in_chann"):
        insert_blocks(model, [dict(after='inner', cfg=POLY)])


@pytest.mark.parametrize(
    'output, message',
    [
        (dict(x=1), "'inner' is no map .*but a dict"),
        (torch.zeros(2, 5), r"'inner' is no map .*\(2, 5\)"),
        (
            (torch.zeros(2, 5, 3, 3), torch.zeros(2, 5, 2, 2)),
            r"'inner' is a tuple of .*\(2, 5, 3, 3\).*item=.*\[0, 1\]",
        ),
        (torch.zeros(2, 6, 3, 3), "after 'inner'.*in_channels=5.*6 channels"),
        (torch.zeros(2, 21, 5), "after 'inner'.*no .H, W. beside"),
        (
            (torch.zeros(2, 21, 5), (3, 7), (7, 3)),
            r"after 'inner'.*more than one \(H, W\)",
        ),
    ],
)
def test_unusable_output_is_named_at_forward(output, message):
    with pytest.raises(ValueError, match=message):
        run_in_host(output, POLY)
