"""The crop of Inception, and what a classifier is given."""

import numpy as np
import pytest
import torch

pytest.importorskip('mmcv')

from mmengine.registry import TRANSFORMS  # noqa: E402


def build(name, **kwargs):
    return TRANSFORMS.build(dict(type=f'polynl_mm.{name}', **kwargs))


def test_parts_are_in_the_picture_and_of_the_shapes_allowed():
    np.random.seed(0)
    crop = build('RandomResizedCrop', size=8, area=(0.08, 0.6))
    shares, shapes, corners = [], [], set()
    for _ in range(2000):
        top, left, h, w = crop.window(300, 400)
        assert 0 <= top <= 300 - h and 0 <= left <= 400 - w
        shares.append(h * w / (300 * 400))
        shapes.append(w / h)
        corners.add((top, left))
    assert 0.079 < min(shares) < 0.09 and 0.59 < max(shares) < 0.61
    # Even in the area, and in the logarithm around 1.
    assert 0.33 < np.mean(shares) < 0.35
    assert 0.74 < min(shapes) < 0.76 and 1.32 < max(shapes) < 1.35
    assert abs(np.mean(np.log(shapes))) < 0.02
    assert len(corners) > 1500


@pytest.mark.parametrize(
    'shape, window',
    [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))],
)
def test_a_part_of_the_middle_where_none_fits(shape, window):
    crop = build('RandomResizedCrop', size=8, area=(1, 1))
    assert crop.window(*shape) == window


def test_the_part_is_resized():
    image = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)
    crop = build('RandomResizedCrop', size=7, area=(0.5, 0.5))
    found = crop(dict(img=image))
    assert found['img'].shape == (7, 7, 3) and found['img_shape'] == (7, 7)
    same = build('RandomResizedCrop', size=30, area=(1, 1), aspect=(1, 1))
    np.testing.assert_array_equal(
        same(dict(img=image[:30]))['img'], image[:30]
    )


@pytest.mark.parametrize(
    'wrong', [dict(area=(0, 1)), dict(area=(0.5, 1.1)), dict(aspect=(2, 1))]
)
def test_ranges_that_are_none(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f'{name} must be two numbers above'):
        build('RandomResizedCrop', size=8, **wrong)


def test_packed():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    data = dict(img=image, gt_label=2, img_path='a.png', ori_shape=(2, 4))
    packed = build('PackClsInputs')(data)
    assert packed['inputs'].shape == (3, 2, 4)
    assert torch.equal(packed['inputs'][1, 0], torch.tensor([1, 4, 7, 10]))
    sample = packed['data_samples']
    assert sample.gt_label == 2 and sample.img_path == 'a.png'
    grey = build('PackClsInputs')(dict(img=image[..., 0]))
    assert grey['inputs'].shape == (1, 2, 4)
    assert 'gt_label' not in grey['data_samples']
