"""The costs of whole models: counted right, and in units of the first."""

import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from benchmarks import model  # noqa: E402
from benchmarks.timing import flops  # noqa: E402

from polynl_mm.engine import cli  # noqa: E402

TOOLS = Path(__file__).parents[2] / 'tools'

# A backbone of one convolution and a head of two, without normalisation.
TINY = """
default_scope = 'mmseg'
custom_imports = dict(imports=['tiny_backbone'])
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='TinyBackbone', channels=5,
        init_cfg=dict(type='Pretrained', checkpoint='/nowhere.pth')),
    decode_head=dict(
        type='FCNHead', in_channels=5, channels=7, num_convs=1,
        concat_input=False, num_classes=2, align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
"""
# How children start where the parent has seen a GPU, here on a CPU.
SPAWN = """
import multiprocessing
from pathlib import Path

get_context = multiprocessing.get_context


def spawn(method=None):
    Path('asked').touch()
    return get_context('spawn')


multiprocessing.get_context = spawn
"""
BACKBONE = """
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import nn


@MODELS.register_module(force=True)
class TinyBackbone(BaseModule):
    def __init__(self, channels, init_cfg=None):
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(3, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return (self.conv(x),)
"""
WIDE = """
_base_ = 'tiny.py'
model = dict(
    backbone=dict(channels=64), decode_head=dict(in_channels=64, channels=64))
"""
TWO_STAGES = """
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
model = dict(
    backbone=dict(base_channels=4, norm_cfg=dict(type='SyncBN')),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32),
        mask_head=dict(in_channels=16, conv_out_channels=16)))
"""
FUSABLE = """
_base_ = 'two_stages.py'
model = dict(backbone=dict(
    init_cfg=None,
    plugins=[dict(cfg=dict(type='polynl_mm.PolyNL2d'),
                  stages=(False, False, True, False),
                  position='after_conv3')]))
"""


@pytest.fixture
def here(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, 'environ', dict(os.environ))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'tiny_backbone.py').write_text(BACKBONE)
    (tmp_path / 'tiny.py').write_text(TINY)
    (tmp_path / 'wide.py').write_text(WIDE)
    (tmp_path / 'det.py').write_text((place / 'det.py').read_text())
    (tmp_path / 'two_stages.py').write_text(TWO_STAGES)
    (tmp_path / 'fusable.py').write_text(FUSABLE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)
    sys.modules.pop('tiny_backbone', None)


@pytest.fixture
def cost(here, monkeypatch, capsys):
    """Run the tool in this process; give its JSON and what it printed."""

    def cost(*args):
        argv = [*map(str, args), '--json', 'out.json']
        monkeypatch.setattr(sys, 'argv', ['benchmark_model.py', *argv])
        tool = runpy.run_path(str(TOOLS / 'benchmark_model.py'))
        cli.run(tool['main'])
        return json.loads((here / 'out.json').read_text()), capsys.readouterr()

    return cost


