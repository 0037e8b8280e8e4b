import copy

import numpy as np
import pytest

pytest.importorskip('mmdet')

from mmdet.evaluation import CocoMetric
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.registry import DefaultScope
from release import (
    ABSENT,
    IDS,
    KEYPOINTS,
    NAMES,
    OFFICIAL,
    POINTS,
    RETINAFACE,
    SCRFD,
)

from polynl_mm.faces.dataset import WiderFaceDataset
from polynl_mm.registry import DATASETS, TRANSFORMS

ANN = 'wider_face_split/wider_face_train_bbx_gt.txt'


@pytest.fixture
def release(tmp_path):
    """Give the root of a release in the official layout; no real pictures."""
    ann = tmp_path / ANN
    ann.parent.mkdir()
    ann.write_text(OFFICIAL)
    for name in NAMES:
        picture = tmp_path / 'WIDER_train/images' / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.touch()
    return tmp_path


def build(root, **kwargs):
    cfg = dict(
        type='polynl_mm.WiderFaceDataset',
        data_root=str(root),
        ann_file=ANN,
        data_prefix=dict(img='WIDER_train/images'),
    )
    return DATASETS.build({**cfg, **kwargs})


def test_the_data_set_in_mmdet_form(release):
    dataset = build(release)
    assert type(dataset) is WiderFaceDataset
    assert dataset.metainfo['classes'] == ('face',)
    assert len(dataset.metainfo['palette']) == 1
    assert [dataset[i]['img_id'] for i in range(len(dataset))] == IDS
    first, empty, edge, _ = (dataset[i] for i in range(4))
    assert first['img_path'] == f'{release}/WIDER_train/images/{NAMES[0]}'
    assert first['instances'] == [
        dict(
            bbox=[449, 330, 571, 479],
            bbox_label=0,
            ignore_flag=0,
            blur=0,
            expression=0,
            illumination=0,
            invalid=0,
            occlusion=0,
            pose=0,
        ),
        dict(
            bbox=[10, 20, 18, 50],
            bbox_label=0,
            ignore_flag=0,
            blur=2,
            expression=1,
            illumination=1,
            invalid=0,
            occlusion=2,
            pose=1,
        ),
        dict(
            bbox=[5, 6, 45, 56],
            bbox_label=0,
            ignore_flag=1,
            blur=1,
            expression=0,
            illumination=0,
            invalid=1,
            occlusion=0,
            pose=0,
        ),
    ]
    assert empty['instances'] == []
    # The two degenerate ones are gone, the one over the edge is as it was.
    assert [face['bbox'] for face in edge['instances']] == [[-3, -4, 17, 17]]
    assert dataset.get_cat_ids(0) == [0, 0, 0]


@pytest.mark.parametrize('test_mode', (False, True))
def test_degenerate_boxes_are_left_out(release, test_mode):
    dataset = build(release, test_mode=test_mode)
    for i in range(len(dataset)):
        for face in dataset[i]['instances']:
            x1, y1, x2, y2 = face['bbox']
            assert x1 < x2 and y1 < y2
    assert len(dataset[2]['instances']) == 1


@pytest.mark.parametrize(
    'min_size, flags', ((None, [0, 0, 1]), (8, [0, 0, 1]), (9, [0, 1, 1]))
)
def test_small_faces_are_ignored(release, min_size, flags):
    faces = build(release, min_size=min_size)[0]['instances']
    assert [face['ignore_flag'] for face in faces] == flags


def ids(dataset):
    return [dataset[i]['img_id'] for i in range(len(dataset))]


def test_pictures_without_a_face_to_learn_are_left_out_in_training(release):
    cfg = dict(filter_cfg=dict(filter_empty_gt=True))
    assert ids(build(release, **cfg)) == [IDS[0], IDS[2]]
    assert ids(build(release, min_size=21, **cfg)) == [IDS[0]]
    assert ids(build(release, test_mode=True, **cfg)) == IDS
    assert ids(build(release, filter_cfg=dict(filter_empty_gt=False))) == IDS
    with pytest.raises(ValueError, match='none of its 4 pictures'):
        build(release, min_size=200, **cfg)


