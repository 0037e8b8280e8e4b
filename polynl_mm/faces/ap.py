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

import os
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

SETTINGS = ('easy', 'medium', 'hard')
THRESHOLDS = 1 - np.arange(1, 1001) / 1000
_ROW = 'left top width height score'
# Pairs of a face and a detection looked at together: what fits into a cache.
_PAIRS = 1 << 15


class GroundTruth(NamedTuple):
    """Faces of n pictures, m in all, and which of them a setting keeps."""

    images: tuple[str, ...]
    """The pictures, ``event/name`` without suffix, in official order."""
    boxes: np.ndarray
    """(m, 4) float64: left, top, width, height in pixels, by picture."""
    starts: np.ndarray
    """(n + 1,) int64: picture i has ``boxes[starts[i]:starts[i + 1]]``."""
    kept: dict[str, np.ndarray]
    """(m,) bool for each of ``easy``, ``medium``, ``hard``."""


class Curve(NamedTuple):
    """Precision and recall at the thresholds 0.999, 0.998, ... 0."""

    recall: np.ndarray
    """(1000,) float64, never decreasing; nan where no face is kept."""
    precision: np.ndarray
    """(1000,) float64; 0 where there is no detection yet."""


# ------------------------------------------------------------ ground truth


def load_wider_face_gt(gt_dir: str | os.PathLike) -> GroundTruth:
    """Read the ground truth of the official evaluation.

    Args:
        gt_dir (str or PathLike): ``eval_tools/ground_truth``: a folder with
            ``wider_face_val.mat`` and ``wider_easy_val.mat``,
            ``wider_medium_val.mat``, ``wider_hard_val.mat``.

    Returns:
        GroundTruth: See there.

    Raises:
        FileNotFoundError: One of the four files is not there.
        ValueError: A file is not of the official structure, or they are not
            of the same pictures; says file and place.
    """
    path = os.path.join(gt_dir, 'wider_face_val.mat')
    images, boxes = _load_cells(path, 'face_bbx_list')
    if not images:
        raise ValueError(f'{path}: has no picture')
    for image, box in zip(images, boxes):
        if box.ndim != 2 or (box.size and box.shape[1] != 4):
            raise ValueError(
                f'{path}: face_bbx_list of {image} has shape {box.shape}, '
                f'expected (faces, 4): x y w h'
            )
    boxes = [box.reshape(-1, 4).astype(np.float64) for box in boxes]
    starts = np.cumsum([0, *map(len, boxes)])
    boxes = np.concatenate(boxes)
    if not np.isfinite(boxes).all():
        raise ValueError(f'{path}: face_bbx_list has NaN or infinity')

    kept = {}
    for setting in SETTINGS:
        path_of_setting = os.path.join(gt_dir, f'wider_{setting}_val.mat')
        same_images, indices = _load_cells(path_of_setting, 'gt_list')
        if same_images != images:
            raise ValueError(
                f'{path_of_setting}: its pictures are not those of {path}'
            )
        kept[setting] = np.zeros(len(boxes), bool)
        for i, index in enumerate(indices):
            # Stored as uint8 or uint16, from 1; nothing is an empty double.
            index = index.ravel().astype(np.int64)
            faces = kept[setting][starts[i] : starts[i + 1]]
            if index.size and not 1 <= index.min() <= index.max() <= len(
                faces
            ):
                raise ValueError(
                    f'{path_of_setting}: gt_list of {images[i]} has '
                    f'{index.min()} to {index.max()}, expected indices of '
                    f'its {len(faces)} faces, from 1'
                )
            faces[index - 1] = True
            if faces.sum() != len(index):
                raise ValueError(
                    f'{path_of_setting}: gt_list of {images[i]} has an index '
                    f'more than once'
                )
    return GroundTruth(images, boxes, starts, kept)


def _load_cells(path: str, key: str) -> tuple[tuple[str, ...], list]:
    """Read the picture names and one array per picture of a .mat file."""
    # Here, as looking up any polynl_mm type imports this module.
    from scipy.io import loadmat

    if not os.path.isfile(path):
        raise FileNotFoundError(
            f'{path}: not there, expected a file of the ground truth of the '
            f'official WIDER Face evaluation'
        )
    names = ('event_list', 'file_list', key)
    try:
        mat = loadmat(path, variable_names=names)
    except Exception as error:  # scipy raises all kinds on a damaged file
        raise ValueError(f'{path}: no MATLAB 5 file: {error}') from error
    images, arrays = [], []
    try:
        events, *columns = (mat[name].ravel() for name in names)
        for i, event in enumerate(events):
            stems, cells = (column[i].ravel() for column in columns)
            if stems.size != cells.size:
                raise ValueError(f'{stems.size} names, {cells.size} cells')
            images += [f'{event.item()}/{stem.item()}' for stem in stems]
            arrays += map(np.asarray, cells)
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        after = f' after {images[-1]}' if images else ''
        raise ValueError(
            f'{path}: {", ".join(names)} are not cells by event and picture'
            f'{after}: {error}'
        ) from error
    if len(set(images)) < len(images):
        raise ValueError(f'{path}: has a picture more than once')
    return tuple(images), arrays


# -------------------------------------------------------- prediction files


