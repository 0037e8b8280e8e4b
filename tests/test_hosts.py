"""The layers as plug-ins of the backbones of mmdet and mmseg."""

import importlib
import logging

import pytest
import torch
from mmcv.cnn import ContextBlock
from mmengine.optim import build_optim_wrapper
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch.testing import assert_close

from polynl_mm import fuse_poly_nl
from polynl_mm.layers import PolyNL2d

POSITIONS = ('after_conv1', 'after_conv2', 'after_conv3')
STAGES = (False, True, False, True)

# Depth 50: the shallower ones have basic blocks, which take no plug-ins.
RESNET = dict(depth=50, base_channels=8)
RESNEXT = dict(depth=50, base_channels=8, groups=4, base_width=4)
RES2NET = dict(depth=50, base_channels=8, scales=4, base_width=4)
REGNET = dict(arch=dict(w0=8, wa=8.0, wm=2.0, group_w=8, depth=8, bot_mul=1.0))
BACKBONES = {
    'mmdet.ResNet': RESNET,
    'mmdet.ResNeXt': RESNEXT,
    'mmdet.RegNet': REGNET,
    'mmdet.ResNetV1d': RESNET,
    'mmdet.Res2Net': RES2NET,
    'mmseg.ResNet': RESNET,
    'mmseg.ResNetV1c': RESNET,
    'mmseg.ResNeXt': RESNEXT,
}
# These two announce the channels of a plain bottleneck to plug-ins inside
# their wider one.
WRONG_INSIDE = ('mmdet.Res2Net', 'mmseg.ResNeXt')
WORKING = [
    (name, position)
    for name in BACKBONES
    for position in POSITIONS
    if position == 'after_conv3' or name not in WRONG_INSIDE
]
BROKEN = [(name, p) for name in WRONG_INSIDE for p in POSITIONS[:2]]


