"""WIDER Face as its official release and its landmark labels lie on disk."""

from __future__ import annotations

import math
import os
import posixpath
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from .landmarks import NUM_LANDMARKS

# The columns of a face line after x, y, w and h.
ATTRIBUTES = (
    'blur',
    'expression',
    'illumination',
    'invalid',
    'occlusion',
    'pose',
)
_COLUMNS = 4 + len(ATTRIBUTES)
_FACE_LINE = f'{_COLUMNS} integers, x y w h {" ".join(ATTRIBUTES)}'
_IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png')
_ABSENT = (-1.0, -1.0, 0.0)
_POINTS = f'{NUM_LANDMARKS} times x y flag'
_LABEL_LINES = {
    False: ((4, 20), f'x y w h, or x y w h, {_POINTS} and a quality'),
    True: (
        (4, 5, 19),
        f'x1 y1 x2 y2, or these and 0 or 1 for ignore, or these and {_POINTS}',
    ),
}


class _Lines:
    """Lines of a text file that are not blank, and its broken ones.

    ``lines[at]`` is the text of a line without the blanks around it.
    ``broken(at, expected)`` raises, or appends to ``errors``, if that is a
    list, so that reading can go on.
    """

    def __init__(self, path: str | os.PathLike, errors: list | None) -> None:
        self.path = path
        self.errors = errors
        # utf-8-sig and 'replace': a byte order mark is dropped, and a file
        # that is no text is reported by its first line.
        with open(path, encoding='utf-8-sig', errors='replace') as file:
            self._lines = [
                (number, line.strip())
                for number, line in enumerate(file, 1)
                if line.strip()
            ]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, at: int) -> str:
        return self._lines[at][1]

    def number(self, at: int) -> int:
        return self._lines[at][0]

    def broken(self, at: int, expected: str) -> None:
        if at < len(self):
            self.report(
                f'{self.path}, line {self.number(at)}: got '
                f'{self[at][:80]!r}, expected {expected}'
            )
        else:
            self.report(f'{self.path}: ends where {expected} is expected')

    def report(self, message: str) -> None:
        if self.errors is None:
            raise ValueError(message)
        self.errors.append(message)


def is_picture(text: str) -> bool:
    """Whether a text reads ``event/name.jpg``, as WIDER Face names them."""
    event, stem = posixpath.split(text)
    return bool(event) and stem.lower().endswith(_IMAGE_SUFFIXES)


def read_bbx_gt(
    path: str | os.PathLike, errors: list[str] | None = None
) -> dict[str, np.ndarray]:
    """Read an official annotation file, ``wider_face_*_bbx_gt.txt``.

    A block of it is a line ``event/name.jpg``, a line with the number of
    faces, and a line per face. The release writes a line of zeros after a
    count of 0, and some copies of it do not: both are read. Boxes are given
    as they stand there, degenerate ones included.

    Args:
        path (str or PathLike): A local file.
        errors (list[str], optional): Takes a message for every broken line,
            and what is not broken is given; without it the first one raises.

    Returns:
        dict[str, ndarray]: For every picture, by ``event/name.jpg`` and in
        the order of the file, an (n, 10) int64 array, n >= 0: left, top,
        width and height in pixels, from 0, then blur (0 to 2), expression,
        illumination, invalid (0 or 1), occlusion (0 to 2), pose (0 or 1).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not what is expected at its place, a picture
            comes twice, or there is none; says file, line and both.
    """
    lines = _Lines(path, errors)
    images = {}
    at = 0
    while at < len(lines):
        name = lines[at]
        if not is_picture(name):
            lines.broken(at, 'a picture, event/name.jpg')
            at += 1
            continue
        if name in images:
            lines.broken(at, 'a picture that has not come before')
        at += 1

        count = _integers(lines[at]) if at < len(lines) else None
        if count is None or len(count) != 1 or count[0] < 0:
            lines.broken(at, f'the number of faces of {name}')
            while at < len(lines) and not is_picture(lines[at]):
                at += 1
            continue
        count = count[0]
        at += 1

        faces = []
        for k in range(1, count + 1):
            face = _integers(lines[at]) if at < len(lines) else None
            if face is None or len(face) != _COLUMNS:
                lines.broken(
                    at, f'face {k} of {count} of {name}: {_FACE_LINE}'
                )
                if at == len(lines) or is_picture(lines[at]):
                    break
            else:
                faces.append(face)
            at += 1
        if count == 0 and at < len(lines):
            at += _integers(lines[at]) == [0] * _COLUMNS
        images.setdefault(
            name, np.array(faces, np.int64).reshape(-1, _COLUMNS)
        )
    if not images:
        lines.report(f'{path}: empty, expected WIDER Face annotations')
    return images


