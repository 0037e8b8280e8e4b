"""Every COCO config: what it adds to mmdet's own, and one training step."""

import logging
import shlex
from argparse import ArgumentParser
from copy import deepcopy
from pathlib import Path

import pytest

np = pytest.importorskip('numpy')
torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmengine.config import Config, DictAction  # noqa: E402
from mmengine.hub import get_config  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

from polynl_mm.attention import PolySA  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'coco'
NAMES = sorted(path.stem for path in CONFIGS.glob('*.py'))

# Class of the block and its name in the model.
BLOCKS = dict(
    polynl=('PolyNL2d', 'poly_nl'),
    nl=('NonLocal2d', 'nonlocal_block'),
    gc=('ContextBlock', 'context_block'),
    attn0010=('GeneralizedAttention', 'gen_attention_block'),
)
# Blocks that start as the identity: what learns in the first step.
FIRST_TO_LEARN = dict(
    polynl='beta',
    nl='conv_out.conv.weight',
    gc='channel_add_conv.3.weight',
    attn0010='gamma',
)


def bottlenecks(channels, stages):
    """Module -> channels of a block in each bottleneck of a ResNet-50."""
    depths = {2: 4, 3: 6, 4: 3}
    return {
        f'backbone.layer{stage}.{i}': channels * 2 ** (stage - 2)
        for stage in stages
        for i in range(depths[stage])
    }


RES4 = {'backbone.layer3.5': 1024}
# Where in Mask R-CNN with ResNet-50, and the blocks that come there. The
# N x N matrix of NonLocal2d would take 16.6 GiB on P2.
PLACES = {
    'r50-{}-res4_fpn': (RES4, BLOCKS),
    'r50-{}-c4_fpn': (bottlenecks(512, [3]), BLOCKS),
    'r50-{}-c3-c5_fpn': (bottlenecks(512, [2, 3, 4]), BLOCKS),
    'r50-{}-conv2-c3-c5_fpn': (bottlenecks(128, [2, 3, 4]), BLOCKS),
    'r50_fpn-{}': (
        {f'neck.fpn_convs.{i}': 256 for i in range(4)},
        ('polynl', 'gc', 'attn0010'),
    ),
}
# Config -> (mmdet's own, block, where with how many channels).
CASES = {
    f'mask-rcnn_{name.format(block)}_1x_coco': (
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco',
        block,
        where,
    )
    for name, (where, blocks) in PLACES.items()
    for block in blocks
}
CASES.update(
    {
        'mask-rcnn_r50-plain_fpn_1x_coco': (
            *('mask_rcnn/mask-rcnn_r50_fpn_1x_coco', 'polynl', {}),
        ),
        'mask-rcnn_r101-polynl-res4_fpn_1x_coco': (
            'mask_rcnn/mask-rcnn_r101_fpn_1x_coco',
            *('polynl', {'backbone.layer3.22': 1024}),
        ),
        'mask-rcnn_x101-32x4d-polynl-res4_fpn_1x_coco': (
            'mask_rcnn/mask-rcnn_x101-32x4d_fpn_1x_coco',
            *('polynl', {'backbone.layer3.22': 1024}),
        ),
        'cascade-mask-rcnn_r50-polynl-res4_fpn_1x_coco': (
            'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco',
            *('polynl', RES4),
        ),
        'mask-rcnn_swin-t-p4-w7-polynl-stage3_fpn_1x_coco': (
            'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco',
            *('polynl', {'backbone.stages.2.blocks.5': 384}),
        ),
        'rtmdet-ins_s-polynl-stage3_8xb32-300e_coco': (
            'rtmdet/rtmdet-ins_s_8xb32-300e_coco',
            # The last layer of the stage.
            *('polynl', {'backbone.stage3.1': 256}),
        ),
    }
)
FIRST = 'mask-rcnn_r50-polynl-res4_fpn_1x_coco'
# Poly-SA in the place of attention: config -> (mmdet's own, how many, parts of
# the host's keys that go).
POLY_SA = {
    'mask-rcnn_swin-t-p4-w7-polysa_fpn_1x_coco': (
        'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco',
        *(12, ['.attn.w_msa.relative_position_']),
    ),
    'retinanet_pvtv2-b0-polysa_fpn_1x_coco': (
        'pvt/retinanet_pvtv2-b0_fpn_1x_coco',
        *(8, ['.attn.sr.', '.attn.norm.']),
    ),
}