@pytest.fixture(autouse=True)
def quiet_and_quick():
    """No log (a paragraph per parameter), no second thread (too small)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


# A trained backbone's residual branches; the host's own init zeroes them.
TRAINABLE = dict(norm_eval=False, zero_init_residual=False)


def build(name, position=None, layer=None, **kwargs):
    """A backbone in training mode, host-initialised without a checkpoint."""
    host = name.partition('.')[0]
    pytest.importorskip(host)
    registry = importlib.import_module(f'{host}.registry')
    cfg = {**BACKBONES[name], **TRAINABLE, **kwargs}
    if position:
        plugin = dict(type='polynl_mm.PolyNL2d', **(layer or {}))
        cfg['plugins'] = [dict(cfg=plugin, stages=STAGES, position=position)]
    torch.manual_seed(0)
    backbone = registry.MODELS.build(dict(cfg, type=name))
    backbone.init_weights()
    backbone.train()
    return backbone


def layers_of(backbone):
    """Name -> layer of every Poly-NL layer."""
    return {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, PolyNL2d)
    }


def pixels():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 64, 64, generator=generator)


def scalar(outputs):
    """A number on which every output has its own random influence."""
    generator = torch.Generator().manual_seed(2)
    return sum(
        (y * torch.randn(y.shape, generator=generator)).sum() for y in outputs
    )


def gradients(backbone):
    """Input and parameter gradients of :func:`scalar`, by name."""
    dtype = next(backbone.parameters()).dtype
    x = pixels().to(dtype).requires_grad_()
    scalar(backbone(x)).backward()
    grads = {n: p.grad for n, p in backbone.named_parameters()}
    return dict(grads, input=x.grad)


def without_layers(backbone, name):
    """The same backbone with the same weights and no Poly-NL layer."""
    plain = build(name)
    layers = tuple(f'{layer}.' for layer in layers_of(backbone))
    assert layers
    plain.load_state_dict(
        {
            key: value
            for key, value in backbone.state_dict().items()
            if not key.startswith(layers)
        }
    )
    return plain


@pytest.mark.parametrize('name, position', WORKING)
def test_trains_at_every_position(name, position):
    backbone = build(name, position, dict(beta_init=0.5))
    layers = layers_of(backbone)
    blocks = (len(backbone.layer2), len(backbone.layer4))
    assert list(layers) == [
        f'layer{stage}.{block}.poly_nl'
        for stage, count in zip((2, 4), blocks)
        for block in range(count)
    ]
    grads = gradients(backbone)
    for layer in layers:
        for key in ('w1.weight', 'w2.weight', 'w3.weight', 'alpha', 'beta'):
            grad = grads[f'{layer}.{key}']
            assert grad.isfinite().all(), (layer, key)
            assert grad.abs().max() > 1e-8, (layer, key)
    assert all(g is not None for g in grads.values())


@pytest.mark.parametrize('name, position', BROKEN)
def test_host_that_announces_other_channels(name, position):
    backbone = build(name, position)
    announced = next(iter(layers_of(backbone).values())).in_channels
    delivered = 2 * announced
    message = (
        rf'PolyNL2d .*in_channels={announced} .*shape '
        rf"\(2, {delivered}, \d+, \d+\).*'after_conv3'"
    )
    with pytest.raises(ValueError, match=message):
        backbone(pixels())


CONTEXT = dict(type='ContextBlock', ratio=0.5)
POLY_NL = dict(type='polynl_mm.PolyNL2d', beta_init=0.5)


def two(*cfgs):
    return [
        dict(cfg=cfg, stages=STAGES, position='after_conv3') for cfg in cfgs
    ]


class OwnBlock(torch.nn.Module):
    after_conv3_plugins = (POLY_NL, CONTEXT)

    def forward_plugin(self, x, names):
        return self.wanted(x)


def test_plugins_of_a_block_that_tells_nothing():
    OwnBlock().poly_nl = PolyNL2d(4)


@pytest.mark.parametrize('cfgs', [(POLY_NL, CONTEXT), (CONTEXT, POLY_NL)])
def test_host_that_loses_all_plugins_but_the_last(cfgs):
    with pytest.raises(
        ValueError, match='mmseg keeps only the last of 2 .*polynl_mm.Insert'
    ):
        build('mmseg.ResNet', plugins=two(*cfgs))
    backbone = build('mmdet.ResNet', plugins=two(*cfgs))
    assert all(g is not None for g in gradients(backbone).values())
    # One that was put together by other means.
    backbone = build('mmseg.ResNet', plugins=two(POLY_NL), norm_eval=True)
    for module in backbone.modules():
        if getattr(module, 'after_conv3_plugin_names', None):
            module.context_block = ContextBlock(module.conv3.out_channels, 0.5)
            module.after_conv3_plugin_names.append('context_block')
    grads = gradients(backbone)
    lost = [k for k, g in grads.items() if '.poly_nl.' in k and g is None]
    assert len(lost) == 7 * 5
    for trainable in (False, True):
        backbone.eval()
        report = fuse_poly_nl(backbone, trainable)[1]
        assert not report.fused and len(report.left) == 7
        assert set(report.left.values()) == {
            "the host keeps only 'context_block'"
        }


@pytest.mark.parametrize('form', ['direct', 'gram'])
@pytest.mark.parametrize('name', ['mmdet.ResNet', 'mmseg.ResNet'])
def test_host_adds_in_place_and_checkpoints(name, form):
    """``out += identity`` onto the layer's result, recomputed or not."""
    layer = dict(beta_init=0.5, form=form)
    stored = build(name, 'after_conv3', layer)
    recomputed = build(name, 'after_conv3', layer, with_cp=True)
    recomputed.load_state_dict(stored.state_dict())
    calls = []
    for backbone in (stored, recomputed):
        # The two sum up in another order, so in float32 they would differ.
        backbone.double()
        for module in layers_of(backbone).values():
            module.register_forward_hook(
                lambda *_, b=backbone: calls.append(b)
            )
    expected, got = gradients(stored), gradients(recomputed)
    assert calls.count(recomputed) == 2 * calls.count(stored) > 0
    assert expected.keys() == got.keys()
    for key, grad in expected.items():
        assert_close(got[key], grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('position', POSITIONS)
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize(
    'layer', [{}, dict(zero_init_w3=True, beta_init=1.0)], ids=str
)
@pytest.mark.parametrize('name', ['mmdet.ResNet', 'mmseg.ResNet'])
def test_identity_after_the_init_of_the_host(name, layer, training, position):
    backbone = build(name, position, layer)
    plain = without_layers(backbone, name)
    backbone.train(training)
    plain.train(training)
    with torch.no_grad():
        got, expected = backbone(pixels()), plain(pixels())
    for y, z in zip(got, expected, strict=True):
        assert_close(y, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('position', POSITIONS)
@pytest.mark.parametrize('name', ['mmdet.ResNet', 'mmseg.ResNet'])
def test_no_identity_with_a_branch(name, position):
    backbone = build(name, position, dict(beta_init=0.5))
    plain = without_layers(backbone, name)
    with torch.no_grad():
        got, expected = backbone(pixels()), plain(pixels())
    changed = [
        not torch.allclose(y, z, rtol=0.01) for y, z in zip(got, expected)
    ]
    # The first output comes before the first layer.
    assert changed == [False, True, True, True]


def test_host_init_reaches_the_convolutions(monkeypatch):
    """Otherwise it would be no merit to stay the identity through it."""

    def spread():
        backbone = build('mmdet.ResNet', 'after_conv3')
        module = next(iter(layers_of(backbone).values()))
        return module.w3.weight.std().item() * module.in_channels**0.5

    assert spread() == pytest.approx(1, rel=0.1)  # Xavier, the layer's own
    monkeypatch.setattr(PolyNL2d, 'init_weights', lambda self: None)
    assert spread() == pytest.approx(2**0.5, rel=0.1)  # Kaiming, the host's


def test_zero_init_residual_silences_after_conv3():
    """The start of a network from scratch: the layer waits for norm3."""
    for zero_init_residual in (True, False):
        backbone = build(
            'mmdet.ResNet',
            'after_conv3',
            dict(beta_init=0.5),
            zero_init_residual=zero_init_residual,
        )
        grads = gradients(backbone)
        for layer in layers_of(backbone):
            largest = grads[f'{layer}.w3.weight'].abs().max()
            assert (largest == 0) == zero_init_residual


@pytest.mark.parametrize('norm_eval', [True, False])
def test_frozen_stages_and_norm_eval_reach_the_layer(norm_eval):
    with pytest.warns(UserWarning, match='norm_eval'):
        backbone = build(
            'mmdet.ResNet',
            'after_conv3',
            dict(beta_init=0.5, norm_cfg=dict(type='BN')),
            frozen_stages=2,
            norm_eval=norm_eval,
        )
    grads = gradients(backbone)
    for name, module in layers_of(backbone).items():
        frozen = name.startswith('layer2')
        assert isinstance(module.norm, _BatchNorm)
        assert module.norm.training == (not frozen and not norm_eval)
        seen = module.norm.num_batches_tracked.item()
        assert seen == int(module.norm.training)
        for key, param in module.named_parameters():
            assert param.requires_grad != frozen
            assert (grads[f'{name}.{key}'] is None) == frozen


def test_normed_branch_in_a_host():
    layer = dict(beta_init=0.5, norm_cfg=dict(type='GN', num_groups=4))
    backbone = build('mmdet.ResNet', 'after_conv3', layer)
    grads = gradients(backbone)
    for name, module in layers_of(backbone).items():
        for key, _ in module.named_parameters():
            assert grads[f'{name}.{key}'].abs().max() > 0, (name, key)


# ------------------------------------------------------------ weight decay

NO_DECAY = {
    'poly_nl.alpha': dict(decay_mult=0),
    'poly_nl.beta': dict(decay_mult=0),
}


def settings_by_name(model, paramwise_cfg):
    """Parameter name -> (learning rate, weight decay) in the optimiser."""
    cfg = dict(
        type='OptimWrapper',
        optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-2),
        paramwise_cfg=paramwise_cfg,
    )
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: (group['lr'], group['weight_decay'])
        for group in build_optim_wrapper(model, cfg).optimizer.param_groups
        for p in group['params']
    }


@pytest.mark.parametrize(
    'others', [{}, dict(norm_decay_mult=0, bias_decay_mult=0)], ids=str
)
@pytest.mark.parametrize('position', POSITIONS)
def test_alpha_and_beta_do_not_decay(position, others):
    model = build('mmdet.ResNet', position)
    scalars = {
        f'{layer}.{key}'
        for layer in layers_of(model)
        for key in ('alpha', 'beta')
    }
    matched = {
        name
        for name, _ in model.named_parameters()
        if any(key in name for key in NO_DECAY)
    }
    assert matched == scalars and len(scalars) == 2 * (4 + 3)

    before = settings_by_name(model, others)
    after = settings_by_name(model, dict(others, custom_keys=NO_DECAY))
    assert after.keys() == {name for name, _ in model.named_parameters()}
    for name, (lr, decay) in after.items():
        if name in scalars:
            assert (lr, decay) == (0.1, 0), name
            # What makes the keys necessary: nothing else exempts a scalar.
            assert before[name][1] == 1e-2, name
        else:
            assert (lr, decay) == before[name], name