def read_predictions(
    pred_dir: str | os.PathLike,
    images: Iterable[str],
    missing_as_empty: bool = False,
    track: Callable[[Iterable], Iterable] = iter,
) -> dict[str, np.ndarray]:
    """Read prediction files of the official form.

    ``<pred_dir>/<event>/<name>.txt`` has a line that is ignored, as the
    official tools ignore it (they write ``event/name.jpg``), the number of
    detections, and for each a line ``left top width height score``.

    Args:
        pred_dir (str or PathLike): Folder of the event folders.
        images (Iterable[str]): All pictures, ``event/name``.
        missing_as_empty (bool): Take a missing file for one without
            detections, as the MATLAB toolbox does, instead of refusing.
        track (Callable): Passes an iterable of the pictures on; shows
            progress, for example.

    Returns:
        dict[str, ndarray]: By picture, in the given order, an (n, 5) float64
        array, n >= 0, in the order of the file: left, top, width, height in
        pixels, score.

    Raises:
        FileNotFoundError: ``pred_dir`` or a file is not there.
        ValueError: A file is of no picture (any ``*.txt`` in ``pred_dir`` or
            in a folder of it counts), or a line is not what is expected at
            its place; says file, line and both.
    """
    images = tuple(images)
    found = _prediction_files(pred_dir)
    unknown = sorted(found.keys() - set(images))
    if unknown:
        raise ValueError(
            f'{found[unknown[0]]}: the ground truth has no picture '
            f'{unknown[0]}; of unknown pictures are {len(unknown)} of '
            f'{len(found)} prediction files'
        )
    missing = [image for image in images if image not in found]
    if missing and not missing_as_empty:
        raise FileNotFoundError(
            f'{os.path.join(pred_dir, missing[0])}.txt: not there; missing '
            f'are {len(missing)} of {len(images)} prediction files'
        )
    return {
        image: _read_file(found[image]) if image in found else np.empty((0, 5))
        for image in track(images)
    }


def _prediction_files(pred_dir: str | os.PathLike) -> dict[str, str]:
    """Give the path of every text file, by path in pred_dir less suffix."""
    if not os.path.isdir(pred_dir):
        raise FileNotFoundError(
            f'{os.fspath(pred_dir)}: not there, expected the folder of the '
            f'predictions, event/name.txt'
        )
    files = {}
    for entry in os.scandir(pred_dir):
        names = os.listdir(entry.path) if entry.is_dir() else ()
        inside = [f'{entry.name}/{name}' for name in names]
        for name in inside or [entry.name]:
            stem, suffix = os.path.splitext(name)
            if suffix == '.txt':
                files[stem] = os.path.join(pred_dir, name)
    return files


def _read_file(path: str) -> np.ndarray:
    # latin-1 takes every byte; what is no number is reported by its line.
    with open(path, encoding='latin-1') as file:
        lines = file.readlines()
    rows = [line for line in lines[2:] if not line.isspace()]
    try:
        boxes = _numbers(rows)
        if (
            int(lines[1]) == len(boxes)
            and boxes.shape[1] == 5
            and np.isfinite(boxes).all()
        ):
            return boxes
    except (IndexError, ValueError):
        pass
    raise ValueError(f'{path}{_defect(lines)}')


def _numbers(rows: list[str]) -> np.ndarray:
    """Numbers of rows of equal length, (n, columns) float64."""
    if not rows:
        return np.empty((0, 5))
    return np.loadtxt(rows, ndmin=2, comments=None)


def _defect(lines: list[str]) -> str:
    """Say where and what the first thing wrong in a prediction file is."""
    if len(lines) < 2:
        return (
            f': ends after {len(lines)} lines, expected a line with the '
            f'picture and one with the number of detections'
        )
    try:
        count = int(lines[1])
    except ValueError:
        return _at(2, lines, 'the number of detections')
    found = 0
    for number, line in enumerate(lines[2:], 3):
        if line.isspace():
            continue
        try:
            row = _numbers([line])
        except ValueError:
            row = np.empty((1, 0))
        if row.shape[1] != 5 or not np.isfinite(row).all():
            return _at(number, lines, f'5 finite numbers, {_ROW}')
        found += 1
    return (
        f', line 2: says {count} detections, expected {found}, as many as '
        f'follow'
    )


def _at(number: int, lines: list[str], expected: str) -> str:
    text = lines[number - 1].strip()[:80]
    return f', line {number}: got {text!r}, expected {expected}'


def write_predictions(
    out_dir: str | os.PathLike, predictions: Mapping[str, np.ndarray]
) -> None:
    """Write prediction files of the official form, those with the best first.

    Numbers are written with as many digits as it takes to read the same
    float64 again, so AP of the files is exactly AP of the arrays. Existing
    files of the same pictures are replaced, others are left.

    Args:
        out_dir (str or PathLike): Folder of the event folders; made if need
            be.
        predictions (Mapping[str, ndarray]): By picture, ``event/name``, an
            (n, 5) array: left, top, width, height in pixels, score.
    """
    for image, rows in predictions.items():
        # The Python ports take the order of the file for that of the scores.
        rows = np.asarray(rows, np.float64)
        rows = rows[np.argsort(-rows[:, 4], kind='stable')]
        lines = [f'{image}.jpg', str(len(rows))]
        lines += [' '.join(map(repr, row)) for row in rows.tolist()]
        path = os.path.join(out_dir, f'{image}.txt')
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w', encoding='utf-8', newline='\n') as file:
            file.write('\n'.join(lines) + '\n')


# -------------------------------------------------------------- evaluation


def evaluate(
    gt: GroundTruth,
    predictions: Mapping[str, np.ndarray],
    missing_as_empty: bool = False,
) -> dict[str, float]:
    """Average precision of the three settings.

    Args:
        gt (GroundTruth): See :func:`load_wider_face_gt`.
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
        gt (GroundTruth): See :func:`load_wider_face_gt`.
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
            f'expected finite {_ROW}'
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
                f'(detections, 5): {_ROW}'
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
