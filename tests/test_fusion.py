"""Layers computed from the input of the convolution before them.

Equality is judged where the branch is 0.4 of what the layer adds to, and with
statistics, weights and biases that are not the initial ones.
"""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from helpers import (
    OLD_TORCH,
    SHARE,
    calibrate,
    count_flops,
    layers_of,
    randomize,
)
from hosts import HOSTS, POLY, POLY1D, RESNET, build, inputs
from mmcv.cnn import ConvModule
from mmcv.cnn.utils import fuse_conv_bn
from mmdet.models.backbones.resnet import Bottleneck
from mmengine.model import initialize, revert_sync_batchnorm
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import register_parametrization
from torch.testing import assert_close

import polynl_mm
from polynl_mm.fusion import FusedPolyNL, FusionReport, fuse_poly_nl
from polynl_mm.insertion import insert_blocks
from polynl_mm.layers import PolyNL, PolyNL1d, PolyNL2d

BIASED = dict(POLY, bias=True)

pytestmark = pytest.mark.usefixtures(
    'quiet_and_quick', 'launches_cost_nothing'
)
each_mode = pytest.mark.parametrize('trainable', [False, True])


def plugins(**cfg):
    where = dict(stages=(False, True, True, True), position='after_conv3')
    return [dict(cfg=dict(POLY, **cfg), **where)]


def cast(args, dtype):
    if isinstance(args, torch.Tensor):
        return args.detach().to(dtype)
    return type(args)(cast(a, dtype) for a in args)


def results(model, *args):
    with torch.no_grad():
        out = model(*args)
    return list(out) if isinstance(out, (tuple, list)) else [out]


def assert_near(gots, wants, tolerance):
    for got, want in zip(gots, wants, strict=True):
        assert got.shape == want.shape
        error = (got - want).abs().max() / want.abs().max()
        assert error <= tolerance


def ready(model, *args):
    """For inference, in float64, drawn and calibrated."""
    model.double()
    model.eval()
    randomize(model)
    args = cast(args, torch.float64)
    calibrate(model, *args)
    return model, args


# ------------------------------------------------------------------- hosts

# Name -> host, scope, its places; beneath which layers can be fused.
PAIRS = {
    'ResNet': ('ResNet', {'layer2.1.conv3': 1, 'layer3.5.conv3': 1}),
    'ResNeXt': ('ResNeXt', {'layer3.2.conv3': 1, 'layer1.0.conv2': 0}),
    'RegNet': ('RegNet', {'layer3.1.conv3': 1, 'layer3.1.conv1': 1}),
    'HRNet': ('HRNet', {'layer1.0.conv3': 1, 'stage4.0.fuse_layers.1.2.0': 1}),
    'PVT': ('PVT', {'layers.2.1.1.ffn.layers.0': 1}),
    'MiT': ('MiT', {'layers.2.1.1.ffn.layers.4': 1, 'layers.1.0': 0}),
    'MobileNetV2': (
        'MobileNetV2',
        {
            'layer5.1.linear_conv': 1,
            'layer5.2': 0,
            'layer6.0.expand_conv': 0,
        },
    ),
    'CSPDarknet': (
        'CSPDarknet',
        {'stage3.1.final_conv.conv': 1, 'stage3.1': 0},
    ),
    'CSPNeXt': (
        'CSPNeXt',
        {'stage3.1.blocks.0.conv2.pointwise_conv.conv': 1, 'stage3': 0},
    ),
    'FPN': ('FPN', {'lateral_convs.*': 2, 'fpn_convs.0': 0}),
    'PAFPN': ('PAFPN', {'lateral_convs.*': 2, 'pafpn_convs.0': 0}),
    'UNet': (
        'UNet',
        {'decoder.1.upsample.interp_upsample.1.conv': 1, 'encoder.3': 0},
    ),
    'Swin': ('Swin', {'stages.2.blocks.1': 0}),
    'RoI extractor': ('RoI extractor', {'': 0}),
}


def test_every_host_is_here():
    assert PAIRS.keys() == HOSTS.keys()


@pytest.mark.parametrize('cfg', [POLY, BIASED], ids=['no bias', 'bias'])
@pytest.mark.parametrize('name', PAIRS)
def test_hosts(name, cfg):
    host, places = PAIRS[name]
    scope, host, _ = HOSTS[host]
    model = build(host, [(after, cfg) for after in places], scope)
    model, args = ready(model, *inputs(name))
    plain = results(model, *args)
    layers = layers_of(model)
    single = results(copy.deepcopy(model).float(), *cast(args, torch.float))
    same, report = fuse_poly_nl(model)
    assert same is model
    assert len(report.fused) == sum(places.values())
    assert sorted([*report.fused, *report.left]) == sorted(layers)
    for path in report.fused:
        assert isinstance(model.get_submodule(path), FusedPolyNL)
    assert all(report.left.values())
    outs = results(model, *args)
    if not report.fused:
        assert all(map(torch.equal, outs, plain))
    assert_near(outs, plain, 1e-10)
    args = cast(args, torch.float)
    assert_near(results(model.float(), *args), single, 1e-5)


