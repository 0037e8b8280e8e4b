"""Every ImageNet config: where its blocks are, the rest, one training step."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmengine.config import Config  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmengine.structures import BaseDataElement  # noqa: E402
from test_coco_configs import bottlenecks, rows, without_blocks  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'imagenet'
NAMES = sorted(path.stem for path in CONFIGS.glob('*.py'))
TAIL = '8xb32-100e_in1k'

# Class of the block, its name in the model, and what learns first.
BLOCKS = dict(
    polynl=('PolyNL2d', 'poly_nl', 'beta'),
    se=('SELayer', 'se_layer', 'conv2.conv.weight'),
    gc=('ContextBlock', 'context_block', 'channel_add_conv.3.weight'),
    nl=('NonLocal2d', 'nonlocal_block', 'conv_out.conv.weight'),
)


def places(depth):
    """Modules of a ResNet with a block -> its channels, by placement."""
    long = {50: 6, 101: 23}[depth]
    c4 = {f'backbone.layer3.{i}': 1024 for i in range(long)}
    return {
        'c4': c4,
        'res4': {f'backbone.layer3.{long - 1}': 1024},
        'c3-c5': {**bottlenecks(512, [2, 3, 4]), **c4},
    }


# Config -> (depth, block, where with how many channels).
CASES = {
    f'r{depth}-{block}-{name}_{TAIL}': (depth, block, where)
    for depth, blocks in ((50, BLOCKS), (101, ('polynl',)))
    for name, where in places(depth).items()
    for block in blocks
}
CASES.update(
    {f'r{depth}-plain_{TAIL}': (depth, None, {}) for depth in (50, 101)}
)
EMA = 'r50-polynl-c4_8xb32-100e-ema_in1k'
CASES[EMA] = CASES[f'r50-polynl-c4_{TAIL}']


@pytest.fixture(autouse=True)
def scope(quiet_and_quick):
    with DefaultScope.overwrite_default_scope('polynl_mm'):
        yield


def ours(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


@cache
def on_meta(name):
    with torch.device('meta'):
        return MODELS.build(ours(name).model)


def test_all_are_here():
    assert set(NAMES) == CASES.keys()


@pytest.mark.parametrize('name', NAMES)
def test_only_the_block_differs(name):
    depth, *_ = CASES[name]
    cfg, plain = ours(name).to_dict(), ours(f'r50-plain_{TAIL}').to_dict()
    cfg['model'] = without_blocks(cfg['model'])
    plain['model']['backbone']['depth'] = depth
    if name == EMA:
        assert cfg['custom_hooks'].pop()['type'] == 'EMAHook'
    assert cfg == plain


@pytest.mark.parametrize('name', NAMES)
def test_where_the_blocks_are(name):
    """And parameters, as the page has them; the rest is plain."""
    depth, block, where = CASES[name]
    model = on_meta(name)
    if block:
        kind, label, _ = BLOCKS[block]
        got = {
            path: getattr(part, 'in_channels', None) or part.inplanes
            for path, part in model.named_modules()
            if type(part).__name__ == kind
        }
        assert got == {f'{p}.{label}': c for p, c in where.items()}
    inside = tuple(f'{p}.{BLOCKS[block][1]}.' for p in where) or 'none'
    assert {k for k in model.state_dict() if not k.startswith(inside)} == {
        *on_meta(f'r{depth}-plain_{TAIL}').state_dict()
    }
    count = sum(p.numel() for p in model.parameters())
    page = rows((CONFIGS / 'README.md').read_text())
    assert page[name][0] == f'{count / 1e6:.2f}'


@pytest.mark.parametrize('block', ['polynl', 'gc', 'nl'])
def test_blocks_begin_as_they_are_alone(block):
    """Though the host initialises its convolutions, and they are inside."""
    cfg = ours(f'r50-{block}-c4_{TAIL}').model
    model = MODELS.build(cfg)
    model.init_weights()
    part = model.get_submodule(f'backbone.layer3.2.{BLOCKS[block][1]}')
    plug = dict(cfg.backbone.plugins[0].cfg, in_channels=1024)
    alone = MODELS.build(plug)
    for name, parameter in alone.named_parameters():
        spread = part.get_parameter(name).std(unbiased=False).item()
        want = parameter.std(unbiased=False).item()
        assert spread == pytest.approx(want, rel=0.3), name


@pytest.mark.parametrize('block', BLOCKS)
def test_one_training_step(block):
    name = f'r50-{block}-res4_{TAIL}'
    cfg, where = ours(name), CASES[name][2]
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    # Blocks are not behind zeros, and no statistics are frozen.
    assert all(unit.norm3.weight.all() for unit in model.backbone.layer3)
    assert all(part.training for part in model.train().modules())
    samples = [BaseDataElement(gt_label=i) for i in (0, 999)]
    images = torch.randn(2, 3, 64, 64)
    loss = model(images, samples, mode='loss')['loss']
    # Nothing is known yet: as by chance, ln 1000.
    assert 6 < loss.item() < 8
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    for path in where:
        _, label, first = BLOCKS[block]
        parameter = model.get_parameter(f'{path}.{label}.{first}')
        before = parameter.detach().clone()
        assert parameter.grad.any()
        wrapper.optimizer.step()
        assert (parameter != before).any()


def test_rates_and_decay():
    """0.1 after five epochs, 0 at the end; norms and biases do not decay."""
    cfg = ours(f'r50-polynl-c4_{TAIL}')
    model = on_meta(f'r50-polynl-c4_{TAIL}')
    wrapper = build_optim_wrapper(model, deepcopy(cfg.optim_wrapper))
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {
        names[id(p)]: group['weight_decay']
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    assert {k for k, v in decay.items() if v == 1e-4} == {
        name for name, p in model.named_parameters() if p.dim() > 1
    }
    assert set(decay.values()) == {0, 1e-4}
    warm, cosine = cfg.param_scheduler
    assert (warm.begin, warm.end, cosine.begin, cosine.end) == (0, 5, 5, 100)
    assert cfg.optim_wrapper.optimizer.lr == 0.1
    assert (
        cfg.auto_scale_lr.base_batch_size
        == 256
        == (8 * cfg.train_dataloader.batch_size)
    )


def test_the_ema_is_of_this_model():
    (*_, ema) = ours(EMA).custom_hooks
    assert ema == dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')


@pytest.mark.parametrize('place', ['c4', 'res4'])
def test_the_backbone_of_mmseg(place):
    """By the option that the page gives."""
    pytest.importorskip('mmseg')
    cfg = ours(f'r50-polynl-{place}_{TAIL}')
    key = 'into' if place == 'res4' else 'type'
    cfg.merge_from_dict({f'model.backbone.{key}': 'mmseg.ResNet'})
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert type(model.backbone).__module__.startswith('mmseg.')
    keys = on_meta(f'r50-polynl-{place}_{TAIL}').state_dict().keys()
    assert model.state_dict().keys() == keys
