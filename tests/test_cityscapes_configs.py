"""Every Cityscapes config: one real training step, and what it evaluates."""

import logging
import runpy
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

np = pytest.importorskip('numpy')
torch = pytest.importorskip('torch')
pytest.importorskip('mmseg')

import cv2  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import (  # noqa: E402
    DATASETS,
    METRICS,
    MODELS,
    DefaultScope,
)
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(p.stem for p in (ROOT / 'configs/cityscapes').glob('*.py'))
OURS = 'polynl_r50-d8_4xb2-40k_cityscapes-512x1024'
RIVALS = {
    'cc': 'CCHead',
    'dnl': 'DNLHead',
    'ema': 'EMAHead',
    'fcn': 'FCNHead',
    'gc': 'GCHead',
    'nl': 'NLHead',
}
CROP = (64, 128)


@pytest.fixture(scope='module')
def city(tmp_path_factory):
    """Two pictures of each split in the layout of the release."""
    root = tmp_path_factory.mktemp('city')
    rng = np.random.default_rng(0)
    for split in ('train', 'val', 'test'):
        for part in ('leftImg8bit', 'gtFine'):
            (root / part / split / 'bonn').mkdir(parents=True)
        for i in range(2):
            name = f'{split}/bonn/bonn_00000{i}_000019'
            ids = np.repeat(rng.integers(0, 19, (4, 8)), 32, 0).repeat(32, 1)
            ids[:9] = 255
            picture = (ids[..., None] * 12) % 251 + rng.integers(0, 5, 3)
            cv2.imwrite(
                str(root / f'leftImg8bit/{name}_leftImg8bit.png'), picture
            )
            # The labels of the test set are not public.
            if split != 'test':
                cv2.imwrite(
                    str(root / f'gtFine/{name}_gtFine_labelTrainIds.png'), ids
                )
    return root


@pytest.fixture(autouse=True)
def scope():
    """No log (a paragraph per parameter), no second thread (too small)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable()
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@cache
def read(name):
    return Config.fromfile(ROOT / f'configs/cityscapes/{name}.py')


def load(name, root='data/cityscapes'):
    cfg = deepcopy(read(name))
    for phase in ('train', 'val', 'test'):
        cfg[f'{phase}_dataloader'].dataset.data_root = str(root)
    return cfg


def build(cfg, narrow=False):
    """The model without its pretrained weights, SyncBN as BN."""
    model = deepcopy(cfg.model)
    model.pretrained = None
    if narrow:
        model.backbone.update(base_channels=4, stem_channels=4)
        model.decode_head.update(in_channels=128, channels=8)
        model.auxiliary_head.update(in_channels=64, channels=8)
    for part in (model.backbone, model.backbone.get('backbone_cfg', {})):
        part.pop('init_cfg', None)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(model))
    model.init_weights()
    return model


def small(cfg, crop=CROP):
    """The config with a small crop in the place of its own."""
    cfg = deepcopy(cfg)
    for step in cfg.train_dataloader.dataset.pipeline:
        if step.type == 'RandomCrop':
            assert step.crop_size == cfg.model.data_preprocessor.size
            step.crop_size = crop
        if step.type == 'RandomResize':
            step.scale = crop[::-1]
    cfg.model.data_preprocessor.size = crop
    return cfg


def first_of_each_model():
    """Configs that differ in schedule or test alone share a model."""
    seen, names = set(), []
    for name in NAMES:
        model = read(name).model
        key = str((model.backbone, model.decode_head))
        if key not in seen:
            seen.add(key)
            names.append(name)
    return names


@pytest.mark.parametrize('name', first_of_each_model())
def test_one_training_step(name, city):
    cfg = small(load(name, city))
    np.random.seed(0)
    data = DATASETS.build(cfg.train_dataloader.dataset)
    batch = pseudo_collate([data[0], data[1]])
    model = build(cfg).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    inputs = model.data_preprocessor(batch, training=True)
    assert inputs['inputs'].shape == (2, 3, *CROP)
    loss, losses = model.parse_losses(model(**inputs, mode='loss'))
    loss.backward()
    # Several processes stop at a parameter that takes no part.
    parameters = dict(model.named_parameters())
    idle = [
        k for k, p in parameters.items() if p.requires_grad and p.grad is None
    ]
    assert not idle
    assert all(0 < float(v) < 100 for k, v in losses.items() if 'loss' in k)
    # Identity blocks learn beta first.
    betas = [p for k, p in parameters.items() if k.endswith('poly_nl.beta')]
    assert len(betas) == ('polynl' in name) and not any(betas)
    wrapper.step()
    assert all(betas)


def test_rivals_differ_in_the_head_alone():
    ours = load(OURS)
    heads = {}
    for rival, kind in RIVALS.items():
        cfg = load(OURS.replace('polynl', f'{rival}-head'))
        heads[rival] = head = cfg.model.decode_head
        assert head.type == kind
        for key in ('in_channels', 'in_index', 'dropout_ratio', 'norm_cfg'):
            assert head[key] == ours.model.decode_head[key]
        assert head.loss_decode == ours.model.decode_head.loss_decode
        cfg.model.decode_head = ours.model.decode_head
        assert cfg.to_dict() == ours.to_dict()
    heads['fcn'].type = 'polynl_mm.PolyNLHead'
    assert heads['fcn'] == ours.model.decode_head


def test_all_watch_the_layers():
    for name in NAMES:
        hooks = read(name).custom_hooks
        assert [hook.type for hook in hooks] == ['polynl_mm.PolyNLHook']


def test_schedules_and_crops():
    """As the names say, and as the host's config of that name has it."""
    for name in NAMES:
        cfg = read(name)
        *_, schedule, data = name.split('_')
        batch, length = schedule.split('-')
        assert cfg.train_dataloader.batch_size == int(batch.split('xb')[1])
        iters = int(length.removesuffix('k')) * 1000
        assert cfg.train_cfg.max_iters == iters
        assert cfg.param_scheduler[-1].end == iters
        crop = tuple(map(int, data.split('-')[1].split('x')))
        assert cfg.model.data_preprocessor.size == crop
        (cut,) = (
            step
            for step in cfg.train_dataloader.dataset.pipeline
            if step.type == 'RandomCrop'
        )
        assert cut.crop_size == crop


