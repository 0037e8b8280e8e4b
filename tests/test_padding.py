"""A layer sees a picture's own positions, whatever it is padded by."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import assert_near
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.structures import BaseDataElement
from torch import nn
from torch.utils.checkpoint import checkpoint

from polynl_mm import (
    PolyNL1d,
    PolyNL2d,
    PolyNL3d,
    fuse_poly_nl,
    insert_blocks,
    layers,
    padding,
    shared_context,
)
from polynl_mm.context import (
    Crops,
    Frames,
    Window,
    WindowError,
    Windows,
    grid,
)
from polynl_mm.padding import Pictures, pictures_in, pictures_of
from polynl_mm.samples import pictures_of_samples

SIZES = [(12, 20), (24, 8), (24, 28)]
WARNING = 'padding of pictures of different sizes'


class Model(BaseModel):
    """Of cells of 4 pixels, which see nothing of each other but by layers."""

    def __init__(self, with_cp=None, layer=PolyNL2d):
        super().__init__()
        torch.manual_seed(0)
        self.with_cp = with_cp
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 4, 4),
            nn.Conv2d(4, 6, 1),
            layer(6, beta_init=0.7, bias=True),
            nn.ReLU(),
            layer(6, beta_init=-0.5),
        )
        self.double()

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if isinstance(inputs, dict):
            inputs = inputs['image']
        if self.with_cp is None:
            y = self.backbone(inputs)
        else:
            y = checkpoint(self.backbone, inputs, use_reentrant=self.with_cp)
        if mode == 'fail':
            raise inputs.error
        return dict(loss=y.square().sum()) if mode == 'loss' else y


def batch(sizes=SIZES, shape=None):
    """Pictures at the top left of noise, and their samples."""
    generator = torch.Generator().manual_seed(1)
    shape = shape or [max(each) for each in zip(*sizes)]
    x = torch.randn(len(sizes), 3, *shape, generator=generator)
    record = dict(batch_input_shape=tuple(shape))
    samples = [
        BaseDataElement(metainfo=dict(img_shape=s, **record)) for s in sizes
    ]
    return x.double(), samples


def own(t, k, stride=4):
    """What of a map is the k-th picture's."""
    height, width = (n // stride for n in SIZES[k])
    return t[k : k + 1, :, :height, :width]


def assert_each_as_alone(model, y):
    for k in range(len(SIZES)):
        alone = model(own(batch()[0], k, 1))
        assert_near(own(y, k), alone, 1e-12)


# --------------------------------------------------------------------- models


@pytest.mark.parametrize('form', ['gram', 'direct', 'fused', 'source'])
def test_a_picture_is_what_it_is_alone(form):
    model = Model().eval()
    for layer in model.backbone[2::2]:
        layer.form = form if form in layers.FORMS else 'auto'
    if form in ('fused', 'source'):
        report = fuse_poly_nl(model, trainable=form == 'source')[1]
        assert report.fused == ['backbone.2']
    x, samples = batch()
    assert_each_as_alone(model, model(x, samples))
    assert_each_as_alone(copy.deepcopy(model), model(x, data_samples=samples))
    assert (model(x, samples) - model(x)).abs().max() > 1e-2


@pytest.mark.parametrize('with_cp', [None, True, False])
def test_gradients(with_cp):
    """Also where backward computes the features again."""
    model, (x, samples) = Model(with_cp), batch()
    x.requires_grad_()
    y = model(x, samples)
    sum(own(y, k).square().sum() for k in range(3)).backward()
    got = [p.grad for p in (x, *model.parameters())]
    want = torch.zeros_like(x)
    model.zero_grad()
    for k in range(3):
        part = own(x.detach(), k, 1).clone().requires_grad_()
        model(part).square().sum().backward()
        own(want, k, 1).copy_(part.grad)
    for a, b in zip(got, [want, *(p.grad for p in model.parameters())]):
        assert_near(a, b, 1e-11)


@pytest.mark.parametrize('with_cp', [True, False])
def test_calls_between_a_call_and_its_backward(with_cp):
    """One without gradients is none; of others it can not be told."""
    model, (x, samples) = Model(with_cp), batch()
    others = batch([(24, 28), (12, 12), (4, 28)])[1]
    x.requires_grad_()
    model(x, samples).sum().backward()
    want = x.grad.clone()
    for _ in range(2):
        x.grad = None
        y = model(x, samples)
        with torch.no_grad():
            model(x, others)
        y.sum().backward()
        assert torch.equal(x.grad, want)
        y = model(x, samples)
        model(x, others)
        with pytest.raises(RuntimeError, match='which of them'):
            y.sum().backward()


def test_whatever_calls_the_model():
    x, samples = batch()
    model = Model()
    want = model(x, samples)
    data = dict(inputs=x, data_samples=samples)
    average = ExponentialMovingAverage(model)
    for got in (
        model(inputs=x, data_samples=samples),
        model.test_step(data),
        average(x, samples),
        nn.Sequential(copy.deepcopy(model))[0](x, samples),
    ):
        assert torch.equal(got, want)


def test_models_are_told_wherever_layers_come_from():
    """With a part, deep below, or by an insertion, all into a model."""
    x, samples = batch()
    whole = Model()
    want = whole(x, samples)
    part, deep, inserted = (
        Model(layer=lambda *args, **kwargs: nn.Identity()) for _ in range(3)
    )
    part.backbone = whole.backbone
    deep.backbone[1] = nn.Sequential(*whole.backbone[1:3])
    deep.backbone[0], deep.backbone[4] = whole.backbone[0], whole.backbone[4]
    cfg = dict(type='polynl_mm.PolyNL2d', in_channels=6)
    insert_blocks(inserted, [dict(after='backbone.1', cfg=cfg)])
    for model in (part, deep):
        assert torch.equal(model(x, samples), want)
    for model in (whole, part, deep, inserted):
        assert len(model._forward_pre_hooks) == 1
        assert len(model._forward_hooks) == 1


@pytest.mark.parametrize('is_built_before', [True, False])
def test_models_are_told_by_a_layer_made_in_python(is_built_before):
    """In a process with nothing else of the package, before or after."""
    code = f"""
import torch
from mmengine.model import BaseModel
from torch import nn

class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.ReLU())

    forward = None

model = Model() if {is_built_before} else None
from polynl_mm import PolyNL2d
layer = PolyNL2d(3)
model = model or Model()
model.part[0] = layer
print([f.__name__ for f in model._forward_pre_hooks.values()])
"""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "['_begin']\n", done.stderr[-2000:]


def test_models_in_models():
    """One that calls itself, and one that is called without samples."""

    class Outer(BaseModel):
        def __init__(self):
            super().__init__()
            self.inner = Model()

        def forward(self, inputs, data_samples=None, depth=1):
            if depth:
                self(inputs[:1], data_samples[:1], depth - 1)
            whole = self.inner(inputs)
            # Of another size: not what the samples are of.
            half = self.inner(inputs[..., :12, :12])
            return whole, half

    model, (x, samples) = Outer(), batch()
    whole, half = model(x, samples)
    assert torch.equal(whole, model.inner(x, samples))
    assert torch.equal(half, model.inner(x[..., :12, :12]))


def test_pictures_of_one_size_cost_nothing(monkeypatch):
    given, poly_nl = [], layers.poly_nl

    def note(*args, **kwargs):
        given.append(kwargs)
        return poly_nl(*args, **kwargs)

    monkeypatch.setattr(layers, 'poly_nl', note)
    Model()(*batch([(24, 28)] * 2))
    assert given == [{}, {}]
    # Padding that is no cell of its own.
    Model()(*batch([(21, 28), (24, 25)]))
    assert given[2:] == [dict(weights=None)] * 2
    Model()(*batch([(20, 28), (24, 28)]))
    (first, second) = (each['weights'] for each in given[4:])
    assert first is second and first.shape == (2, 6, 7)
    assert first.flatten(1).sum(1).tolist() == [35, 42]


def test_nothing_is_left_of_a_call():
    model, (x, samples) = Model(), batch()
    x.error = ValueError
    with pytest.raises(ValueError):
        model(x, samples, 'fail')
    assert pictures_of() is None
    # Of this no hook is told.
    x.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        model(x, samples, 'fail')
    assert pictures_of() is None and not padding._calls.get()
    with pictures_in(Pictures((24, 28), SIZES)):
        y = model(x)
        assert pictures_of() is not None
    assert torch.equal(y, model(x, samples))


def test_what_can_not_be_told_is_said(monkeypatch):
    model, (x, samples) = Model(), batch()
    with pytest.warns(UserWarning, match=f'more than a batch.*{WARNING}'):
        model(dict(image=x), dict(image=samples))
    model(dict(image=x), dict(image=batch([(24, 28)] * 3)[1]))

    def compiled(*args):
        with monkeypatch.context() as patch:
            patch.setattr(padding, 'is_recorded', lambda: True)
            return Model.forward(model, *args)

    model.forward = compiled
    with pytest.warns(UserWarning, match=f'compiled.*{WARNING}'):
        got = model(x, samples)
    del model.forward
    assert_near(got, model(x), 1e-12)


# ----------------------------------------------------------------------- maps


@pytest.mark.parametrize(
    'shape, sizes, axes, stride, counts',
    [
        ((64, 96), [(64, 96), (33, 1)], (4, 6), 16, [24, 3]),
        # Not a multiple of the stride, as of an unpadded last cell.
        ((33, 65), [(33, 65), (32, 64)], (2, 3), 32, [6, 2]),
        ((224, 168), [(224, 168), (29, 15)], (16, 12), 14, [192, 6]),
        ((64, 48), [(64, 48), (29, 17)], (5, 4, 3), 16, [60, 20]),
        ((8, 8), [(8, 8), (0, 0)], (8, 8), 1, [64, 0]),
    ],
)
def test_cells_of_a_picture(shape, sizes, axes, stride, counts):
    pictures = Pictures(shape, sizes)
    weights = pictures.weights(torch.empty(2, 3, *axes))
    assert padding._stride(shape, axes) == stride
    assert weights.shape == (2, *axes) and weights[0].all()
    assert weights.flatten(1).sum(1).tolist() == counts
    layer = (PolyNL2d if len(axes) == 2 else PolyNL3d)(3, beta_init=1)
    x = torch.randn(2, 3, *axes)
    if counts[1]:
        x[1, :, ..., : sizes[1][1] // stride + 1] += 5
    with pictures_in(pictures):
        assert layer(x).isfinite().all()


def test_maps_of_something_else(recwarn):
    pictures = Pictures((64, 64), [(32, 64), (64, 64)])
    # Regions of interest, and a map of the padding's size only.
    assert pictures.weights(torch.empty(5, 3, 7, 7)) is None
    assert pictures.weights(torch.empty(2, 3, 1, 1)) is None
    assert not recwarn
    for axes in ((7, 7), (100,), (8, 4)):
        with pytest.warns(UserWarning, match=f'no map of whole.*{WARNING}'):
            assert pictures.weights(torch.empty(2, 3, *axes)) is None
    # Of no stride that features have.
    large = Pictures((512, 512), [(256, 512), (512, 512)])
    with pytest.warns(UserWarning, match=WARNING):
        assert large.weights(torch.empty(2, 3, 2, 2)) is None
    assert large.weights(torch.empty(2, 3, 1, 1)) is None
    with pictures_in(pictures), pytest.warns(UserWarning, match=WARNING):
        PolyNL1d(3)(torch.randn(2, 3, 64))


def test_sizes_of_samples(recwarn):
    x, samples = batch([(24, 28, 3), (99, 8)], (24, 28))
    pictures = pictures_of_samples(x, samples)
    assert pictures.sizes == ((24, 28), (24, 8))
    assert pictures_of_samples(x, None) is None
    assert pictures_of_samples(x, [BaseDataElement()] * 2) is None
    part = pictures.within((4, 8, 16, 32))
    assert part.shape == (24, 12) and part.sizes == ((16, 12), (16, 4))


SHAPE, SMALL = (24, 28), (20, 8)


@pytest.mark.parametrize(
    'meta, size',
    [
        (dict(batch_input_shape=SHAPE), SMALL),
        (dict(batch_input_shape=SHAPE, pad_shape=(24, 7)), (20, 7)),
        # As mmseg tests and trains; of a test only the padding is known.
        (dict(img_padding_size=(0, 4, 0, 3), pad_shape=SHAPE), (21, 24)),
        (dict(padding_size=[0, 20, 0, 4], pad_shape=None), SMALL),
        # Of another tensor, or at the left.
        ({}, None),
        (dict(batch_input_shape=(48, 28)), None),
        (dict(padding_size=(0, 4, 0, 3), pad_shape=(48, 28)), None),
        (dict(padding_size=(9, 11, 0, 4)), None),
    ],
)
def test_padding_is_what_is_recorded(recwarn, meta, size):
    meta = dict(img_shape=SMALL, **meta)
    samples = [BaseDataElement(metainfo=meta)] * 2
    pictures = pictures_of_samples(torch.zeros(2, 3, *SHAPE), samples)
    assert (pictures and pictures.sizes) == (size and (size, size))
    assert not recwarn


@pytest.mark.parametrize(
    'img_shape, is_one',
    [
        (np.array(SMALL), True),
        (torch.tensor(SMALL), True),
        (torch.Size(SMALL), True),
        (8, False),
        ('20x8', False),
        ([[20, 8], [20, 8]], False),
        ([[20], [20, 8]], False),
        ((20,), False),
    ],
)
def test_shapes_of_other_kinds(img_shape, is_one):
    meta = dict(img_shape=img_shape, batch_input_shape=SHAPE)
    samples = [BaseDataElement(metainfo=meta)]
    pictures = pictures_of_samples(torch.zeros(1, 3, *SHAPE), samples)
    assert (pictures is not None) == is_one
    for inputs in (torch.tensor(1.0), torch.zeros(1), torch.zeros(1, *SHAPE)):
        assert pictures_of_samples(inputs, samples) is None


def test_sizes_that_nothing_has_recorded_are_said():
    model, (x, samples) = Model(), batch()
    for sample in samples:
        sample.set_metainfo(dict(batch_input_shape=(48, 28)))
    with pytest.warns(UserWarning, match=f'no preprocessor.*{WARNING}'):
        y = model(x, samples)
    assert torch.equal(y, model(x))


# ------------------------------------------------------------------- contexts


@pytest.mark.parametrize('budget', [None, 0])
def test_windows_of_padded_pictures(budget):
    """Those of a batch; the second has nothing in some windows."""
    model, (x, samples) = Model().eval(), batch()
    want, y = model(x, samples), torch.zeros(3, 6, 6, 7).double()
    windows = grid((24, 28), (12, 12), (8, 8))
    over = Windows(budget, images=3)

    def step(window):
        x1, y1, x2, y2 = window.box
        part = model.backbone(x[..., y1:y2, x1:x2])
        y[..., y1 // 4 : y2 // 4, x1 // 4 : x2 // 4] = part

    with torch.no_grad(), shared_context(model, over):
        with pictures_in(Pictures((24, 28), SIZES)):
            over(step, windows)
    assert_near(y, want, 1e-12)


@pytest.mark.parametrize('budget', [None, 0])
def test_windows_that_are_padded_each(budget):
    model, (x, _) = Model().eval(), batch([(24, 28)])
    want, y = model(x), torch.zeros(1, 6, 6, 7).double()
    noise = batch([(16, 16)])[0]

    def step(window):
        x1, y1, x2, y2 = window.box
        inputs = noise.clone()
        inputs[..., : y2 - y1, : x2 - x1] = x[..., y1:y2, x1:x2]
        part = model(inputs, batch([(y2 - y1, x2 - x1)], (16, 16))[1])
        part = part[..., : (y2 - y1) // 4, : (x2 - x1) // 4]
        y[..., y1 // 4 : y2 // 4, x1 // 4 : x2 // 4] = part

    with torch.no_grad(), shared_context(model, Windows(budget)) as over:
        over(step, grid((24, 28), (12, 12), (8, 8)))
    assert_near(y, want, 1e-12)
    window = Window((0, 0, 12, 12), (0, 0, 28, 24))
    with torch.no_grad(), shared_context(model, Windows(budget)) as over:
        with pytest.raises(WindowError):  # the second's box is none
            over(step, [window, Window((0, 0, 99, 9), (0, 0, 0, 0))])
    assert pictures_of() is None


def test_parts_of_parts_of_padded_pictures_are_refused():
    model, x = Model().eval(), torch.zeros(3, 3, 24, 28).double()
    outer, inner = Windows(images=3), Windows(images=3)
    window = Window((0, 0, 28, 24), (0, 0, 28, 24))

    def step(_):
        return inner(lambda _: model.backbone(x), [window])

    with torch.no_grad(), shared_context(model, outer):
        with (
            shared_context(model, inner),
            pictures_in(Pictures((24, 28), SIZES)),
            pytest.raises(RuntimeError, match='of padded pictures'),
        ):
            outer(step, [window])


@pytest.mark.parametrize('kind', ['crops', 'frames'])
def test_crops_and_frames_that_are_padded(kind):
    """A crop counts as many cells as it has; a frame is what it is alone."""
    model, (x, samples) = Model().eval(), batch()
    if kind == 'frames':
        want = model(x, samples)
        with shared_context(model, Frames()) as frames:
            for _ in range(2):
                assert_near(frames(model, x, samples), want, 1e-12)
        return
    with shared_context(model, Crops([0, 0, 1])):
        y = model(x, samples)
    assert_near(own(y, 2), model(own(x, 2, 1)), 1e-12)
    # Both crops of the first image in one map.
    row = torch.zeros(1, 3, 24, 28).double()
    row[..., :12, :20], row[..., 20:] = own(x, 0, 1), own(x, 1, 1)
    counts = torch.zeros(1, 6, 7)
    counts[:, :3, :5], counts[:, :, 5:] = 1, 1

    def around(layer, x):
        return None, counts

    for layer in model.backbone[2::2]:
        layer.around = around
    assert_near(own(y, 0), model(row)[..., :3, :5], 1e-12)


# ---------------------------------------------------------------------- hosts


def test_a_plugin_in_a_config_is_all_it_takes():
    """Built in a process that has not heard of the package before."""
    pytest.importorskip('mmdet')
    code = """
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules

register_all_modules()
torch.manual_seed(0)
plugin = dict(type='polynl_mm.PolyNL2d', beta_init=.3)
model = MODELS.build(dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=50, base_channels=8, out_indices=(2,),
        zero_init_residual=False, plugins=[dict(cfg=plugin,
        stages=(False, False, True, False), position='after_conv3')]),
    neck=None, bbox_head=dict(type='RetinaHead', num_classes=1,
        in_channels=128))).eval()
seen = []
layer = model.backbone.layer3[-1].poly_nl
around = type(layer)._around
type(layer)._around = lambda self, x: seen.append(around(self, x)) or seen[-1]
shapes = [(40, 70), (96, 128)]
data = model.data_preprocessor(dict(
    inputs=[torch.randint(255, (3, *s), dtype=torch.uint8) for s in shapes],
    data_samples=[DetDataSample(metainfo=dict(img_shape=s)) for s in shapes]))
model(**data)
print([w['weights'].flatten(1).sum(1).tolist() for w in seen])
"""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
    )
    # Of stride 16: 3 by 5 cells, and 6 by 8.
    want = str([[15, 48]] * 6)
    assert done.stdout.splitlines()[-1:] == [want], done.stderr[-2000:]