def _integers(line: str) -> list[int] | None:
    try:
        return [int(word) for word in line.split()]
    except ValueError:
        return None


def read_file_list(
    path: str | os.PathLike, errors: list[str] | None = None
) -> list[str]:
    """Read ``wider_face_test_filelist.txt``, a picture per line.

    Args:
        path (str or PathLike): A local file.
        errors (list[str], optional): As in :func:`read_bbx_gt`.

    Returns:
        list[str]: ``event/name.jpg`` of every picture.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is no picture, one comes twice, or there is none.
    """
    lines = _Lines(path, errors)
    names = {}
    for at in range(len(lines)):
        if not is_picture(lines[at]):
            lines.broken(at, 'a picture, event/name.jpg')
        elif lines[at] in names:
            lines.broken(at, 'a picture that has not come before')
        else:
            names[lines[at]] = None
    if not names:
        lines.report(f'{path}: empty, expected a picture per line')
    return list(names)


class LandmarkLabels(NamedTuple):
    """Faces of one picture in a landmark label file.

    ``bboxes`` (n, 4) float64: x1, y1, x2, y2 in pixels, as annotated.
    ``keypoints`` (n, 5, 3) float64: see :mod:`polynl_mm.faces.landmarks`.
    ``ignore`` (n,) bool: the file itself says to ignore the face.
    ``lines`` (n,) int64 and ``header``: lines in the file, from 1, of the
    faces and of the picture.
    """

    bboxes: np.ndarray
    keypoints: np.ndarray
    ignore: np.ndarray
    lines: np.ndarray
    header: int


def read_landmark_labels(
    path: str | os.PathLike,
    errors: list[str] | None = None,
    allow_degenerate: bool = False,
) -> dict[str, LandmarkLabels]:
    """Read faces and landmarks in RetinaFace's or SCRFD's label format.

    The header of a picture tells which: ``# event/name.jpg`` is followed by
    lines of RetinaFace's ``label.txt``, that is ``x y w h`` (its val file) or
    20 numbers, ``x y w h``, five times ``x y flag`` and an image quality,
    which is not used. ``# event/name.jpg width height`` is followed by lines
    of SCRFD's ``labelv2.txt``: ``x1 y1 x2 y2``, alone, with a fifth number
    that is 1 for a face to ignore, or with five times ``x y flag``. In both,
    a flag is 0 for visible, 1 for occluded and -1 for not annotated.

    Args:
        path (str or PathLike): A local file.
        errors (list[str], optional): As in :func:`read_bbx_gt`.
        allow_degenerate (bool): Give boxes without width or height as they
            stand there. Otherwise they count as broken.

    Returns:
        dict[str, LandmarkLabels]: For every picture, by ``event/name.jpg``
        and in the order of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is neither, the formats are mixed, a picture comes
            twice, or there is none; says file, line and what is expected.
    """
    lines = _Lines(path, errors)
    images = {}
    headers = {}
    rows = sized = None
    for at in range(len(lines)):
        try:
            if lines[at].startswith('#'):
                # Faces below a broken header are checked, too, for the
                # messages, and go nowhere.
                rows = []
                name, has_size = _label_header(lines[at])
                if sized is None:
                    sized = has_size
                elif sized != has_size:
                    raise ValueError('the format of the headers before')
                if name in images:
                    raise ValueError('a picture that has not come before')
                images[name] = rows
                headers[name] = lines.number(at)
            elif rows is None:
                raise ValueError('# event/name.jpg or # event/name.jpg W H')
            else:
                face = _label_face(lines[at], bool(sized), allow_degenerate)
                rows.append((*face, lines.number(at)))
        except ValueError as error:
            expected = str(error)
        else:
            continue
        lines.broken(at, expected)
    if not images:
        lines.report(f'{path}: empty, expected landmark labels of WIDER Face')
    return {name: _stack(images[name], headers[name]) for name in images}


def _label_header(line: str) -> tuple[str, bool]:
    words = line[1:].split()
    sizes = _integers(' '.join(words[1:]))
    if (
        len(words) not in (1, 3)
        or not is_picture(words[0])
        or sizes is None
        or any(size <= 0 for size in sizes)
    ):
        raise ValueError('# event/name.jpg or # event/name.jpg W H')
    return words[0], len(words) == 3


