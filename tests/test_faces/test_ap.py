"""The protocol: counted by hand, against a slow truth, on the real faces."""

import time

import numpy as np
import pytest
from oracles import wider_face_loop

from polynl_mm.faces.ap import (
    average_precision,
    evaluate,
    misread,
    precision_recall,
)
from polynl_mm.faces.files import load_wider_face_gt

SETTINGS = ('easy', 'medium', 'hard')


def all_kept(*boxes):
    return boxes, {'hard': range(1, len(boxes) + 1)}


def curve_of(write, folder, pictures):
    """Give gt, predictions and the curve of hard.

    ``pictures`` is {'event/name': (boxes, kept, rows)}.
    """
    gt = load_wider_face_gt(write.gt(folder / 'gt', pictures))
    rows = {image: picture[2] for image, picture in pictures.items()}
    return precision_recall(gt, rows)['hard']


# Counted by hand


def test_curve_counted_by_hand(three):
    curve = precision_recall(*three)['hard']
    proposals = np.repeat([1, 2, 3, 4, 5], [333, 167, 166, 333, 1])
    hits = np.repeat([1, 2], [666, 334])
    np.testing.assert_array_equal(curve.recall, hits / 3)
    np.testing.assert_array_equal(curve.precision, hits / proposals)
    assert average_precision(curve) == pytest.approx(0.5, abs=1e-15)


def test_every_setting_is_of_its_own_faces(three):
    # Medium keeps the second face of A, too: one more find, of four faces,
    # and nothing is dropped in A. Easy: one find, of two faces, at once.
    ap = evaluate(*three)
    assert ap['medium'] == pytest.approx(1 / 2 + 3 / 5 * 1 / 4)
    # Faces 1 and 3 of A are dropped; the false one comes later.
    assert ap['easy'] == 0.5
    assert list(ap) == list(SETTINGS)


def test_sides_count_both_end_pixels(tmp_path, write):
    # Exactly 0.5 so, 0.43 otherwise.
    rows = [(2, 0, 5, 5, 0.9), (300, 300, 5, 5, 0.1)]
    pictures = {'e/i': (*all_kept((0, 0, 5, 5)), rows)}
    curve = curve_of(write, tmp_path, pictures)
    assert average_precision(curve) == 1


def test_no_second_best_face(tmp_path, write):
    rows = [
        (1, 0, 20, 20, 0.9),
        (2, 0, 20, 20, 0.8),
        (400, 400, 10, 10, 0.1),
    ]
    boxes = all_kept((0, 0, 20, 20), (6, 0, 20, 20))
    curve = curve_of(write, tmp_path, {'e/i': (*boxes, rows)})
    assert average_precision(curve) == 0.5
    # The second had IoU 0.68 with the second face.
    first = curve_of(write, tmp_path, {'e/i': (*boxes, [rows[0], rows[2]])})
    assert first.recall[-1] == 0.5 and first.precision[0] == 1


def test_first_of_equal_faces(tmp_path, write):
    boxes = [(0, 0, 9, 9), (0, 0, 9, 9)]
    rows = [(0, 0, 9, 9, 0.9), (50, 50, 9, 9, 0.1)]
    for kept, recall in ([1], 1), ([2], 0):
        picture = boxes, {'hard': kept}, rows
        curve = curve_of(write, tmp_path, {'e/i': picture})
        assert curve.recall[-1] == recall


@pytest.mark.parametrize('score', (0.25, 0, -7.5, 1e300))
def test_equal_scores_everywhere_are_one_point(tmp_path, write, score):
    rows = [(0, 0, 9, 9, score), (50, 50, 9, 9, score)]
    pictures = {
        'e/i': (*all_kept((0, 0, 9, 9)), rows),
        'e/j': (*all_kept((0, 0, 9, 9)), rows[1:]),
    }
    curve = curve_of(write, tmp_path, pictures)
    assert curve.recall.tolist() == [0] * 999 + [1 / 2]
    assert curve.precision.tolist() == [0] * 999 + [1 / 3]
    assert average_precision(curve) == pytest.approx(1 / 6)


def test_one_score_far_out_moves_all_thresholds(tmp_path, write):
    rows = [(0, 0, 9, 9, 0.9), (50, 50, 9, 9, 0.1)]
    pictures = {
        'e/i': (*all_kept((0, 0, 9, 9)), rows),
        'e/j': ([], {}, [(0, 0, 9, 9, 1e6)]),
    }
    # Only the last threshold is below 0.9 and 0.1 now. The outlier itself,
    # in a picture without any box, is not counted.
    curve = curve_of(write, tmp_path, pictures)
    assert curve.precision.tolist() == [0] * 999 + [1 / 2]


