"""mmseg's sliding windows with one context, against the whole image."""

import os
import subprocess
import sys
from copy import deepcopy
from importlib import reload
from pathlib import Path

import pytest

pytest.importorskip('mmseg')

import cv2
import mmseg
import numpy as np
import pointwise  # noqa: F401  (the parts of the models below)
import torch
from helpers import HALF_TOLERANCE, calibrate, layers_of
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.models.segmentors import (
    BaseSegmentor,
    DepthEstimator,
    EncoderDecoder,
    MultimodalEncoderDecoder,
)
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch.testing import assert_close

from polynl_mm import fuse_poly_nl
from polynl_mm.context import WindowError, grid
from polynl_mm.engine.cli import StartError
from polynl_mm.engine.start import read_config
from polynl_mm.padding import Pictures, pictures_in
from polynl_mm.segmentation import windows as module

pytestmark = pytest.mark.usefixtures('quiet_and_quick')

ROOT = Path(__file__).parents[2]
POLY = dict(type='polynl_mm.PolyNL2d', beta_init=1.0)
PLAIN = dict(
    in_channels=6,
    channels=5,
    num_classes=4,
    norm_cfg=dict(type='BN'),
    align_corners=False,
    dropout_ratio=0,
)
HEAD = dict(PLAIN, type='polynl_mm.PolyNLHead', kernel_size=1, beta_init=1.0)
BACKBONE = dict(
    type='polynl_mm.Insert',
    into='Pointwise',
    blocks=[dict(after='stem', cfg=POLY), dict(after='second', cfg=POLY)],
)
MODEL = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[60.0] * 3, std=[60.0] * 3
    ),
    backbone=BACKBONE,
    decode_head=HEAD,
    test_cfg=dict(mode='whole'),
)
WINDOWS = dict(mode='slide', crop_size=(16, 20), stride=(11, 15))
SIZE = (37, 53)


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def build(dtype=torch.float64, **kwargs):
    return as_trained(MODELS.build(ConfigDict(MODEL, **kwargs)).to(dtype))


def as_trained(model):
    """Layers that matter, and classes that all occur."""
    torch.manual_seed(0)
    model.eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter)
    image = images(1).to(parameter.dtype)
    calibrate(Whole(model), image)
    head = model.decode_head
    head = head[-1] if isinstance(head, torch.nn.ModuleList) else head
    with torch.no_grad():
        head.conv_seg.bias -= Whole(model)(image).mean((0, 2, 3))
    return model


class Whole(torch.nn.Module):
    """The way of an image through all of a segmentor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model.encode_decode(image, metas(len(image)))


def images(count, size=SIZE):
    """Bright on one side: no window has the mean of the whole."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(count, 3, *size, generator=generator)
    tint = torch.rand(count, 3, 1, 1, generator=generator)
    return noise + tint + torch.linspace(-1, 1, size[1])


def metas(count, size=SIZE):
    return [
        dict(ori_shape=size, img_shape=size, pad_shape=size, number=k)
        for k in range(count)
    ]


@torch.no_grad()
def infer(model, inputs, **test_cfg):
    model.test_cfg = ConfigDict(test_cfg)
    dtype = next(model.parameters()).dtype
    count, _, *size = inputs.shape
    return model.inference(inputs.to(dtype), metas(count, tuple(size)))


# ---------------------------------------------------- equal to the whole image


@pytest.mark.parametrize('fused', [False, True], ids=['', 'fused'])
@pytest.mark.parametrize(
    'size, stride, batch',
    [
        ((16, 20), (11, 15), 1),
        ((16, 20), (11, 15), 2),
        ((16, 20), (16, 20), 2),
        ((37, 20), (37, 20), 1),
        ((64, 64), (40, 40), 2),
    ],
    ids=['overlap', 'batch', 'shifted', 'columns', 'one window'],
)
def test_windows_are_the_whole_image(size, stride, batch, fused):
    model = build()
    assert len(layers_of(model)) == 3
    inputs = images(batch)
    whole = infer(model, inputs, mode='whole')
    if fused:
        model, report = fuse_poly_nl(model)
        assert len(report.fused) == 2
    slide = dict(mode='slide', crop_size=size, stride=stride)
    assert_close(infer(model, inputs, **slide, context='image'), whole)
    differ = (infer(model, inputs, **slide) - whole).abs().max()
    assert (differ > 1e-2) == (size != (64, 64))