@pytest.fixture
def start_here(here):
    """Run the tool in a fresh process, as its children want it."""

    def start(*args):
        done = subprocess.run(
            [sys.executable, str(TOOLS / 'benchmark_model.py')]
            + [*map(str, args), '--json', 'out.json'],
            env={
                **os.environ,
                'OMP_NUM_THREADS': '1',
                'PYTHONPATH': str(here),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return start


@pytest.fixture
def refuse(cost, capsys):
    def refuse(*args):
        with pytest.raises(SystemExit) as caught:
            cost(*args)
        assert caught.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return refuse


def test_counted_by_hand(cost):
    row, printed = cost('tiny.py', '--shape', 16, 24, '--no-time')
    assert row['modes'] == []
    # Three convolutions, each giving 8 x 12 positions: 3 x 3 from 3 to 5
    # channels, 3 x 3 from 5 to 7 without a bias, 1 x 1 from 7 to 2.
    products = 27 * 5 + 45 * 7 + 7 * 2
    biases = 5 + 7 + 2
    assert row['contenders']['tiny.py'] == dict(
        parameters=products + biases,
        multiply_adds=8 * 12 * products,
        flops=2 * 8 * 12 * products,
    )
    assert row['shape'] == [16, 24]
    assert row['unit'] == 'tiny.py'
    assert printed.out.splitlines()[-1] == '| tiny | 0.00 | 0.00 | 0.00 |'


@pytest.mark.long
def test_time_and_memory(here, start_here):
    out = start_here('tiny.py', 'wide.py', '--shape', 256, 256, '--turns', 3)
    row = json.loads((here / 'out.json').read_text())
    small, large = row['contenders'].values()
    for case in (small, large):
        for mode in ('forward', 'training'):
            assert len(case[mode]) == 3 and min(case[mode]) > 0
    assert small['relative'] == dict(forward=[1, 0], training=[1, 0])
    maps = 128 * 128 * 4
    for mode in ('forward', 'training'):
        assert large['relative'][mode][0] > 1
        # The maps of the backbone, and their gradients, are alive together.
        assert small['peak_bytes'][mode] > 5 * maps
        assert large['peak_bytes'][mode] > 2 * 64 * maps
    assert large['peak_bytes']['training'] > small['peak_bytes']['training']
    lines = out.splitlines()
    assert lines[-2].startswith('| tiny | ')
    assert '| 1.000 ± 0.000 |' in lines[-2]


@pytest.mark.long
def test_children_of_a_process_that_has_seen_the_gpu(here, start_here):
    """They are spawned: they find the tool, its modules and the config."""
    (here / 'sitecustomize.py').write_text(SPAWN)
    start_here(
        *('tiny.py', '--shape', 512, 512, '--turns', 2, '--modes', 'forward')
    )
    case = json.loads((here / 'out.json').read_text())['contenders']['tiny.py']
    assert case['peak_bytes']['forward'] > 2**20
    assert (here / 'asked').exists()


@pytest.mark.long
def test_one_mode_only(here, start_here):
    shape = ('--shape', 16, 16, '--turns', 2)
    out = start_here('tiny.py', *shape, '--modes', 'forward')
    case = json.loads((here / 'out.json').read_text())['contenders']['tiny.py']
    assert len(case['forward']) == 2 and 'training' not in case
    assert list(case['peak_bytes']) == list(case['relative']) == ['forward']
    assert 'forward, ms' in out and 'training' not in out


@pytest.mark.long
def test_variants_of_a_backbone(here, start_here):
    out = start_here(
        *('tiny.py', 'fusable.py', '--shape', 64, 64, '--turns', 2),
        *('--backbone', '--fuse', '--forms', 'direct', '--fuse-conv-bn'),
    )
    cases = json.loads((here / 'out.json').read_text())['contenders']
    names = ['fusable.py', 'fusable.py (direct)', 'fusable.py (fused)']
    assert list(cases) == [
        *('tiny.py', *names, 'tiny.py (conv-bn)', 'fusable.py (conv-bn)'),
        'fusable.py (fused, conv-bn)',
    ]
    for case in cases.values():
        assert list(case['relative']) == ['forward'] and case['peak_bytes']
    plain, direct, fused = (cases[name] for name in names)
    assert plain['parameters'] == direct['parameters'] == fused['parameters']
    # Six blocks, 4 x 4 positions, 64 channels behind 16: two of three
    # products of N C^2 are N C c. The second moment would take more launches.
    n, c, wide = 16, 16, 64
    less = 2 * n * wide**2 - 2 * n * wide * c
    assert direct['multiply_adds'] - fused['multiply_adds'] == 6 * less
    assert '| fusable (fused, conv-bn) |' in out


def test_a_step_of_training_fused(here):
    logging.disable(logging.INFO)
    variant = model.Variant('fusable.py', fuse=True)
    contender = model.Contender(variant, [64, 64], 'cpu')
    contender.call('training')()
    layer = contender.model.backbone.layer3[0]
    assert layer.poly_nl.w1.weight.requires_grad
    x = torch.randn(1, 16, 4, 4)
    assert layer.conv3(x) is x
    contender.call('forward')()
    assert isinstance(
        contender.model.backbone.layer3[0].conv3, torch.nn.Identity
    )
    assert isinstance(
        contender.whole.backbone.layer3[0].conv3, torch.nn.Conv2d
    )


def test_fused_attention_is_counted():
    n, c = 16, 8
    layer = torch.nn.MultiheadAttention(c, 2, batch_first=True).eval()
    x = torch.randn(1, n, c)
    q = x.view(1, 2, n, c // 2)
    with torch.no_grad():
        fused = torch.nn.functional.scaled_dot_product_attention
        products = 2 * (2 * n * n * c)
        assert flops(lambda: fused(q, q, q)) == products
        assert flops(lambda: layer(x, x, x)) == products + 8 * n * c**2
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize('name', ['det.py', 'two_stages.py'])
def test_detectors(here, name):
    logging.disable(logging.INFO)
    contender = model.Contender(name, [64, 96], 'cpu')
    kinds = {type(m).__name__ for m in contender.model.modules()}
    assert 'SyncBatchNorm' not in kinds
    counts = set()
    for _ in range(2):
        forward = contender.call('forward')
        assert not contender.model.training
        counts.add(flops(forward))
    assert len(counts) == 1
    head = contender.forward()[-1]
    if name == 'two_stages.py':
        scores, boxes, masks = head
        assert scores.shape == (1000, 81) and masks.shape[0] == 100
    training = contender.call('training')
    assert contender.model.training
    seen = []
    contender.model.register_forward_hook(
        lambda *args: seen.append({k: sum_of(v) for k, v in args[2].items()})
    )
    # Twice, as the first must leave the annotations as they are.
    training()
    training()
    for losses in seen:
        assert all(0 < v < 100 for k, v in losses.items() if 'loss' in k)
    assert all(p.grad is None for p in contender.model.parameters())


def sum_of(losses):
    losses = losses if isinstance(losses, list) else [losses]
    return sum(loss.item() for loss in losses)


def test_a_classifier(quiet_and_quick):
    name = 'configs/mini/resnet18-polynl_mini-digits.py'
    found = model.Contender(str(TOOLS.parent / name), [32, 32], 'cpu')
    # Batch statistics of one picture are those of its positions.
    found.call('training')()
    assert found.call('forward')().shape == (1, 10)


def test_refuses(refuse, here):
    shape = ('--shape', 16, 16)
    assert refuse('none.py', *shape) == (
        'benchmark_model.py: error: config none.py does not exist, and '
        'polynl_mm has none of that name'
    )
    (here / 'cls.py').write_text(
        "default_scope = 'mmengine'\nmodel = dict(type='ToyModel')"
    )
    assert (
        "config cls.py has default_scope='mmengine', expected one of mmdet, "
        'mmseg, polynl_mm' in refuse('cls.py', *shape)
    )
    (here / 'empty.py').write_text("default_scope = 'mmdet'")
    assert 'empty.py has no model' in refuse('empty.py', *shape)
    assert 'given twice' in refuse('tiny.py', 'tiny.py', *shape)
    assert '--shape' in refuse('tiny.py')
    assert 'two sizes' in refuse('tiny.py', '--shape', 0, 16)
    assert '--turns 1' in refuse('tiny.py', *shape, '--turns', 1)
