"""Which cell a pixel belongs to, what is attended to, and the hook."""

import cv2
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmcv')

from mmcv.cnn import NonLocal2d  # noqa: E402
from mmcv.transforms import Resize  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.model import BaseModel, ImgDataPreprocessor  # noqa: E402
from mmengine.registry import TRANSFORMS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from polynl_mm.engine.cli import StartError  # noqa: E402
from polynl_mm.engine.influence import (  # noqa: E402
    InfluenceHook,
    Picture,
    draw,
    views,
)
from polynl_mm.influence import influence  # noqa: E402
from polynl_mm.layers import PolyNL2d  # noqa: E402


@TRANSFORMS.register_module(force=True)
class PackOnlyInputs:
    def __init__(self):
        pass

    def __call__(self, results):
        image = np.ascontiguousarray(results['img'])
        return dict(inputs=torch.tensor(image).permute(2, 0, 1))


@TRANSFORMS.register_module(force=True)
class EnlargeSilently:
    """Without a scale_factor, as a crop that is resized."""

    def __init__(self):
        pass

    def __call__(self, results):
        return dict(results, img=results['img'].repeat(2, 0).repeat(2, 1))


@TRANSFORMS.register_module(force=True)
class MirrorInPlace:
    """Whose name says nothing, and that writes into what it is given."""

    def __call__(self, results):
        results['img'][:] = results['img'][:, ::-1].copy()
        return results


@TRANSFORMS.register_module(force=True)
class TurningResize(Resize):
    """A resize that does more than its type."""

    def transform(self, results):
        results = super().transform(results)
        return dict(results, img=results['img'][::-1])


@TRANSFORMS.register_module(force=True)
class PackMirrored(PackOnlyInputs):
    def __call__(self, results):
        return super().__call__(dict(results, img=results['img'][:, ::-1]))


class Model(BaseModel):
    """Means over cells of 4 x 4 pixels, a block, scores of three classes."""

    def __init__(self, block=None):
        super().__init__(ImgDataPreprocessor(pad_size_divisor=16))
        self.cells = nn.AvgPool2d(4)
        self.block = PolyNL2d(3, beta_init=0.5) if block is None else block
        self.scores = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, inputs, data_samples=None, mode='predict'):
        y = self.scores(self.block(self.cells(inputs / 255)))
        return {'loss': y.square().mean()} if mode == 'loss' else y


def config(*steps, pack='PackOnlyInputs'):
    steps = [
        dict(type='LoadImageFromFile'),
        *steps,
        dict(type='LoadAnnotations'),
        dict(type=pack),
    ]
    loader = dict(dataset=dict(dataset=dict(pipeline=steps)))
    return Config(dict(test_dataloader=loader, default_scope='mmengine'))


@pytest.fixture
def path(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (13, 30, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'some.png'), pixels)
    return str(tmp_path / 'some.png')


RESIZE = dict(type='Resize', scale=(60, 26), keep_ratio=True)
PAD = dict(type='Pad', size=(64, 40))
COLOURS = dict(type='Normalize', mean=[9.0] * 3, std=[2.0] * 3)
NO_FLIP = dict(type='RandomFlip', prob=0.0)


