"""Every WIDER Face config: one real training step at its real input size."""

import runpy
from copy import deepcopy
from pathlib import Path

import pytest

np = pytest.importorskip('numpy')
torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmengine.config import Config  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import (  # noqa: E402
    DATASETS,
    MODELS,
    TASK_UTILS,
    TRANSFORMS,
    DefaultScope,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'configs/wider_face').glob('*.py'))
BASELINE = 'retinaface_r50_p2-p6_8xb4-100e_wider-face.py'


@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    """A few pictures in the layout of the release, landmarks included."""
    out = tmp_path_factory.mktemp('data') / 'mini'
    make = runpy.run_path(str(ROOT / 'tools/make_mini_data.py'))['main']
    sizes = ['--train', '4', '--val', '4']
    make(['wider_face', '--out', str(out), '--seed', '0', *sizes])
    return out


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def load(name, data_root):
    cfg = Config.fromfile(ROOT / 'configs/wider_face' / name)
    for phase in ('train', 'val', 'test'):
        cfg[f'{phase}_dataloader'].dataset.data_root = str(data_root)
    return cfg


def without_download(model):
    """The same config without the pretrained weights of its backbone.

    Nor the zeros with which its branches start from scratch.
    """
    model = deepcopy(model)
    model.backbone.init_cfg = None
    if model.backbone.type == 'ResNet':
        model.backbone.zero_init_residual = False
    return model


def sample_to_learn_from(data, landmarks):
    """One whose random crop has a face of some size, with landmarks if asked.

    Below 16 pixels no anchor may be a match.
    """
    np.random.seed(0)
    for i in range(80):
        sample = data[i % len(data)]
        faces = sample['data_samples'].gt_instances
        sizes = faces.bboxes.tensor[:, 2:] - faces.bboxes.tensor[:, :2]
        good = (sizes > 40).all(1)
        if landmarks:
            good &= (faces.keypoints_visible > 0).all(1)
        if good.any():
            return sample
    raise AssertionError('no such face in 80 samples')


def first_of_each_model():
    """Configs that differ in schedule or test pipeline share a model."""
    seen, names = set(), []
    for path in CONFIGS:
        cfg = Config.fromfile(path)
        key = str(
            (
                cfg.model.backbone,
                cfg.model.get('blocks'),
                cfg.model.neck,
                cfg.model.bbox_head,
            )
        )
        if key not in seen:
            seen.add(key)
            names.append(path.name)
    return names


@pytest.mark.parametrize(
    'name',
    [
        # Those of the rivals change with the hosts alone.
        pytest.param(
            name,
            marks=[pytest.mark.long]
            if 'polynl' not in name or '1xb8' in name
            else [],
        )
        for name in first_of_each_model()
    ],
)
def test_one_training_step(name, mini):
    torch.manual_seed(0)
    cfg = load(name, mini)
    landmarks = not name.startswith('tinaface')
    data = DATASETS.build(cfg.train_dataloader.dataset)
    batch = pseudo_collate([sample_to_learn_from(data, landmarks)])
    assert batch['inputs'][0].shape == (3, 640, 640)
    model = MODELS.build(without_download(cfg.model))
    model.init_weights()
    model.train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    inputs = model.data_preprocessor(batch, training=True)
    loss, losses = model.parse_losses(model(**inputs, mode='loss'))
    loss.backward()
    # Several processes stop at a parameter that takes no part.
    idle = [k for k, p in model.named_parameters() if p.grad is None]
    assert bool(idle) == cfg.get('find_unused_parameters', False), idle
    wrapper.step()
    names = {'loss', 'loss_cls', 'loss_bbox'}
    names.add('loss_landmark' if landmarks else 'loss_iou')
    assert losses.keys() == names
    for key, loss in losses.items():
        assert 0 < float(loss) < 100, key
    print(name, {k: round(float(v), 3) for k, v in losses.items()})
    # Identity blocks learn beta first.
    betas = [k for k in before if k.endswith('poly_nl.beta')]
    assert bool(betas) == ('polynl' in name)
    after = dict(model.named_parameters())
    assert all((after[k] != before[k]).all() for k in betas)


SIZES = [2 ** (k / 3) for k in range(3)]


