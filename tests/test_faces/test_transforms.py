import copy

import cv2
import numpy as np
import pytest

pytest.importorskip('mmdet')

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmcv.transforms import Compose
from mmcv.transforms.utils import cache_random_params
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.registry import DefaultScope
from mmengine.runner import set_random_seed

from polynl_mm.faces import transforms
from polynl_mm.faces.boxes import FaceBoxes
from polynl_mm.registry import TRANSFORMS

# Where the five points of a face are in its cell, in whole pixels.
CELL = 40
POINTS = np.array([(12, 12), (27, 11), (20, 19), (13, 27), (26, 28)])
BACK = 10


def build(name, **kwargs):
    return TRANSFORMS.build(dict(type=f'polynl_mm.{name}', **kwargs))


def points_of(results):
    """The (n, 5, 3) landmarks, as an array."""
    return results['gt_bboxes'].keypoints.numpy()


def chain(*cfgs):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return Compose(list(cfgs))


def colour(face, point):
    """A colour of its own for each mark, far from all others."""
    number = face * 5 + point
    return np.array([60 + 60 * (number // 4**i % 4) for i in range(3)])


def scene(rows, cols, ignored, flags, radius):
    """A picture with marks, and its results as a pipeline has them.

    Faces are in the cells of a grid; the label of a face is its number, so
    that it can be found again. ``flags`` (n, 5) are those of landmarks.
    """
    height, width = rows * CELL + 7, cols * CELL + 3
    image = np.full((height, width, 3), BACK, np.uint8)
    instances = []
    for face, (hide, flag) in enumerate(zip(ignored, flags)):
        at = np.array([face % cols, face // cols]) * CELL
        points = np.full((5, 3), -1.0)
        points[:, 2] = flag
        for k, (x, y) in enumerate(at + POINTS):
            if flag[k]:
                image[
                    y - radius : y + radius + 1, x - radius : x + radius + 1
                ] = colour(face, k)
                points[k, :2] = x + 0.5, y + 0.5
        instances.append(
            dict(
                bbox=[*(at + 8), *(at + 32)],
                bbox_label=face,
                ignore_flag=int(hide),
                keypoints=points.ravel().tolist(),
            )
        )
    results = dict(
        img=image,
        img_shape=image.shape[:2],
        ori_shape=image.shape[:2],
        instances=instances,
    )
    return build('LoadAnnotations', with_keypoints=True)(results)


@st.composite
def scenes(draw, radius):
    rows, cols = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    count = draw(st.integers(0, rows * cols))
    ignored = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    flags = draw(
        st.lists(
            st.lists(st.integers(0, 2), min_size=5, max_size=5),
            min_size=count,
            max_size=count,
        )
    )
    return scene(rows, cols, ignored, flags, radius), flags, ignored


flips = st.builds(
    dict,
    type=st.just('RandomFlip'),
    prob=st.just(1.0),
    direction=st.sampled_from(['horizontal', 'vertical', 'diagonal']),
)
crops = st.builds(
    dict,
    type=st.just('polynl_mm.RandomSquareCrop'),
    crop_choice=st.lists(
        st.sampled_from([0.3, 0.45, 0.6, 0.8, 1.0, 1.4, 2.0]),
        min_size=1,
        max_size=3,
    ),
    num_factors=st.integers(1, 3),
    num_offsets=st.integers(1, 25),
    need_whole_box=st.booleans(),
    fallback=st.sampled_from(['last', 'pad']),
    bbox_clip_border=st.booleans(),
    pad_val=st.just(BACK),
)
# Never beyond the picture: a mark that is cut at an edge and then padded
# would mix with the padding when it is resized.
inner_crops = crops.map(
    lambda cfg: {
        **cfg,
        'crop_choice': [min(f, 1.0) for f in cfg['crop_choice']],
        'fallback': 'last',
    }
)
filters = st.builds(
    dict,
    type=st.just('FilterAnnotations'),
    min_gt_bbox_wh=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    keep_empty=st.just(False),
)
resizes = st.builds(
    dict,
    type=st.just('polynl_mm.Resize'),
    scale_factor=st.tuples(st.floats(0.8, 2), st.floats(0.8, 2)),
    clip_object_border=st.booleans(),
)


def check_marks(results, names, flags, lost, tolerance):
    """Every landmark is on its mark, unless that was cropped away before.

    ``names`` says which landmark is where after flips, ``lost`` remembers
    the marks that were cropped away, as (face, landmark).
    """
    image = results['img']
    faces = results['gt_bboxes_labels']
    keypoints = points_of(results)
    boxes = results['gt_bboxes'].tensor.numpy()
    assert keypoints.shape == (len(faces), 5, 3)
    assert keypoints.dtype == np.float32
    assert len(boxes) == len(results['gt_ignore_flags']) == len(faces)
    assert results['img_shape'] == image.shape[:2]
    for face, box, points in zip(faces.tolist(), boxes, keypoints):
        for k, (x, y, flag) in enumerate(points):
            assert flag == flags[face][names[k]]
            inside = 0 <= x < image.shape[1] and 0 <= y < image.shape[0]
            if not inside:
                lost.add((face, names[k]))
            if flag and (face, names[k]) not in lost:
                seen = image[int(y), int(x)].astype(int)
                wanted = colour(face, names[k])
                assert abs(seen - wanted).max() <= tolerance
                assert box[0] <= x <= box[2] and box[1] <= y <= box[3]


def check_packed(packed, results, ignored):
    sample = packed['data_samples']
    assert packed['inputs'].shape[1:] == results['img_shape']
    for part, hide in (
        (sample.gt_instances, False),
        (sample.ignored_instances, True),
    ):
        rows = [
            row
            for row, face in enumerate(results['gt_bboxes_labels'])
            if ignored[face] == hide
        ]
        keypoints = points_of(results)[rows]
        assert part.keypoints.dtype == torch.float32
        np.testing.assert_array_equal(part.keypoints, keypoints[..., :2])
        np.testing.assert_array_equal(
            part.keypoints_visible, keypoints[..., 2] > 0
        )
        np.testing.assert_array_equal(
            part.labels, results['gt_bboxes_labels'][rows]
        )
        assert len(part.bboxes) == len(rows)


def run_and_check(made, cfgs, seed, tolerance):
    results, flags, ignored = made
    set_random_seed(seed)
    names, lost = [0, 1, 2, 3, 4], set()
    for cfg in cfgs:
        results = chain(cfg)(results)
        if cfg.get('direction') in ('horizontal', 'diagonal'):
            names = [names[k] for k in (1, 0, 2, 4, 3)]
        check_marks(results, names, flags, lost, tolerance)
        # mmdet's packing fails on a flipped picture of one pixel's width.
        assume(min(results['img_shape']) > 1)
    packed = chain(dict(type='polynl_mm.PackDetInputs'))(dict(results))
    check_packed(packed, results, ignored)


@settings(deadline=None)
@given(
    scenes(radius=0),
    st.lists(flips | crops | filters, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_landmarks_stay_on_their_very_pixel(made, cfgs, seed):
    run_and_check(made, cfgs, seed, tolerance=0)


@settings(deadline=None)
@given(
    scenes(radius=3),
    st.lists(flips | inner_crops | filters, max_size=3),
    resizes,
    st.lists(flips | inner_crops | filters, max_size=3),
    resizes,
    st.integers(0, 2**32 - 1),
)
def test_landmarks_stay_on_their_marks_when_resized(
    made, first, resize, second, again, seed
):
    cfgs = [*first, resize, *second, again]
    run_and_check(made, cfgs, seed, tolerance=1)


def test_a_chain_does_move_landmarks():
    """The properties above are not about faces that were all dropped."""
    results = scene(2, 2, [0, 1, 0, 0], [[2] * 5] * 4, 0)
    cfgs = (
        dict(type='polynl_mm.RandomSquareCrop', crop_choice=[0.8]),
        dict(type='RandomFlip', prob=1.0),
        dict(type='polynl_mm.PackDetInputs'),
    )
    set_random_seed(0)
    before = points_of(results)
    packed = chain(*cfgs)(results)
    part = packed['data_samples'].gt_instances
    assert len(part.labels) >= 1
    after = part.keypoints[0].numpy()
    assert (after != before[part.labels[0], :, :2]).all()
    np.testing.assert_array_equal(part.keypoints_visible, 1)


def test_a_mirrored_face_by_hand():
    results = scene(1, 1, [0], [[2, 0, 1, 2, 1]], 0)
    kept = points_of(results)
    results = chain(dict(type='RandomFlip', prob=1.0))(results)
    width = CELL + 3
    points = points_of(results)[0]
    assert points[:, 2].tolist() == [0, 2, 1, 1, 2]
    assert points[1].tolist() == [width - 12.5, 12.5, 2]
    assert points[3].tolist() == [width - 26.5, 28.5, 1]
    assert points[4].tolist() == [width - 13.5, 27.5, 2]
    again = chain(dict(type='RandomFlip', prob=1.0))(results)
    np.testing.assert_array_equal(points_of(again), kept)


def test_a_vertical_flip_leaves_left_and_right():
    results = scene(1, 1, [0], [[2, 0, 1, 2, 1]], 0)
    results = chain(dict(type='RandomFlip', prob=1.0, direction='vertical'))(
        results
    )
    points = points_of(results)[0]
    assert points[:, 2].tolist() == [2, 0, 1, 2, 1]
    assert points[0].tolist() == [12.5, CELL + 7 - 12.5, 2]


def test_resize_clips_boxes_and_no_landmarks():
    results = scene(1, 1, [0], [[2] * 5], 0)
    points = results['gt_bboxes'].keypoints
    points[0, 0, :2] = torch.tensor([-5, 70])
    box = torch.tensor([[-5.0, 3, 20, 70]])
    results['gt_bboxes'] = FaceBoxes.join(box, points)
    results = build('Resize', scale_factor=2.0)(results)
    assert points_of(results)[0, 0].tolist() == [-10, 140, 2]
    assert points_of(results).dtype == np.float32
    assert results['gt_bboxes'].tensor[:, :4].tolist() == [[0, 6, 40, 94]]


@pytest.mark.parametrize(
    'cfg',
    (
        dict(type='polynl_mm.Resize', scale=(60, 30)),
        dict(type='RandomFlip', prob=1.0),
        dict(type='FilterAnnotations', min_gt_bbox_wh=(25, 1)),
        dict(type='polynl_mm.RandomSquareCrop', crop_choice=[1.0]),
        dict(type='polynl_mm.PhotoMetricDistortion'),
    ),
    ids=lambda cfg: cfg['type'],
)
def test_boxes_go_with_and_without_landmarks_the_same_way(cfg):
    results = scene(1, 2, [0, 0], [[2] * 5] * 2, 0)
    plain = copy.deepcopy(results)
    plain['gt_bboxes'] = plain['gt_bboxes'].convert_to('hbox')
    set_random_seed(1)
    plain = chain(cfg)(plain)
    set_random_seed(1)
    results = chain(cfg)(results)
    if plain is None:
        assert results is None
        return
    np.testing.assert_array_equal(plain['img'], results['img'])
    np.testing.assert_array_equal(
        plain['gt_bboxes'].tensor, results['gt_bboxes'].tensor[:, :4]
    )


def moving(type, **kwargs):
    return dict(type=type, **kwargs)


@pytest.mark.parametrize(
    'cfg',
    [
        moving('Resize', scale_factor=1.7, keep_ratio=True),
        moving(
            'RandomChoiceResize',
            scales=[(250, 190), (170, 300)],
            resize_type='Resize',
            keep_ratio=False,
        ),
        moving('FixShapeResize', width=260, height=230, keep_ratio=False),
        moving('FixScaleResize', scale=(300, 220), keep_ratio=True),
        moving('ResizeShortestEdge', scale=200, max_size=333),
        moving('RandomFlip', prob=1.0, direction='horizontal'),
        moving('RandomFlip', prob=1.0, direction='vertical'),
        moving('RandomFlip', prob=1.0, direction='diagonal'),
        moving('Expand', mean=(BACK,) * 3, prob=1.0),
        moving('MinIoURandomCrop', min_ious=[0.1], min_crop_size=0.6),
        moving('RandomCrop', crop_size=(90, 80)),
        moving('RandomCenterCropPad', crop_size=(90, 80), ratios=(1.0,),
               border=32, mean=[BACK] * 3, std=[1] * 3, to_rgb=False,
               test_pad_mode=None),
        moving('RandomAffine', scaling_ratio_range=(0.9, 1.4)),
        moving('Rotate', prob=1.0, level=7),
        moving('ShearX', prob=1.0, level=7),
        moving('ShearY', prob=1.0, level=7),
        moving('TranslateX', prob=1.0, min_mag=0.2, max_mag=0.2),
        moving('TranslateY', prob=1.0, min_mag=0.2, max_mag=0.2),
        moving('RandomShift', prob=1.0),
        moving('Mosaic', img_scale=(120, 130)),
        moving('CachedMosaic', img_scale=(120, 130)),
        moving('MixUp', img_scale=(120, 130), flip_ratio=-1.0),
        moving('CachedMixUp', img_scale=(120, 130), flip_ratio=-1.0),
    ],
    ids=lambda cfg: f'{cfg["type"]}-{cfg.get("direction", "")}'.strip('-'),
)  # fmt: skip
def test_landmarks_follow_the_transforms_of_mmdet(cfg):
    """Each is on its mark, a patch of its colour in the picture."""
    flags = [[2, 1, 2, 2, 0], [2, 2, 0, 1, 2], [1] * 5, [2] * 5]
    made = scene(3, 3, [0, 1, 0, 0], flags, 3)
    others = [copy.deepcopy(made) for _ in range(4)]
    if cfg['type'] == 'RandomCenterCropPad':
        made['img'] = made['img'].astype(np.float32)
    names, contrast = [0, 1, 2, 3, 4], 1
    if cfg.get('direction') in ('horizontal', 'diagonal'):
        names = [1, 0, 2, 4, 3]
    if 'MixUp' in cfg['type']:
        # It mirrors the other picture and takes the mean of both.
        made, others = scene(3, 3, [], [], 0), others[:1]
        names, contrast = [1, 0, 2, 4, 3], 0.5
    kept = changed = 0
    for seed in range(4):
        results = copy.deepcopy(made)
        step = chain(cfg)
        if 'Cached' in cfg['type']:
            step.transforms[0].results_cache = copy.deepcopy(others)
        else:
            results['mix_results'] = copy.deepcopy(others)
        set_random_seed(seed)
        out = step(results)
        changed += not np.array_equal(out['img'], made['img'])
        out['img'] = (out['img'].astype(float) - BACK) / contrast + BACK
        check_marks(out, names, flags, set(), tolerance=4)
        kept += len(out['gt_bboxes'])
    assert kept >= 4 and changed >= 2


@pytest.mark.parametrize('with_flags', (True, False))
def test_a_filtered_face_takes_its_landmarks_with_it(with_flags):
    results = scene(2, 2, [1, 0, 1, 0], [[2] * 5] * 4, 0)
    keypoints = points_of(results)
    results['gt_bboxes'].tensor[[0, 2], 2] -= 20
    if not with_flags:
        results.pop('gt_ignore_flags')
    few = chain(dict(type='FilterAnnotations', min_gt_bbox_wh=(5, 5)))
    results = few(results)
    assert results['gt_bboxes_labels'].tolist() == [1, 3]
    np.testing.assert_array_equal(points_of(results), keypoints[[1, 3]])
    if with_flags:
        assert results['gt_ignore_flags'].tolist() == [False, False]
    else:
        assert 'gt_ignore_flags' not in results
    nothing = chain(dict(type='FilterAnnotations', min_gt_bbox_wh=(50, 50)))
    assert nothing(results) is None


def test_views_of_test_time_augmentation_carry_their_landmarks():
    results = scene(1, 1, [0], [[2, 0, 2, 2, 2]], 0)
    views = chain(
        dict(
            type='TestTimeAug',
            transforms=[
                [
                    dict(type='polynl_mm.Resize', scale_factor=1.0),
                    dict(type='polynl_mm.Resize', scale_factor=2.0),
                ],
                [
                    dict(type='RandomFlip', prob=0.0),
                    dict(type='RandomFlip', prob=1.0),
                ],
                [dict(type='polynl_mm.PackDetInputs')],
            ],
        )
    )(results)
    assert len(views['inputs']) == 4
    seen = set()
    for sample in views['data_samples']:
        part = sample.gt_instances
        right = sample.flip
        assert part.keypoints_visible[0].tolist() == (
            [0, 1, 1, 1, 1] if right else [1, 0, 1, 1, 1]
        )
        seen.add(tuple(part.keypoints[0, 2].tolist()))
    width = CELL + 3
    assert seen == {
        (20.5, 19.5),
        (width - 20.5, 19.5),
        (41, 39),
        (2 * width - 41, 39),
    }


def test_random_resize_of_mmcv_takes_ours():
    results = scene(1, 1, [0], [[2] * 5], 0)
    resize = chain(
        dict(
            type='RandomResize',
            scale=[(86, 94), (86, 94)],
            resize_type='polynl_mm.Resize',
            keep_ratio=True,
        )
    )
    results = resize(results)
    assert results['img_shape'] == (94, 86)
    assert points_of(results)[0, 2].tolist() == [41, 39, 2]


def test_landmarks_of_no_face():
    results = scene(1, 1, [], [], 0)
    assert points_of(results).shape == (0, 5, 3)
    part = build('PackDetInputs')(results)['data_samples'].gt_instances
    assert part.keypoints.shape == (0, 5, 2)
    assert part.keypoints_visible.shape == (0, 5)


def test_landmarks_are_loaded_when_asked_for_and_there():
    face = dict(bbox=[0, 0, 9, 9], bbox_label=0, ignore_flag=0)
    results = dict(img_path='a/b.jpg', instances=[face])
    plain = build('LoadAnnotations')(dict(results))
    assert type(plain['gt_bboxes']) is HorizontalBoxes
    with pytest.raises(ValueError, match='a/b.jpg.*landmark_file'):
        build('LoadAnnotations', with_keypoints=True)(dict(results))


# The crop.


def boxes_only(shape, boxes, ignored=None):
    return dict(
        img=np.zeros((*shape, 3), np.uint8),
        gt_bboxes=HorizontalBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        ),
        gt_bboxes_labels=np.arange(len(boxes)),
        gt_ignore_flags=np.array(ignored or [0] * len(boxes), bool),
    )


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.lists(
        st.tuples(*[st.integers(-5, 50)] * 2, *[st.integers(1, 30)] * 2),
        max_size=6,
    ),
    st.data(),
)
def test_the_crop_keeps_faces_by_their_centre(shape, faces, data):
    """Against a loop over faces that looks where the crop came from."""
    boxes = [[x, y, x + w, y + h] for x, y, w, h in faces]
    ignored = [data.draw(st.booleans()) for _ in boxes]
    cfg = data.draw(crops)
    results = boxes_only(shape, boxes, ignored)
    ys, xs = np.indices(shape)
    # Where a pixel came from is written into it; 200 is outside.
    results['img'] = np.dstack([xs, ys, xs]).astype(np.uint8)
    set_random_seed(data.draw(st.integers(0, 1000)))
    out = TRANSFORMS.build({**cfg, 'pad_val': 200})(results)

    side = len(out['img'])
    assert out['img'].shape == (side, side, 3)
    assert out['img_shape'] == (side, side)
    ys, xs = np.nonzero(out['img'][..., 0] != 200)
    x, y = out['img'][ys[0], xs[0], :2].astype(int)
    left, top = x - xs[0], y - ys[0]
    for j, i in ((ys[0], xs[0]), (ys[-1], xs[-1])):
        assert out['img'][j, i, :2].tolist() == [i + left, j + top]
    padded = side == max(shape) and (left, top) == (0, 0)
    if not (padded and cfg['fallback'] == 'pad'):
        sides = [max(int(f * min(shape)), 1) for f in cfg['crop_choice']]
        assert side in sides
        for offset, length in ((left, shape[1]), (top, shape[0])):
            room = length - side
            assert min(room, 0) <= offset <= max(room, 0)

    kept, expected = [], []
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        cx, cy = (x1 + x2) / 2 - left, (y1 + y2) / 2 - top
        if 0 < cx < side and 0 < cy < side:
            box = [x1 - left, y1 - top, x2 - left, y2 - top]
            if cfg['bbox_clip_border']:
                box = [min(max(c, 0), side) for c in box]
            kept.append(i)
            expected.append(box)
    assert out['gt_bboxes_labels'].tolist() == kept
    assert out['gt_bboxes'].tensor.tolist() == expected
    assert out['gt_ignore_flags'].tolist() == [ignored[i] for i in kept]


def test_a_centre_on_the_edge_is_not_inside():
    boxes = [[-2, 3, 2, 5], [4, 8, 6, 12], [4, 4, 6, 6], [3, -1, 4, 1]]
    crop = build('RandomSquareCrop', crop_choice=[1.0])
    out = crop(boxes_only((10, 10), boxes))
    assert out['gt_bboxes_labels'].tolist() == [2]


def test_the_crop_waits_for_a_face():
    boxes = [[900, 400, 910, 410], [0, 0, 500, 500]]
    results = boxes_only((1000, 1000), boxes, [0, 1])
    crop = build('RandomSquareCrop', crop_choice=[0.3])
    for seed in range(20):
        set_random_seed(seed)
        assert 0 in crop(copy.deepcopy(results))['gt_bboxes_labels']


def test_the_crop_waits_for_a_whole_face_if_told():
    boxes = [[400, 400, 600, 600]]
    results = boxes_only((1000, 1000), boxes)
    cut = 0
    for whole in (False, True):
        crop = build(
            'RandomSquareCrop', crop_choice=[0.3], need_whole_box=whole
        )
        for seed in range(20):
            set_random_seed(seed)
            (box,) = crop(copy.deepcopy(results))['gt_bboxes'].tensor.tolist()
            inside = min(box) >= 0 and max(box) <= 300
            assert inside or not whole
            cut += not inside
    assert cut


@pytest.mark.parametrize('fallback, side', (('last', 30), ('pad', 200)))
def test_the_crop_gives_up(fallback, side):
    # No square of 30 pixels has the centre of a face outside the picture.
    results = boxes_only((100, 200), [[300, 300, 310, 310]])
    crop = build(
        'RandomSquareCrop',
        crop_choice=[0.3],
        fallback=fallback,
        pad_val=(1, 2, 3),
    )
    out = crop(results)
    assert out['img'].shape == (side, side, 3)
    assert len(out['gt_bboxes']) == len(out['gt_bboxes_labels']) == 0
    if fallback == 'pad':
        assert out['img'][150, 20].tolist() == [1, 2, 3]
        assert out['img'][20, 20].tolist() == [0, 0, 0]


@pytest.mark.parametrize('boxes, ignored', (([], []), ([[9, 9, 12, 12]], [1])))
def test_the_crop_without_a_face_to_learn_takes_the_first(boxes, ignored):
    crop = build('RandomSquareCrop', crop_choice=[0.3, 2.0])
    sides, places = set(), set()
    for seed in range(30):
        set_random_seed(seed)
        out = crop(boxes_only((100, 200), boxes, ignored))
        sides.add(len(out['img']))
        places.add(tuple(out['homography_matrix'][:2, 2]))
    assert sides == {30, 200} and len(places) > 20


def test_the_crop_is_reproducible_and_caches():
    results = scene(2, 2, [0] * 4, [[2] * 5] * 4, 0)
    crop = build('RandomSquareCrop')

    def go():
        return crop(copy.deepcopy(results))['homography_matrix'].tolist()

    set_random_seed(3)
    first = [go() for _ in range(5)]
    set_random_seed(3)
    assert [go() for _ in range(5)] == first
    assert len({str(matrix) for matrix in first}) > 1
    with cache_random_params([crop]):
        assert len({str(go()) for _ in range(5)}) == 1


def test_the_crop_takes_a_range_and_plain_arrays():
    crop = build('RandomSquareCrop', crop_ratio_range=(0.5, 0.6))
    results = boxes_only((100, 100), [[40, 40, 60, 60]])
    results['gt_bboxes'] = results['gt_bboxes'].numpy()
    sides = set()
    for seed in range(20):
        set_random_seed(seed)
        out = crop(copy.deepcopy(results))
        assert isinstance(out['gt_bboxes'], np.ndarray)
        sides.add(len(out['img']))
    assert min(sides) >= 50 and max(sides) <= 60 and len(sides) > 3
    assert 'crop_ratio_range=(0.5, 0.6)' in repr(crop)


def test_the_crop_of_a_bare_picture_records_its_homography():
    results = dict(
        img=np.zeros((60, 80), np.uint8),
        homography_matrix=np.diag([2, 2, 1]).astype(np.float32),
    )
    set_random_seed(0)
    out = build('RandomSquareCrop', crop_choice=[0.5])(results)
    matrix = out['homography_matrix']
    assert out['img'].shape == (30, 30)
    assert matrix[0, 0] == 2 and matrix[0, 2] < 0 and matrix[1, 2] < 0


@pytest.mark.parametrize(
    'kwargs, message',
    (
        (dict(crop_choice=[0.3], crop_ratio_range=(1, 2)), 'got both'),
        (dict(crop_choice=[]), 'factors must be above 0'),
        (dict(crop_choice=[0.3, 0]), 'factors must be above 0'),
        (dict(crop_ratio_range=(2, 1)), 'least, most'),
        (dict(crop_ratio_range=(1, 2, 3)), 'least, most'),
        (dict(num_factors=0), 'num_factors must be at least 1'),
        (dict(num_offsets=0), 'num_offsets must be at least 1'),
        (dict(fallback='none'), "'last' or 'pad', got 'none'"),
    ),
)
def test_wrong_arguments_of_the_crop(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build('RandomSquareCrop', **kwargs)


def test_the_crop_refuses_what_it_would_leave_behind():
    results = boxes_only((9, 9), [[1, 1, 3, 3]])
    results['gt_seg_map'] = np.zeros((9, 9))
    with pytest.raises(ValueError, match='gt_seg_map'):
        build('RandomSquareCrop')(results)


# The distortion.


def slow_distortion(image, flags):
    """Pixel by pixel with the standard library."""
    import colorsys

    first, bright, contrast, saturate, turn, _, b, c, s, h, _ = flags
    out = np.empty(image.shape)
    for at in np.ndindex(image.shape[:2]):
        bgr = image[at].astype(float)
        if bright:
            bgr = np.clip(bgr + b, 0, 255)
        if contrast and first:
            bgr = np.clip(bgr * c, 0, 255)
        hue, sat, val = colorsys.rgb_to_hsv(*bgr[::-1] / 255)
        if saturate:
            sat = min(sat * s, 1)
        if turn:
            hue = (hue + h / 360) % 1
        bgr = np.array(colorsys.hsv_to_rgb(hue, sat, val))[::-1] * 255
        if contrast and not first:
            bgr = np.clip(bgr * c, 0, 255)
        out[at] = bgr
    return out


def test_distortion_against_a_slow_one():
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    distortion = build('PhotoMetricDistortion', hue_delta=36)
    for seed in range(40):
        set_random_seed(seed)
        out = distortion(dict(img=image))['img']
        set_random_seed(seed)
        flags = distortion._random_flags()
        assert out.dtype == np.float32
        assert 0 <= out.min() and out.max() <= 255
        np.testing.assert_allclose(
            out, slow_distortion(image, flags), atol=0.02
        )


# Reading pictures.


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / 'event' / 'face.jpg'
    file.parent.mkdir()
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 96, 3), np.uint8)
    assert cv2.imwrite(str(file), cv2.GaussianBlur(image, (0, 0), 2))
    return file


def load(file, **kwargs):
    return build('LoadImageFromFile', **kwargs)(dict(img_path=str(file)))


def test_a_whole_picture_is_read_as_mmcv_reads_it(picture):
    from mmcv.transforms import LoadImageFromFile

    ours = load(picture, to_float32=True)
    theirs = LoadImageFromFile(to_float32=True)(dict(img_path=str(picture)))
    assert ours.keys() == theirs.keys()
    assert ours['img_shape'] == ours['ori_shape'] == (64, 96)
    np.testing.assert_array_equal(ours['img'], theirs['img'])
    # Behind the end, anything may follow.
    picture.write_bytes(picture.read_bytes() + b'\0' * 9)
    load(picture)


@pytest.mark.parametrize('backend', ('cv2', 'pillow'))
@pytest.mark.parametrize('share', (0.02, 0.3, 0.6, 0.9, 0.999))
def test_a_truncated_picture_is_named(picture, share, backend):
    whole = picture.read_bytes()
    picture.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match='event/face.jpg: truncated'):
        load(picture, imdecode_backend=backend)
    assert load(picture, ignore_empty=True) is None


def test_a_thumbnail_hides_no_truncation(picture):
    whole = picture.read_bytes()
    # As in an Exif segment: a JPEG within the header of a JPEG.
    segment = b'\xff\xe1' + (len(whole) + 2).to_bytes(2, 'big') + whole
    nested = whole[:2] + segment + whole[2:]
    picture.write_bytes(nested)
    load(picture)
    picture.write_bytes(nested[:-500])
    with pytest.raises(ValueError, match='truncated'):
        load(picture)


@pytest.mark.parametrize(
    'content, message',
    (
        (b'', 'empty'),
        (b'no picture', 'not a readable picture'),
        (b'\xff\xd8\xff\xd9', 'truncated'),
    ),
)
def test_what_is_no_picture_is_named(picture, content, message):
    picture.write_bytes(content)
    with pytest.raises(ValueError, match=f'event/face.jpg: {message}'):
        load(picture)


def test_a_png_with_a_hole_is_named(picture):
    image = cv2.imread(str(picture))
    data = cv2.imencode('.png', image)[1].tobytes()
    picture.write_bytes(data[:100])
    with pytest.raises(ValueError, match='event/face.jpg'):
        load(picture, imdecode_backend='pillow')


def test_a_picture_may_be_too_large(picture):
    """It is not decoded."""
    load(picture, max_pixels=64 * 96)
    said = 'event/face.jpg: 96x64 pixels are more than max_pixels=6143'
    with pytest.raises(ValueError, match=said):
        load(picture, max_pixels=64 * 96 - 1)


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='event/none.jpg'):
        load(tmp_path / 'event/none.jpg')


def test_outdated_argument_is_refused():
    with pytest.raises(ValueError, match='backend_args'):
        build('LoadImageFromFile', file_client_args=dict(backend='disk'))


@pytest.mark.parametrize(
    'most, shape', [(None, (200, 400)), (400, (200, 400)), (120, (60, 120))]
)
def test_a_limit_of_the_longer_side(most, shape):
    resize = transforms.Resize(
        scale_factor=4.0, keep_ratio=True, max_side=most
    )
    results = resize.transform(dict(img=np.zeros((50, 100, 3), np.uint8)))
    assert results['img_shape'] == results['img'].shape[:2] == shape


def test_boxes_and_centres_at_the_edge_of_a_square():
    """The whole box may touch it, a centre must be strictly inside."""
    boxes, corner = np.array([[0, 0, 10, 10], [10, 0, 10, 6]], float), [0, 0]
    corner = np.array(corner, float)
    assert transforms._within(boxes, corner, 10).tolist() == [True, True]
    assert transforms._within(boxes, corner, 9).tolist() == [False, False]
    assert transforms._centred(boxes, corner, 10).tolist() == [True, False]