@pytest.mark.parametrize(
    'kwargs, message',
    (
        (dict(min_size=0), 'min_size must be None or above 0 pixels, got 0'),
        (dict(filter_cfg=dict(min_size=32)), "got \\['min_size'\\]"),
        (dict(data_prefix=dict(img_path='x')), "under 'img'"),
    ),
)
def test_wrong_arguments(release, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(release, **kwargs)


@pytest.mark.parametrize(
    'kwargs, missing',
    (
        (dict(ann_file='wider_face_split/x.txt'), 'wider_face_split/x.txt'),
        (dict(ann_file='wider_face_split'), 'wider_face_split'),
        (dict(data_prefix=dict(img='images')), 'images'),
        (dict(data_root='no/where'), f'no/where/{ANN}'),
    ),
)
def test_missing_files_and_folders_are_named(release, kwargs, missing):
    with pytest.raises(FileNotFoundError, match='WIDER Face') as error:
        build(release, **kwargs)
    place = str(error.value).split(': not there, expected')[0]
    assert place in (missing, f'{release}/{missing}')


def test_missing_pictures_are_counted_and_the_first_named(release):
    for name in NAMES[1:3]:
        (release / 'WIDER_train/images' / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        build(release)
    message = str(error.value)
    assert f'WIDER_train/images/{NAMES[1]}: not there' in message
    assert 'missing are 2 of 4 pictures' in message and ANN in message


def test_malformed_annotation_says_file_and_line(release):
    (release / ANN).write_text(OFFICIAL.replace('449 330', '449,330'))
    with pytest.raises(ValueError, match=f'{ANN}, line 3: got') as error:
        build(release)
    assert str(release) in str(error.value)


def test_coco_metric_takes_it_as_ground_truth(release):
    """Of the annotation itself AP is 1; ignored faces do not count."""
    import torch

    dataset = build(release, test_mode=True)
    metric = CocoMetric(metric='bbox')
    metric.dataset_meta = dataset.metainfo
    for i in range(len(dataset)):
        data = copy.deepcopy(dataset[i])
        boxes = [f['bbox'] for f in data['instances'] if not f['ignore_flag']]
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        data['pred_instances'] = dict(
            bboxes=boxes,
            scores=torch.ones(len(boxes)),
            labels=torch.zeros(len(boxes), dtype=torch.long),
        )
        metric.process({}, [{**data, 'ori_shape': (500, 600)}])
    result = metric.evaluate(size=len(dataset))
    assert result['coco/bbox_mAP'] == 1


def test_pipeline_gives_boxes_flags_and_pictures(release):
    import cv2

    picture = release / 'WIDER_train/images' / NAMES[0]
    cv2.imwrite(str(picture), np.full((500, 600, 3), 90, np.uint8))
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = build(
            release,
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True),
                dict(type='Resize', scale_factor=0.5, keep_ratio=True),
                dict(type='PackDetInputs'),
            ],
        )
    packed = dataset[0]
    assert packed['inputs'].shape == (3, 250, 300)
    sample = packed['data_samples']
    assert sample.img_id == IDS[0]
    np.testing.assert_allclose(
        sample.gt_instances.bboxes.tensor,
        [[224.5, 165, 285.5, 239.5], [5, 10, 9, 25]],
    )
    np.testing.assert_allclose(
        sample.ignored_instances.bboxes.tensor, [[2.5, 3, 22.5, 28]]
    )


def test_the_type_is_found_from_mmdet():
    from mmdet.registry import DATASETS as MMDET

    assert MMDET.get('polynl_mm.WiderFaceDataset') is WiderFaceDataset


LABELS = 'retinaface_gt_v1.1/train/label.txt'


@pytest.fixture
def labelled(release):
    """Write a release's label file."""

    def write(text=RETINAFACE):
        file = release / LABELS
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return release

    return write


@pytest.mark.parametrize('text', (RETINAFACE, SCRFD))
def test_landmarks_come_to_the_official_faces(labelled, text):
    root = labelled(text)
    plain = build(root)
    dataset = build(root, landmark_file=LABELS)
    for i in range(len(plain)):
        faces = copy.deepcopy(dataset[i]['instances'])
        keypoints = [face.pop('keypoints') for face in faces]
        assert faces == plain[i]['instances']
        for k, points in enumerate(keypoints):
            flags = [0] * 5 if (i, k) != (0, 0) else [2, 2, 1, 2, 1]
            assert points[2::3] == flags
    points = dataset[0]['instances'][0]['keypoints']
    assert points == [value for point in KEYPOINTS for value in point]