@pytest.mark.parametrize(
    'context',
    [
        dict(),
        dict(budget=0),
        dict(budget=0.02),
        dict(budget=None, wait_on='cpu'),
    ],
    ids=str,
)
def test_options_of_windows(context):
    model, inputs = build(), images(2)
    whole = infer(model, inputs, mode='whole')
    assert_close(infer(model, inputs, **WINDOWS, context=context), whole)


@pytest.mark.parametrize('dtype', HALF_TOLERANCE, ids=str)
def test_autocast(dtype):
    model, inputs = build(torch.float32), images(1)
    truth = infer(model, inputs, mode='whole')
    with torch.autocast('cpu', dtype=dtype):
        whole = infer(model, inputs, mode='whole')
        windows = infer(model, inputs, **WINDOWS, context='image')
    without = infer(model, inputs, **WINDOWS)
    error = (whole - truth).abs().max()
    assert 0 < error
    assert (windows - truth).abs().max() <= 2 * error
    assert (without - truth).abs().max() > 4 * error


def test_other_segmentors():
    """A cascade, one of two modalities, and a subclass of one's own."""

    class Own(EncoderDecoder):
        def slide_inference(self, inputs, batch_img_metas):
            return super().slide_inference(inputs, batch_img_metas) * 2

    cascade = build(
        type='CascadeEncoderDecoder',
        num_stages=2,
        decode_head=[HEAD, dict(PLAIN, type='Again')],
    )
    two = MultimodalEncoderDecoder(
        image_encoder=dict(BACKBONE, into='PointwiseMap'),
        text_encoder=dict(type='Words'),
        decode_head=dict(HEAD, in_index=1),
        asymetric_input=False,
    )
    for model in (cascade, build(type=Own), as_trained(two.double())):
        inputs = images(2)
        whole = infer(model, inputs, mode='whole')
        if isinstance(model, Own):
            whole = 2 * whole
        windows = infer(model, inputs, **WINDOWS, context='image')
        assert_close(windows, whole)
        differ = (infer(model, inputs, **WINDOWS) - whole).abs().max()
        assert differ > 1e-3


# ------------------------------------------------------ otherwise as the host


def host_inference(model, inputs, given):
    return EncoderDecoder.slide_inference.host(model, inputs, given)


@pytest.mark.parametrize('stride', [(16, 20), (11, 15), (3, 7)], ids=str)
def test_without_a_branch_it_is_the_host_bit_by_bit(stride):
    """The same windows in the same order: what is left without a gate.

    With convolutions that see borders, so that windows do not agree.
    """
    model = build(torch.float32, decode_head=dict(HEAD, kernel_size=3))
    inputs = images(2)
    for layer in layers_of(model).values():
        torch.nn.init.zeros_(layer.beta)
    slide = dict(WINDOWS, stride=stride)
    windows = infer(model, inputs, **slide, context='image')
    assert torch.equal(windows, infer(model, inputs, **slide))


def test_without_the_key_it_is_the_host(monkeypatch):
    monkeypatch.setattr(module, 'shared_context', None)
    model, inputs = build(torch.float32), images(2)
    for more in ({}, dict(context=None)):
        got = infer(model, inputs, **WINDOWS, **more)
        given = metas(2)
        with torch.no_grad():
            assert torch.equal(got, host_inference(model, inputs, given))
        assert given[0]['img_shape'] == (16, 20)