def test_degenerate_kept_face_counts_and_is_never_found(tmp_path, write):
    boxes = all_kept((0, 0, 9, 9), (30, 30, -2, 12))
    rows = [
        (0, 0, 9, 9, 0.9),
        (30, 30, -2, 12, 0.8),
        (28, 30, 2, 12, 0.7),
        (99, 99, 5, 5, 0.1),
    ]
    curve = curve_of(write, tmp_path, {'e/i': (*boxes, rows)})
    assert curve.recall[-1] == 0.5
    assert curve.precision[-1] == 1 / 4


def test_boxes_of_any_size(tmp_path, write):
    # Areas that are infinite, negative, or such that a union would be 0.
    rows = [
        (0, 0, 9, 9, 0.9),
        (-1e308, -1e308, 1.7e308, 1.7e308, 0.8),
        (1e308, 1e308, 1e308, 1e308, 0.7),
        (-1e308, 0, -1.7e308, 1e308, 0.6),
        (3, 3, -102, 0, 0.5),
        (0, 0, 0, 0, 0.4),
    ]
    with np.errstate(all='raise'):
        curve = curve_of(
            write, tmp_path, {'e/i': (*all_kept((0, 0, 9, 9)), rows)}
        )
    assert curve.recall[-1] == 1 and curve.precision[-1] == 1 / 6


def test_nothing_detected(three):
    gt, rows = three
    assert evaluate(gt, dict.fromkeys(rows, ())) == dict.fromkeys(SETTINGS, 0)
    assert evaluate(gt, {}, missing_as_empty=True) == dict.fromkeys(
        SETTINGS, 0
    )


def test_a_setting_without_faces_has_no_ap(tmp_path, write):
    picture = [(0, 0, 9, 9)], {'easy': [1]}, [(0, 0, 9, 9, 0.5)]
    gt = load_wider_face_gt(write.gt(tmp_path, {'e/i': picture}))
    ap = evaluate(gt, {'e/i': picture[2]})
    assert ap['easy'] == 1
    assert np.isnan(ap['medium']) and np.isnan(ap['hard'])


def test_threshold_by_threshold(tmp_path, write):
    # 1 - 0.7 is above 0.3 in floats, 1 - 0.5 is 0.5: reached are 0.3 only at
    # the threshold after its own, 0.5 at its own.
    rows = [(50, 50, 9, 9, s) for s in (0.0, 0.3, 0.5, 1.0)]
    pictures = {'e/i': (*all_kept((50, 50, 9, 9)), rows)}
    precision = curve_of(write, tmp_path, pictures).precision
    assert 1 - 700 / 1000 > 0.3
    counts = np.round(1 / precision).astype(int)
    np.testing.assert_array_equal(
        counts, np.repeat([1, 2, 3, 4], [499, 201, 299, 1])
    )


# Against the loop


def random_pictures(rng, mode):
    """Small pictures with everything that is rare in real ones."""
    pictures = {}
    for i in range(14):
        size = int(rng.choice([0, 1, 2, 5, 12, 40]))
        if i == 7:
            size = 270  # indices that need 16 bits
        boxes = np.column_stack(
            [rng.integers(0, 60, (size, 2)), rng.integers(1, 25, (size, 2))]
        )
        if size > 2:
            boxes[1] = boxes[0]
            boxes[2, 2] = rng.choice([-2, -1, 0])
        if size == 0 and rng.random() < 0.5:
            boxes = np.zeros((1, 4), int)
        level = rng.random(len(boxes))
        kept = {
            setting: 1 + np.flatnonzero(level < share)
            for setting, share in zip(SETTINGS, (0.3, 0.6, 0.9))
        }
        if rng.random() < 0.2:
            kept = {'hard': kept['hard']}
        repeats = rng.integers(0, 4)
        rows = np.concatenate(
            [
                np.repeat(boxes, repeats, 0),
                np.column_stack(
                    [
                        rng.integers(0, 60, (9, 2)),
                        rng.integers(-3, 25, (9, 2)),
                    ]
                ),
            ]
        ).astype(float)
        rows += rng.choice([0, 0, 0.25, 1, -1, 2, 3], rows.shape)
        if mode == 'fractions':
            rows += rng.normal(0, 0.5, rows.shape)
        n = len(rows)
        score = {
            'thresholds': rng.integers(0, 1001, n) / 1000,
            'fractions': rng.random(n),
            'logits': rng.normal(-3, 9, n).round(1),
            'two': rng.choice([0.1, 0.7], n),
            'same': np.full(n, 0.3),
        }[mode]
        rows = np.column_stack([rows, score])[rng.permutation(n)]
        if rng.random() < 0.15:
            rows = rows[:0]
        kept = {s: kept.get(s, np.empty(0, int)).tolist() for s in SETTINGS}
        image = f'{i % 3}--Event/{i % 3}_Event_{i}'
        pictures[image] = boxes.tolist(), kept, rows.tolist()
    # As sorted into their events by the official files.
    return dict(sorted(pictures.items()))