def test_an_absolute_landmark_file_stays_as_it_is(labelled):
    root = labelled()
    dataset = build(root, landmark_file=str(root / LABELS))
    assert dataset.landmark_file == str(root / LABELS)


def test_equal_boxes_take_their_landmarks_in_order(labelled):
    root = labelled(
        f'# {NAMES[0]}\n5 6 40 50 {ABSENT} 1\n5 6 40 50 {POINTS} 1\n'
    )
    (root / ANN).write_text(
        OFFICIAL.replace('449 330 122 149 0', '5 6 40 50 2')
    )
    faces = build(root, landmark_file=LABELS)[0]['instances']
    assert [face['blur'] for face in faces] == [2, 2, 1]
    assert [sum(face['keypoints'][2::3]) for face in faces] == [0, 0, 8]


@pytest.mark.parametrize(
    'change, message',
    (
        (
            ('8 30', '9 30'),
            r'line 3: got a face of .*\[10\.0, 20\.0, 19\.0, 50',
        ),
        (('7 8 0 30', '7 8 1 30'), 'line 6: got a face of '),
        (
            ('-3 -4', f'-3 -4 20 21 {ABSENT} 1\n-3 -4'),
            'line 8: got a face',
        ),
        (('0_Parade_a_2', '0_Parade_x'), "line 4: .*'0--Parade/0_Parade_x"),
        ((POINTS, ABSENT), 'none of its faces has landmarks'),
        ((POINTS, POINTS[:-4]), 'line 2: got'),
    ),
)
def test_labels_that_do_not_fit(labelled, change, message):
    root = labelled(RETINAFACE.replace(*change))
    with pytest.raises(ValueError, match=message) as error:
        build(root, landmark_file=LABELS)
    assert LABELS in str(error.value)


@pytest.mark.parametrize('box', ['0 0 0 0', '7 8 -1 30'])
def test_a_label_of_no_area_is_passed_over(labelled, box):
    """Some files have the zeros that stand for no face."""
    header = f'# {NAMES[1]}\n'
    root = labelled(RETINAFACE.replace(header, f'{header}{box} {ABSENT} 1\n'))
    with_it = build(root, landmark_file=LABELS)
    labelled()
    without = build(root, landmark_file=LABELS)
    assert list(with_it) == list(without)


@pytest.mark.parametrize('text', (RETINAFACE, SCRFD))
def test_a_label_file_alone(labelled, text):
    root = labelled(text)
    dataset = build(root, ann_file=LABELS, skip_degenerate=True)
    assert ids(dataset) == IDS
    assert dataset[0]['instances'] == [
        dict(
            bbox=[449, 330, 571, 479],
            bbox_label=0,
            ignore_flag=0,
            keypoints=[value for point in KEYPOINTS for value in point],
        ),
        dict(
            bbox=[10, 20, 18, 50],
            bbox_label=0,
            ignore_flag=int(text == SCRFD),
            keypoints=[-1, -1, 0] * 5,
        ),
    ]
    assert dataset[1]['instances'] == []
    assert [face['bbox'] for face in dataset[2]['instances']] == [
        [-3, -4, 17, 17]
    ]
    assert [f['ignore_flag'] for f in dataset[3]['instances']] == [0]
    small = build(root, ann_file=LABELS, skip_degenerate=True, min_size=21)
    assert [f['ignore_flag'] for f in small[0]['instances']] == [0, 1]


def test_degenerate_labels_alone_are_an_error(labelled):
    with pytest.raises(ValueError, match='line 6: .*w > 0 and h > 0'):
        build(labelled(), ann_file=LABELS)


def test_invalid_faces_are_learnt_if_told(release):
    faces = build(release, ignore_invalid=False)[0]['instances']
    assert [face['ignore_flag'] for face in faces] == [0, 0, 0]
    assert [face['invalid'] for face in faces] == [0, 0, 1]


