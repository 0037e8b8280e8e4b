"""What mmcv lacks of the transforms for recognition."""

from __future__ import annotations

import math

import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmengine.structures import BaseDataElement

from polynl_mm.registry import TRANSFORMS


@TRANSFORMS.register_module()
class RandomResizedCrop(BaseTransform):
    """Take a random part of the picture and bring it to one size.

    Its share of the area is drawn evenly, the logarithm of its width by its
    height, too; where ten draws do not fit into the picture, the largest
    part in the middle whose shape is allowed is taken. That is the crop of
    the Inception networks, Szegedy et al., CVPR 2015, as torchvision's
    ``RandomResizedCrop`` draws it.

    Args:
        size (int): Side of the result in pixels.
        area (tuple[float, float]): Least and largest share of the area.
        aspect (tuple[float, float]): Least and largest width by height.
        interpolation (str): As of :func:`mmcv.imresize`.

    Raises:
        ValueError: A range is not one.
    """

    def __init__(
        self,
        size: int,
        area: tuple[float, float] = (0.08, 1.0),
        aspect: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = 'bilinear',
    ) -> None:
        """Check the ranges."""
        for name, (least, most), end in (
            ('area', area, 1),
            ('aspect', aspect, math.inf),
        ):
            if not 0 < least <= most <= end:
                raise ValueError(
                    f'{name} must be two numbers above 0, the second not '
                    f'below the first nor above {end}, got {(least, most)}'
                )
        self.size = size
        self.area = area
        self.aspect = aspect
        self.interpolation = interpolation

    @cache_randomness
    def window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw top, left, height and width of the part."""
        for _ in range(10):
            area = height * width * np.random.uniform(*self.area)
            aspect = math.exp(np.random.uniform(*np.log(self.aspect)))
            w = round(math.sqrt(area * aspect))
            h = round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top = np.random.randint(height - h + 1)
                return top, np.random.randint(width - w + 1), h, w
        w = min(width, max(1, round(height * self.aspect[1])))
        h = min(height, max(1, round(width / self.aspect[0])))
        return (height - h) // 2, (width - w) // 2, h, w

    def transform(self, results: dict) -> dict:
        """Replace ``img`` and its ``img_shape``."""
        top, left, h, w = self.window(*results['img'].shape[:2])
        part = results['img'][top : top + h, left : left + w]
        results['img'] = mmcv.imresize(
            part, (self.size, self.size), interpolation=self.interpolation
        )
        results['img_shape'] = results['img'].shape[:2]
        return results


@TRANSFORMS.register_module()
class PackClsInputs(BaseTransform):
    """Give a picture and its class as a classifier takes them.

    The result has ``inputs``, (C, H, W) as the picture was, and
    ``data_samples``, a :class:`mmengine.structures.BaseDataElement` with
    ``gt_label``, an int, if the data has it.

    Args:
        meta_keys (tuple[str]): What else of the data, if there, comes into
            the metainfo of the sample.
    """

    def __init__(
        self, meta_keys: tuple[str, ...] = ('img_path', 'ori_shape')
    ) -> None:
        """Keep the names."""
        self.meta_keys = meta_keys

    def transform(self, results: dict) -> dict:
        """Pack it."""
        image = np.atleast_3d(results['img']).transpose(2, 0, 1)
        sample = BaseDataElement(
            metainfo={k: results[k] for k in self.meta_keys if k in results}
        )
        if 'gt_label' in results:
            sample.gt_label = results['gt_label']
        return dict(
            inputs=torch.from_numpy(np.ascontiguousarray(image)),
            data_samples=sample,
        )
