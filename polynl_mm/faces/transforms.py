"""Transforms of pictures with boxes and five landmarks per face.

They carry mmdet's names; what they add is said at each. Landmarks travel
inside ``gt_bboxes``, see :class:`polynl_mm.faces.boxes.FaceBoxes`, so that
any transform of mmdet stands between :class:`LoadAnnotations` and
:class:`PackDetInputs`. Coordinates are those of boxes: pixel i covers
[i, i + 1). A landmark is absent where its flag says so, nowhere else:
transforms move absent ones, too, to places without a meaning.

mmcv's wrappers build these by name: ``RandomResize`` and
``RandomChoiceResize`` with ``resize_type='polynl_mm.Resize'``, and
``RandomApply`` applies a distortion in a share of the pictures only.
"""

from __future__ import annotations

from collections.abc import Sequence

import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmdet.datasets import transforms as host
from mmdet.structures.bbox import autocast_box_type

from polynl_mm.registry import TRANSFORMS

from .boxes import FaceBoxes
from .landmarks import NUM_LANDMARKS

# One row for each face.
_PER_FACE = ('gt_bboxes', 'gt_bboxes_labels', 'gt_ignore_flags')


@TRANSFORMS.register_module()
class LoadAnnotations(host.LoadAnnotations):
    """mmdet's, which ignores ``with_keypoints``; here it has a meaning.

    Args:
        *args: See :class:`mmdet.datasets.transforms.LoadAnnotations`, and so
            for ``**kwargs``; ``with_keypoints=True`` loads the landmarks into
            ``gt_bboxes``, which are :class:`~.boxes.FaceBoxes` then.

    Raises:
        ValueError: Landmarks are wanted and boxes are not, or a face has
            none, not even absent ones.
    """

    def __init__(self, *args, **kwargs) -> None:
        """Check the arguments."""
        super().__init__(*args, **kwargs)
        if self.with_keypoints and not (
            self.with_bbox and self.box_type == 'hbox'
        ):
            raise ValueError(
                'with_keypoints=True loads landmarks into boxes, expected '
                "with_bbox=True and box_type='hbox', got "
                f'with_bbox={self.with_bbox} and box_type={self.box_type!r}'
            )

    def transform(self, results: dict) -> dict:
        """Add ``gt_*``, for every face a row."""
        results = super().transform(results)
        if self.with_keypoints:
            self._load_kps(results)
        return results

    def _load_kps(self, results: dict) -> None:
        instances = results.get('instances', [])
        if not all('keypoints' in face for face in instances):
            raise ValueError(
                f'{results.get("img_path")}: with_keypoints=True expects '
                f'landmarks, give the data set a landmark_file'
            )
        keypoints = np.array(
            [face['keypoints'] for face in instances], np.float32
        )
        results['gt_bboxes'] = FaceBoxes.join(
            results['gt_bboxes'].tensor,
            torch.from_numpy(keypoints.reshape(-1, NUM_LANDMARKS, 3)),
        )


@TRANSFORMS.register_module()
class Resize(host.Resize):
    """mmdet's, with a limit.

    Args:
        *args: See :class:`mmdet.datasets.transforms.Resize`, and so for
            ``**kwargs``.
        max_side (int, optional): Most pixels that the longer side may get,
            whatever ``scale`` or ``scale_factor`` asks for, so that no
            picture exhausts the memory.

    Raises:
        ValueError: ``max_side`` is below 1.
    """

    def __init__(self, *args, max_side: int | None = None, **kwargs) -> None:
        """Check the argument."""
        super().__init__(*args, **kwargs)
        if max_side is not None and max_side < 1:
            raise ValueError(f'max_side must be at least 1, got {max_side}')
        self.max_side = max_side

    def _resize_img(self, results: dict) -> None:
        longer = max(results['scale'])
        if self.max_side is not None and longer > self.max_side:
            results['scale'] = tuple(
                max(round(side * self.max_side / longer), 1)
                for side in results['scale']
            )
        super()._resize_img(results)