@pytest.mark.parametrize(
    'scope, cfg, fused',
    [
        ('mmdet', dict(RESNET), 13),
        ('mmseg', dict(RESNET, type='ResNetV1c', stem_channels=8), 13),
        ('mmdet', dict(HOSTS['ResNeXt'][1], depth=50), 13),
        ('mmdet', dict(RESNET, avg_down=True, style='caffe'), 13),
    ],
    ids=['ResNet', 'ResNetV1c', 'ResNeXt', 'caffe'],
)
@each_mode
def test_plugins(scope, cfg, fused, trainable):
    model = build(dict(cfg, plugins=plugins(bias=True)), scope=scope)
    model, args = ready(model, *inputs('ResNet'))
    plain = results(model, *args)
    keys = list(model.state_dict())
    report = polynl_mm.fuse_poly_nl(model, trainable=trainable)[1]
    assert len(report.fused) == fused and not report.left
    assert 'layer2.0.poly_nl' in {
        path.replace('poly_nl_block', 'poly_nl') for path in report.fused
    }
    assert_near(results(model, *args), plain, 1e-10)
    assert (list(model.state_dict()) == keys) == trainable
    small = cast([torch.randn(2, 3, 20, 33)], torch.float64)
    assert results(model, *small)[-1].shape[2:] == (1, 2)


def test_fpn_with_norm():
    cfg = dict(HOSTS['FPN'][1], norm_cfg=dict(type='BN'))
    model = build(cfg, [('lateral_convs.*', POLY)])
    model, args = ready(model, *inputs('FPN'))
    plain = results(model, *args)
    assert len(fuse_poly_nl(model)[1].fused) == 2
    assert all(isinstance(c.bn, nn.Identity) for c in model.lateral_convs)
    assert_near(results(model, *args), plain, 1e-10)


# ------------------------------------------------------------ small models


def pair(norm=True, **kwargs):
    conv = nn.Conv2d(4, 6, 1, **kwargs)
    norms = [nn.BatchNorm2d(6)] if norm else []
    return nn.Sequential(conv, *norms, PolyNL2d(6))


def image(c=4, size=(5, 7)):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, c, *size, generator=generator).double()


def inserted(module, *blocks, after='0', c=4, tail=None):
    """A Sequential of the module (and a tail), with blocks after a path."""
    items = [module] if tail is None else [module, tail]
    model = nn.Sequential(*items)
    return insert_blocks(model, [dict(after=after, cfg=cfg) for cfg in blocks])


FUSABLE = {
    'norm': lambda: pair(),
    'bias': lambda: pair(norm=False),
    'bias and norm': lambda: pair(bias=True),
    'no bias': lambda: pair(norm=False, bias=False),
    'layer with biases': lambda: nn.Sequential(
        nn.Conv2d(4, 6, 1), PolyNL2d(6, bias=True)
    ),
    'norm without affine': lambda: nn.Sequential(
        nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), PolyNL2d(6)
    ),
    'identity': lambda: nn.Sequential(
        nn.Conv2d(4, 6, 1), nn.Identity(), PolyNL2d(6)
    ),
    'narrower': lambda: nn.Sequential(
        nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3), PolyNL2d(3)
    ),
    'wide': lambda: nn.Sequential(
        nn.Conv2d(4, 2, 1, bias=False),
        nn.BatchNorm2d(2),
        PolyNL2d(2, bias=True),
    ),
    'valid': lambda: pair(padding='valid'),
    'SyncBN': lambda: nn.Sequential(
        nn.Conv2d(4, 6, 1), nn.SyncBatchNorm(6), PolyNL2d(6)
    ),
    'ConvModule': lambda: nn.Sequential(
        ConvModule(4, 6, 1, norm_cfg=dict(type='BN'), act_cfg=None),
        PolyNL2d(6),
    ),
    'inserted': lambda: inserted(nn.Conv2d(4, 6, 1), POLY),
    'inserted before the norm': lambda: inserted(
        nn.Conv2d(4, 6, 1), POLY, tail=nn.BatchNorm2d(6)
    ),
    'inserted in a ConvModule': lambda: inserted(
        ConvModule(4, 6, 1, norm_cfg=dict(type='BN')), POLY, after='0.conv'
    ),
    'map to 1d': lambda: inserted(
        ConvModule(4, 6, 1, norm_cfg=dict(type='BN'), act_cfg=None), POLY1D
    ),
    'called twice': lambda: nn.Sequential(
        nn.Conv2d(4, 4, 1), *[inserted(nn.Conv2d(4, 4, 1), POLY)] * 2
    ),
}


@each_mode
@pytest.mark.parametrize('name', FUSABLE)
def test_fused(name, trainable):
    model, args = ready(FUSABLE[name](), image())
    plain = results(model, *args)
    state = copy.deepcopy(model.state_dict())
    single = results(copy.deepcopy(model).float(), args[0].float())
    same, report = fuse_poly_nl(model, trainable=trainable)
    assert same is model
    assert len(report.fused) == 1 and not report.left
    assert_near(results(model, *args), plain, 1e-12)
    tiny = image(size=(1, 2))
    assert_near(results(model.float(), args[0].float()), single, 1e-5)
    if trainable:
        assert model.state_dict().keys() == state.keys()
    # Fewer positions than channels
    model.double()
    other = FUSABLE[name]().double().eval()
    other.load_state_dict(state)
    if not trainable:
        model = fuse_poly_nl(copy.deepcopy(other))[0]
    assert_near(results(model, tiny), results(other, tiny), 1e-6)


