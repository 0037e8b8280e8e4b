"""Detection tile by tile: one gate, every object once and in its place."""

from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import calibrate, layers_of, randomize
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from pycocotools.mask import decode
from torch import nn

from polynl_mm.context import WindowError, Windows
from polynl_mm.detection.tiles import Tiled
from polynl_mm.fusion import fuse_poly_nl
from polynl_mm.layers import PolyNL2d

ROOT = Path(__file__).parents[2]
MASK_RCNN = 'mini/mask-rcnn_r50-polynl_mini-coco.py'
RETINAFACE = 'mini/retinaface_r50-polynl_mini-wider.py'
NMS = dict(type='nms', iou_threshold=0.5)

pytestmark = pytest.mark.usefixtures('quiet_and_quick')


class Islands(BaseDetector):
    """Finds what is connected and above 0, without a mistake.

    Its class is the value less 1, its landmarks lie on the diagonal. No
    convolution of it sees beyond a patch of 8 by 8.
    """

    def __init__(self, layers=2, test_cfg=None, **kwargs):
        super().__init__(**kwargs)
        self.test_cfg = test_cfg
        torch.manual_seed(1)
        self.embed = nn.Conv2d(3, 5, 8, stride=8)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(PolyNL2d(5, beta_init=0.4), nn.Conv2d(5, 5, 1))
                for _ in range(layers)
            )
        )

    def extract_feat(self, batch_inputs):
        return self.layers(self.embed(batch_inputs))

    def predict(self, batch_inputs, batch_data_samples, rescale=True):
        self.extract_feat(batch_inputs)
        found = [
            self._find(image[0].numpy(), sample, rescale)
            for image, sample in zip(batch_inputs, batch_data_samples)
        ]
        return self.add_pred_to_datasample(batch_data_samples, found)

    def _find(self, image, sample, rescale):
        image = np.ascontiguousarray(image[: sample.img_shape[0]])
        if (image == 99).any():
            raise ZeroDivisionError('an island too hot')
        count, islands, stats, _ = cv2.connectedComponentsWithStats(
            (image > 0).astype(np.uint8)
        )
        boxes = torch.from_numpy(stats[1:, :4]).float().reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        values = [image[islands == k].max() for k in range(1, count)]
        masks = np.stack([islands == k for k in range(count)])[1:]
        if rescale:
            boxes = boxes / boxes.new_tensor(sample.scale_factor).repeat(2)
            size = sample.ori_shape[::-1]
            masks = [cv2.resize(m.astype(np.uint8), size) for m in masks]
            masks = np.stack([np.zeros(size[::-1]), *masks])[1:]
        points = torch.linspace(0, 1, 5)[:, None]
        return InstanceData(
            bboxes=boxes,
            labels=torch.tensor(values).long() - 1,
            # Parts are more certain than the whole.
            scores=1 / (1 + (boxes[:, 2:] - boxes[:, :2]).sum(1)),
            masks=torch.from_numpy(masks).bool(),
            keypoints=boxes[:, None, :2].lerp(boxes[:, None, 2:], points),
        )

    def loss(self, *args):
        raise NotImplementedError

    _forward = loss


def islands(tile=64, overlap=32, **kwargs):
    kwargs = dict(nms=NMS, context=None) | kwargs
    return Tiled(Islands, tile, overlap, **kwargs).eval()


def sample(height, width, scale=1.0):
    return DetDataSample(
        metainfo=dict(
            img_path='name.jpg',
            img_shape=(height, width),
            ori_shape=(round(height / scale), round(width / scale)),
            scale_factor=(scale, scale),
        )
    )


def picture(shape, *boxes):
    """(3, H, W) with islands x1, y1, x2, y2 of class 0, or given as fifth."""
    image = torch.zeros(3, *shape)
    for x1, y1, x2, y2, *label in boxes:
        image[:, y1:y2, x1:x2] = 1 + sum(label)
    return image


@torch.no_grad()
def detect(model, *images, scale=1.0, rescale=True):
    """What is found in pictures, padded to one size as a batch."""
    height, width = (max(image.shape[k] for image in images) for k in (1, 2))
    inputs = torch.zeros(len(images), 3, height, width)
    for target, image in zip(inputs, images):
        target[:, : image.shape[1], : image.shape[2]] = image
    samples = [sample(*image.shape[1:], scale) for image in images]
    got = model.predict(inputs, samples, rescale)
    assert all(a is b for a, b in zip(got, samples))
    return [each.pred_instances for each in got]


def boxes_of(found):
    return sorted(map(tuple, found.bboxes.tolist()))