@TRANSFORMS.register_module()
class RandomSquareCrop(BaseTransform):
    """Crop a random square of a size relative to the shorter side.

    A try places a square of side factor * min(H, W) at random: within the
    picture along an axis that is long enough, around the whole of it
    otherwise. The first try with a face to learn, one that is not ignored,
    is taken, and of the faces those whose box centre is strictly inside, the
    ignored ones by the same rule. Without a face to learn there is nothing
    to wait for and the first try is taken, so that this always ends.

    What the recipes use, in their own code:

    ==========  ======================================  ====================
    RetinaFace  crop_choice (0.3, 0.45, 0.6, 0.8, 1.0)  num_factors=1,
                                                        num_offsets=25
    TinaFace    the same                                num_factors=1,
                                                        bbox_clip_border=True
    SCRFD       (0.3, 0.45, 0.6, 0.8, 1.0, 1.2, 1.4,    pad_val=128 (its
                1.6, 1.8, 2.0)                          num_factors is
                                                        without an end)
    PyTorch     as RetinaFace                           num_factors=250,
    RetinaFace                                          num_offsets=1,
                                                        need_whole_box=True,
                                                        fallback='pad',
                                                        bbox_clip_border=True,
                                                        pad_val=(104, 117,
                                                        123)
    ==========  ======================================  ====================

    The picture, ``gt_bboxes``, ``gt_bboxes_labels`` and ``gt_ignore_flags``
    change, and ``img_shape`` and ``homography_matrix`` with them. Landmarks
    are moved and never clipped: they may lie outside.

    Args:
        crop_choice (Sequence[float], optional): Factors to choose from.
            RetinaFace's, if ``crop_ratio_range`` is not given either.
        crop_ratio_range (tuple[float, float], optional): Draw the factor
            uniformly from this range instead.
        num_factors (int): Factors to try, one after the other.
        num_offsets (int): Places to try for each factor.
        need_whole_box (bool): A try also needs a face to learn whose box is
            wholly inside.
        fallback (str): What is taken if no try succeeds: ``'last'``, the
            last one, with whatever is in it, or ``'pad'``, the whole picture
            in the upper left corner of a square.
        bbox_clip_border (bool): Clip boxes to the crop.
        pad_val (float or Sequence[float]): Pixels outside the picture, in
            the order of its channels.

    Raises:
        ValueError: On an argument out of range, and on masks, segmentation
            maps or instance ids, which it does not crop.
    """

    def __init__(
        self,
        crop_choice: Sequence[float] | None = None,
        crop_ratio_range: tuple[float, float] | None = None,
        num_factors: int = 40,
        num_offsets: int = 250,
        need_whole_box: bool = False,
        fallback: str = 'last',
        bbox_clip_border: bool = False,
        pad_val: float | Sequence[float] = 128,
    ) -> None:
        """Check the arguments."""
        if crop_choice is None and crop_ratio_range is None:
            crop_choice = (0.3, 0.45, 0.6, 0.8, 1.0)
        elif crop_choice is not None and crop_ratio_range is not None:
            raise ValueError(
                f'crop_choice or crop_ratio_range expected, got both, '
                f'{crop_choice} and {crop_ratio_range}'
            )
        factors = crop_ratio_range if crop_choice is None else crop_choice
        if not len(factors) or not all(factor > 0 for factor in factors):
            raise ValueError(f'factors must be above 0, got {factors}')
        if crop_ratio_range is not None and (
            len(factors) != 2 or factors[0] > factors[1]
        ):
            raise ValueError(
                f'crop_ratio_range must be (least, most), got {factors}'
            )
        for name, number in (
            ('num_factors', num_factors),
            ('num_offsets', num_offsets),
        ):
            if number < 1:
                raise ValueError(f'{name} must be at least 1, got {number}')
        if fallback not in ('last', 'pad'):
            raise ValueError(
                f"fallback must be 'last' or 'pad', got {fallback!r}"
            )
        self.crop_choice = crop_choice
        self.crop_ratio_range = crop_ratio_range
        self.num_factors = num_factors
        self.num_offsets = num_offsets
        self.need_whole_box = need_whole_box
        self.fallback = fallback
        self.bbox_clip_border = bbox_clip_border
        self.pad_val = pad_val

    @cache_randomness
    def _random_tries(self) -> tuple[np.ndarray, np.ndarray]:
        """Draw (F,) factors and (F, P, 2) places, x and y in [0, 1)."""
        if self.crop_choice is not None:
            factors = np.random.choice(self.crop_choice, self.num_factors)
        else:
            factors = np.random.uniform(
                *self.crop_ratio_range, self.num_factors
            )
        places = np.random.rand(self.num_factors, self.num_offsets, 2)
        return factors, places

    def _window(
        self, shape: tuple[int, int], boxes: np.ndarray
    ) -> tuple[int, int, int]:
        """Choose left, top and side for the boxes (n, 4) to learn."""
        sizes = np.array(shape[::-1])
        for factor, places in zip(*self._random_tries()):
            side = max(int(factor * sizes.min()), 1)
            # Negative where the square is the longer one.
            room = sizes - side
            offsets = np.sign(room) * np.floor(places * (abs(room) + 1))
            if not len(boxes):
                return (*offsets[0].astype(int), side)
            corners = offsets[:, None]
            good = _centred(boxes, corners, side).any(1)
            if self.need_whole_box:
                good &= _within(boxes, corners, side).any(1)
            if good.any():
                return (*offsets[good.argmax()].astype(int), side)
        if self.fallback == 'pad':
            return 0, 0, int(sizes.max())
        return (*offsets[-1].astype(int), side)

    @autocast_box_type()
    def transform(self, results: dict) -> dict:
        """Crop picture and boxes."""
        unknown = [
            key
            for key in ('gt_masks', 'gt_seg_map', 'gt_instances_ids')
            if results.get(key) is not None
        ]
        if unknown:
            raise ValueError(
                'RandomSquareCrop crops boxes and landmarks only, got '
                f'{unknown}'
            )
        image = results['img']
        bboxes = results.get('gt_bboxes')
        to_learn = np.zeros((0, 4), np.float32)
        if bboxes is not None:
            corners = bboxes.convert_to('hbox').numpy()
            to_learn = corners
            if results.get('gt_ignore_flags') is not None:
                to_learn = to_learn[results['gt_ignore_flags'] == 0]
        left, top, side = self._window(image.shape[:2], to_learn)
        results['img'] = _cut(image, left, top, side, self.pad_val)
        results['img_shape'] = results['img'].shape[:2]
        homography = np.eye(3, dtype=np.float32)
        homography[:2, 2] = -left, -top
        if results.get('homography_matrix') is not None:
            homography = homography @ results['homography_matrix']
        results['homography_matrix'] = homography
        if bboxes is None:
            return results

        keep = _centred(corners, np.array((left, top), np.float64), side)
        moved = bboxes.clone()
        moved.translate_([-left, -top])
        if self.bbox_clip_border:
            moved.clip_((side, side))
        results['gt_bboxes'] = moved
        for key in _PER_FACE:
            if results.get(key) is not None:
                results[key] = results[key][keep]
        return results

    def __repr__(self) -> str:
        """Name the arguments."""
        arguments = ', '.join(
            f'{name}={value!r}'
            for name, value in vars(self).items()
            if not name.startswith('_')
        )
        return f'{type(self).__name__}({arguments})'