@each_mode
@pytest.mark.parametrize('axes', [1, 3])
def test_other_axes(axes, trainable):
    conv, norm = getattr(nn, f'Conv{axes}d'), getattr(nn, f'BatchNorm{axes}d')
    layer = PolyNL1d if axes == 1 else polynl_mm.layers.PolyNL3d
    model = nn.Sequential(conv(4, 6, 1), norm(6), layer(6))
    model, args = ready(model, image(size=(3, 2, 4)[-axes:]))
    plain = results(model, *args)
    assert fuse_poly_nl(model, trainable)[1].fused == ['2']
    assert_near(results(model, *args), plain, 1e-12)


@each_mode
def test_two_blocks_after_one(trainable):
    model = inserted(nn.Conv2d(4, 6, 1), POLY, dict(POLY, postfix='_2'))
    model, args = ready(model, image())
    plain = results(model, *args)
    report = fuse_poly_nl(model, trainable)[1]
    assert report.fused == ['0.poly_nl']
    assert report.left == {'0.poly_nl_2': "'poly_nl' comes between"}
    assert_near(results(model, *args), plain, 1e-12)


def fpn_level(c, out):
    return ready(
        nn.Sequential(nn.Conv2d(c, out, 1), PolyNL2d(out)),
        image(c, (12, 16)),
    )


@each_mode
@pytest.mark.parametrize('c, out', [(8, 8), (12, 8), (16, 8), (64, 8)])
def test_never_dearer_where_the_map_is_large(c, out, trainable):
    model, args = fpn_level(c, out)
    macs = count_flops(lambda: results(model, *args))[0]
    assert fuse_poly_nl(model, trainable)[1].fused
    fused = count_flops(lambda: results(model, *args))[0]
    assert fused <= 1.01 * macs
    assert (fused < 0.8 * macs) == (c == out)


class Tripled(PolyNL2d):
    def forward(self, x):
        return 3 * super().forward(x)


class Rectified(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class OwnBottleneck(Bottleneck):
    """As that of mmdet in its attributes, not in its forward."""

    def forward(self, x):
        x = self.norm3(self.conv3(x)).relu()
        return self.forward_plugin(x, self.after_conv3_plugin_names)


def shared_conv():
    conv = nn.Conv2d(4, 4, 1)
    return nn.Sequential(conv, nn.ReLU(), conv, PolyNL2d(4))


def shared_conv_module():
    conv = ConvModule(4, 4, 1, act_cfg=None)
    return nn.Sequential(conv, nn.ReLU(), conv, PolyNL2d(4))


def hooked(*path):
    model = nn.Sequential(
        ConvModule(4, 6, 1, norm_cfg=dict(type='BN'), act_cfg=None),
        PolyNL2d(6),
    )
    model.get_submodule('.'.join(path)).register_forward_hook(
        lambda module, args, out: 2 * out
    )
    return model


def between():
    cfg = dict(type='ContextBlock', ratio=0.5)
    return inserted(nn.Conv2d(4, 6, 1), cfg, POLY)


def own_forward():
    model = pair()
    model[0].forward = lambda x: 2 * nn.Conv2d.forward(model[0], x)
    return model


def efficient(after):
    conv = ConvModule(
        4,
        6,
        1,
        norm_cfg=dict(type='BN'),
        act_cfg=None,
        efficient_conv_bn_eval=True,
    )
    return inserted(conv, POLY, after=after)


def root():
    return insert_blocks(nn.Conv2d(4, 6, 1), [dict(after='', cfg=POLY)])


def odd(*items, c=6):
    return nn.Sequential(*items, PolyNL2d(c))


LEFT = {
    'activation': (
        lambda: odd(nn.Conv2d(4, 6, 1), nn.ReLU()),
        'follows a ReLU',
    ),
    'activation of a ConvModule': (
        lambda: inserted(ConvModule(4, 6, 1), POLY),
        'follows conv -> act',
    ),
    'act first': (
        lambda: inserted(
            ConvModule(4, 6, 1, order=('act', 'conv', 'norm')), POLY
        ),
        'follows act -> conv',
    ),
    'groups': (lambda: pair(groups=2), 'groups=2'),
    '3x3': (lambda: odd(nn.Conv2d(4, 6, 3)), r'kernel_size=\(3, 3\)'),
    'stride': (lambda: pair(stride=2), r'stride=\(2, 2\)'),
    'padding': (lambda: pair(padding=1), r'padding=\(1, 1\)'),
    'transposed': (
        lambda: odd(nn.ConvTranspose2d(4, 6, 1)),
        'follows a ConvTranspose2d',
    ),
    'no statistics': (
        lambda: odd(
            nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)
        ),
        'statistics of the batch',
    ),
    'GN in a ConvModule': (
        lambda: inserted(
            ConvModule(
                4,
                6,
                1,
                norm_cfg=dict(type='GN', num_groups=2),
                act_cfg=None,
            ),
            POLY,
        ),
        'norm is a GroupNorm, which is no BatchNorm',
    ),
    'GN': (
        lambda: odd(nn.Conv2d(4, 6, 1), nn.GroupNorm(2, 6)),
        'GroupNorm',
    ),
    'norm of another kind': (
        lambda: odd(nn.Conv2d(4, 6, 1), Rectified(6)),
        'Rectified has a forward of its own',
    ),
    'shared': (shared_conv, r"'\w' \(Conv2d\) is used elsewhere"),
    'shared ConvModule': (shared_conv_module, 'used elsewhere'),
    'hook on the convolution': (
        lambda: hooked('0', 'conv'),
        r"'0.conv' \(Conv2d\) has hooks",
    ),
    'hook within the layer': (
        lambda: hooked('1', 'w1'),
        'its convolutions have hooks',
    ),
    'hook on the norm': (lambda: hooked('0', 'bn'), 'has hooks'),
    'hook on the ConvModule': (lambda: hooked('0'), 'has hooks'),
    'plug-in between': (between, "'context_block' comes between"),
    'forward replaced': (own_forward, 'forward of its own'),
    'normalised branch': (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 1),
            PolyNL2d(6, norm_cfg=dict(type='GN', num_groups=2)),
        ),
        'branch is normalised',
    ),
    'subclass': (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1), Tripled(6)),
        'Tripled has a forward of its own',
    ),
    "bottleneck of one's own": (
        lambda: OwnBottleneck(
            16, 4, plugins=[dict(cfg=POLY, position='after_conv3')]
        ),
        'no 1x1 convolution is known',
    ),
    'efficient': (lambda: efficient('0'), 'efficient_conv_bn_eval'),
    'efficient within': (
        lambda: efficient('0.conv'),
        'efficient_conv_bn_eval',
    ),
    'first': (lambda: nn.Sequential(PolyNL2d(4)), 'no 1x1 convolution'),
    'the model itself': (root, 'itself'),
}