def trained(config, **changes):
    """A model of ours, as if it were trained, that finds something."""
    register_all_modules()
    cfg = Config.fromfile(ROOT / 'configs' / config).model
    test_cfg = cfg.test_cfg.get('rcnn') or cfg.test_cfg
    test_cfg.update(score_thr=0.0, max_per_img=12)
    if 'rpn' in cfg.test_cfg:
        cfg.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
    test_cfg.nms_pre = 50
    torch.manual_seed(0)
    model = MODELS.build({**cfg, **changes})
    model.init_weights()
    randomize(model).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 96, 128, generator=generator)
    calibrate(nn.Sequential(model.backbone, model.neck), x)
    return model


# ------------------------------------------------------------- equal to host


@pytest.mark.parametrize(
    'config, detector',
    [(MASK_RCNN, 'MaskRCNN'), (RETINAFACE, 'SingleStageDetector')],
)
@pytest.mark.parametrize('context', ['image', None])
@torch.no_grad()
def test_one_tile_is_the_host(config, detector, context):
    host = trained(config)
    tiled = trained(
        config,
        type='polynl_mm.Tiled',
        detector=detector,
        tile=128,
        overlap=32,
        context=context,
    )
    assert isinstance(tiled, type(host))
    assert tiled.state_dict().keys() == host.state_dict().keys()
    generator = torch.Generator().manual_seed(1)
    # Padded to multiples of 32 by the preprocessor.
    image = torch.randn(3, 96, 128, generator=generator)
    # As EMA, fusing and DDP have it.
    for model, rescale in ((tiled, True), (deepcopy(tiled), False)):
        want, got = (
            each.predict(image[None], [sample(90, 128, 1.25)], rescale)
            for each in (host, model)
        )
        want, got = want[0].pred_instances, got[0].pred_instances
        assert len(want) > 6 and {*want.keys()} == {*got.keys()}
        for key, value in want.items():
            assert torch.equal(got[key], value), key


# ------------------------------------------------------------------- context


def features(model, image):
    """Of every Poly-NL layer, in the order in which they are computed."""
    seen = []
    handles = [
        layer.register_forward_hook(lambda *args: seen.append(args[-1]))
        for layer in layers_of(model).values()
    ]
    detect(model, image)
    for handle in handles:
        handle.remove()
    return seen