@pytest.mark.parametrize(
    'steps, given, scale',
    (
        ((), (16, 32), 1),
        ((RESIZE,), (32, 64), 2),
        ((COLOURS, RESIZE, NO_FLIP, PAD), (48, 64), 2),
        # The second factor is that of the second step alone.
        ((RESIZE, dict(type='Resize', scale_factor=2.0)), (64, 128), 4),
    ),
)
def test_a_pixel_is_seen_where_it_lies(path, steps, given, scale):
    """Behind a resize and padding, by the pipeline, the model, or both."""
    picture = Picture(config(*steps), path)
    assert picture.pixels.shape == (13, 30, 3)
    assert (picture.pixels[..., ::-1] == cv2.imread(path)).all()
    torch.manual_seed(0)
    model = Model().eval()
    view = views(model, picture, [(29, 12), (5, 7)])
    assert view.layer == 'block' and view.maps.shape == (2, 13, 30)
    batch = model.data_preprocessor(picture.data)
    assert batch['inputs'].shape[-2:] == given
    # Cells of 4 pixels of what the model is given.
    cells = [
        (12 * scale // 4, 29 * scale // 4),
        (7 * scale // 4, 5 * scale // 4),
    ]
    want = influence(model, **batch, at=cells).numpy()
    np.testing.assert_allclose(view.sums, want.sum((1, 2)), rtol=1e-5)
    for y in range(13):
        for x in range(30):
            np.testing.assert_array_equal(
                view.maps[:, y, x], want[:, y * scale // 4, x * scale // 4]
            )


def test_what_can_not_be_placed_is_refused(path):
    for step in (
        dict(type='CenterCrop', crop_size=(8, 8)),
        dict(type='RandomFlip', prob=1.0),
        dict(type='EnlargeSilently'),
        dict(type='MirrorInPlace'),
        dict(type='TurningResize', scale=(30, 13)),
        dict(
            type='RandomChoiceResize',
            scales=[(30, 13)],
            resize_type='TurningResize',
        ),
    ):
        line = f'{step["type"]} is .* where its pixels went is not known'
        with pytest.raises(ValueError, match=line):
            Picture(config(step), path)
    with pytest.raises(ValueError, match='PackMirrored is not known only'):
        Picture(config(pack='PackMirrored'), path)
    for step, line in (
        (dict(type='Quatsch'), 'pipeline can not be built: KeyError.*Quatsch'),
        (dict(scale=3), 'pipeline can not be built: '),
        (dict(type='ToTensor', keys=['a']), 'ToTensor can not be run: Key'),
    ):
        with pytest.raises(ValueError, match=line):
            Picture(config(step), path)
    with pytest.raises(ValueError, match="Normalize gives no 'inputs'"):
        cfg = config(COLOURS)
        del cfg.test_dataloader.dataset.dataset.pipeline[2:]
        Picture(cfg, path)
    picture = Picture(config(), path)
    with pytest.raises(ValueError, match=r'point 30 0 is not in the picture'):
        views(Model(), picture, [(30, 0)])
    with pytest.raises(ValueError, match='has no Poly-NL layer'):
        views(Model(nn.Identity()), picture, [(0, 0)])


@pytest.mark.parametrize('host', ('mmdet', 'mmseg'))
def test_steps_of_the_hosts(path, host):
    """What a type does to the places of pixels, whatever it says."""
    pytest.importorskip(host)

    def picture(*steps):
        cfg = config(*steps)
        cfg.default_scope = host
        return Picture(cfg, path)

    turns = dict(
        mmdet=dict(type='Rotate', prob=1.0, min_mag=60.0, max_mag=60.0),
        mmseg=dict(type='RandomRotate', prob=1.0, degree=(60.0, 60.0)),
    )
    with pytest.raises(ValueError, match='where its pixels went is not known'):
        picture(turns[host])
    steps = (dict(type='PhotoMetricDistortion'), NO_FLIP, RESIZE)
    shorter = dict(type='ResizeShortestEdge', scale=39, max_size=90)
    assert picture(*steps, shorter).scale == (3, 3)


def test_an_enlargement_without_a_factor_is_no_padding(path):
    """mmseg's ResizeToMultiple tells none."""
    pytest.importorskip('mmseg')
    step = dict(type='mmseg.ResizeToMultiple', size_divisor=16)
    picture = Picture(config(step), path)
    assert picture.scale == (32 / 30, 16 / 13)
    # The last cells are those of the last pixels.
    assert picture.rows(16, 16)[-1] == 15 and picture.columns(32, 32)[-1] == 31


def test_a_number_of_the_scores_at_a_point(path):
    picture, model = Picture(config(), path), Model().eval()
    batch = model.data_preprocessor(picture.data)
    view = views(
        model,
        picture,
        [(17, 9)],
        score=lambda scores, point: scores[0] - point[0] * scores[2],
    )
    score = model(**batch)[0, :, 2, 4]
    score = score[0] - 17 * score[2]
    (slope,) = torch.autograd.grad(score, model.block.beta)
    want = (slope * model.block.beta).item()
    assert view.sums[0] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    'mode', ('gaussian', 'embedded_gaussian', 'dot_product', 'concatenation')
)
@pytest.mark.parametrize('sub_sample', (False, True))
def test_attention_is_that_of_the_block(path, mode, sub_sample):
    """It brings the block's own output about."""
    torch.manual_seed(0)
    block = NonLocal2d(
        3, reduction=1, mode=mode, sub_sample=sub_sample, zeros_init=False,
        std=1.0,
    )  # fmt: skip
    # As high and wide as is asked for: without padding.
    pixels = np.random.default_rng(0).integers(0, 255, (16, 32, 3), np.uint8)
    cv2.imwrite(path, pixels)
    model, picture = Model(block).eval(), Picture(config(), path)
    view = views(model, picture, [(17, 9)])
    inputs = model.data_preprocessor(picture.data)['inputs']
    with torch.no_grad():
        x = model.cells(inputs / 255)
        values = block.g(x)
        stride = 8 if sub_sample else 4
        row = torch.tensor(view.maps[0, ::stride, ::stride])
        y = torch.einsum('chw,hw->c', values[0], row)
        y = x[0, :, 2, 4] + block.conv_out(y[None, :, None, None])[0, :, 0, 0]
        torch.testing.assert_close(y, block(x)[0, :, 2, 4])
    assert row.std() > 0
    assert view.sums[0] == pytest.approx(row.sum().item(), rel=1e-5)


def test_colours():
    pixels = np.full((4, 6, 3), 200, np.uint8)
    values = np.zeros((4, 6))
    values[1, 2], values[2, 3] = 2.0, -1.0
    drawn = draw(pixels, values).astype(int)
    grey = drawn[0, 0]
    assert (grey == grey[0]).all() and (drawn[3, 5] == grey).all()
    red, blue = drawn[1, 2], drawn[2, 3]
    assert tuple(red) == (214, 24, 31)
    # Half as strong.
    assert np.abs(blue - (grey + (5, 84, 200)) / 2).max() <= 0.5
    assert (draw(pixels, point=(3, 2)) != pixels).any()
    assert (draw(pixels, np.zeros((4, 6))) == grey[0]).all()


def train(folder, path, **hook):
    data = [dict(inputs=torch.ones(3, 16, 16))] * 8
    runner = Runner(
        Model(),
        str(folder),
        train_dataloader=DataLoader(data, 2, collate_fn=pseudo_collate),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(checkpoint=None),
        custom_hooks=[
            dict(type='polynl_mm.PolyNLHook', interval=2),
            dict(type='polynl_mm.InfluenceHook', image=path, **hook),
        ],
        visualizer=dict(
            type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]
        ),
        experiment_name=folder.name,
        cfg=config(),
    )
    runner.train()
    return runner


def test_hook_draws(tmp_path, path):
    torch.manual_seed(0)
    runner = train(tmp_path / 'a', path, at=[(17, 9), (0, 0)], interval=2)
    files = sorted((tmp_path / 'a').rglob('vis_image/*.png'))
    assert [file.name for file in files] == [
        f'influence_{point}_{step}.png'
        for point in ('0_0', '17_9')
        for step in (2, 4)
    ]
    drawn = [cv2.imread(str(file)) for file in files]
    assert drawn[0].shape == (13, 30, 3) and (drawn[0] != drawn[2]).any()
    # The step is taken with what the model learns, and with its watch.
    assert runner.model.training
    (file,) = (tmp_path / 'a').rglob('vis_data/scalars.json')
    assert 'poly_nl/block.share' in file.read_text()
    # A hook that looks at something else overwrites nothing.
    hook = InfluenceHook(path, [(0, 0)], layer='block', call=0, interval=5)
    hook.before_train(runner)
    hook.after_train_iter(runner, 4)
    (new,) = {*(tmp_path / 'a').rglob('vis_image/*.png')} - {*files}
    assert new.name == 'influence_0_0_block_call0_5.png'


@pytest.mark.parametrize(
    'hook, line',
    (
        (dict(at=[(30, 0)]), 'point 30 0 is not in the picture'),
        (
            dict(at=[(0, 0)], layer='a'),
            "no Poly-NL layer 'a'; there are block",
        ),
    ),
)
def test_hook_is_refused_before_the_training(tmp_path, path, hook, line):
    with pytest.raises(StartError, match=line):
        train(tmp_path / 'a', path, **hook)
    with pytest.raises(StartError, match="No such file .*none.png'"):
        train(tmp_path / 'b', str(tmp_path / 'none.png'), at=[(0, 0)])
    with pytest.raises(StartError, match=r'\.py: not a readable picture'):
        train(tmp_path / 'c', __file__, at=[(0, 0)])