@each_mode
@pytest.mark.parametrize('name', LEFT)
def test_left_alone(name, trainable):
    make, reason = LEFT[name]
    model, args = ready(make(), image())
    modules = dict(model.named_modules())
    plain = results(model, *args)
    report = fuse_poly_nl(model, trainable)[1]
    assert not report.fused
    ((path, why),) = [
        item
        for item in report.left.items()
        if isinstance(modules[item[0]], PolyNL)
    ]
    assert path in layers_of(model)
    assert re.search(reason, why)
    assert dict(model.named_modules()) == modules
    assert all(map(torch.equal, results(model, *args), plain))


@each_mode
def test_training_mode_is_left(trainable):
    model = pair().train()
    report = fuse_poly_nl(model, trainable)[1]
    assert 'BatchNorm2d uses the statistics' in report.left['2']
    assert type(model[0]) is nn.Conv2d


def test_without_a_norm_in_training_mode():
    """Nothing else would tell that what is fused learns no more."""
    model = pair(norm=False).train()
    _, report = fuse_poly_nl(model)
    (reason,) = report.left.values()
    assert 'training mode: call model.eval() first' in reason
    assert not report.fused and layers_of(model)
    assert fuse_poly_nl(model, trainable=True)[1].fused
    assert fuse_poly_nl(model.eval())[1].fused


def test_report():
    report = FusionReport(['a', 'b'], dict(c='why', d='so', e='why'))
    assert str(report).splitlines() == [
        '2 of 5 Poly-NL layers fused with the convolution before them',
        'left: c, e: why',
        'left: d: so',
    ]


# ------------------------------------------------- life of a fused model


def fused_resnet(trainable=False, **kwargs):
    model = build(dict(RESNET, plugins=plugins(bias=True), **kwargs))
    model, args = ready(model, torch.randn(1, 3, 48, 64))
    plain = copy.deepcopy(model)
    fuse_poly_nl(model, trainable)
    return model, plain, args


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_mode
def test_second_call(trainable):
    model, _, args = fused_resnet(trainable)
    before, modules = results(model, *args), dict(model.named_modules())
    for again in (trainable, True):
        same, report = fuse_poly_nl(model, again)
        assert same is model and not report.left
        assert len(report.fused) == 13
        assert dict(model.named_modules()) == modules
    assert all(map(torch.equal, results(model, *args), before))


@pytest.mark.parametrize('name', FUSABLE)
def test_for_inference_after_training(name):
    model, args = ready(FUSABLE[name](), image())
    fuse_poly_nl(model, trainable=True)
    before = results(model, *args)
    report = fuse_poly_nl(model)[1]
    assert not report.left and not layers_of(model)
    assert isinstance(model.get_submodule(report.fused[0]), FusedPolyNL)
    assert not any('forward' in vars(m) for m in model.modules())
    assert_near(results(model, *args), before, 1e-12)


