"""Detectors that take a large picture tile by tile, with one gate for all.

::

    _base_ = 'mask-rcnn_r50-polynl-c4_fpn_1x_coco.py'
    model = dict(type='polynl_mm.Tiled', detector='MaskRCNN', tile=1024,
                 overlap=128)

Each tile goes through the whole detector, with its NMS. The Poly-NL layers
before the RoI heads share their gates over all tiles of the picture
(:mod:`polynl_mm.context`), so what is far away is seen. What was found is put
together by mmdet's NMS, per class. An object in the overlap is found whole by
one tile, and parts of it by others: parts are told by the border that cuts
them, and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
from mmcv.cnn import ContextBlock
from mmcv.ops import batched_nms
from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample
from mmdet.structures.mask import encode_mask_results
from mmengine import registry as root
from mmengine.structures import InstanceData
from pycocotools.mask import decode
from torch import Tensor

from polynl_mm.context import Window, Windows, grid, shared_context
from polynl_mm.layers import InContext
from polynl_mm.padding import pictures_in
from polynl_mm.registry import MODELS
from polynl_mm.samples import pictures_of_samples


@MODELS.register_module()
def Tiled(
    detector: str,
    tile: int,
    overlap: int,
    context: str | None = 'image',
    nms: dict | None = None,
    encode_masks: bool = False,
    budget: float | None = 2048,
    wait_on: str | None = None,
    **host,
) -> BaseDetector:
    """Build a detector of mmdet that predicts tile by tile.

    It is the detector itself, of a subclass of its class: keys, checkpoints
    and training are as they were, and inserted blocks, too, by
    ``detector='polynl_mm.Insert', into=...``.

    The tiles are cut from what the preprocessor gives, at the size to which
    the pipeline has brought the picture. Pictures of a batch are computed one
    after the other, each padded as if it were alone.

    - An object up to ``overlap`` pixels is found once. Of a larger one, parts
      may be found by several tiles; several scales of the picture
      (test-time augmentation) help.
    - ``max_per_img`` of the detector's ``test_cfg`` holds for each tile, and
      for the picture.
    - ``masks`` become those of the picture, and what was found then is on the
      CPU. Those of tiles wait as run lengths.
    - ``keypoints`` (n, ..., 2 or more; x and y first) move with the boxes,
      and any other field of ``pred_instances`` is kept as it is.

    Args:
        detector: Its type, as it would stand in ``type``.
        tile: Side of a tile in pixels; smaller pictures are one tile.
        overlap: Of neighbours, in pixels, below ``tile``. Like that, a
            multiple of the preprocessor's ``pad_size_divisor``, so that all
            tiles have the features' grid.
        context: ``'image'``, or None: each tile has gates of its own.
        nms: How tiles are merged, such as ``dict(type='nms',
            iou_threshold=0.5)``; by default as the ``test_cfg`` says.
            ``soft_nms`` lowers scores again.
        encode_masks: Give masks as a list of run lengths, as CocoMetric takes
            them too, not as bool (n, H, W): 64 MB each for 8000 by 8000
            pixels.
        budget: See :class:`polynl_mm.context.Windows`.
        wait_on: See there.
        **host: All keys of the detector.

    Raises:
        ValueError: An argument is out of range; it is no detector of mmdet;
            no ``nms`` is given by either; no layer shares a context.
    """
    model = root.MODELS.build(dict(host, type=detector))
    if not isinstance(model, BaseDetector):
        raise ValueError(
            f'detector={detector!r} is a {type(model).__name__}, not a '
            'detector of mmdet'
        )
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    for name, value, least in (('tile', tile, 1), ('overlap', overlap, 0)):
        if not isinstance(value, int) or value < least or value % divisor:
            raise ValueError(
                f'{name} must be {least} or more pixels, a whole multiple of '
                f'{divisor} (pad_size_divisor of data_preprocessor), got '
                f'{value!r}'
            )
    if overlap >= tile:
        raise ValueError(
            f'overlap must be less than tile={tile}, got {overlap}'
        )
    if context not in ('image', None):
        raise ValueError(f"context must be 'image' or None, got {context!r}")
    if context and not any(
        isinstance(module, (InContext, ContextBlock))
        for module in model.modules()
    ):
        raise ValueError(
            f'{type(model).__name__} has no Poly-NL layer and no '
            'ContextBlock: with context=None, each tile is on its own'
        )
    test_cfg = getattr(model, 'test_cfg', None) or {}
    test_cfg = test_cfg.get('rcnn') or test_cfg
    nms = nms or test_cfg.get('nms')
    if nms is None:
        raise ValueError(
            f'test_cfg of {type(model).__name__} has no nms, by which tiles '
            'could be merged: give nms=dict(...) beside tile'
        )
    model.tiling = Tiling(
        tile=tile,
        overlap=overlap,
        divisor=divisor,
        make_context=context and partial(Windows, budget, wait_on=wait_on),
        nms=nms,
        max_per_img=test_cfg.get('max_per_img', -1),
        encode_masks=encode_masks,
    )
    # At once, as a wrong budget is an error here.
    if context:
        model.tiling.make_context()
    model.__class__ = _subclass(type(model))
    return model


@dataclass(frozen=True)
class Tiling:
    """How a detector takes its tiles; see :func:`Tiled`."""

    tile: int
    overlap: int
    divisor: int
    make_context: partial | None
    nms: dict
    max_per_img: int
    encode_masks: bool

    def tiles_of(self, shape: tuple[int, int]) -> list[Window]:
        """Lay the tiles, over a picture of this height and width, padded."""
        height, width = (-(-n // self.divisor) * self.divisor for n in shape)
        stride = self.tile - self.overlap
        return grid((height, width), (self.tile,) * 2, (stride,) * 2)

    def merge(self, parts: list[InstanceData]) -> InstanceData:
        """Put together what the tiles of a picture have, in its pixels."""
        found = InstanceData.cat(parts)
        if len(parts) == 1 or not len(found):
            return found
        boxes, kept = batched_nms(
            found.bboxes, found.scores, found.labels, self.nms
        )
        found = found[kept]
        # Some kinds change them.
        found.scores = boxes[:, 4]
        return found[: self.max_per_img] if self.max_per_img > 0 else found


@cache
def _subclass(kind: type[BaseDetector]) -> type[BaseDetector]:
    return type(f'Tiled{kind.__name__}', (_Tiled, kind), {})


class _Tiled:
    """First base of a detector that predicts tile by tile.

    Attributes:
        tiling (Tiling): How.
    """

    def predict(
        self,
        batch_inputs: Tensor,
        batch_data_samples: list[DetDataSample],
        rescale: bool = True,
    ) -> list[DetDataSample]:
        """Detect; arguments and result as in the detector's own ``predict``.

        Raises:
            WindowError: It failed in a tile, which is named; without a
                context, what it raised.
            ValueError: The detector gives more than ``pred_instances``.
        """
        for image, sample in zip(batch_inputs, batch_data_samples):
            step = partial(self._predict_tile, image, sample, rescale)
            windows = self.tiling.tiles_of(sample.img_shape[:2])
            if self.tiling.make_context is None:
                parts = [step(window) for window in windows]
            else:
                with shared_context(self, self.tiling.make_context()) as run:
                    parts = run(step, windows)
            found = self.tiling.merge(parts)
            if 'masks' in found:
                shape = sample.ori_shape if rescale else sample.img_shape
                found = found.cpu()
                paste = partial(_paste, shape=shape[:2])
                # One by one, so that there are never many.
                found.masks = (
                    [run for m in found.masks for run in _encode(paste([m]))]
                    if self.tiling.encode_masks
                    else paste(found.masks)
                )
            sample.pred_instances = found
        return batch_data_samples

    def _predict_tile(self, image, sample, rescale, window):
        """Detect in a tile of ``image`` (C, H, W); pixels of the picture."""
        x1, y1, x2, y2 = window.box
        height, width = sample.img_shape[:2]
        scale = sample.scale_factor
        own = DetDataSample(metainfo=sample.metainfo)
        own.set_metainfo(
            dict(
                img_shape=(min(y2, height) - y1, min(x2, width) - x1),
                pad_shape=(y2 - y1, x2 - x1),
                batch_input_shape=(y2 - y1, x2 - x1),
                ori_shape=tuple(
                    min(round(end / s), size) - round(begin / s)
                    for begin, end, s, size in zip(
                        (y1, x1), (y2, x2), scale[::-1], sample.ori_shape
                    )
                ),
            )
        )
        tile = image[None, :, y1:y2, x1:x2]
        with pictures_in(pictures_of_samples(tile, [own])):
            (own,) = super().predict(tile, [own], rescale=rescale)
        if own.keys() != ['pred_instances']:
            raise ValueError(
                f'{type(self).__name__} gives {own.keys()}: only '
                'pred_instances of tiles can be merged'
            )
        found = own.pred_instances
        scale = found.bboxes.new_tensor(scale if rescale else (1, 1))
        corner = found.bboxes.new_tensor((x1, y1)) / scale
        found.bboxes = found.bboxes + corner.repeat(2)
        if 'keypoints' in found:
            points = found.keypoints.clone()
            points[..., :2] += corner
            found.keypoints = points
        if 'masks' in found:
            place = corner.round().int().tolist()
            found.masks = [(mask, place) for mask in _encode(found.masks)]
        return found[
            _is_whole(found.bboxes * scale.repeat(2), window, (height, width))
        ]


def _is_whole(boxes, window, shape):
    """Whether boxes (n, 4) are no part of what a neighbour sees whole.

    Such a part ends at a border within the picture, and its middle is beyond
    the core, as long as the whole is no longer than the overlap. A whole that
    lies there has no such border, and is kept: its neighbour may see its
    middle elsewhere.
    """
    whole = boxes.new_ones(len(boxes), dtype=torch.bool)
    for axis, length in enumerate(shape[::-1]):
        low, high = boxes[:, axis], boxes[:, axis + 2]
        begin, end = window.box[axis::2]
        core_begin, core_end = window.core[axis::2]
        middle = (low + high) / 2
        # So far from the border a box may end whose object is cut there.
        slack = 0.1 * (high - low) + 1
        if begin > 0:
            whole &= (low - begin > slack) | (middle >= core_begin)
        if end < length:
            whole &= (end - high > slack) | (middle <= core_end)
    return whole


def _encode(masks):
    return encode_mask_results(masks.cpu().numpy())


def _paste(masks, shape):
    """Give masks (n, H, W) from run lengths and their places in there."""
    pasted = torch.zeros(len(masks), *shape, dtype=torch.bool)
    for target, (mask, (x, y)) in zip(pasted, masks):
        target = target[y:, x:]
        mask = torch.from_numpy(decode(mask)).bool()
        height, width = target.shape
        mask = mask[:height, :width]
        target[: mask.shape[0], : mask.shape[1]] = mask
    return pasted
