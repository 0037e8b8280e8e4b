"""Box voting against a loop, and the model that merges views."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectors import landmarks_in
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData
from oracles import vote_loop
from torch.testing import assert_close

from polynl_mm.faces.voting import BoxVotingTTAModel, vote_boxes

pytestmark = pytest.mark.usefixtures('quiet_and_quick')

ROOT = Path(__file__).parents[2]


def detections(seed, faces=12, per_face=6, ties=False):
    """Boxes scattered around faces, scores, and something to average."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 300, (faces, 1, 2))
    sides = rng.uniform(4, 80, (faces, 1, 2))
    boxes = np.concatenate([corners, corners + sides], 2)
    boxes = (
        boxes
        + rng.normal(0, 0.15, (faces, per_face, 4)) * sides.mean(2)[..., None]
    )
    boxes = boxes.reshape(-1, 4)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    scores = rng.uniform(0.02, 1, len(boxes))
    if ties:
        scores = scores.round(1).clip(0.1)
    values = np.hstack([boxes, rng.normal(100, 50, (len(boxes), 10))])
    return (
        torch.tensor(x, dtype=torch.float32) for x in (boxes, scores, values)
    )


@pytest.mark.parametrize('keep_single', [True, False])
@pytest.mark.parametrize('threshold', [0.2, 0.4, 0.7, 1.0])
@pytest.mark.parametrize('seed', range(4))
def test_voting_agrees_with_a_loop(seed, threshold, keep_single):
    boxes, scores, values = detections(seed, ties=seed > 1)
    for max_num in (750, 5):
        got = vote_boxes(
            boxes, scores, values, threshold, keep_single, max_num
        )
        means, best = vote_loop(
            boxes.tolist(),
            scores.tolist(),
            values.tolist(),
            threshold,
            keep_single,
            max_num,
        )
        assert got[0].dtype == torch.float32
        assert_close(got[0], torch.tensor(means), rtol=1e-5, atol=1e-3)
        assert_close(got[1], torch.tensor(best))
        assert len(best) <= max_num


def test_pairs_are_looked_at_in_parts():
    """More pairs than fit into one part."""
    boxes, scores, values = detections(0, faces=700, per_face=3)
    means, best = vote_boxes(boxes, scores, values, 0.4, max_num=2100)
    assert len(best) * len(boxes) > 10**6
    expected = vote_loop(
        boxes.tolist(), scores.tolist(), values.tolist(), 0.4, True, 2100
    )
    assert_close(means, torch.tensor(expected[0]), rtol=1e-5, atol=1e-3)
    assert_close(best, torch.tensor(expected[1]))


def test_width_counts_one_more():
    """6 pixels wide, 2 apart: IoU 24 / 48 with the + 1, 15 / 35 without."""
    boxes = torch.tensor([[0.0, 0, 5, 5], [2, 0, 7, 5]])
    scores = torch.tensor([0.9, 0.3])
    means, best = vote_boxes(boxes, scores, boxes, iou_threshold=0.5)
    assert_close(means, torch.tensor([[0.5, 0, 5.5, 5]]))
    assert_close(best, torch.tensor([0.9]))
    assert len(vote_boxes(boxes, scores, boxes, 0.51)[0]) == 2


def test_single_boxes():
    """The official code keeps a single box only as the last of a picture."""
    boxes = torch.tensor(
        [[0.0, 0, 9, 9], [50, 50, 59, 59], [50, 50, 60, 59], [90, 0, 99, 9]]
    )
    scores = torch.tensor([0.9, 0.8, 0.7, 0.1])

    def best(keep_single, count=4):
        return vote_boxes(
            boxes[:count],
            scores[:count],
            boxes[:count],
            keep_single=keep_single,
        )[1].tolist()

    assert best(True) == pytest.approx([0.9, 0.8, 0.1])
    assert best(False) == pytest.approx([0.8, 0.1])
    assert best(False, 3) == pytest.approx([0.8])
    assert best(False, 1) == pytest.approx([0.9])
    assert best(False, 0) == []


def test_scores_of_zero_and_boxes_without_area():
    boxes = torch.tensor([[3.0, 3, 3, 3]]).repeat(3, 1)
    means, best = vote_boxes(boxes, torch.zeros(3), boxes)
    assert_close(means, boxes[:1])
    assert best.tolist() == [0]