def test_tiles_have_the_features_of_the_whole():
    image = torch.randn(3, 96, 128, generator=torch.Generator().manual_seed(0))
    model = islands(context='image')
    windows = model.tiling.tiles_of((96, 128))
    assert len(windows) == 6

    def worst(got, of_layer):
        """Largest error, over all tiles of a layer."""
        errors = []
        for window, part in zip(windows, got[6 * of_layer :]):
            x1, y1, x2, y2 = (side // 8 for side in window.box)
            whole = want[of_layer][:, :, y1:y2, x1:x2]
            errors.append((part - whole).abs().max().item())
        return max(errors)

    want = features(islands(tile=128, context=None), image)
    assert len(want) == 2
    shared = features(model, image)
    assert len(shared) == 12
    assert worst(shared, 0) < 1e-6 and worst(shared, 1) < 1e-6
    own = features(islands(), image)
    # Those march one after the other.
    assert worst(own[::2] + own[1::2], 1) > 1e-3
    # And so it is where nothing is held.
    none_held = islands(context='image', budget=0)
    assert worst(features(none_held, image)[-12:][::2], 0) < 1e-6


POLY = dict(type='polynl_mm.PolyNL2d')
IN_BACKBONE = [f'backbone.layer3.{k}.poly_nl' for k in range(6)]


@pytest.mark.parametrize(
    'config, host, after, inserted, shared',
    [
        (MASK_RCNN, 'MaskRCNN', 'neck.fpn_convs.*', 4, 4),
        (RETINAFACE, 'SingleStageDetector', 'neck.0.fpn_convs.*', 3, 3),
        # What sees one RoI at a time is not of a tile.
        (MASK_RCNN, 'MaskRCNN', 'roi_head.bbox_roi_extractor', 1, 0),
    ],
)
def test_layers_share_wherever_they_are(
    config, host, after, inserted, shared, monkeypatch
):
    gates = {}
    pool = Windows.pool

    def record(self, layer, *args, **kwargs):
        mean = pool(self, layer, *args, **kwargs)
        gates.setdefault(self.layers[layer], []).append(mean)
        return mean

    monkeypatch.setattr(Windows, 'pool', record)
    channels = 32 if config == MASK_RCNN else 48
    model = trained(
        config,
        type='polynl_mm.Tiled',
        detector='polynl_mm.Insert',
        into=host,
        blocks=[dict(after=after, cfg=dict(POLY, in_channels=channels))],
        tile=64,
        overlap=32,
    )
    layers = layers_of(model)
    if shared == inserted:
        # As test.py --fuse does.
        model, report = fuse_poly_nl(deepcopy(model))
        assert {*IN_BACKBONE} <= {*report.fused}
    (found,) = detect(model, torch.randn(3, 96, 128))
    assert len(found) == 12
    assert len(layers) == 6 + inserted
    before_rois = [path for path in layers if 'roi_head' not in path]
    assert sorted(gates) == sorted(before_rois)
    assert len(gates) == 6 + shared and gates.keys() >= {*IN_BACKBONE}
    for values in gates.values():
        assert len(values) == 6
        assert all(torch.equal(value, values[0]) for value in values)


def test_model_is_left_as_it_was():
    model = islands(context='image')
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    detect(model, picture((64, 96), (10, 10, 30, 20)))
    hot = picture((64, 96), (70, 10, 90, 20, 98))
    with pytest.raises(
        WindowError, match=r'x 32\.\.96, y 0\.\.64: ZeroDivisionError: an isl'
    ):
        detect(model, hot)
    assert before == {n: set(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(ZeroDivisionError):
        detect(islands(), hot)


# ------------------------------------------------------------ what was found


@pytest.mark.parametrize('context', ['image', None])
@pytest.mark.parametrize('scale', [1.0, 2.0, 0.5])
def test_everything_once_and_in_its_place(context, scale):
    """In the middle, across one border, across two, as large as can be."""
    image = picture(
        (128, 160),
        (3, 4, 10, 12),
        (20, 40, 52, 44, 1),
        (30, 60, 62, 92),
        (70, 20, 102, 36, 2),
        (60, 2, 68, 10),
        (90, 88, 122, 120, 1),
        (150, 118, 160, 128),
        (128, 60, 160, 80),
    )
    whole = islands(tile=256)
    tiled = islands(context=context)
    assert len(tiled.tiling.tiles_of((128, 160))) == 12
    (want,), (got,) = (detect(m, image, scale=scale) for m in (whole, tiled))
    assert len(want) == 8 and {*want.keys()} == {*got.keys()}
    order = [
        sorted(range(8), key=lambda k, f=f: f.bboxes[k].tolist())
        for f in (want, got)
    ]
    want, got = (f[torch.tensor(o)] for f, o in zip((want, got), order))
    for key in ('bboxes', 'labels', 'scores', 'keypoints', 'masks'):
        assert torch.equal(got[key], want[key]), key
    assert got.masks.shape == (8, round(128 / scale), round(160 / scale))


def test_pixels_of_the_network():
    image = picture((64, 96), (30, 4, 40, 12), (70, 30, 90, 50))
    (found,) = detect(islands(), image, scale=2.0, rescale=False)
    assert boxes_of(found) == [(30, 4, 40, 12), (70, 30, 90, 50)]
    assert found.masks.shape == (2, 64, 96)


def test_pictures_of_a_batch():
    """Each as if it were alone, whatever it was padded to."""
    model = islands(context='image')
    images = [
        picture((80, 128), (100, 60, 120, 80)),
        picture((128, 72), (40, 100, 72, 128), (0, 0, 5, 5)),
        picture((40, 40), (30, 30, 40, 40)),
    ]
    together = detect(model, *images)
    for image, found in zip(images, together):
        (alone,) = detect(model, image)
        assert boxes_of(found) == boxes_of(alone)
    assert [len(found) for found in together] == [1, 2, 1]
    assert boxes_of(together[0]) == [(100, 60, 120, 80)]


def test_parts_are_dropped_though_they_score_higher():
    """NMS alone would keep them: they overlap with the whole too little."""
    image = picture((64, 160), (20, 10, 48, 40))
    model = islands()
    (found,) = detect(model, image)
    assert boxes_of(found) == [(20, 10, 48, 40)]


class Rough(Islands):
    """Sees boxes a pixel too far outwards in its tile, or inwards."""

    def __init__(self, outwards, **kwargs):
        super().__init__(**kwargs)
        self.outwards = outwards

    def _find(self, image, sample, rescale):
        found = super()._find(image, sample, rescale)
        middles = found.bboxes.unflatten(1, (2, 2)).mean(1)
        centre = middles.new_tensor(image.shape[::-1]) / 2
        found.bboxes += self.outwards * (middles - centre).sign().repeat(1, 2)
        return found


@pytest.mark.parametrize('outwards', [1, -1])
def test_boxes_that_are_not_quite_right(outwards):
    """Outwards: each of two tiles sees the middle on the other one's side.

    Inwards: what is cut seems to end before the border that cuts it.
    """
    model = Tiled(
        Rough, 64, 32, context=None, nms=NMS, outwards=outwards
    ).eval()
    for x in range(0, 77, 2):
        (found,) = detect(model, picture((64, 96), (x, 10, x + 20, 40)))
        assert len(found) == 1
        assert (
            found.bboxes - torch.tensor([x, 10, x + 20, 40])
        ).abs().max() < 2


def test_masks_as_run_lengths():
    image = picture((64, 96), (30, 4, 40, 12), (70, 30, 90, 50))
    (want,), (found,) = (
        detect(islands(encode_masks=each), image, scale=2.0)
        for each in (False, True)
    )
    for mask, runs in zip(want.masks, found.masks):
        assert np.array_equal(decode(runs), mask.numpy())
    assert len(found.masks) == 2
    empty = detect(islands(encode_masks=True), 0 * image)[0]
    assert empty.masks == []


def test_larger_than_the_overlap_comes_in_parts():
    image = picture((64, 160), (10, 10, 150, 40))
    (found,) = detect(islands(), image)
    assert len(found) > 1
    covered = found.masks.any(0)
    assert torch.equal(covered, image[0] > 0)


def test_overlapping_of_several_classes_and_the_most_of_a_picture():
    parts = [
        InstanceData(
            bboxes=torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]]) + shift,
            labels=torch.tensor(labels),
            scores=torch.tensor(scores),
        )
        for labels, scores, shift in (
            ([0, 1], [0.5, 0.6], 0),
            ([0, 0], [0.7, 0.8], 0),
            ([0, 0], [0.9, 0.1], 90),
        )
    ]
    tiling = islands().tiling
    merged = tiling.merge(parts)
    assert merged.scores.tolist() == pytest.approx([0.9, 0.8, 0.6])
    assert merged.labels.tolist() == [0, 0, 1]
    few = islands(test_cfg=dict(max_per_img=2, nms=NMS), nms=None).tiling
    assert few.merge(parts).scores.tolist() == pytest.approx([0.9, 0.8])
    # One that lowers scores instead.
    soft = islands(nms=dict(type='soft_nms', iou_threshold=0.3)).tiling
    found = soft.merge(parts)
    want = [0.9, 0.8, 0.6, 0.07, 0.01]
    assert found.scores.tolist() == pytest.approx(want, abs=0.006)