@pytest.fixture(scope='module', autouse=True)
def quiet_and_quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable()
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def ours(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


def theirs(name):
    return get_config(f'mmdet::{name}.py')


def test_all_are_here():
    assert set(NAMES) == CASES.keys() | POLY_SA.keys()


# ------------------------------------------------------------------ settings


def without_blocks(part):
    """Take what puts blocks into a model out of its config."""
    if not isinstance(part, dict):
        return part
    part = {key: without_blocks(value) for key, value in part.items()}
    part.pop('plugins', None)
    if part.get('type') == 'polynl_mm.Insert':
        assert part.pop('blocks')
        part['type'] = part.pop('into')
    if part.get('type') == 'polynl_mm.Replace':
        assert part.pop('attention')
        part['type'] = part.pop('into')
    return part


def without_scope(part):
    """What stands for a host in a part that a config took from its base."""
    if isinstance(part, dict):
        return {
            key: without_scope(value)
            for key, value in part.items()
            if key != '_scope_'
        }
    if isinstance(part, (list, tuple)):
        return type(part)(map(without_scope, part))
    return part


def assert_adds_only_blocks(cfg, host):
    """The config is the host's, but for what ``polynl.py`` lists."""
    cfg, host = without_scope(cfg.to_dict()), without_scope(host.to_dict())
    for key in [key for key in cfg if key.startswith('polynl_')]:
        del cfg[key]
    imports = cfg.pop('custom_imports')
    assert imports['imports'] == ['polynl_mm.engine.safe_load']
    hooks = cfg.pop('custom_hooks')
    assert hooks.pop() == dict(type='polynl_mm.PolyNLHook')
    assert hooks == host.pop('custom_hooks', [])
    for key in ('resume', 'finite_loss'):
        del cfg['default_hooks'][key]
    checkpoint = cfg['default_hooks']['checkpoint']
    assert checkpoint.pop('type') == 'polynl_mm.CheckpointHook'
    assert host['default_hooks']['checkpoint'].pop('type') == 'CheckpointHook'
    paramwise = cfg['optim_wrapper'].pop('paramwise_cfg')
    for key in ('poly_nl.alpha', 'poly_nl.beta'):
        assert paramwise['custom_keys'].pop(key) == dict(decay_mult=0)
    if not paramwise['custom_keys']:
        del paramwise['custom_keys']
    assert paramwise == host['optim_wrapper'].pop('paramwise_cfg', {})
    cfg['model'] = without_blocks(cfg['model'])
    # mmdet's of RTMDet is that of another schedule.
    if host['train_dataloader']['batch_size'] == 32:
        host['auto_scale_lr']['base_batch_size'] = 256
    assert cfg == host


@pytest.mark.parametrize('name', NAMES)
def test_adds_only_blocks(name):
    assert_adds_only_blocks(ours(name), theirs({**CASES, **POLY_SA}[name][0]))


def test_rivals_are_set_as_in_mmdet():
    gcnet = theirs('gcnet/mask-rcnn_r50-gcb-r16-c3-c5_fpn_1x_coco')
    attention = theirs(
        'empirical_attention/faster-rcnn_r50-attn0010_fpn_1x_coco'
    )
    same = ours('mask-rcnn_r50-gc-c3-c5_fpn_1x_coco')
    assert without_scope(same.model) == without_scope(gcnet.model)
    known = dict(
        gc=gcnet.model.backbone.plugins[0].cfg,
        attn0010=attention.model.backbone.plugins[0].cfg,
        # No config of mmdet has these as plug-ins: their defaults.
        nl=dict(type='NonLocal2d'),
        polynl=dict(type='polynl_mm.PolyNL2d'),
    )
    for name, (_, block, where) in CASES.items():
        if where:
            model = ours(name).model
            (entry,) = (
                model.backbone.get('plugins')
                or model.backbone.get('blocks')
                or model.neck.blocks
            )
            assert entry['cfg'] == known[block], name


# --------------------------------------------------------------------- models


def build(name):
    """(config, model); random weights, no download."""
    torch.manual_seed(0)
    cfg = ours(name)
    return cfg, revert_sync_batchnorm(MODELS.build(deepcopy(cfg.model)))


@pytest.fixture(scope='module', params=CASES)
def built(request):
    """Each once."""
    return build(request.param)


@pytest.fixture
def case(built):
    return CASES[Path(built[0].filename).stem]


def blocks_of(model, kind):
    """Path -> block of every block of a kind."""
    return {
        path: module
        for path, module in model.named_modules()
        if type(module).__name__ == BLOCKS[kind][0]
    }


def test_where_the_blocks_are(built, case):
    model, (_, block, where) = built[1], case
    got = {
        path: getattr(module, 'in_channels', None) or module.inplanes
        for path, module in blocks_of(model, block).items()
    }
    assert got == {f'{p}.{BLOCKS[block][1]}': c for p, c in where.items()}
    for other in BLOCKS.keys() - {block}:
        assert not blocks_of(model, other)


def test_checkpoints_of_mmdet_fit(built, case):
    model, (host, block, _) = built[1], case
    inside = tuple(f'{path}.' for path in blocks_of(model, block))
    cfg = theirs(host).model
    if cfg.backbone.type == 'SwinTransformer':
        # It asks for values, which there are none of on the meta device.
        plain = MODELS.build(cfg)
    else:
        with torch.device('meta'):
            plain = MODELS.build(cfg)
    assert {
        key: value.shape
        for key, value in model.state_dict().items()
        if not key.startswith(inside or 'none')
    } == {key: value.shape for key, value in plain.state_dict().items()}


def a_batch(size=64):
    """One picture of noise with three objects of different classes."""
    boxes = torch.tensor(
        [[4.0, 6.0, 40.0, 34.0], [20.0, 24.0, 60.0, 62.0], [30, 2, 58, 26]]
    )
    masks = np.zeros((len(boxes), size, size), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    shapes = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    sample = DetDataSample(
        metainfo=dict(
            dict.fromkeys(shapes, (size, size)), scale_factor=(1.0, 1.0)
        ),
        gt_instances=InstanceData(
            bboxes=boxes,
            labels=torch.tensor([0, 17, 79]),
            masks=BitmapMasks(masks, size, size),
        ),
    )
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, size, size, generator=generator), [sample]


def backward_of_a_step(cfg, model):
    """The optimiser's wrapper, with all gradients there."""
    for name, part in model.named_children():
        # The backbone's would download.
        if name not in ('backbone', 'data_preprocessor'):
            part.init_weights()
    # Hundreds of RoIs of noise would say nothing more.
    samplers = getattr(getattr(model, 'roi_head', None), 'bbox_sampler', [])
    for sampler in samplers if isinstance(samplers, list) else [samplers]:
        sampler.num = 16
    model.train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    loss, losses = model.parse_losses(model(*a_batch(), mode='loss'))
    loss.backward()
    print({key: round(float(value), 3) for key, value in losses.items()})
    names = {'loss_cls'} if 'retina' in str(cfg.filename) else {'loss_mask'}
    assert names <= {key.split('.')[-1] for key in losses}
    for key, value in losses.items():
        assert 0 < float(value) < 100 or key.endswith('acc'), key
    # Several processes stop at a parameter that takes no part.
    assert not [
        key
        for key, p in model.named_parameters()
        if p.requires_grad and p.grad is None
    ]
    return wrapper


def test_one_training_step(built, case):
    (cfg, model), (_, block, _) = built, case
    wrapper = backward_of_a_step(cfg, model)
    parameters = dict(model.named_parameters())
    firsts = [
        f'{path}.{FIRST_TO_LEARN[block]}' for path in blocks_of(model, block)
    ]
    before = [parameters[key].detach().clone() for key in firsts]
    wrapper.optimizer.step()
    for path, module in blocks_of(model, block).items():
        for key, p in module.named_parameters():
            # None is frozen with its stage.
            assert p.requires_grad and p.grad.isfinite().all(), (path, key)
    for key, old in zip(firsts, before):
        assert parameters[key].grad.any(), key
        assert (parameters[key] != old).any(), key


@pytest.mark.parametrize('name', POLY_SA)
def test_poly_sa_in_the_place_of_attention(name):
    """Where it is, what of mmdet's checkpoints fits, and one step."""
    cfg, model = build(name)
    host, count, gone = POLY_SA[name]
    cores = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, PolySA)
    }
    assert len(cores) == count
    plain = MODELS.build(theirs(host).model).state_dict()
    state = model.state_dict()
    new = {f'{p}.norm.{key}' for p in cores for key in ('weight', 'bias')}
    assert {k: v.shape for k, v in state.items() if k not in new} == {
        key: value.shape
        for key, value in plain.items()
        if not any(part in key for part in gone)
    }
    for module in model.modules():
        if hasattr(module, 'drop_prob'):
            module.drop_prob = 0.0  # it would drop the only picture
    backward_of_a_step(cfg, model).optimizer.step()
    for key, p in model.named_parameters():
        if key.startswith(tuple(cores)):
            assert p.requires_grad and p.grad.isfinite().all(), key
            assert p.grad.any(), key
    assert_parameters_in_readme(cfg, model)