def test_unfused_again_where_it_can_not_be_for_inference():
    model, args = ready(pair(), image())
    twin = copy.deepcopy(model).train()
    fuse_poly_nl(model, trainable=True)
    report = fuse_poly_nl(model.train())[1]
    assert not report.fused and 'statistics' in report.left['2']
    assert all(map(torch.equal, results(model, *args), results(twin, *args)))


@each_mode
def test_state_dict_into_another(trainable):
    model, _, args = fused_resnet(trainable)
    other = build(dict(RESNET, plugins=plugins(bias=True))).double()
    other.eval()
    fuse_poly_nl(other, trainable)
    other.load_state_dict(saved(model))
    assert all(map(torch.equal, results(other, *args), results(model, *args)))


@pytest.mark.parametrize('load', [nn.Module.load_state_dict, load_state_dict])
@pytest.mark.parametrize('strict', [False, True])
def test_the_other_kind_of_state_dict_is_refused(load, strict):
    model, plain, _ = fused_resnet()
    with pytest.raises(RuntimeError, match='layer2.0.*load it before fuse'):
        load(model, saved(plain), strict=strict)
    with pytest.raises(RuntimeError, match='layer2.0.*on which fuse_poly_nl'):
        load(plain, saved(model), strict=strict)


@each_mode
@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copy(copied, trainable):
    for model, args in (
        fused_resnet(trainable)[::2],
        ready(FUSABLE['map to 1d'](), image()),
    ):
        fuse_poly_nl(model, trainable)
        before = results(model, *args)
        twin = copied(model)
        assert all(map(torch.equal, results(twin, *args), before))
        with torch.no_grad():
            for t in [*twin.parameters(), *twin.buffers()]:
                t.zero_()
        assert all(map(torch.equal, results(model, *args), before))
        assert not any(
            torch.equal(y, z) for y, z in zip(results(twin, *args), before)
        )


@pytest.mark.parametrize('name', ['norm', 'inserted', 'map to 1d'])
def test_trace_and_export(name):
    model, args = ready(FUSABLE[name](), image())
    fuse_poly_nl(model)
    other = torch.randn(1, 4, 2, 1).double(), torch.randn(2, 4, 9, 3).double()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(model, args)
    for x in other:
        assert_close(traced(x), model(x))
    if OLD_TORCH:
        pytest.skip('torch.export came of age in 2.5')
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        model, args, dynamic_shapes=[{2: auto, 3: auto}]
    )
    x = torch.randn(2, 4, 9, 3).double()
    assert_close(program.module()(x), model(x))


@pytest.mark.skipif(OLD_TORCH, reason='torch.export came of age in 2.5')
@each_mode
def test_exported_for_every_size(trainable):
    model, _ = ready(odd(nn.Conv2d(8, 12, 1), c=12), image(8))
    fuse_poly_nl(model, trainable)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        model, (image(8),), dynamic_shapes=[{2: auto, 3: auto}]
    ).module()
    for size in ((2, 3), (30, 20)):
        assert_close(program(image(8, size)), model(image(8, size)))


FUSE = dict(
    norm=fuse_conv_bn,
    poly=lambda model: fuse_poly_nl(model)[0],
    training=lambda model: fuse_poly_nl(model, trainable=True)[0],
)


@pytest.mark.parametrize(
    'steps',
    ['norm poly', 'poly norm', 'training norm', 'training norm poly'],
)
def test_with_fuse_conv_bn(steps):
    model, args = ready(
        build(dict(RESNET, plugins=plugins())), torch.randn(1, 3, 48, 64)
    )
    plain = results(model, *args)
    for step in steps.split():
        model = FUSE[step](model)
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())
    fused = sum(isinstance(m, FusedPolyNL) for m in model.modules())
    assert fused == (13 if 'poly' in steps else 0)
    assert_near(results(model, *args), plain, 1e-10)


@pytest.mark.parametrize('steps', ['norm poly', 'poly norm', 'training norm'])
def test_fuse_conv_bn_finds_no_other_convolution(steps):
    """It takes a norm for that of the last convolution, however far."""
    model, args = ready(
        nn.Sequential(nn.Conv2d(4, 4, 3), *pair(), nn.BatchNorm2d(6)), image()
    )
    plain = results(model, *args)
    if steps == 'poly norm':
        report = fuse_poly_nl(model)[1]
        assert 'call fuse_conv_bn first' in report.left['3']
    for step in steps.split():
        model = FUSE[step](model)
    assert any(isinstance(m, FusedPolyNL) for m in model) == (
        steps == 'norm poly'
    )
    assert isinstance(model[4], nn.BatchNorm2d)
    assert_near(results(model, *args), plain, 1e-10)


@each_mode
def test_low_precision(trainable):
    if OLD_TORCH:
        pytest.skip('this torch has no float16 on a CPU')
    model, args = ready(pair(bias=True), image(size=(9, 9)))
    truth = results(model, *args)
    model.float()
    fuse_poly_nl(model, trainable)
    x = args[0].float()
    with torch.autocast('cpu', torch.bfloat16):
        y = results(model, x)
    assert y[0].dtype == torch.bfloat16
    assert_near([t.double() for t in y], truth, 3e-2)
    y = results(model.half(), x.half())
    assert y[0].dtype == torch.float16
    assert_near([t.double() for t in y], truth, 1e-2)