def check_against_loop(gt, rows, pictures):
    curves = precision_recall(gt, rows)
    for setting, (ap, recalls, precisions) in wider_face_loop(
        pictures
    ).items():
        curve = curves[setting]
        np.testing.assert_array_equal(curve.recall, recalls)
        np.testing.assert_array_equal(curve.precision, precisions)
        assert average_precision(curve) == pytest.approx(ap, abs=1e-13)
    return {name: average_precision(c) for name, c in curves.items()}


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize(
    'mode', ('thresholds', 'fractions', 'logits', 'two', 'same')
)
def test_agrees_with_the_loop(tmp_path, write, mode, seed):
    pictures = random_pictures(np.random.default_rng(seed), mode)
    gt = load_wider_face_gt(write.gt(tmp_path, pictures))
    assert gt.images == tuple(pictures)
    rows = {image: picture[2] for image, picture in pictures.items()}
    ap = check_against_loop(gt, rows, list(pictures.values()))
    assert 0 < ap['hard'] < 1


def test_blocks_are_as_good_as_one(three, monkeypatch):
    from polynl_mm.faces import ap

    expected = precision_recall(*three)
    monkeypatch.setattr(ap, '_PAIRS', 1)
    for setting, curve in precision_recall(*three).items():
        np.testing.assert_array_equal(curve, expected[setting])


# On the real faces


def perturbed(gt, seed, decimals=None, integer=False, false_ones=110):
    """Detections as of a real detector, by picture, in random order.

    Low faces are missed more often, one in three found ones comes again and
    again with a worse box, and there are ``false_ones`` per picture.
    """
    rng = np.random.default_rng(seed)
    rows = {}
    for i, image in enumerate(gt.images):
        boxes = gt.boxes[gt.starts[i] : gt.starts[i + 1]]
        found = rng.random(len(boxes)) < 1 / (
            1 + np.exp((12 - boxes[:, 3]) / 6)
        )
        parts = []
        for again in range(3):
            share = 1 if again == 0 else 0.3
            some = boxes[found & (rng.random(len(boxes)) < share)]
            sides = np.maximum(some[:, [2, 3, 2, 3]], 1)
            noise = rng.normal(0, 0.08 * (1 + again), some.shape)
            score = rng.beta(6, 2, len(some)) - 0.15 * again
            score += 0.002 * np.minimum(some[:, 3], 60)
            parts.append(np.column_stack([some + noise * sides, score]))
        n = rng.poisson(false_ones)
        w = 3 + rng.gamma(2, 12, n)
        parts.append(
            np.column_stack(
                [
                    rng.uniform(0, 1000, n),
                    rng.uniform(0, 750, n),
                    w,
                    w * rng.uniform(0.9, 1.4, n),
                    rng.beta(1, 12, n),
                ]
            )
        )
        rows[image] = rng.permutation(np.concatenate(parts))
        if decimals is not None:
            rows[image][:, 4] = rows[image][:, 4].round(decimals)
        if integer:
            rows[image][:, :4] = np.trunc(rows[image][:, :4])
    return rows


def part_of(gt, step):
    """Every so manieth picture of a ground truth, and as plain lists."""
    chosen = range(0, len(gt.images), step)
    faces = [slice(*gt.starts[i : i + 2]) for i in chosen]
    part = gt._replace(
        images=tuple(gt.images[i] for i in chosen),
        boxes=np.concatenate([gt.boxes[f] for f in faces]),
        starts=np.cumsum([0, *(f.stop - f.start for f in faces)]),
        kept={
            setting: np.concatenate([kept[f] for f in faces])
            for setting, kept in gt.kept.items()
        },
    )
    lists = [
        (
            gt.boxes[f].tolist(),
            {
                setting: (1 + np.flatnonzero(kept[f])).tolist()
                for setting, kept in gt.kept.items()
            },
        )
        for f in faces
    ]
    return part, lists