def test_the_test_set(release):
    file = release / 'wider_face_split/wider_face_test_filelist.txt'
    file.write_text(''.join(f'{name}\n' for name in NAMES))
    dataset = build(release, ann_file=str(file), test_mode=True)
    assert ids(dataset) == IDS
    assert dataset[0]['instances'] == []
    with pytest.raises(ValueError, match='test_filelist.*test_mode=True'):
        build(release, ann_file=str(file))
    pictures = (release / 'WIDER_train/images').resolve()
    file.write_text(''.join(f'{pictures / name}\n' for name in NAMES))
    absolute = build(release, ann_file=str(file), test_mode=True)
    assert ids(absolute) == IDS
    assert absolute[0]['img_path'] == dataset[0]['img_path']


@pytest.mark.parametrize('ann', ('list.txt', LABELS))
def test_a_landmark_file_goes_with_the_official_annotation(labelled, ann):
    root = labelled()
    (root / 'list.txt').write_text('\n'.join(NAMES))
    with pytest.raises(ValueError, match='landmark_file goes with'):
        build(
            root,
            ann_file=ann,
            landmark_file=LABELS,
            test_mode=True,
            skip_degenerate=True,
        )


def test_a_missing_landmark_file_is_named(release):
    with pytest.raises(FileNotFoundError, match=f'{LABELS}: not there'):
        build(release, landmark_file=LABELS)


def test_pipeline_gives_landmarks(labelled):
    import cv2

    root = labelled()
    picture = root / 'WIDER_train/images' / NAMES[0]
    cv2.imwrite(str(picture), np.full((500, 600, 3), 90, np.uint8))
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = build(
            root,
            landmark_file=LABELS,
            pipeline=[
                dict(type='polynl_mm.LoadImageFromFile'),
                dict(type='polynl_mm.LoadAnnotations', with_keypoints=True),
                dict(type='polynl_mm.Resize', scale_factor=0.5),
                dict(type='RandomFlip', prob=1.0),
                dict(type='polynl_mm.PackDetInputs'),
            ],
        )
    sample = dataset[0]['data_samples']
    faces = sample.gt_instances
    assert faces.keypoints.shape == (2, 5, 2)
    assert faces.keypoints_visible.tolist() == [[1] * 5, [0] * 5]
    np.testing.assert_allclose(
        faces.keypoints[0],
        [[39.75, 190], [65, 190], [50, 205], [42.5, 220.5], [60, 220]],
    )
    assert sample.ignored_instances.keypoints_visible.tolist() == [[0] * 5]


def anew(results):
    """A transform that makes its boxes by hand."""
    boxes = results['gt_bboxes'].convert_to('hbox').tensor * 2
    return {**results, 'gt_bboxes': HorizontalBoxes(boxes)}


@pytest.mark.parametrize(
    'step, name',
    (
        (dict(type='RandomErasing', n_patches=1, ratio=0.1), 'RandomErasing'),
        (anew, 'function'),
        (
            dict(
                type='RandomApply',
                prob=1.0,
                transforms=[dict(type='GTBoxSubOne_GLIP')],
            ),
            'RandomApply',
        ),
    ),
)
def test_a_transform_that_loses_landmarks_is_named(labelled, step, name):
    import cv2

    root = labelled()
    picture = root / 'WIDER_train/images' / NAMES[0]
    cv2.imwrite(str(picture), np.full((500, 600, 3), 90, np.uint8))

    def load(with_keypoints):
        with DefaultScope.overwrite_default_scope('mmdet'):
            return build(
                root,
                landmark_file=LABELS,
                pipeline=[
                    dict(type='polynl_mm.LoadImageFromFile'),
                    dict(
                        type='polynl_mm.LoadAnnotations',
                        with_keypoints=with_keypoints,
                    ),
                    step,
                ],
            )[0]

    with pytest.raises(ValueError, match=f'^{name}.* without landmarks'):
        load(True)
    assert type(load(False)['gt_bboxes']) is HorizontalBoxes


@pytest.mark.parametrize('cfg', (dict(with_bbox=False), dict(box_type=None)))
def test_landmarks_are_loaded_into_boxes_or_not_at_all(cfg):
    cfg = dict(type='polynl_mm.LoadAnnotations', with_keypoints=True, **cfg)
    with pytest.raises(ValueError, match='expected with_bbox=True and box_ty'):
        TRANSFORMS.build(cfg)