# ---------------------------------------------------------------- training


def trained(fused, **kwargs):
    """A tiny ResNet in training, as mmdet trains it, and its optimiser."""
    torch.manual_seed(0)
    cfg = dict(RESNET, norm_eval=True, frozen_stages=1, plugins=plugins())
    model = build({**cfg, **kwargs})
    model.init_weights()
    model, _ = ready(model, torch.randn(2, 3, 64, 64))
    # The steps would be those of beta alone, were it as small as that.
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.w3.weight *= layer.beta / SHARE
            layer.beta.fill_(SHARE)
    model.train()
    parameters = dict(model.named_parameters())
    if fused:
        report = fuse_poly_nl(model, trainable=True)[1]
        assert len(report.fused) == 13 and not report.left
    assert list(dict(model.named_parameters())) == list(parameters)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    return model


def loss_of(model, x):
    generator = torch.Generator().manual_seed(5)
    loss = 0
    for y in model(x):
        target = torch.randn(y.shape, generator=generator).to(y)
        loss = loss + (y / (1 + y.detach().std()) - target).square().mean()
    return loss


def test_same_losses():
    losses = []
    for fused in (False, True):
        model = trained(fused)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, 5e-5)
        x = torch.randn(
            1, 3, 64, 96, generator=torch.Generator().manual_seed(6)
        )
        losses.append([])
        for _ in range(50):
            loss = loss_of(model, x.double())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1)
            optimizer.step()
            losses[-1].append(loss.item())
    assert max(losses[0]) - min(losses[0]) > 1e-3 * losses[0][0]
    assert_close(losses[1], losses[0], rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        dict(with_cp=True),
        dict(frozen_stages=4),
        dict(norm_cfg=dict(type='BN', requires_grad=False)),
        dict(norm_cfg=dict(type='SyncBN')),
    ],
    ids=lambda k: next(iter(k), 'plain'),
)
def test_same_gradients(kwargs):
    x = torch.randn(2, 3, 64, 96).double()
    grads = []
    for fused in (False, True):
        model = trained(fused, **kwargs)
        if kwargs.get('frozen_stages') == 4:  # all but the layers
            for layer in layers_of(model).values():
                layer.requires_grad_(True)
        loss_of(model, x).backward()
        grads.append({k: p.grad for k, p in model.named_parameters()})
    for key, want in grads[0].items():
        assert (grads[1][key] is None) == (want is None), key
        if want is not None:
            # w1, w2 may have gradients far smaller than the others.
            assert want.abs().max() > 0, key
            error = (grads[1][key] - want).abs().max()
            assert error <= 1e-8 * want.abs().max(), key
    learns = {
        k.partition('.')[0] for k, g in grads[0].items() if g is not None
    }
    assert 'layer4' in learns


@pytest.mark.parametrize('frozen', ['', '0', '1', '2', '01', '02', '12'])
def test_frozen_parts(frozen):
    model, args = ready(pair(bias=True), image())
    for index in frozen:
        model[int(index)].requires_grad_(False)
    twin = copy.deepcopy(model)
    assert fuse_poly_nl(model, trainable=True)[1].fused
    x = args[0].requires_grad_()
    dy = torch.randn(2, 6, 5, 7).double()
    wanted = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(model(x), [x, *wanted], dy)
    wanted = [p for p in twin.parameters() if p.requires_grad]
    want = torch.autograd.grad(twin(x), [x, *wanted], dy)
    assert_near(got, want, 1e-11)