def test_names_are_no_other_hosts():
    import mmseg

    shipped = Path(mmseg.__file__).parent.glob('.mim/configs/**/*.py')
    shipped = {path.stem for path in shipped}
    assert len(shipped) > 500 and not shipped & {*NAMES}


def rates(cfg):
    """Parameter of the head -> (learning rate, weight decay)."""
    model = build(cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    return {
        names[id(p)]: (group['lr'], group['weight_decay'])
        for group in groups.param_groups
        for p in group['params']
    }


def test_segformer_learns_the_block_as_fast_as_its_head():
    cfg = load('segformer-polynl_mit-b0_8xb1-160k_cityscapes-1024x1024')
    rate, decay = cfg.optim_wrapper.optimizer.lr, 0.01
    got = rates(cfg)
    block = 'decode_head.fusion_conv.poly_nl'
    assert got[f'{block}.w3.weight'] == (10 * rate, decay)
    assert got['decode_head.fusion_conv.conv.weight'] == (10 * rate, decay)
    for key in ('alpha', 'beta'):
        assert got[f'{block}.{key}'] == (10 * rate, 0)


@pytest.mark.parametrize(
    'name, mode, windows',
    [
        (OURS, 'whole', 1),
        (f'{OURS}-slide', 'slide', 9),
        (f'{OURS}-slide-context', 'slide', 9),
        (OURS.replace('512x1024', '769x769'), 'slide', 8),
        (OURS.replace('512x1024', '769x769') + '-whole', 'whole', 1),
    ],
)
def test_windows(name, mode, windows):
    cfg = load(name)
    assert cfg.model.test_cfg.mode == mode
    shape = (1024, 2048) if '512x1024' in name else (1025, 2049)
    model = build(cfg, narrow=True).eval()
    shapes = []

    def logits(inputs, _):
        shapes.append(inputs.shape[2:])
        # All that windows of one context have to come to.
        layer = model.decode_head.poly_nl
        layer(inputs.new_zeros(1, layer.in_channels, 4, 8))
        return inputs.new_zeros(1, 19, *inputs.shape[2:])

    model.encode_decode = logits
    with torch.no_grad():
        model.inference(
            torch.zeros(1, 3, *shape),
            [dict(img_shape=shape, ori_shape=shape)],
        )
    assert len(shapes) == windows
    size = cfg.model.data_preprocessor.size if mode == 'slide' else shape
    assert set(shapes) == {tuple(size)}


def test_multi_scale_and_flip(city):
    """As ``tools/test.py --tta`` puts it together."""
    cfg = load(OURS, city)
    tool = runpy.run_path(str(ROOT / 'tools/test.py'))
    model = build(cfg, narrow=True).eval()
    torch.nn.init.constant_(model.decode_head.poly_nl.beta, 0.5)
    tool['set_tta'](cfg)
    assert cfg.model.module.decode_head.type == 'polynl_mm.PolyNLHead'
    views = DATASETS.build(cfg.test_dataloader.dataset)[0]
    shapes = [tuple(view.shape[1:]) for view in views['inputs']]
    assert shapes == [
        (int(128 * scale), int(256 * scale))
        for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
        for _ in range(2)
    ]
    # Two of the views: a plain one and its mirror image, at half the size.
    views = {key: value[:2] for key, value in views.items()}
    tta = MODELS.build(dict(cfg.tta_model, module=model))
    with torch.no_grad():
        (result,) = tta.test_step(pseudo_collate([views]))
        singles = [
            model.test_step({key: [value[i]] for key, value in views.items()})
            for i in range(2)
        ]
    mean = sum(single.seg_logits.data.softmax(0) for (single,) in singles)
    assert result.pred_sem_seg.data.shape[-2:] == (128, 256)
    assert (result.pred_sem_seg.data == mean.argmax(0)).all()


def test_what_the_server_gets(city, tmp_path):
    """Without labels, in the official ids, one file per picture."""
    pytest.importorskip('cityscapesscripts.evaluation')
    from cityscapesscripts.helpers.labels import trainId2label

    cfg = load(f'{OURS}-server', city)
    cfg.test_evaluator.output_dir = str(tmp_path / 'out')
    data = DATASETS.build(cfg.test_dataloader.dataset)
    assert len(data) == 2
    for pipeline in (data.pipeline, cfg.tta_pipeline):
        assert 'LoadAnnotations' not in str(pipeline)
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = data.metainfo
    model = build(cfg, narrow=True).eval()
    # All classes in one picture.
    ids = torch.arange(19).repeat_interleave(8).expand(64, -1)
    model.encode_decode = lambda inputs, _: (
        torch.nn.functional.one_hot(ids, 19).permute(2, 0, 1)[None].float()
    )
    for i in range(2):
        batch = pseudo_collate([data[i]])
        batch['inputs'] = [torch.zeros(3, *ids.shape)]
        batch['data_samples'][0].set_metainfo(
            dict(img_shape=ids.shape, ori_shape=ids.shape)
        )
        with torch.no_grad():
            results = model.test_step(batch)
        metric.process(batch, [r.to_dict() for r in results])
    assert metric.evaluate(2) == {}
    written = sorted((tmp_path / 'out').iterdir())
    assert [path.name for path in written] == [
        f'bonn_00000{i}_000019_leftImg8bit.png' for i in range(2)
    ]
    picture = np.array(Image.open(written[0]))
    official = np.array([trainId2label[i].id for i in range(19)])
    assert (picture == official[ids]).all()


def test_validation_reads_labels_of_the_server_config(city):
    """Only the test set of that config is without them."""
    cfg = load(f'{OURS}-server', city)
    ours = load(OURS, city)
    assert cfg.val_dataloader == ours.val_dataloader
    assert cfg.val_evaluator == ours.val_evaluator
    sample = DATASETS.build(cfg.val_dataloader.dataset)[0]
    assert sample['data_samples'].gt_sem_seg.data.max() == 255


def test_the_check_of_the_data_accepts_it(city):
    from polynl_mm.engine import checks

    checks.check_data(load(OURS, city), 'train', 'val', 'test')
    cfg = load(f'{OURS}-server', city)
    checks.check_data(cfg, 'train', 'val', 'test')
    assert 'polynl_mm.segmentation.labels' in sys.modules