def test_nothing():
    image = torch.zeros(3, 64, 160)
    (found,) = detect(islands(context='image'), image, scale=2.0)
    assert len(found) == 0 and found.bboxes.shape == (0, 4)
    assert found.masks.shape == (0, 32, 80)
    assert found.keypoints.shape == (0, 5, 2)
    # Some tiles are empty.
    image[:, 10:20, 140:150] = 1
    (found,) = detect(islands(context='image'), image)
    assert boxes_of(found) == [(140, 10, 150, 20)]


def test_rois_without_any_box():
    model = trained(
        MASK_RCNN,
        type='polynl_mm.Tiled',
        detector='MaskRCNN',
        tile=64,
        overlap=32,
    )
    model.roi_head.test_cfg.score_thr = 2.0
    (found,) = detect(model, torch.randn(3, 96, 128))
    assert found.masks.shape == (0, 96, 128)


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    'changes, said',
    [
        (dict(overlap=64), 'overlap must be less than tile=64, got 64'),
        (dict(overlap=-8), 'overlap must be 0 or more'),
        (dict(overlap=8.0), 'whole multiple of 1 .*, got 8.0'),
        (dict(tile=0), 'tile must be 1 or more'),
        (dict(tile='64'), "got '64'"),
        (dict(context='batch'), "context must be 'image' or None, got 'batch"),
        (dict(nms=None), 'test_cfg of Islands has no nms'),
        (dict(budget=-1, context='image'), 'budget must be 0 or more MiB'),
        (dict(layers=0, context='image'), 'Islands has no Poly-NL .*None'),
        (dict(detector=nn.Identity), 'a Identity, not a detector of mmdet'),
        (
            dict(
                tile=48,
                data_preprocessor=dict(
                    type='DetDataPreprocessor', pad_size_divisor=32
                ),
            ),
            r'tile must .* multiple of 32 \(pad_size_divisor .*got 48',
        ),
    ],
)
def test_bad_argument(changes, said):
    register_all_modules()
    arguments = dict(
        detector=Islands, tile=64, overlap=32, context=None, nms=NMS
    )
    arguments.update(changes)
    if arguments['detector'] is nn.Identity:
        arguments.pop('nms')
    with pytest.raises(ValueError, match=said):
        Tiled(**arguments)


def test_no_layer_but_plain_tiles():
    (found,) = detect(islands(layers=0), picture((64, 96), (30, 4, 40, 12)))
    assert boxes_of(found) == [(30, 4, 40, 12)]


def test_more_than_instances():
    class Both(Islands):
        def predict(self, batch_inputs, batch_data_samples, rescale=True):
            super().predict(batch_inputs, batch_data_samples, rescale)
            batch_data_samples[0].pred_sem_seg = PixelData()
            return batch_data_samples

    model = Tiled(Both, 64, 32, context=None, nms=NMS).eval()
    with pytest.raises(ValueError, match='pred_sem_seg'):
        detect(model, torch.zeros(3, 64, 64))