def _centred(boxes: np.ndarray, corners: np.ndarray, side: int) -> np.ndarray:
    """Whether centres of boxes (n, 4) are in squares, (n,) or (P, n).

    ``corners`` are the upper left ones, (2,) or (P, 1, 2) float64.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((corners < centres) & (centres < corners + side)).all(-1)


def _within(boxes: np.ndarray, corners: np.ndarray, side: int) -> np.ndarray:
    """Whether the whole boxes are in the squares, see :func:`_centred`."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return ((corners <= low) & (high <= corners + side)).all(-1)


def _cut(image, left: int, top: int, side: int, pad_val) -> np.ndarray:
    """Square of an (H, W[, C]) picture, filled where it sticks out."""
    height, width = image.shape[:2]
    crop = np.empty((side, side, *image.shape[2:]), image.dtype)
    crop[...] = pad_val
    x1, x2 = max(left, 0), min(left + side, width)
    y1, y2 = max(top, 0), min(top + side, height)
    crop[y1 - top : y2 - top, x1 - left : x2 - left] = image[y1:y2, x1:x2]
    return crop


@TRANSFORMS.register_module()
class PhotoMetricDistortion(host.PhotoMetricDistortion):
    """mmdet's, clipped to [0, 255] after each step and without channel swap.

    mmdet's own leaves values out of range, which go on into the next step,
    and exchanges colour channels in half of the pictures; no recipe for
    faces does either. The PyTorch RetinaFace turns hues twice as far as
    mmdet's default, ``hue_delta=36`` here.

    Args:
        *args: See :class:`mmdet.datasets.transforms.PhotoMetricDistortion`,
            and so for ``**kwargs``.
    """

    def transform(self, results: dict) -> dict:
        """Distort ``img``, (H, W, 3) BGR, to float32 in [0, 255]."""
        (
            contrast_first,
            brightness,
            contrast,
            saturation,
            hue,
            _,
            brightness_value,
            contrast_value,
            saturation_value,
            hue_value,
            _,
        ) = self._random_flags()
        image = results['img'].astype(np.float32)
        if brightness:
            image = np.clip(image + brightness_value, 0, 255)
        if contrast and contrast_first:
            image = np.clip(image * contrast_value, 0, 255)
        if saturation or hue:
            # In [0, 360], [0, 1] and [0, 255].
            image = mmcv.bgr2hsv(image)
            if saturation:
                image[..., 1] = np.clip(image[..., 1] * saturation_value, 0, 1)
            if hue:
                image[..., 0] = (image[..., 0] + hue_value) % 360
            image = mmcv.hsv2bgr(image)
        if contrast and not contrast_first:
            image = image * contrast_value
        # The way to HSV and back leaves rounding errors.
        results['img'] = np.clip(image, 0, 255)
        return results


