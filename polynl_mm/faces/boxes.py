"""Boxes of faces that carry their landmarks through every transform."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.structures.bbox import (
    BaseBoxes,
    HorizontalBoxes,
    register_box,
    register_box_converter,
)
from torch import Tensor

from .landmarks import FLIP_INDICES, NUM_LANDMARKS

_POINTS = 2 * NUM_LANDMARKS


@register_box('face')
class FaceBoxes(BaseBoxes):
    """Boxes with five landmarks each, as a box type of mmdet.

    Every transform of mmdet that moves ``gt_bboxes`` does it by the methods
    of a box type, so landmarks that are part of one move with any of them,
    in a mosaic and out of a crop. A landmark is moved as the host moves a box
    without a size, and never clipped; left and right change their names where
    a flip makes them change sides, see :mod:`polynl_mm.faces.landmarks`.

    A row of ``tensor`` (n, 19) is x1, y1, x2, y2, five times x, y, and five
    flags. Where other code insists on horizontal boxes, it refuses this type;
    ``convert_to('hbox')`` gives them, without landmarks.

    Args:
        data (Tensor): (n, 19), see :meth:`join`.
        *args: See :class:`mmdet.structures.bbox.BaseBoxes`, and so for
            ``**kwargs``.
    """

    box_dim = 4 + 3 * NUM_LANDMARKS

    @classmethod
    def join(cls, boxes: Tensor, keypoints: Tensor) -> FaceBoxes:
        """Put boxes (n, 4), x1 y1 x2 y2, and keypoints (n, 5, 3) together."""
        points, flags = keypoints.split((2, 1), -1)
        parts = (boxes, points.flatten(-2), flags.flatten(-2))
        return cls(torch.cat(parts, -1), clone=False)

    @property
    def keypoints(self) -> Tensor:
        """(n, 5, 3): x and y in pixels and the flag."""
        _, points, flags = self._parts()
        points = points.reshape(*flags.shape, 2)
        return torch.cat([points, flags[..., None]], -1)

    def _parts(self) -> tuple[Tensor, ...]:
        return self.tensor.split((4, _POINTS, NUM_LANDMARKS), -1)

    def _move(self, how: str, *args) -> None:
        boxes, points, flags = self._parts()
        boxes = HorizontalBoxes(boxes)
        as_boxes = HorizontalBoxes(points.reshape(-1, 2).repeat(1, 2))
        for each in (boxes, as_boxes):
            getattr(each, how)(*args)
        points = as_boxes.tensor[:, :2].reshape(points.shape)
        self.tensor = torch.cat([boxes.tensor, points, flags], -1)

    def _change_box(self, how: str, *args) -> None:
        """Change boxes in a picture that stays, and so do the landmarks."""
        boxes = HorizontalBoxes(self.tensor[..., :4])
        getattr(boxes, how)(*args)
        self.tensor = torch.cat([boxes.tensor, self.tensor[..., 4:]], -1)

    def flip_(
        self, img_shape: tuple[int, int], direction: str = 'horizontal'
    ) -> None:
        """Mirror them in a picture of (height, width)."""
        self._move('flip_', img_shape, direction)
        if direction != 'vertical':
            boxes = self.tensor[..., :4]
            points = self.keypoints[..., FLIP_INDICES, :]
            self.tensor = self.join(boxes, points).tensor

    def translate_(self, distances: Sequence[float]) -> None:
        """Move them by (x, y)."""
        self._move('translate_', distances)

    def rescale_(self, scale_factor: Sequence[float]) -> None:
        """Scale them with the picture, by factors of (width, height)."""
        self._move('rescale_', scale_factor)

    def rotate_(self, center: tuple[float, float], angle: float) -> None:
        """Rotate them around a point by degrees."""
        self._move('rotate_', center, angle)

    def project_(self, homography_matrix) -> None:
        """Move them by a (3, 3) matrix."""
        self._move('project_', homography_matrix)

    def clip_(self, img_shape: tuple[int, int]) -> None:
        """Clip the boxes to a picture of (height, width)."""
        self._change_box('clip_', img_shape)

    def resize_(self, scale_factor: tuple[float, float]) -> None:
        """Scale width and height of each box around its centre."""
        self._change_box('resize_', scale_factor)

    @property
    def _hbox(self) -> HorizontalBoxes:
        return self.convert_to('hbox')

    @property
    def centers(self) -> Tensor:
        """(n, 2), of the boxes."""
        return self._hbox.centers

    @property
    def areas(self) -> Tensor:
        """(n,), of the boxes."""
        return self._hbox.areas

    @property
    def widths(self) -> Tensor:
        """(n,), of the boxes."""
        return self._hbox.widths

    @property
    def heights(self) -> Tensor:
        """(n,), of the boxes."""
        return self._hbox.heights

    def is_inside(self, *args, **kwargs) -> Tensor:
        """Whether the boxes are inside a picture, as mmdet sees it."""
        return self._hbox.is_inside(*args, **kwargs)

    def find_inside_points(self, *args, **kwargs) -> Tensor:
        """Whether points are inside the boxes, as mmdet sees it."""
        return self._hbox.find_inside_points(*args, **kwargs)

    overlaps = staticmethod(HorizontalBoxes.overlaps)

    @staticmethod
    def from_instance_masks(masks) -> FaceBoxes:
        """Refuse: masks tell boxes and no landmarks.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            'FaceBoxes can not be made of masks, which do not tell where '
            'their landmarks are'
        )


@register_box_converter(FaceBoxes, HorizontalBoxes)
def _without_landmarks(rows: Tensor) -> Tensor:
    return rows[..., :4]