# --------------------------------------------------------------------- README

README = (CONFIGS / 'README.md').read_text()


def rows(text):
    """Cells of every row of the tables, by the first one."""
    lines = [line for line in text.splitlines() if line.startswith('| ')]
    cells = [[c.strip() for c in line.split('|')[1:-1]] for line in lines]
    return {first.strip('`'): rest for first, *rest in cells}


def assert_parameters_in_readme(cfg, model):
    count = sum(p.numel() for p in model.parameters())
    row = rows(README)[Path(cfg.filename).stem]
    assert row[0] == f'{count / 1e6:.2f}'


def test_parameters_in_readme(built):
    assert_parameters_in_readme(*built)


def variant(name, of):
    """A config with the options that the README gives for a variant."""
    command = rows(README)[of][0].strip('`')
    parser = ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    options = parser.parse_args(shlex.split(command)).cfg_options
    cfg = ours(name)
    cfg.merge_from_dict(options)
    return cfg


@pytest.mark.parametrize(
    'name, of, host',
    [
        (FIRST, '2x', 'mask_rcnn/mask-rcnn_r50_fpn_2x_coco'),
        # mmdet's only 3x that does not repeat the data set instead.
        (
            'mask-rcnn_swin-t-p4-w7-polynl-stage3_fpn_1x_coco',
            *('3x', 'swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco'),
        ),
    ],
)
def test_schedules(name, of, host):
    cfg, expected = variant(name, of), theirs(host)
    for key in ('train_cfg', 'param_scheduler'):
        assert without_scope(cfg[key]) == without_scope(expected[key])
        assert cfg[key] != ours(name)[key]


def test_clipped():
    wrapper = variant(FIRST, 'gradients clipped').optim_wrapper
    assert wrapper.pop('clip_grad') == dict(max_norm=35)
    assert wrapper == ours(FIRST).optim_wrapper


@pytest.mark.parametrize(
    'name, of',
    [
        (FIRST, 'without blocks, of those inserted in the backbone'),
        (
            'mask-rcnn_r50-polynl-c4_fpn_1x_coco',
            'without blocks, of the plug-ins (`-c4`, `-c3-c5`)',
        ),
    ],
)
def test_without_blocks(name, of):
    with torch.device('meta'):
        plain = MODELS.build(variant(name, of).model)
        expected = MODELS.build(theirs(CASES[name][0]).model)
    assert plain.state_dict().keys() == expected.state_dict().keys()


def test_another_base(tmp_path):
    text = README.partition('```python\n')[2].partition('```')[0]
    (tmp_path / 'some.py').write_text(text)
    cfg = Config.fromfile(tmp_path / 'some.py')
    host = theirs('mask_rcnn/mask-rcnn_r50_fpn_ms-poly-3x_coco')
    assert_adds_only_blocks(cfg, host)
    assert cfg.model.backbone == ours(FIRST).model.backbone