# ------------------------------------------------------------------ model


class Views(torch.nn.Module):
    """Stands for a detector that has seen the views already."""

    def test_step(self, data):
        return data['data_samples']


def view(boxes, scores, keypoints=None, labels=None, **meta):
    found = InstanceData(
        bboxes=torch.tensor(boxes).float().reshape(-1, 4),
        scores=torch.tensor(scores).float(),
        labels=torch.tensor(labels or [0] * len(scores)).long(),
    )
    if keypoints is not None:
        found.keypoints = keypoints
    return DetDataSample(
        metainfo=dict(img_path='event/name.jpg', ori_shape=(80, 100), **meta),
        pred_instances=found,
    )


def merge(*views, **kwargs):
    model = BoxVotingTTAModel(module=Views(), **kwargs)
    data = dict(inputs=[0] * len(views), data_samples=[[v] for v in views])
    (merged,) = model.test_step(data)
    return merged.pred_instances


BOX = [[10.0, 20.0, 40.0, 60.0]]


def mirrored(boxes, scores, points):
    """What the same detector finds in the mirrored picture, 100 wide."""
    flipped = [[100 - x2, y1, 100 - x1, y2] for x1, y1, x2, y2 in boxes]
    points = points * torch.tensor([-1.0, 1.0]) + torch.tensor([100.0, 0.0])
    # It names the left eye what it sees on the left.
    points = points[:, [1, 0, 2, 4, 3]]
    return view(
        flipped, scores, points, flip=True, flip_direction='horizontal'
    )


def test_views_come_back_onto_the_picture():
    points = landmarks_in(BOX)
    # Not symmetric, so that a swap too many or too few is seen.
    points[0, 0] += torch.tensor([-3.0, 5.0])
    found = merge(
        view(BOX, [0.6], points, flip=False),
        mirrored(BOX, [0.9], points),
    )
    assert_close(found.bboxes, torch.tensor(BOX))
    assert_close(found.scores, torch.tensor([0.9]))
    assert_close(found.keypoints, points)


def test_landmarks_are_weighted_by_the_score():
    points = landmarks_in(BOX)
    found = merge(
        view(BOX, [0.2], points, flip=False),
        view(BOX, [0.6], points + 8, flip=False),
    )
    assert_close(found.keypoints, points + 6)


def test_classes_do_not_mix_and_the_best_come_first():
    boxes = BOX + [[60.0, 0.0, 90.0, 30.0]] + BOX
    found = merge(
        view(boxes, [0.3, 0.5, 0.8], labels=[0, 1, 1], flip=False),
        view(boxes, [0.4, 0.7, 0.9], labels=[0, 1, 1], flip=False),
    )
    assert found.labels.tolist() == [1, 1, 0]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.4])
    assert 'keypoints' not in found
    few = merge(
        view(boxes, [0.3, 0.5, 0.8], labels=[0, 1, 1], flip=False),
        max_per_img=2,
    )
    assert few.scores.tolist() == pytest.approx([0.8, 0.5])


@pytest.mark.parametrize('empty', [1, 2])
def test_views_in_which_nothing_is(empty):
    nothing = torch.zeros(0, 5, 2)
    views = [
        view([], [], nothing, flip=False),
        mirrored([], [], nothing),
        mirrored(BOX, [0.5], landmarks_in(BOX)),
    ]
    found = merge(*views[3 - empty - 1 :] if empty == 1 else views[:2])
    assert len(found) == (1 if empty == 1 else 0)
    assert found.bboxes.shape[1:] == (4,)
    assert found.keypoints.shape[1:] == (5, 2)


def test_single_views_can_be_dropped():
    other = [[60.0, 0.0, 90.0, 30.0]]
    views = [
        view(BOX + other, [0.9, 0.5], flip=False),
        view(other, [0.4], flip=False),
    ]
    assert len(merge(*views)) == 2
    found = merge(*views, keep_single=False)
    assert found.scores.tolist() == pytest.approx([0.5])


@pytest.mark.parametrize(
    'meta, message',
    [
        ({}, "event/name.jpg: a view has no 'flip'; .*RandomFlip.*meta_keys"),
        (
            dict(flip=True, flip_direction='vertical'),
            "must be 'horizontal' .*, got 'vertical'",
        ),
        (dict(flip=True), "must be 'horizontal' .*, got None"),
    ],
)
def test_views_that_can_not_be_brought_back(meta, message):
    with pytest.raises(ValueError, match=message):
        merge(view(BOX, [0.5], **meta))


