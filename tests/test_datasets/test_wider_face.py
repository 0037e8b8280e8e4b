import copy

import numpy as np
import pytest

pytest.importorskip('mmdet')

from mmdet.evaluation import CocoMetric
from mmengine.registry import DefaultScope

from polynl_mm.datasets import WiderFaceDataset, read_bbx_gt
from polynl_mm.registry import DATASETS

# An official file in small: trailing blanks, a picture without faces and its
# line of zeros, an invalid face, degenerate boxes, a box over the edge.
OFFICIAL = """\
0--Parade/0_Parade_a_1.jpg
3
449 330 122 149 0 0 0 0 0 0 
10 20 8 30 2 1 1 0 2 1 
5 6 40 50 1 0 0 1 0 0 
0--Parade/0_Parade_a_2.jpg
0
0 0 0 0 0 0 0 0 0 0 
61--Street_Battle/61_Street_b_1.jpg
3
7 8 0 30 0 0 0 0 0 0 
9 9 -2 12 0 0 0 0 0 0 
-3 -4 20 21 0 0 0 0 1 0 
61--Street_Battle/61_Street_b_2.jpg
1
5 6 40 50 1 0 0 1 0 0 
"""  # noqa: W291
NAMES = [line for line in OFFICIAL.splitlines() if line.endswith('.jpg')]
IDS = [name[: -len('.jpg')] for name in NAMES]
ANN = 'wider_face_split/wider_face_train_bbx_gt.txt'


def rows(images):
    return {name: faces.tolist() for name, faces in images.items()}


@pytest.fixture
def read(tmp_path):
    def read(text):
        (tmp_path / 'gt.txt').write_bytes(text.encode())
        return read_bbx_gt(tmp_path / 'gt.txt')

    return read


def test_the_reader_gives_every_number(read):
    images = read(OFFICIAL)
    assert list(images) == NAMES
    assert [faces.shape for faces in images.values()] == [
        (3, 10),
        (0, 10),
        (3, 10),
        (1, 10),
    ]
    assert all(faces.dtype == np.int64 for faces in images.values())
    assert images[NAMES[0]][1].tolist() == [10, 20, 8, 30, 2, 1, 1, 0, 2, 1]
    assert images[NAMES[2]][:, :4].tolist() == [
        [7, 8, 0, 30],
        [9, 9, -2, 12],
        [-3, -4, 20, 21],
    ]


@pytest.mark.parametrize(
    'change',
    (
        lambda text: text.replace('0 0 0 0 0 0 0 0 0 0 \n', ''),
        lambda text: text.replace(' \n', '\n'),
        lambda text: text.replace('\n', '\r\n'),
        lambda text: text.replace('\n', '\n\n'),
        lambda text: text.rstrip(),
        lambda text: '\ufeff' + text,
        lambda text: text.replace(' ', '\t'),
    ),
    ids=[
        'no dummy',
        'no blank',
        'CRLF',
        'blank lines',
        'no end',
        'BOM',
        'tab',
    ],
)
def test_the_reader_takes_what_copies_made_of_the_file(read, change):
    changed = change(OFFICIAL)
    assert changed != OFFICIAL
    assert rows(read(changed)) == rows(read(OFFICIAL))


def test_the_last_picture_may_be_the_faceless_one(read):
    for dummy in ('', '0 0 0 0 0 0 0 0 0 0 \n'):
        assert rows(read(f'a/b.jpg\n0\n{dummy}')) == {'a/b.jpg': []}
    # With a count of 1 the zeros are a face, degenerate as it is.
    assert rows(read('a/b.jpg\n1\n0 0 0 0 0 0 0 0 0 0 \n')) == {
        'a/b.jpg': [[0] * 10]
    }


FACE = '1 2 3 4 0 0 0 0 0 0 '


@pytest.mark.parametrize(
    'text, line, got, expected',
    (
        (f'1\n{FACE}\n', 1, '1', 'event/name.jpg'),
        ('b.jpg\n0\n', 1, 'b.jpg', 'event/name.jpg'),
        ('a/b\n0\n', 1, 'a/b', 'event/name.jpg'),
        (f'a/b.jpg\n{FACE}\n', 2, FACE.strip(), 'number of faces of a/b.jpg'),
        ('a/b.jpg\ntwo\n', 2, 'two', 'number of faces'),
        ('a/b.jpg\n-1\n', 2, '-1', 'number of faces'),
        ('a/b.jpg\n1\n1 2 3 4 0 0 0 0 0\n', 3, '1 2 3 4 0', '10 integers'),
        (f'a/b.jpg\n1\n{FACE}0\n', 3, '1 2 3 4', '10 integers, x y w h blur'),
        ('a/b.jpg\n1\n1 2 3.5 4 0 0 0 0 0 0\n', 3, '1 2 3.5', '10 integers'),
        (f'a/b.jpg\n2\n{FACE}\nc/d.jpg\n', 4, 'c/d.jpg', 'face 2 of 2'),
        (f'a/b.jpg\n1\n{FACE}\n{FACE}\n', 4, '1 2 3 4', 'event/name.jpg'),
        (f'a/b.jpg\n0\n{FACE}\n', 3, '1 2 3 4', 'event/name.jpg'),
        ('a/b.jpg\n0\na/b.jpg\n0\n', 3, 'a/b.jpg', 'not come before'),
        ('\n\na/b.jpg\n\nx\n', 5, 'x', 'number of faces'),
        ('# a/b.txt 3 4\n', 1, '# a/b.txt 3 4', 'event/name.jpg'),
    ),
)
def test_a_malformed_line_is_shown(read, tmp_path, text, line, got, expected):
    with pytest.raises(ValueError) as error:
        read(text)
    message = str(error.value)
    start = f'{tmp_path / "gt.txt"}, line {line}: got {got!r}'[:-1]
    assert message.startswith(start), message
    assert expected in message and '\n' not in message


@pytest.mark.parametrize(
    'text, expected',
    (
        ('', 'empty'),
        (' \n\n', 'empty'),
        ('a/b.jpg\n', 'ends where the number of faces of a/b.jpg'),
        (f'a/b.jpg\n2\n{FACE}\n', 'ends where face 2 of 2 of a/b.jpg'),
    ),
)
def test_a_file_that_ends_too_soon(read, tmp_path, text, expected):
    with pytest.raises(ValueError, match=expected) as error:
        read(text)
    assert str(tmp_path / 'gt.txt') in str(error.value)


def test_a_binary_file_is_refused(tmp_path):
    file = tmp_path / 'gt.mat'
    file.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r'gt\.mat, line 1: got'):
        read_bbx_gt(file)


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