def is_unfused(model, x, monkeypatch):
    """Whether the convolution ran."""
    calls = []
    source = next(iter(layers_of(model).values())).source
    compute = type(source).__call__

    def spy(self, x):
        calls.append(self)
        return compute(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(type(source), '__call__', spy)
        y = results(model, x)
    return bool(calls), y


def test_when_it_runs_unfused(monkeypatch):
    model, args = ready(pair(), image())
    twin = copy.deepcopy(model)
    fuse_poly_nl(model, trainable=True)
    for size, unfused in (((1, 3), True), ((1, 6), True), ((1, 7), False)):
        x = image(size=size)
        ran, y = is_unfused(model, x, monkeypatch)
        assert ran == unfused
        assert_near(y, results(twin, x), 1e-12)
    # The statistics of the batch, and the running ones go on.
    model.train()
    twin.train()
    ran, y = is_unfused(model, *args, monkeypatch)
    assert ran
    assert_near(y, results(twin, *args), 1e-12)
    assert_close(model[1].running_mean, twin[1].running_mean)
    assert model[1].num_batches_tracked == twin[1].num_batches_tracked == 1
    model.eval()
    twin.eval()
    ran, y = is_unfused(model, *args, monkeypatch)
    assert not ran
    assert_near(y, results(twin, *args), 1e-12)


def test_training_with_batch_statistics_is_left():
    model = build(dict(RESNET, norm_eval=False, plugins=plugins()))
    model.train()
    report = fuse_poly_nl(model, trainable=True)[1]
    assert not report.fused and len(report.left) == 13
    assert 'norm_eval=True' in str(report)


def test_copy_trains_its_own():
    model, args = ready(pair(), image())
    fuse_poly_nl(model, trainable=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(*args).sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
        assert all(p.grad is None for p in model.parameters())


def test_training_under_autocast():
    model, args = ready(pair(bias=True), image(size=(9, 9)))
    truth = copy.deepcopy(model)
    model.float()
    fuse_poly_nl(model, trainable=True)
    dy = torch.randn(2, 6, 9, 9)
    truth(*args).backward(dy.double())
    with torch.autocast('cpu', torch.bfloat16):
        y = model(args[0].float())
    y.backward(dy.bfloat16())
    for (name, p), q in zip(model.named_parameters(), truth.parameters()):
        assert p.grad.dtype == torch.float32
        error = (p.grad - q.grad).abs().max()
        assert error <= 6e-2 * q.grad.abs().max(), name


@pytest.mark.skipif(OLD_TORCH, reason='torch.compile came of age in 2.5')
@each_mode
@pytest.mark.parametrize('size', [(5, 7), (1, 3)])
def test_compiled_in_one_graph(size, trainable):
    torch._dynamo.reset()
    model, _ = ready(pair(bias=True), image())
    truth = copy.deepcopy(model)
    fuse_poly_nl(model, trainable)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = image(size=size).requires_grad_()
    y = compiled(x * 1)
    assert_close(y, truth(x), rtol=1e-10, atol=1e-10)
    wanted = [x, *model.parameters()] if trainable else [x]
    dy = torch.randn_like(y)
    gots = torch.autograd.grad(y, wanted, dy)
    wants = torch.autograd.grad(
        truth(x), [x, *truth.parameters()][: len(wanted)], dy
    )
    assert_near(gots, wants, 1e-10)


@pytest.mark.skipif(OLD_TORCH, reason='torch.compile came of age in 2.5')
@pytest.mark.parametrize(
    'how',
    [
        'as it is',
        'inference',
        pytest.param('training', marks=pytest.mark.long),
    ],
)
def test_backbone_compiled_in_one_graph(how):
    torch._dynamo.reset()
    model = trained(fused=how == 'training')
    if how != 'training':
        model.eval()
    truth = copy.deepcopy(model)
    if how == 'inference':
        assert not fuse_poly_nl(model)[1].left
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = torch.randn(1, 3, 64, 96).double()
    with torch.set_grad_enabled(how == 'training'):
        assert_near(compiled(x), truth(x), 1e-10)


def test_no_module():
    backbone = build(RESNET)
    with pytest.raises(TypeError, match='got NoneType .*return None'):
        fuse_poly_nl(backbone.eval())


@each_mode
def test_block_between_convolution_and_norm_is_not_passed_over(trainable):
    """The layer behind the norm sees what the block has made of the map."""
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), PolyNL2d(6))
    cfg = dict(type='ContextBlock', ratio=0.5)
    insert_blocks(model, [dict(after='0', cfg=cfg)])
    nn.init.normal_(model[0].context_block.channel_add_conv[-1].weight)
    model, args = ready(model, image())
    plain = results(model, *args)
    report = fuse_poly_nl(model, trainable)[1]
    assert "'context_block' comes between" in report.left['2']
    assert_near(results(model, *args), plain, 1e-12)


@each_mode
def test_block_after_the_layer_stays(trainable):
    model = pair()
    cfg = dict(type='ContextBlock', ratio=0.5, in_channels=6)
    insert_blocks(model, [dict(after='2', cfg=cfg)])
    nn.init.normal_(model[2].context_block.channel_add_conv[-1].weight)
    model, args = ready(model, image())
    plain = results(model, *args)
    assert fuse_poly_nl(model, trainable)[1].fused == ['2']
    assert_near(results(model, *args), plain, 1e-12)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('copied', [lambda m: m, copy.deepcopy])
def test_norm_moved_past_a_block_is_refused(bias, copied):
    """By fuse_conv_bn, which knows nothing of blocks after convolutions."""
    model = inserted(
        nn.Conv2d(4, 6, 1, bias=bias), POLY, tail=nn.BatchNorm2d(6)
    )
    model, args = ready(model, image())
    plain = results(model, *args)
    twin = copied(model)
    assert_near(results(twin, *args), plain, 0)
    fuse_conv_bn(twin)
    with pytest.raises(RuntimeError, match="'0.*'poly_nl'.* norm '1'.*before"):
        twin(*args)


def test_norm_of_another_convolution_may_be_moved():
    """Of one that no block stands behind, or before the block came."""
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)
    )
    insert_blocks(model, [dict(after='2', cfg=POLY)])
    model, args = ready(model, image())
    plain = results(model, *args)
    assert_near(results(fuse_conv_bn(model), *args), plain, 1e-12)
    model = fuse_conv_bn(
        nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)).eval()
    )
    insert_blocks(model, [dict(after='0', cfg=POLY)])
    results(model.double(), *args)