@pytest.mark.parametrize(
    'shape, size, stride',
    [
        (SIZE, (16, 20), (11, 15)),
        (SIZE, (16, 20), (16, 20)),
        (SIZE, (37, 20), (37, 1)),
        (SIZE, (64, 20), (64, 20)),
        (SIZE, (64, 64), (1, 1)),
        (SIZE, (64, 64), (99, 99)),
        ((48, 60), (16, 20), (16, 20)),
        ((17, 21), (16, 20), (9, 9)),
    ],
    ids=str,
)
def test_windows_are_those_of_the_host(shape, size, stride):
    """Seen by coordinates in the place of colours."""
    rows, columns = torch.meshgrid(*map(torch.arange, shape), indexing='ij')
    inputs = torch.stack([columns, rows, rows])[None].double()
    model = build(test_cfg=dict(mode='slide', crop_size=size, stride=stride))
    boxes = []

    def encode_decode(crop, _):
        begin, end = crop[0, :2, 0, 0], crop[0, :2, -1, -1] + 1
        boxes.append(tuple(map(int, (*begin, *end))))
        return crop[:, :1].expand(-1, 4, -1, -1)

    model.encode_decode = encode_decode
    host_inference(model, inputs, metas(1))
    assert boxes == [window.box for window in grid(shape, size, stride)]


def test_a_window_of_a_padded_image_is_what_it_is_alone():
    """Of the second only the left half is the image's."""
    model, inputs = build(), images(1, (16, 40))
    with pictures_in(Pictures((16, 40), [(16, 30)])):
        slide = dict(mode='slide', crop_size=(16, 20), stride=(16, 20))
        got = infer(model, inputs, **slide)
    for part in (slice(0, 20), slice(20, 30)):
        alone = infer(model, inputs[..., part], mode='whole')
        assert_close(got[..., part], alone)


def test_each_window_has_metas_of_its_own():
    model, inputs, given = build(), images(2).double(), metas(2)
    model.test_cfg = ConfigDict(WINDOWS, crop_size=(16, 64), context='image')
    seen = []
    decode = model.encode_decode

    def encode_decode(crop, metas):
        result = decode(crop, metas)
        # After the others have begun.
        seen.append((crop.shape[2:], metas))
        return result

    model.encode_decode = encode_decode
    with torch.no_grad():
        model.slide_inference(inputs, given)
    assert given == metas(2)
    assert [len(own) for _, own in seen] == [2] * 3
    for shape, own in seen:
        assert own[0].pop('img_shape') == shape == (16, 53)
        # Where it is no Size, heads take pad_shape.
        assert type(shape) is torch.Size
        del given[0]['img_shape']
        assert own == given
        given = metas(2)


def test_importing_again_replaces_nothing_twice():
    model, inputs = build(), images(1)
    before = infer(model, inputs, **WINDOWS, context='image')
    for _ in range(2):
        reload(module)
    for kind, name in (
        (EncoderDecoder, 'slide_inference'),
        (MultimodalEncoderDecoder, 'slide_inference'),
        (DepthEstimator, 'slide_flip_inference'),
        (BaseSegmentor, 'forward'),
    ):
        function = getattr(kind, name)
        assert Path(function.host.__code__.co_filename).is_relative_to(
            Path(mmseg.__file__).parent
        )
        assert function.__code__.co_filename == module.__file__
        assert not hasattr(function.host, 'host')
        assert function.__doc__ == function.host.__doc__
    after = infer(model, inputs, **WINDOWS, context='image')
    assert torch.equal(before, after)


# ------------------------------------------------------ what calls a segmentor