@pytest.mark.parametrize(
    'argument',
    [dict(iou_threshold=0), dict(iou_threshold=1.1), dict(max_per_img=0)],
)
def test_bad_arguments(argument):
    (key, value), *_ = argument.items()
    with pytest.raises(ValueError, match=f'{key} must be .*, got {value}'):
        BoxVotingTTAModel(module=Views(), **argument)


# ------------------------------------------------------- tools/test.py

SCALES = [(96, 64), (160, 120)]


def test_tool_merges_saves_and_draws(build, config, tmp_path):
    """`tools/test.py --tta --out --show-dir`, on two small pictures."""
    rng = np.random.default_rng(0)
    folder = tmp_path / 'data' / 'WIDER_val' / 'images' / '0--Parade'
    folder.mkdir(parents=True)
    for i, size in enumerate([(90, 120), (128, 70)]):
        picture = rng.integers(0, 256, (*size, 3), np.uint8)
        cv2.imwrite(str(folder / f'{i}.jpg'), picture)
    (tmp_path / 'data' / 'val.txt').write_text(
        '0--Parade/0.jpg\n1\n10 10 40 40 0 0 0 0 0 0\n'
        '0--Parade/1.jpg\n0\n0 0 0 0 0 0 0 0 0 0\n'
    )
    pack = dict(type='PackDetInputs')
    loader = dict(
        batch_size=1,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='polynl_mm.WiderFaceDataset',
            data_root='data',
            ann_file='val.txt',
            data_prefix=dict(img='WIDER_val/images'),
            test_mode=True,
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='Resize', scale=SCALES[0], keep_ratio=True),
                pack,
            ],
        ),
    )
    cfg = dict(
        default_scope='mmdet',
        model=config('p2-p6', test_cfg=dict(score_thr=0.0, nms_pre=50)),
        test_dataloader=loader,
        test_cfg=dict(type='TestLoop'),
        test_evaluator=dict(type='DumpDetResults', out_file_path='plain.pkl'),
        default_hooks=dict(
            visualization=dict(type='DetVisualizationHook', score_thr=0.0)
        ),
        visualizer=dict(
            type='polynl_mm.FaceVisualizer',
            vis_backends=[dict(type='LocalVisBackend')],
            name='visualizer',
        ),
        tta_model=dict(type='polynl_mm.BoxVotingTTAModel', max_per_img=6),
        tta_pipeline=[
            dict(type='LoadImageFromFile'),
            dict(
                type='TestTimeAug',
                transforms=[
                    [
                        dict(type='Resize', scale=scale, keep_ratio=True)
                        for scale in SCALES
                    ],
                    [
                        dict(type='RandomFlip', prob=0.0),
                        dict(type='RandomFlip', prob=1.0),
                    ],
                    [pack],
                ],
            ),
        ],
    )
    Config(cfg).dump(str(tmp_path / 'config.py'))
    torch.save(build('p2-p6').state_dict(), tmp_path / 'model.pth')
    done = subprocess.run(
        [
            sys.executable, '-W', 'ignore', str(ROOT / 'tools' / 'test.py'),
            'config.py', 'model.pth', '--tta', '--out', 'out.pkl',
            '--show-dir', 'drawn', '--work-dir', str(tmp_path / 'work'),
        ],
        cwd=tmp_path,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    with open(tmp_path / 'out.pkl', 'rb') as file:
        saved = pickle.load(file)
    assert [s['img_id'] for s in saved] == ['0--Parade/0', '0--Parade/1']
    for each in saved:
        found = each['pred_instances']
        assert len(found['scores']) == 6
        assert found['bboxes'].shape == (6, 4)
        assert found['keypoints'].shape == (6, 5, 2)
        assert found['keypoints'].dtype == torch.float32
        # Untrained, but the points are about where the anchors are.
        height, width = each['ori_shape']
        assert (found['keypoints'][..., 0] - width / 2).abs().max() < 2 * width
        assert found['keypoints'].abs().max() > 1
    (drawn,) = tmp_path.glob('work/**/drawn/0.jpg')
    assert cv2.imread(str(drawn)) is not None
