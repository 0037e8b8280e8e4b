"""Every WIDER Face config: one real training step at its real input size."""

import runpy
from copy import deepcopy
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmengine.config import Config  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import (  # noqa: E402
    DATASETS,
    MODELS,
    TRANSFORMS,
    DefaultScope,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'configs/wider_face').glob('*.py'))
BASELINE = 'retinaface_r50_p2-p6_8xb4-160e_wider-face.py'


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
    """One whose random crop has a face, with landmarks if wanted."""
    for i in range(40):
        sample = data[i % len(data)]
        faces = sample['data_samples'].gt_instances
        if len(faces) and (
            not landmarks or (faces.keypoints_visible > 0).any()
        ):
            return sample
    raise AssertionError('no face in 40 samples')


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


@pytest.mark.parametrize('name', first_of_each_model())
def test_one_training_step(name, mini):
    torch.manual_seed(0)
    cfg = load(name, mini)
    data = DATASETS.build(cfg.train_dataloader.dataset)
    landmarks = not name.startswith('tinaface')
    batch = pseudo_collate([sample_to_learn_from(data, landmarks)])
    assert batch['inputs'][0].shape == (3, 640, 640)
    model = MODELS.build(without_download(cfg.model))
    model.init_weights()
    model.train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    losses = model.train_step(batch, wrapper)
    names = {'loss', 'loss_cls', 'loss_bbox'}
    names.add('loss_landmark' if landmarks else 'loss_iou')
    assert losses.keys() == names
    for key, loss in losses.items():
        assert 0 < float(loss) < 100, key
    # Identity blocks learn beta first; whatever has a gradient has moved.
    betas = [k for k in before if k.endswith('poly_nl.beta')]
    assert bool(betas) == ('polynl' in name)
    moved = {k for k, p in model.named_parameters() if (p != before[k]).any()}
    assert moved >= {*betas, 'bbox_head.conv_cls.0.weight'}


def test_variants_are_those_of_the_paper_and_the_public_codes(mini):
    for name, anchors in (
        (BASELINE, 102300),
        ('retinaface_r50_p3-p5_8xb4-160e_wider-face.py', 16800),
        ('tinaface_r50_p2-p7_8xb4-160e_wider-face.py', 102375),
    ):
        head = MODELS.build(without_download(load(name, mini).model)).bbox_head
        sizes = [
            (-(-640 // s), -(-640 // s))
            for s, _ in head.prior_generator.strides
        ]
        priors = head.prior_generator.grid_priors(sizes, device='cpu')
        assert sum(map(len, priors)) == anchors


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
        assert blocks(f'{name}_8xb4-160e_wider-face.py') == expected


def test_learning_rate_goes_with_the_batch(mini):
    base = load(BASELINE, mini)
    per_picture = base.optim_wrapper.optimizer.lr / 32
    assert base.auto_scale_lr.base_batch_size == 32
    for path in CONFIGS:
        cfg = Config.fromfile(path)
        gpus, batch = path.name.split('_')[-2].split('-')[0].split('xb')
        assert cfg.train_dataloader.batch_size == int(batch)
        rate = cfg.optim_wrapper.optimizer.lr
        assert rate == pytest.approx(per_picture * int(gpus) * int(batch))


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
    import numpy as np

    stem = 'retinaface_r50-polynl-c4_p2-p6_8xb4-160e_wider-face'
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
    heights = [view.shape[1] for view in views['inputs']]
    assert len(heights) == 10 and heights[::2] == heights[1::2]
    metas = [sample.metainfo for sample in views['data_samples']]
    assert [meta['flip'] for meta in metas] == [False, True] * 5
    assert sorted({min(m['img_shape']) for m in metas}) == sorted(
        {min(view.shape[1:]) for view in views['inputs']}
    )
    model = MODELS.build(
        dict(cfg.tta_model, module=without_download(cfg.model))
    )
    assert type(model).__name__ == 'BoxVotingTTAModel'
