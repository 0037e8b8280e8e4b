"""Small models of mmdet and mmseg to put layers into, and what they take."""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

POLY = dict(type='polynl_mm.PolyNL2d')
POLY1D = dict(type='polynl_mm.PolyNL1d')
CONTEXT = dict(type='ContextBlock', ratio=0.5)
NON_LOCAL = dict(type='NonLocal2d', reduction=1)

RESNET = dict(type='ResNet', depth=50, base_channels=8)


def hrnet():
    stages = {}
    for stage in (1, 2, 3, 4):
        stages[f'stage{stage}'] = dict(
            num_modules=1,
            num_branches=stage,
            block='BOTTLENECK' if stage == 1 else 'BASIC',
            num_blocks=(1,) * stage,
            num_channels=tuple(8 * 2**i for i in range(stage)),
        )
    return dict(type='HRNet', extra=stages)


# Host -> its scope, its config, and what to insert after: path of the block.
HOSTS = {
    'ResNet': (
        'mmdet',
        RESNET,
        {
            'layer2': 'layer2.3.poly_nl',
            'layer3.5': 'layer3.5.poly_nl',
            'layer4.2': 'layer4.2.poly_nl',
        },
    ),
    'ResNeXt': (
        'mmdet',
        dict(
            type='ResNeXt', depth=101, base_channels=8, groups=4, base_width=4
        ),
        {'layer3.22': 'layer3.22.poly_nl'},
    ),
    'RegNet': (
        'mmdet',
        dict(
            type='RegNet',
            arch=dict(w0=8, wa=8.0, wm=2.0, group_w=8, depth=8, bot_mul=1.0),
        ),
        {'layer3': 'layer3.2.poly_nl'},
    ),
    'Swin': (
        'mmdet',
        dict(
            type='SwinTransformer',
            embed_dims=8,
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 2, 2),
            window_size=4,
        ),
        {
            'patch_embed': 'patch_embed.poly_nl',
            'stages.2.blocks.1': 'stages.2.blocks.1.poly_nl',
            'stages.3': 'stages.3.poly_nl',
        },
    ),
    'PVT': (
        'mmdet',
        dict(
            type='PyramidVisionTransformer',
            embed_dims=8,
            num_layers=[1, 1, 2, 1],
            num_heads=[1, 2, 2, 2],
        ),
        {'layers.2.1.1': 'layers.2.1.1.poly_nl'},
    ),
    'MobileNetV2': (
        'mmdet',
        dict(type='MobileNetV2', widen_factor=0.25),
        {'layer5': 'layer5.2.poly_nl'},
    ),
    'CSPDarknet': (
        'mmdet',
        dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.125),
        {'stem': 'stem.poly_nl', 'stage3': 'stage3.1.poly_nl'},
    ),
    'CSPNeXt': (
        'mmdet',
        dict(type='CSPNeXt', deepen_factor=0.167, widen_factor=0.125),
        {'stage3': 'stage3.1.poly_nl'},
    ),
    'HRNet': ('mmdet', hrnet(), {'layer1': 'layer1.0.poly_nl'}),
    'FPN': (
        'mmdet',
        dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=3),
        {'fpn_convs.0': 'fpn_convs.0.poly_nl'},
    ),
    'PAFPN': (
        'mmdet',
        dict(type='PAFPN', in_channels=[8, 16], out_channels=8, num_outs=3),
        {'pafpn_convs.0': 'pafpn_convs.0.poly_nl'},
    ),
    'RoI extractor': (
        'mmdet',
        dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
            out_channels=8,
            featmap_strides=[4, 8],
        ),
        {'': 'poly_nl'},
    ),
    'UNet': (
        'mmseg',
        dict(type='UNet', base_channels=8),
        {'encoder.3': 'encoder.3.1.poly_nl', 'decoder.0': 'decoder.0.poly_nl'},
    ),
    'MiT': (
        'mmseg',
        dict(
            type='MixVisionTransformer',
            embed_dims=8,
            num_layers=[1, 1, 2, 1],
            num_heads=[1, 2, 2, 2],
        ),
        {
            'layers.1.0': 'layers.1.0.poly_nl',
            'layers.2.1.1': 'layers.2.1.1.poly_nl',
        },
    ),
}
# ConvNeXt is mmpretrain's, see test_classification/test_mmpretrain.py.


def build(cfg, blocks=None, scope='mmdet'):
    """As the hosts' runners do, with blocks after paths."""
    pytest.importorskip(scope)
    if blocks is not None:
        entries = [dict(after=after, cfg=block) for after, block in blocks]
        cfg = dict(
            cfg, type='polynl_mm.Insert', into=cfg['type'], blocks=entries
        )
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(cfg)


def build_host(name, *layers, **kwargs):
    """The host of that name, with these layers in each of its places."""
    scope, cfg, places = HOSTS[name]
    blocks = [(after, layer) for after in places for layer in layers]
    return build({**cfg, **kwargs}, blocks or None, scope)


def inputs(name):
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        x = torch.randn(*shape, generator=generator)
        return x.requires_grad_()

    if name in ('FPN', 'PAFPN'):
        return ([rand(2, 8, 16, 16), rand(2, 16, 8, 8)],)
    if name == 'RoI extractor':
        boxes = [[0, 3, 3, 40, 50], [1, 0, 0, 60, 30], [0, 0, 0, 250, 250]]
        maps = (rand(2, 8, 16, 16), rand(2, 8, 8, 8))
        return maps, torch.tensor(boxes, dtype=torch.float)
    return (rand(2, 3, 64, 64),)