@pytest.mark.parametrize(
    'name, strides, sizes, ratio, centre, anchors',
    [
        # As in the paper's table.
        ('retinaface_r50_p2-p6', 5, [4 * s for s in SIZES], 1, 0, 102300),
        # As in the public codes: 16 and 32 pixels at stride 8, and so on.
        ('retinaface_r50_p3-p5', 3, None, 1, 0.5, 16800),
        (
            'tinaface_r50_p2-p7',
            *(6, [2 ** (4 / 3) * s for s in SIZES], 1.3, 0, 102375),
        ),
    ],
)
def test_anchors(mini, name, strides, sizes, ratio, centre, anchors):
    cfg = load(f'{name}_8xb4-100e_wider-face.py', mini)
    generator = TASK_UTILS.build(cfg.model.bbox_head.anchor_generator)
    assert len(generator.strides) == strides
    grid = [(-(-640 // s), -(-640 // s)) for s, _ in generator.strides]
    priors = generator.grid_priors(grid, device='cpu')
    assert sum(map(len, priors)) == anchors
    for level, (base, (stride, _)) in enumerate(
        zip(generator.base_anchors, generator.strides)
    ):
        expected = (
            [stride * s for s in sizes]
            if sizes
            else [(16, 32), (64, 128), (256, 512)][level]
        )
        width, height = (base[:, 2:] - base[:, :2]).T
        assert (width * height).sqrt().tolist() == pytest.approx(
            list(expected), rel=1e-4
        )
        assert (height / width).tolist() == pytest.approx(
            [ratio] * len(base), rel=1e-4
        )
        assert ((base[:, :2] + base[:, 2:]) / 2 == centre * stride).all()


def test_where_the_blocks_are(mini):
    def blocks(name):
        model = MODELS.build(without_download(load(name, mini).model))
        return {
            path.removesuffix('.poly_nl')
            for path, _ in model.named_modules()
            if path.endswith('.poly_nl')
        }

    levels = {f'neck.0.fpn_convs.{i}' for i in range(5)}
    c4 = {f'backbone.layer3.{i}' for i in range(6)}
    for name, expected in (
        ('retinaface_r50-polynl-c4_p2-p6', c4),
        ('retinaface_r50_p2-p6-polynl', levels),
        ('retinaface_r50-polynl-c4_p2-p6-polynl', c4 | levels),
    ):
        assert blocks(f'{name}_8xb4-100e_wider-face.py') == expected


def test_learning_rate_goes_with_the_batch():
    for path in CONFIGS:
        cfg = Config.fromfile(path)
        gpus, batch = path.name.split('_')[-2].split('-')[0].split('xb')
        assert cfg.train_dataloader.batch_size == int(batch)
        pictures = int(gpus) * int(batch)
        assert cfg.auto_scale_lr.base_batch_size == pictures
        per_picture = (
            3.75e-3 / 12 if path.name.startswith('tinaface') else 1e-3 / 24
        )
        rate = cfg.optim_wrapper.optimizer.lr
        assert rate == pytest.approx(per_picture * pictures)


@pytest.mark.parametrize(
    'protocol, shape, large',
    [
        ('', (1600, 2133), (1433, 2150)),
        ('-vga', (480, 640), (427, 640)),
        ('-original', (768, 1024), (2731, 4096)),
    ],
)
def test_protocols(mini, tmp_path, protocol, shape, large):
    import cv2

    stem = 'retinaface_r50-polynl-c4_p2-p6_8xb4-100e_wider-face'
    cfg = load(f'{stem}{protocol}.py', mini)
    assert cfg.test_dataloader == cfg.val_dataloader
    pipeline = [
        TRANSFORMS.build(each) for each in cfg.test_dataloader.dataset.pipeline
    ]
    for size, expected in (((768, 1024), shape), ((4000, 6000), large)):
        path = tmp_path / 'some.png'
        cv2.imwrite(str(path), np.zeros((*size, 3), np.uint8))
        results = dict(img_path=str(path), img_id='event/some', instances=[])
        for transform in pipeline:
            results = transform(results)
        assert results['inputs'].shape[1:] == expected
        padded = MODELS.build(cfg.model.data_preprocessor)(
            pseudo_collate([results])
        )['inputs'].shape[2:]
        if protocol == '-vga':
            assert padded == (640, 640)
        else:
            assert all(0 <= p - e < 32 for p, e in zip(padded, expected))


def test_multi_scale(mini):
    cfg = load(BASELINE, mini)
    dataset = deepcopy(cfg.test_dataloader.dataset)
    dataset.pipeline = cfg.tta_pipeline
    views = DATASETS.build(dataset)[0]
    shapes = [view.shape[1:] for view in views['inputs']]
    assert len(shapes) == 10 and shapes[::2] == shapes[1::2]
    height, width = views['data_samples'][0].ori_shape
    assert shapes[::2] == [
        (round(height * factor), round(width * factor))
        for short, long in (
            *((500, 750), (800, 1200), (1100, 1650)),
            *((1400, 2100), (1700, 2550)),
        )
        for factor in [
            min(short / min(height, width), long / max(height, width))
        ]
    ]
    metas = [sample.metainfo for sample in views['data_samples']]
    assert [meta['flip'] for meta in metas] == [False, True] * 5
    assert all(meta['img_id'] for meta in metas)
    model = MODELS.build(
        dict(cfg.tta_model, module=without_download(cfg.model))
    )
    assert type(model).__name__ == 'BoxVotingTTAModel'
