"""Average precision of WIDER Face, by its official protocol.

The protocol is that of the data set's MATLAB toolbox, ``eval_tools`` (Yang et
al., WIDER FACE: A Face Detection Benchmark, CVPR 2016), and its Python ports:

1. Scores are brought to [0, 1] by their minimum and maximum over all
   pictures: s' = (s - min) / (max - min), or 0 where all are equal.
2. Sides of boxes count both end pixels, w + 1 and h + 1, in areas and in
   overlaps. In every picture a detection belongs to the face with the largest
   IoU (the first of equals), if that is at least 0.5. All annotated faces
   take part, also those that a setting does not keep.
3. In a setting, a detection of a face that is not kept is dropped. Of those
   of a kept face the one with the highest score finds it. All others, and
   those of no face, are false.
4. Precision and recall are taken at the 1000 thresholds 0.999, 0.998, ... 0
   of s'; recall is of all kept faces.
5. AP is the area under the precision made non-increasing, over all points.

The matching in 2 depends on no setting and on no score, so it is done once.
What a threshold counts are then sets: the faces that a detection above it
belongs to, and the detections above it that are not dropped. So each setting
is two cumulative histograms, and the order of detections, which the official
tools sort by score, can not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from .files import PREDICTION, GroundTruth

THRESHOLDS = 1 - np.arange(1, 1001) / 1000
# Pairs of a face and a detection looked at together: what fits into a cache.
_PAIRS = 1 << 15


class Curve(NamedTuple):
    """Precision and recall at the thresholds 0.999, 0.998, ... 0."""

    recall: np.ndarray
    """(1000,) float64, never decreasing; nan where no face is kept."""
    precision: np.ndarray
    """(1000,) float64; 0 where there is no detection yet."""


def evaluate(
    gt: GroundTruth,
    predictions: Mapping[str, np.ndarray],
    missing_as_empty: bool = False,
) -> dict[str, float]:
    """Average precision of the three settings.

    Args:
        gt (GroundTruth): See :func:`~.files.load_wider_face_gt`.
        predictions (Mapping[str, ndarray]): See :func:`precision_recall`.
        missing_as_empty (bool): See :func:`precision_recall`.

    Returns:
        dict[str, float]: ``easy``, ``medium`` and ``hard`` as fractions in
        [0, 1], nan where the setting keeps no face.
    """
    curves = precision_recall(gt, predictions, missing_as_empty)
    return {name: average_precision(curve) for name, curve in curves.items()}


def precision_recall(
    gt: GroundTruth,
    predictions: Mapping[str, np.ndarray],
    missing_as_empty: bool = False,
    track: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Curve]:
    """Precision and recall of the three settings, by the official protocol.

    Args:
        gt (GroundTruth): See :func:`~.files.load_wider_face_gt`.
        predictions (Mapping[str, ndarray]): By picture, ``event/name``, an
            (n, 5) array, n >= 0, in any order: left, top, width, height in
            pixels of the original picture, score of any finite range. As one
            outlying score moves all thresholds, predictions of all pictures
            are needed together.
        missing_as_empty (bool): Take a missing picture for one without
            detections instead of refusing.
        track (Callable): Passes an iterable of the pictures on; shows
            progress, for example.

    Returns:
        dict[str, Curve]: For ``easy``, ``medium`` and ``hard``.

    Raises:
        ValueError: Predictions of an unknown picture, none of a known one, of
            another shape, or NaN or infinity in them.
    """
    rows = _in_order(gt, predictions, missing_as_empty)
    ends = np.cumsum([0, *map(len, rows)])
    rows = np.concatenate(rows)
    infinite = np.flatnonzero(~np.isfinite(rows).all(1))
    if infinite.size:
        image = np.searchsorted(ends, infinite[0], 'right') - 1
        raise ValueError(
            f'predictions of {gt.images[image]}, row '
            f'{infinite[0] - ends[image]}: got {rows[infinite[0]].tolist()}, '
            f'expected finite {PREDICTION}'
        )
    face = _match(gt, rows, ends, track)

    # Position of the first, so highest, threshold that a score reaches, of
    # every detection and of the best of every face.
    reached = THRESHOLDS.size - np.searchsorted(
        THRESHOLDS[::-1], _normalised(rows[:, 4]), 'right'
    )
    of_a_face = face >= 0
    best = np.full(len(gt.boxes), THRESHOLDS.size)
    np.minimum.at(best, face[of_a_face], reached[of_a_face])
    # The toolbox passes over pictures without any box, false ones and all.
    counted = np.repeat(np.diff(gt.starts) > 0, np.diff(ends))

    curves = {}
    for setting, kept in gt.kept.items():
        proposed = counted.copy()
        proposed[of_a_face] = kept[face[of_a_face]]
        proposals, hits = _at_thresholds(reached[proposed], best[kept])
        faces = np.count_nonzero(kept)
        recall = hits / faces if faces else np.full(hits.shape, np.nan)
        curves[setting] = Curve(recall, hits / np.maximum(proposals, 1))
    return curves


def misread(
    gt: GroundTruth, predictions: Mapping[str, np.ndarray]
) -> tuple[int, str | None]:
    """Say whether boxes meet faces only where they are read in another way.

    To be asked where AP is near 0, as it costs three matchings.

    Args:
        gt (GroundTruth): See :func:`~.files.load_wider_face_gt`.
        predictions (Mapping[str, ndarray]): See :func:`precision_recall`;
            a missing picture is one without detections.

    Returns:
        tuple[int, str or None]: How many faces a detection overlaps by an IoU
        of 0.5, and another layout of the boxes by which there are more than
        ten times as many, and more than a hundredth of all.
    """
    rows = _in_order(gt, predictions, missing_as_empty=True)
    ends = np.cumsum([0, *map(len, rows)])
    rows = np.concatenate(rows)

    def met(boxes: np.ndarray) -> int:
        face = _match(gt, boxes, ends, iter)
        return len(np.unique(face[face >= 0]))

    low, second = rows[:, :2], rows[:, 2:4]
    as_they_are = met(rows)
    for layout, boxes in (
        ('x1 y1 x2 y2', (low, second - low)),
        ('the centre, width, height', (low - second / 2, second)),
    ):
        if met(np.hstack(boxes)) > max(10 * as_they_are, len(gt.boxes) / 100):
            return as_they_are, layout
    return as_they_are, None


def _at_thresholds(*reached: np.ndarray) -> list[np.ndarray]:
    """Count, at each threshold, those that have reached it by then."""
    n = THRESHOLDS.size
    return [np.bincount(r, minlength=n)[:n].cumsum() for r in reached]


def _in_order(
    gt: GroundTruth,
    predictions: Mapping[str, np.ndarray],
    missing_as_empty: bool,
) -> list[np.ndarray]:
    """Give the (n, 5) float64 predictions of every picture."""
    unknown = predictions.keys() - set(gt.images)
    if unknown:
        raise ValueError(
            f'predictions of {min(unknown, key=str)!r}: the ground truth has '
            f'no such picture; unknown are {len(unknown)} of '
            f'{len(predictions)}'
        )
    missing = [image for image in gt.images if image not in predictions]
    if missing and not missing_as_empty:
        raise ValueError(
            f'no predictions of {missing[0]}; missing are {len(missing)} of '
            f'{len(gt.images)} pictures of the ground truth: give those '
            f'without detections as empty, or set missing_as_empty=True'
        )
    rows = []
    for image in gt.images:
        row = np.asarray(predictions.get(image, ()), np.float64)
        if row.size == 0:
            row = row.reshape(0, 5)
        if row.ndim != 2 or row.shape[1] != 5:
            raise ValueError(
                f'predictions of {image} have shape {row.shape}, expected '
                f'(detections, 5): {PREDICTION}'
            )
        rows.append(row)
    return rows


def _normalised(score: np.ndarray) -> np.ndarray:
    if score.size == 0:
        return score
    low, high = score.min(), score.max()
    if low == high:
        return np.zeros_like(score)
    with np.errstate(over='ignore'):
        span = high - low
    if span == np.inf:
        raise ValueError(
            f'scores from {low} to {high}: expected a range that float64 holds'
        )
    return (score - low) / span


def _match(
    gt: GroundTruth,
    rows: np.ndarray,
    ends: np.ndarray,
    track: Callable[[Iterable], Iterable],
) -> np.ndarray:
    """Find the face of every detection.

    Args:
        gt (GroundTruth): m faces.
        rows (ndarray): (p, 5) float64, the detections by picture.
        ends (ndarray): Picture i has ``rows[ends[i]:ends[i + 1]]``.
        track (Callable): See :func:`precision_recall`.

    Returns:
        ndarray: (p,) int64, indices of ``gt.boxes``; -1 where no IoU is 0.5.
    """
    faces, detections = _corners(gt.boxes), _corners(rows)
    face = np.full(len(rows), -1)
    for i, _ in enumerate(track(gt.images)):
        first, last = gt.starts[i : i + 2]
        if first == last:
            continue
        step = max(_PAIRS // (last - first), 1)
        for start in range(ends[i], ends[i + 1], step):
            part = slice(start, min(start + step, ends[i + 1]))
            iou = _iou(faces[:, first:last, None], detections[:, None, part])
            hits = np.flatnonzero(iou.max(0) >= 0.5)
            face[start + hits] = first + iou[:, hits].argmax(0)
    return face


def _corners(boxes: np.ndarray) -> np.ndarray:
    """Turn (n, 4 or more) x y w h into (5, n) x1, y1, x2, y2, area."""
    x1, y1, w, h = boxes[:, :4].T
    # Only a box far outside any picture is too large for a float64.
    with np.errstate(over='ignore', invalid='ignore'):
        x2, y2 = x1 + w, y1 + h
        w, h = x2 - x1 + 1, y2 - y1 + 1
        # A box that covers nothing overlaps nothing: any area will do, but
        # one that could make a union 0.
        area = np.where((w > 0) & (h > 0), w * h, 1)
    return np.stack([x1, y1, x2, y2, area])


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of (5, ...) boxes of :func:`_corners` that broadcast.

    In the order of operations of the Python ports, so to the last bit theirs.
    """
    w = np.minimum(a[2], b[2])
    w -= np.maximum(a[0], b[0])
    w += 1
    h = np.minimum(a[3], b[3])
    h -= np.maximum(a[1], b[1])
    h += 1
    np.maximum(w, 0, out=w)
    np.maximum(h, 0, out=h)
    w *= h
    union = a[4] + b[4]
    union -= w
    w /= union
    return w


def average_precision(curve: Curve) -> float:
    """Area under a curve, by its definition at all points (VOC, from 2010).

    Args:
        curve (Curve): Recall never decreasing and precision, (n,) each.

    Returns:
        float: In [0, 1]; nan where recall is.
    """
    recall = np.concatenate([[0.0], curve.recall, [1.0]])
    precision = np.concatenate([[0.0], curve.precision, [0.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * precision[1:]))
