"""Where mmpretrain is installed: the layer in its own configs and ConvNeXt."""

import pytest

pytest.importorskip('mmpretrain')

import torch  # noqa: E402
from mmengine.hub import get_config  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmpretrain.structures import DataSample  # noqa: E402

POLY = dict(type='polynl_mm.PolyNL2d', beta_init=0.5)


def insert(backbone, after):
    """The one line of a config."""
    return dict(
        backbone,
        type='polynl_mm.Insert',
        into=backbone['type'],
        blocks=[dict(after=after, cfg=POLY)],
    )


def build(cfg):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(cfg)


@pytest.mark.parametrize(
    'name, after, layer',
    [
        ('resnet/resnet18_8xb32_in1k', 'layer3', 'layer3.1.poly_nl'),
        (
            'convnext_v2/convnext-v2-atto_32xb32_in1k',
            *('stages.2', 'stages.2.5'),
        ),
        ('convnext/convnext-tiny_32xb128_in1k', 'stages.2.*', 'stages.2.8'),
    ],
)
def test_its_own_configs(name, after, layer):
    """One training step: the layer runs, and all of its parameters learn."""
    model = get_config(f'mmpretrain::{name}.py').model
    plain = build(model.backbone)
    host = dict(model, backbone=insert(model.backbone, after), train_cfg=None)
    classifier = build(host).train()
    layer = layer.removesuffix('.poly_nl') + '.poly_nl'
    block = classifier.backbone.get_submodule(layer)
    # All else is the host's, so that its checkpoints load.
    keys = classifier.backbone.state_dict().keys()
    assert {k for k in keys if '.poly_nl.' not in k} == {
        *plain.state_dict().keys()
    }
    samples = [DataSample().set_gt_label(i) for i in range(2)]
    losses = classifier(torch.randn(2, 3, 64, 64), samples, mode='loss')
    losses['loss'].backward()
    for key, p in block.named_parameters():
        assert p.grad is not None and p.grad.any(), key