@TRANSFORMS.register_module()
class PackDetInputs(host.PackDetInputs):
    """mmdet's, and it packs the landmarks.

    ``gt_instances`` and ``ignored_instances`` get ``keypoints`` (n, 5, 2)
    float32, in pixels of the input, and ``keypoints_visible`` (n, 5) float32,
    1 for a landmark that is annotated, occluded or not, and 0 for one that is
    absent, whose position means nothing. The metainfo gets
    ``landmark_shape``, height and width of the picture that they belong to:
    where ``img_shape`` has become another, the picture was changed behind
    the pipeline, and they were not.
    """

    mapping_table = {
        **host.PackDetInputs.mapping_table,
        'gt_keypoints': 'keypoints',
        'gt_keypoints_visible': 'keypoints_visible',
    }

    def transform(self, results: dict) -> dict:
        """Give ``inputs`` and ``data_samples``."""
        boxes = results.get('gt_bboxes')
        if not isinstance(boxes, FaceBoxes):
            return super().transform(results)
        points, flags = boxes.keypoints.split((2, 1), -1)
        packed = super().transform(
            {
                **results,
                'gt_bboxes': boxes.convert_to('hbox'),
                'gt_keypoints': points,
                'gt_keypoints_visible': (flags.squeeze(-1) > 0).float(),
            }
        )
        packed['data_samples'].set_metainfo(
            dict(landmark_shape=results['img_shape'])
        )
        return packed