def _label_face(line: str, sized: bool, allow_degenerate: bool) -> tuple:
    """Give box, keypoints and ignore flag, or say what was expected."""
    counts, layout = _LABEL_LINES[sized]
    try:
        numbers = [float(word) for word in line.split()]
    except ValueError:
        numbers = []
    if len(numbers) not in counts or not all(map(math.isfinite, numbers)):
        raise ValueError(f'{" or ".join(map(str, counts))} numbers: {layout}')
    x1, y1, x2, y2 = numbers[:4]
    if not sized:
        x2, y2 = x1 + x2, y1 + y2
    if not allow_degenerate and (x2 <= x1 or y2 <= y1):
        raise ValueError('x2 > x1 and y2 > y1' if sized else 'w > 0 and h > 0')
    if len(numbers) == 5 and numbers[4] not in (0, 1):
        raise ValueError('0 or 1 as the fifth number, for ignore')
    keypoints = (_ABSENT,) * NUM_LANDMARKS
    if len(numbers) >= 19:
        points = [numbers[i : i + 3] for i in range(4, 19, 3)]
        if any(flag not in (-1, 0, 1) for _, _, flag in points):
            raise ValueError('-1, 0 or 1 as the flag of a landmark')
        keypoints = [
            _ABSENT if flag < 0 else (x, y, 2 - flag) for x, y, flag in points
        ]
    return (x1, y1, x2, y2), keypoints, numbers[4:] == [1]


def _stack(rows: list[tuple], header: int) -> LandmarkLabels:
    bboxes, keypoints, ignore, lines = zip(*rows) if rows else ([],) * 4
    return LandmarkLabels(
        np.array(bboxes, np.float64).reshape(-1, 4),
        np.array(keypoints, np.float64).reshape(-1, NUM_LANDMARKS, 3),
        np.array(ignore, bool),
        np.array(lines, np.int64),
        header,
    )


def match_landmarks(
    faces: dict[str, np.ndarray],
    labels: dict[str, LandmarkLabels],
    ann_file: str,
    landmark_file: str,
    errors: list[str] | None = None,
) -> dict[str, np.ndarray]:
    """Give the faces of the official annotation their landmarks.

    A face takes those of the equal box of the same picture; of equal boxes
    in one picture the first belongs to the first.

    Args:
        faces (dict[str, ndarray]): See :func:`read_bbx_gt`.
        labels (dict[str, LandmarkLabels]): See :func:`read_landmark_labels`.
        ann_file (str): Where ``faces`` come from, for the messages.
        landmark_file (str): Where ``labels`` come from, likewise.
        errors (list[str], optional): As in :func:`read_bbx_gt`.

    Returns:
        dict[str, ndarray]: For every picture of ``faces`` its (n, 5, 3)
        float64 keypoints; a face that ``labels`` does not have has flag 0.

    Raises:
        ValueError: ``labels`` has a picture, or a box of some area, that
            ``faces`` does not have.
    """

    def report(line: int, message: str) -> None:
        message = f'{landmark_file}, line {line}: got {message} in {ann_file}'
        if errors is None:
            raise ValueError(
                f'{message}; to train on the faces of a label file alone '
                f'give it as ann_file'
            )
        errors.append(message)

    matched = {
        name: np.tile(_ABSENT, (len(rows), NUM_LANDMARKS, 1))
        for name, rows in faces.items()
    }
    for name, (bboxes, keypoints, _, lines, header) in labels.items():
        if name not in faces:
            report(header, f'the picture {name!r}, which is not')
            continue
        free = defaultdict(list)
        for i, (x, y, w, h) in enumerate(faces[name][:, :4].tolist()):
            free[x, y, x + w, y + h].append(i)
        for bbox, points, line in zip(bboxes.tolist(), keypoints, lines):
            found = free.get(tuple(bbox))
            if found:
                matched[name][found.pop(0)] = points
            elif bbox[0] < bbox[2] and bbox[1] < bbox[3]:
                # One without area, such as the zeros that stand for no face,
                # could not be learnt anyway.
                report(
                    line,
                    f'a face of {name} with the box {bbox} (x1 y1 x2 y2), '
                    f'which is not, or not as often,',
                )
    return matched


def annotation_format(path: str | os.PathLike) -> str:
    """Recognise a file by its content.

    Args:
        path (str or PathLike): A local file.

    Returns:
        str: ``'landmarks'`` (see :func:`read_landmark_labels`) if the first
        line begins with ``#``, ``'list'`` (see :func:`read_file_list`) if all
        lines are pictures, else ``'bbx_gt'`` (see :func:`read_bbx_gt`).
    """
    lines = _Lines(path, None)
    if len(lines) and lines[0].startswith('#'):
        return 'landmarks'
    if len(lines) and all(is_picture(lines[i]) for i in range(len(lines))):
        return 'list'
    return 'bbx_gt'