def test_real_ground_truth_has_the_published_counts(real_gt):
    assert len(real_gt.images) == 3226
    assert real_gt.boxes.shape == (39708, 4)
    counts = {s: int(kept.sum()) for s, kept in real_gt.kept.items()}
    assert counts == dict(easy=7211, medium=13319, hard=31958)
    easy, medium, hard = real_gt.kept.values()
    assert not (easy & ~medium).any() and not (medium & ~hard).any()
    empty = {
        setting: sum(
            not part.any() for part in np.split(kept, real_gt.starts[1:-1])
        )
        for setting, kept in real_gt.kept.items()
    }
    assert empty == dict(easy=622, medium=207, hard=7)
    assert np.diff(real_gt.starts).max() == 709
    degenerate = hard & (real_gt.boxes[:, 2] == -2)
    assert np.flatnonzero(degenerate).size == 1
    picture = np.searchsorted(real_gt.starts, np.argmax(degenerate), 'right')
    assert real_gt.images[picture - 1] == (
        '39--Ice_Skating/39_Ice_Skating_iceskiing_39_583'
    )


@pytest.mark.parametrize(
    'seed, change',
    ((0, {}), (1, dict(decimals=3)), (2, dict(integer=True))),
)
def test_real_faces_agree_with_the_loop(real_gt, seed, change):
    gt, lists = part_of(real_gt, 8)
    rows = perturbed(gt, seed, **change)
    pictures = [
        (*each, row.tolist()) for each, row in zip(lists, rows.values())
    ]
    ap = check_against_loop(gt, rows, pictures)
    assert 0.5 < ap['hard'] < ap['easy'] < 1


def test_real_faces_detected_as_annotated(real_gt):
    rows = {
        image: np.column_stack(
            [boxes, np.linspace(0, 1, len(boxes) + 2)[1:-1]]
        )
        for image, boxes in zip(
            real_gt.images, np.split(real_gt.boxes, real_gt.starts[1:-1])
        )
    }
    curves = precision_recall(real_gt, rows)
    # Some faces are annotated twice: the double one is never found. One of
    # the kept ones is degenerate.
    for curve in curves.values():
        assert 0.999 < curve.recall[-1] <= 1
    assert curves['hard'].recall[-1] < 1
    assert average_precision(curves['hard']) > 0.999


def test_whole_val_set_takes_seconds(real_gt):
    rows = perturbed(real_gt, 0)
    assert sum(map(len, rows.values())) > 390_000
    start = time.process_time()
    evaluate(real_gt, rows)
    # 0.2 s where nothing else runs; a loop over detections takes 10.
    assert time.process_time() - start < 2


# Arrays


def test_missing_and_unknown_pictures(three):
    gt, rows = three
    some = {image: rows[image] for image in gt.images[1:]}
    with pytest.raises(ValueError, match='a--A/A; missing are 1 of 3'):
        evaluate(gt, some)
    with pytest.raises(ValueError, match='a--A/A; missing are 1 of 3'):
        precision_recall(gt, some)
    as_empty = evaluate(gt, some, missing_as_empty=True)
    assert as_empty == evaluate(gt, {**some, 'a--A/A': []})
    with pytest.raises(ValueError, match="'a--A/D': the ground truth has no"):
        evaluate(gt, {**rows, 'a--A/D': []}, missing_as_empty=True)


def test_boxes_that_are_read_another_way(tmp_path, write):
    faces = np.array(
        [(100, 100, 20, 20), (200, 100, 30, 20), (100, 300, 25, 25)], float
    )
    low, size = np.split(faces, 2, 1)
    ways = {
        None: (low, size),
        'x1 y1 x2 y2': (low, low + size),
        'the centre, width, height': (low + size / 2, size),
    }
    for way, boxes in ways.items():
        rows = np.hstack([*boxes, np.ones((3, 1))])
        pictures = {'a--A/A': (*all_kept(*faces), rows)}
        gt = load_wider_face_gt(write.gt(tmp_path / 'gt', pictures))
        met = 0 if way else 3
        assert misread(gt, {'a--A/A': rows}) == (met, way)


@pytest.mark.parametrize('bad', (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize('column', (0, 4))
def test_numbers_that_are_none(three, bad, column):
    gt, rows = three
    broken = np.array(rows['b--B/C'])
    broken[1, column] = bad
    with pytest.raises(ValueError, match=r'of b--B/C, row 1: got \['):
        evaluate(gt, {**rows, 'b--B/C': broken})


def test_scores_further_apart_than_a_float_holds(three):
    gt, rows = three
    far = [(1, 1, 9, 9, 1.7e308), (1, 1, 9, 9, -1.7e308)]
    with pytest.raises(ValueError, match='range that float64 holds'):
        evaluate(gt, {**rows, 'b--B/C': far})


def test_rows_of_another_shape(three):
    gt, rows = three
    for wrong in (np.ones((3, 4)), np.ones(5), np.ones((1, 2, 5))):
        with pytest.raises(ValueError, match='a--A/A have shape'):
            evaluate(gt, {**rows, 'a--A/A': wrong})