def with_sync_bn(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


@pytest.mark.parametrize('c', [4, 6], ids=['as wide', 'wider'])
def test_sync_bn_converted_afterwards_is_refused(c):
    model, args = ready(
        nn.Sequential(nn.Conv2d(4, c, 1), nn.BatchNorm2d(c), PolyNL2d(c)),
        image(),
    )
    fuse_poly_nl(model, trainable=True)
    model = with_sync_bn(model)
    with pytest.raises(RuntimeError, match='a SyncBatchNorm has taken.*befor'):
        model(*args)


def test_sync_bn_reverted_afterwards_is_refused():
    model, args = ready(FUSABLE['SyncBN'](), image())
    fuse_poly_nl(model, trainable=True)
    model = revert_sync_batchnorm(model)
    with pytest.raises(RuntimeError, match='a .?BatchNorm.* has taken.*befo'):
        model(*args)


def test_what_passes_is_still_of_its_class():
    """Hosts and optimisers go by it."""
    model, _ = ready(pair(), image())
    fuse_poly_nl(model, trainable=True)
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert 'PassingConv2d(4, 6' in repr(model)
    assert model[2].in_channels == 4
    with pytest.raises(ValueError, match='in_channels=4'):
        model[2](image(6))


@each_mode
def test_norm_moved_past_a_block_is_not_fused(trainable):
    """What fuse_conv_bn has spoilt stays refused."""
    model = inserted(nn.Conv2d(4, 6, 1), POLY, tail=nn.BatchNorm2d(6))
    model, args = ready(model, image())
    model = fuse_conv_bn(model)
    report = fuse_poly_nl(model, trainable)[1]
    assert "fuse_conv_bn has moved '1'" in report.left['0.poly_nl']
    with pytest.raises(RuntimeError, match='before the block'):
        model(*args)


def test_fused_before_fuse_conv_bn_with_a_norm_behind():
    """Without this convolution the norm would be taken for the other's."""
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
    )
    insert_blocks(model, [dict(after='1', cfg=POLY)])
    model, args = ready(model, image())
    plain = results(model, *args)
    report = fuse_poly_nl(model)[1]
    assert 'call fuse_conv_bn first' in report.left['1.poly_nl']
    assert_near(results(model, *args), plain, 1e-12)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized():
    model, args = ready(pair(), image())
    register_parametrization(model[0], 'weight', Doubled())
    plain = results(model, *args)
    for trainable in (False, True):
        report = fuse_poly_nl(model, trainable)[1]
        assert 'is parametrized' in report.left['2']
    assert_near(results(model, *args), plain, 0)
    model, args = ready(pair(), image())
    fuse_poly_nl(model, trainable=True)
    register_parametrization(model[0], 'weight', Doubled())
    with pytest.raises(RuntimeError, match='Conv2d was parametrized after'):
        fuse_poly_nl(model)


def test_initialised_by_name_after_fusing():
    """mmengine goes by the names of a class and of its bases."""
    model, _ = ready(pair(), image())
    fuse_poly_nl(model, trainable=True)
    with torch.no_grad():
        model[0].weight.fill_(7)
        model[1].weight.fill_(7)
    initialize(
        model,
        [
            dict(type='Constant', val=3, layer='_BatchNorm'),
            dict(type='Constant', val=4, layer='Conv2d'),
        ],
    )
    assert (model[1].weight == 3).all() and (model[0].weight == 4).all()


@pytest.mark.parametrize('name', ['norm', 'wide'])
@pytest.mark.parametrize('how', ['as it is', 'training', 'inference'])
def test_pool_takes_part(name, how):
    model, args = ready(FUSABLE[name](), image())
    plain = results(model, *args)
    gates = []

    def pool(g):
        gates.append(g)
        return 2 * g

    model[-1].around = lambda layer, x: (pool, None)
    if how != 'as it is':
        fuse_poly_nl(model, trainable=how == 'training')
    y = results(model, *args)
    assert len(gates) == 1 and gates[0].shape == (
        2,
        model[-1].out_channels
        if how == 'inference'
        else model[-1].w1.in_channels,
    )
    difference = (y[0] - plain[0]).abs().max()
    assert difference > 0.05 * plain[0].abs().max()
    model[-1].around = lambda layer, x: (None, None)
    assert_near(results(model, *args), plain, 1e-12)


def test_the_form_asked_for_is_taken_when_fused():
    """By name: a second derivative is that of the direct form."""
    model, _ = ready(
        nn.Sequential(nn.Conv2d(8, 32, 1), PolyNL2d(32, form='direct')),
        image(8),
    )
    fuse_poly_nl(model, trainable=True)
    x = image(8, (9, 9)).requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


def test_a_source_of_ones_own_is_left():
    class Source:
        in_channels = 4

        def as_conv(self):
            return None

        def __call__(self, h):
            return torch.cat([h, h[:, :2]], 1)

    model = nn.Sequential(nn.Identity(), PolyNL2d(6))
    model[1].source = Source()
    assert model(image().float()).shape == (2, 6, 5, 7)
    for trainable in (False, True):
        report = fuse_poly_nl(model, trainable)[1]
        assert report.left == {'1': 'it has a source of its own'}
