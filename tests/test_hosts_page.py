"""The code of configs/hosts.md: built, its layers counted, and run."""

import logging
import re
from pathlib import Path

import pytest
import torch
from helpers import calibrate, layers_of
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'configs' / 'hosts.md'
SIZE = (64, 64)

# Section -> layers of the model of each block of code in it.
LAYERS = {
    'ResNet': [6],
    'FPN': [4],
    'Swin': [1],
    'ConvNeXt': [1],
    'RTMDet and YOLOX': [1, 1],
    'DETR': [6, 3],
    'UNet': [1],
    'Plain torch': [1, 1],
}


def sections():
    """Title -> the code in it."""
    found = re.split(r'^## (.+)$', PAGE.read_text(), flags=re.M)[1:]
    code = re.compile(r'^```python\n(.*?)^```$', re.M | re.S)
    return {
        title: code.findall(body)
        for title, body in zip(found[::2], found[1::2])
    }


CASES = [
    pytest.param(code, count, id=f'{title} {i}')
    for title, codes in sections().items()
    for i, (code, count) in enumerate(zip(codes, LAYERS[title], strict=True))
]


def test_the_page_is_in_this_table():
    assert list(sections()) == list(LAYERS)
    rows = re.findall(r'^\| \[.* \| ([\d, ]+) \|$', PAGE.read_text(), re.M)
    told = [[int(n) for n in row.split(',')] for row in rows]
    # Of two configs in a section the table has the first.
    for each, counts in zip(told, LAYERS.values(), strict=True):
        assert each == counts[: len(each)]


def built(code, folder):
    """The model of a config that is saved, or of Python that is run."""
    if '_base_ = ' not in code:
        names = {}
        exec(code, names)
        return names['model']
    if 'mmpretrain' in code or 'convnext' in code:
        pytest.importorskip('mmpretrain')
    host = re.search(r"_base_ = '(\w+)::", code)[1]
    pytest.importorskip(host)
    (folder / 'my_config.py').write_text(code)
    cfg = Config.fromfile(folder / 'my_config.py')
    with DefaultScope.overwrite_default_scope(host):
        return MODELS.build(cfg.model)


class UpToTheLayers(nn.Module):
    """What of a model the layers have a say in, without its heads."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        if hasattr(self.model, 'encoder') and layers_of(self.model.encoder):
            from mmdet.structures import DetDataSample

            sizes = dict(img_shape=SIZE, batch_input_shape=SIZE)
            samples = [DetDataSample(metainfo=sizes)]
            return tree_leaves(self.model(x, samples, mode='tensor'))
        if hasattr(self.model, 'extract_feat'):
            return tree_leaves(self.model.extract_feat(x))
        return tree_leaves(self.model(x))


@pytest.mark.parametrize('code, count', CASES)
def test_code(code, count, tmp_path):
    torch.manual_seed(0)
    logging.disable()
    try:
        model = UpToTheLayers(built(code, tmp_path)).eval()
    finally:
        logging.disable(logging.NOTSET)
    layers = layers_of(model)
    assert len(layers) == count
    assert all(layer.beta.item() == 0 for layer in layers.values())
    x = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        identity = model(x)
        calibrate(model, x)
        changed = model(x)
    assert all(y.isfinite().all() for y in changed)
    assert any(
        (y - z).abs().max() > 0.01 * z.abs().max()
        for y, z in zip(changed, identity, strict=True)
    )


def test_padding_of_tokens_is_told(tmp_path):
    """As the page says of DETR."""
    pytest.importorskip('mmdet')
    from mmdet.structures import DetDataSample

    x = torch.randn(2, 3, *SIZE)
    shapes = (SIZE, (32, 64))
    samples = [
        DetDataSample(metainfo=dict(img_shape=s, batch_input_shape=SIZE))
        for s in shapes
    ]
    model = built(sections()['DETR'][0], tmp_path).eval()
    with torch.no_grad(), pytest.warns(match='no map of whole pictures'):
        model(x, samples, mode='tensor')
