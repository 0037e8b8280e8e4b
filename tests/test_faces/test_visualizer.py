"""Dots in the pictures, where and only where there are landmarks."""

import numpy as np
import pytest
import torch
from detectors import landmarks_in, sample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

from polynl_mm.faces.visualizer import FaceVisualizer

pytestmark = pytest.mark.usefixtures('quiet_and_quick')

BOXES = [[20, 30, 140, 150], [200, 40, 320, 190], [60, 160, 130, 230]]
GRAY = np.full((240, 360, 3), 128, np.uint8)
COLORS = [(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 0, 255), (255, 255, 0)]


def draw(kind, data_sample, **kwargs):
    visualizer = kind(name=f'{kind.__name__}{np.random.random()}')
    visualizer.dataset_meta = dict(classes=('face',), palette=[(0, 99, 0)])
    visualizer.add_datasample('', GRAY, data_sample, **kwargs)
    return visualizer.get_image()


def dots(picture, box, color):
    """Centre (x, y) of the pixels of a colour in a box, or None."""
    x1, y1, x2, y2 = box
    part = picture[y1 + 4 : y2, x1 + 4 : x2 - 4].astype(int)
    y, x = (abs(part - color).sum(2) < 90).nonzero()
    return (x.mean() + x1 + 4.5, y.mean() + y1 + 4.5) if len(x) else None


def truth(visible):
    return sample(BOXES, landmarks_in(BOXES), visible, size=GRAY.shape[:2])


def prediction():
    result = sample([])
    result.pred_instances = InstanceData(
        bboxes=torch.tensor(BOXES).float(),
        scores=torch.tensor([0.9, 0.1, 0.2]),
        labels=torch.zeros(3, dtype=torch.long),
        keypoints=landmarks_in(BOXES),
    )
    return result


def test_ground_truth_where_visible():
    visible = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [1, 0, 0, 0, 0]])
    picture = draw(FaceVisualizer, truth(visible), draw_pred=False)
    assert picture.shape == GRAY.shape
    points = landmarks_in(BOXES).tolist()
    for face, box in enumerate(BOXES):
        for landmark, color in enumerate(COLORS):
            found = dots(picture, box, color)
            if visible[face, landmark]:
                expected = points[face][landmark]
                assert found == pytest.approx(expected, abs=1), color
            else:
                assert found is None


def test_predictions_above_the_threshold():
    picture = draw(FaceVisualizer, prediction(), draw_gt=False)
    points = landmarks_in(BOXES).tolist()
    for landmark, color in enumerate(COLORS):
        expected = points[0][landmark]
        assert dots(picture, BOXES[0], color) == pytest.approx(expected, abs=1)
        assert dots(picture, BOXES[1], color) is None


def test_without_landmarks_as_mmdet_draws():
    plain = sample(BOXES)
    picture = draw(FaceVisualizer, plain, draw_pred=False)
    expected = draw(DetLocalVisualizer, plain, draw_pred=False)
    assert (picture == expected).all()
    # And with none to draw.
    picture = draw(FaceVisualizer, truth(torch.zeros(3, 5)), draw_pred=False)
    assert (picture == expected).all()
    draw(FaceVisualizer, sample([]))


def test_points_outside_do_not_move_the_picture():
    inside = truth(torch.tensor([[1] * 5, [0] * 5, [0] * 5]))
    outside = truth(torch.tensor([[1] * 5, [1] * 5, [0] * 5]))
    keypoints = outside.gt_instances.keypoints
    keypoints[1] = torch.tensor(
        [[-50.0, 9], [900, 9], [9, -1], [9, 241], [float('nan'), 9]]
    )
    assert (
        draw(FaceVisualizer, inside, draw_pred=False)
        == draw(FaceVisualizer, outside, draw_pred=False)
    ).all()