def test_each_view_of_tta_has_its_own_context():
    """Flipped and scaled, two images at once."""
    model = build(torch.float32)
    tta = MODELS.build(dict(type='SegTTAModel', module=model))
    data = dict(inputs=[], data_samples=[])
    for size, flip in ((SIZE, None), (SIZE, 'horizontal'), ((30, 61), None)):
        inputs = images(2, size) * 60 + 60
        info = dict(
            ori_shape=SIZE,
            img_shape=size,
            flip=flip is not None,
            flip_direction=flip,
            img_path='',
        )
        data['inputs'].append(list(inputs.flip(3) if flip else inputs))
        data['data_samples'].append(
            [SegDataSample(metainfo=dict(info)) for _ in range(2)]
        )

    def logits(**test_cfg):
        model.test_cfg = ConfigDict(test_cfg)
        with torch.no_grad():
            results = tta.test_step(deepcopy(data))
        return torch.stack([each.seg_logits.data for each in results])

    whole = logits(mode='whole')
    assert_close(
        logits(**WINDOWS, context='image'), whole, atol=1e-4, rtol=1e-4
    )
    assert (logits(**WINDOWS) - whole).abs().max() > 1e-2


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    """A config, a checkpoint, and three pictures with labels."""
    folder = tmp_path_factory.mktemp('job')
    for name in ('img', 'ann'):
        (folder / name).mkdir()
    for k, image in enumerate(images(3)):
        pixels = (image * 60 + 60).clamp(0, 255).byte().numpy()
        cv2.imwrite(str(folder / f'img/{k}.png'), pixels.transpose(1, 2, 0))
        label = np.zeros(SIZE, np.uint8)
        label[0] = 1
        cv2.imwrite(str(folder / f'ann/{k}.png'), label)
    load = dict(type='LoadImageFromFile')
    loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='BaseSegDataset',
            data_root=str(folder),
            img_suffix='.png',
            seg_map_suffix='.png',
            data_prefix=dict(img_path='img', seg_map_path='ann'),
            metainfo=dict(classes=tuple('abcd'), palette=[[0] * 3] * 4),
            pipeline=[load, dict(type='LoadAnnotations')]
            + [dict(type='PackSegInputs')],
        ),
    )
    cfg = dict(
        default_scope='mmseg',
        custom_imports=dict(imports=['pointwise']),
        model=MODEL,
        visualizer=dict(type='SegLocalVisualizer', vis_backends=[]),
        test_pipeline=[load, dict(type='PackSegInputs')],
        test_dataloader=loader,
        test_evaluator=dict(type='IoUMetric'),
        test_cfg=dict(type='TestLoop'),
    )
    Config(cfg).dump(folder / 'whole.py')
    (folder / 'windows.py').write_text(
        f"_base_ = 'whole.py'\nmodel = dict(test_cfg=dict({WINDOWS}))\n"
    )
    (folder / 'image.py').write_text(
        "_base_ = 'windows.py'\nmodel = dict(test_cfg=dict(context='image'))\n"
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = build(torch.float32)
        meta = dict(dataset_meta=loader['dataset']['metainfo'])
    torch.save(
        dict(state_dict=model.state_dict(), meta=meta), folder / 'model.pth'
    )
    return folder


def test_inferencers(job):
    files = [str(job / f'img/{k}.png') for k in range(3)]
    logits = {}
    for name in ('whole', 'windows', 'image'):
        args = [str(job / f'{name}.py'), str(job / 'model.pth')]
        draw = MMSegInferencer(*args, device='cpu')
        drawn = draw(files, return_datasamples=True, batch_size=2)
        results = inference_model(init_model(*args, device='cpu'), files)
        logits[name], again = (
            torch.stack([each.seg_logits.data for each in samples])
            for samples in (drawn, results)
        )
        assert_close(logits[name], again)
    assert_close(logits['image'], logits['whole'], atol=1e-4, rtol=1e-4)
    assert (logits['windows'] - logits['whole']).abs().max() > 1e-2


def test_tools(job):
    """Ours with options, the host's with a config."""
    ours = [ROOT / 'tools/test.py', 'windows.py']
    host = [Path(mmseg.__file__).parent / '.mim/tools/test.py', 'image.py']
    options = ['--cfg-options', 'model.test_cfg.context=image']
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    for out, command, more in (('a', ours, options), ('b', host, [])):
        done = subprocess.run(
            [sys.executable, *map(str, command), 'model.pth', '--out', out]
            + ['--work-dir', 'work', *more],
            cwd=job,
            env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    model = init_model(str(job / 'whole.py'), str(job / 'model.pth'), 'cpu')
    for k in range(3):
        whole = inference_model(model, str(job / f'img/{k}.png'))
        whole = whole.pred_sem_seg.data[0].numpy()
        for out in 'ab':
            got = cv2.imread(str(job / f'{out}/{k}.png'), 0)
            np.testing.assert_array_equal(got, whole)
        model.test_cfg = ConfigDict(WINDOWS)
        alone = inference_model(model, str(job / f'img/{k}.png'))
        assert (alone.pred_sem_seg.data[0].numpy() != whole).mean() > 0.02
        model.test_cfg = ConfigDict(mode='whole')


# ---------------------------------------------------------------------- errors


def predict(model, **test_cfg):
    model.test_cfg = ConfigDict(test_cfg)
    samples = [SegDataSample(metainfo=each) for each in metas(1)]
    return model(images(1).double(), samples, mode='predict')


@pytest.mark.parametrize(
    'context',
    [
        True,
        'window',
        3,
        dict(budget=-1),
        dict(budget='all'),
        dict(images=2),
        dict(wait_on='nowhere'),
    ],
    ids=str,
)
def test_what_is_no_context(context):
    with pytest.raises(ValueError, match=r'model\.test_cfg\.context='):
        predict(build(), **WINDOWS, context=context)


@pytest.mark.parametrize(
    'options, said',
    [
        (dict(mode='slide', context='row'), "context='row', expected"),
        (dict(context='image'), "is for model.test_cfg.mode='slide', got"),
    ],
    ids=str,
)
def test_tools_say_it_before_they_start(options, said):
    path = str(ROOT / 'configs/mini/polynl_r18-d4_mini-cityscapes.py')
    options = {f'model.test_cfg.{key}': v for key, v in options.items()}
    with pytest.raises(StartError, match=said):
        read_config(path, options)
    read_config(path, {**options, 'model.test_cfg.context': None})


def test_a_key_that_is_not_heeded_is_an_error():
    class Own(EncoderDecoder):
        def slide_inference(self, inputs, batch_img_metas):
            return self.whole_inference(inputs, batch_img_metas)

    class Whole(EncoderDecoder):
        def inference(self, inputs, batch_img_metas):
            return self.whole_inference(inputs, batch_img_metas)

    with pytest.raises(ValueError, match="mode='slide', got 'whole'"):
        predict(build(), mode='whole', context='image')
    for kind in (Own, Whole, 'DepthEstimator'):
        model = build(type=kind)
        predict(model, **WINDOWS)
        with pytest.raises(TypeError, match="context='image'.* does not take"):
            predict(model, **WINDOWS, context='image')


def test_models_that_can_not():
    without = build(backbone=dict(type='Pointwise'))
    without.decode_head = MODELS.build(dict(PLAIN, type='FCNHead')).double()
    # What tests do not call does not count.
    without.auxiliary_head = MODELS.build(HEAD)
    with pytest.raises(ValueError, match='has no Poly-NL layer'):
        predict(without.eval(), **WINDOWS, context='image')
    norm = dict(type='GN', num_groups=1)
    model = build(decode_head=dict(HEAD, branch_norm_cfg=norm))
    with pytest.raises(ValueError, match='decode_head.poly_nl'):
        predict(model, **WINDOWS, context='image')
    model = build()
    model.auxiliary_head = MODELS.build(dict(HEAD, branch_norm_cfg=norm))
    predict(model.eval(), **WINDOWS, context='image')


def test_gaps_between_windows():
    with pytest.raises(
        ValueError,
        match=r'crop_size=\(16, 20\), stride=.*windows of 16 at steps of 17',
    ):
        predict(
            build(),
            mode='slide',
            crop_size=(16, 20),
            stride=(17, 20),
            context='image',
        )


def test_a_failing_window_is_named():
    model = build()
    before = predict(model, **WINDOWS, context='image')
    state = {path: dict(vars(m)) for path, m in model.named_modules()}
    times = []

    def fail(*args):
        times.append(1)
        if len(times) == 3:
            raise FloatingPointError('no number')

    handle = model.backbone.second.register_forward_hook(fail)
    said = r'window x 30\.\.50, y 0\.\.16: FloatingPointError: no number'
    with pytest.raises(WindowError, match=said):
        predict(model, **WINDOWS, context='image')
    handle.remove()
    assert module._heeded.get() is None
    assert state == {path: vars(m) for path, m in model.named_modules()}
    after = predict(model, **WINDOWS, context='image')
    for a, b in zip(before, after):
        assert torch.equal(a.seg_logits.data, b.seg_logits.data)
