"""WIDER Face as it lies on disk: annotations, landmark labels, predictions.

Also the ground truth of the official evaluation. Names of pictures are
``event/name.jpg`` in annotations and labels, ``event/name`` in what the
evaluation reads and writes, as in the official files.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from polynl_mm.limits import MB, call_in_child

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
# Each is 0 to this.
_MOST = (2, 1, 1, 1, 2, 1)
_RANGES = ', '.join(
    f'{name} 0 to {most}' for name, most in zip(ATTRIBUTES, _MOST)
)
_COLUMNS = 4 + len(ATTRIBUTES)
_FACE_LINE = (
    f'{_COLUMNS} integers, x y w h {" ".join(ATTRIBUTES)}, '
    f'of at most 10 digits'
)
# Sums of them are far from the end of int64.
_INTEGER = re.compile('[+-]?[0-9]{1,10}')
_IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png')
_PICTURE = 'a picture, event/name.jpg'
# What stands for bytes that are no UTF-8.
_UNDECODED = '\ufffd'
_ABSENT = (-1.0, -1.0, 0.0)
_POINTS = f'{NUM_LANDMARKS} times x y flag'
_LABEL_LINES = {
    False: ((4, 20), f'x y w h, or x y w h, {_POINTS} and a quality'),
    True: (
        (4, 5, 19),
        f'x1 y1 x2 y2, or these and 0 or 1 for ignore, or these and {_POINTS}',
    ),
}
SETTINGS = ('easy', 'medium', 'hard')
# The columns of a prediction file.
PREDICTION = 'left top width height score'


class _Expected(ValueError):
    """Its text is what was expected of a line, and not the whole message."""


class _Lines:
    """Lines of a text file that are not blank, and its broken ones.

    ``lines[at]`` is the text of a line without the blanks around it.
    ``picture(text)`` is the picture that a text names, or None.
    ``broken(at, expected)`` raises, or appends to ``errors``, if that is a
    list, so that reading can go on.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        errors: list | None,
        folder: str | os.PathLike | None = None,
    ) -> None:
        self.path = path
        self.errors = errors
        self.folders = ()
        if folder is not None:
            # As it is written, and as it is where links lead to it.
            self.folders = os.path.abspath(folder), os.path.realpath(folder)
        self._stems = set()
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

    def picture(self, text: str) -> str | None:
        # '..' stays what it is, for is_picture.
        name = text if '..' in text.split('/') else posixpath.normpath(text)
        for folder in self.folders:
            if name.startswith(folder + '/'):
                name = name[len(folder) + 1 :]
                break
        return name if is_picture(name) else None

    def is_new(self, name: str) -> bool:
        """Whether no picture of this event/name has come before."""
        stem = posixpath.splitext(name)[0]
        if stem in self._stems:
            return False
        self._stems.add(stem)
        return True

    def broken(self, at: int, expected: str) -> None:
        if at < len(self):
            if _UNDECODED in self[at]:
                expected += ', in UTF-8'
            elif self.folders and self[at].lstrip('# ').startswith('/'):
                expected += f', or a path below {self.folders[0]}'
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
    """Whether a text reads ``event/name.jpg``, as WIDER Face names them.

    A name that would lead out of the picture folder is none, nor is one that
    is longer than any.
    """
    parts = text.split('/')
    return (
        len(parts) > 1
        and len(text) <= 1000
        and parts[-1].lower().endswith(_IMAGE_SUFFIXES)
        and not {'', '.', '..'}.intersection(parts)
        and not {'\0', _UNDECODED}.intersection(text)
    )


def read_bbx_gt(
    path: str | os.PathLike,
    errors: list[str] | None = None,
    folder: str | os.PathLike | None = None,
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
        folder (str or PathLike, optional): Where the pictures are. Absolute
            names below it become relative to it; others are broken, as are
            names with ``..``.

    Returns:
        dict[str, ndarray]: For every picture, by ``event/name.jpg`` and in
        the order of the file, an (n, 10) int64 array, n >= 0: left, top,
        width and height in pixels, from 0, then blur (0 to 2), expression,
        illumination, invalid (0 or 1), occlusion (0 to 2), pose (0 or 1).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not what is expected at its place, a picture
            comes twice, or there is none; says file, line and both. Pictures
            that differ in their suffix alone are one, as their predictions
            would be.
    """
    lines = _Lines(path, errors, folder)
    images = {}
    at = 0
    while at < len(lines):
        name = lines.picture(lines[at])
        if name is None:
            lines.broken(at, _PICTURE)
            at += 1
            continue
        if not lines.is_new(name):
            lines.broken(at, 'a picture that has not come before')
        at += 1

        count = _integers(lines[at]) if at < len(lines) else None
        if count is None or len(count) != 1 or count[0] < 0:
            lines.broken(at, f'the number of faces of {name}')
            while at < len(lines) and not lines.picture(lines[at]):
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
                if at == len(lines) or lines.picture(lines[at]):
                    break
            elif any(
                not 0 <= value <= most for value, most in zip(face[4:], _MOST)
            ):
                lines.broken(at, f'x y w h and {_RANGES}')
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
    words = line.split()
    return [*map(int, words)] if all(map(_INTEGER.fullmatch, words)) else None


def read_file_list(
    path: str | os.PathLike,
    errors: list[str] | None = None,
    folder: str | os.PathLike | None = None,
) -> list[str]:
    """Read ``wider_face_test_filelist.txt``, a picture per line.

    Args:
        path (str or PathLike): A local file.
        errors (list[str], optional): As in :func:`read_bbx_gt`.
        folder (str or PathLike, optional): As there.

    Returns:
        list[str]: ``event/name.jpg`` of every picture.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is no picture, one comes twice, or there is none.
    """
    lines = _Lines(path, errors, folder)
    names = []
    for at in range(len(lines)):
        name = lines.picture(lines[at])
        if name is None:
            lines.broken(at, _PICTURE)
        elif not lines.is_new(name):
            lines.broken(at, 'a picture that has not come before')
        else:
            names.append(name)
    if not names:
        lines.report(f'{path}: empty, expected a picture per line')
    return names


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
    folder: str | os.PathLike | None = None,
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
        folder (str or PathLike, optional): As in :func:`read_bbx_gt`.

    Returns:
        dict[str, LandmarkLabels]: For every picture, by ``event/name.jpg``
        and in the order of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is neither, the formats are mixed, a picture comes
            twice, or there is none; says file, line and what is expected.
    """
    lines = _Lines(path, errors, folder)
    images = {}
    headers = {}
    rows = sized = None
    for at in range(len(lines)):
        try:
            if lines[at].startswith('#'):
                # Faces below a broken header are checked, too, for the
                # messages, and go nowhere.
                rows = []
                name, has_size = _label_header(lines, lines[at])
                if sized is None:
                    sized = has_size
                elif sized != has_size:
                    raise _Expected('the format of the headers before')
                if not lines.is_new(name):
                    raise _Expected('a picture that has not come before')
                images[name] = rows
                headers[name] = lines.number(at)
            elif rows is None:
                raise _Expected('# event/name.jpg or # event/name.jpg W H')
            else:
                face = _label_face(lines[at], bool(sized), allow_degenerate)
                rows.append((*face, lines.number(at)))
        except _Expected as error:
            expected = str(error)
        else:
            continue
        lines.broken(at, expected)
    if not images:
        lines.report(f'{path}: empty, expected landmark labels of WIDER Face')
    return {name: _stack(images[name], headers[name]) for name in images}


def _label_header(lines: _Lines, line: str) -> tuple[str, bool]:
    """Give the picture, whose name may have blanks, and if it has a size."""
    text = line[1:].strip()
    name = lines.picture(text)
    if name is not None:
        return name, False
    text, *sizes = text.rsplit(None, 2) or ['']
    sizes = _integers(' '.join(sizes)) or [0]
    name = lines.picture(text)
    if name is None or len(sizes) != 2 or min(sizes) <= 0:
        raise _Expected('# event/name.jpg or # event/name.jpg W H')
    return name, True


def _label_face(line: str, sized: bool, allow_degenerate: bool) -> tuple:
    """Give box, keypoints and ignore flag, or say what was expected."""
    counts, layout = _LABEL_LINES[sized]
    try:
        numbers = [float(word) for word in line.split()]
    except ValueError:
        numbers = []
    if len(numbers) not in counts or not all(abs(n) < 1e9 for n in numbers):
        raise _Expected(
            f'{" or ".join(map(str, counts))} numbers: {layout}; all finite '
            f'and below 1e9'
        )
    x1, y1, x2, y2 = numbers[:4]
    if not sized:
        x2, y2 = x1 + x2, y1 + y2
    if not allow_degenerate and (x2 <= x1 or y2 <= y1):
        raise _Expected('x2 > x1 and y2 > y1' if sized else 'w > 0 and h > 0')
    if len(numbers) == 5 and numbers[4] not in (0, 1):
        raise _Expected('0 or 1 as the fifth number, for ignore')
    keypoints = (_ABSENT,) * NUM_LANDMARKS
    if len(numbers) >= 19:
        points = [numbers[i : i + 3] for i in range(4, 19, 3)]
        if any(flag not in (-1, 0, 1) for _, _, flag in points):
            raise _Expected('-1, 0 or 1 as the flag of a landmark')
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
        line begins with ``#``, ``'list'`` (see :func:`read_file_list`) if the
        first two, or the only one, end as names of pictures do, else
        ``'bbx_gt'`` (see :func:`read_bbx_gt`).
    """
    lines = _Lines(path, None)
    first = [lines[at].lower() for at in range(min(2, len(lines)))]
    if first and first[0].startswith('#'):
        return 'landmarks'
    if first and all(line.endswith(_IMAGE_SUFFIXES) for line in first):
        return 'list'
    return 'bbx_gt'


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


def load_wider_face_gt(
    gt_dir: str | os.PathLike, max_memory: int = 1024 * MB
) -> GroundTruth:
    """Read the ground truth of the official evaluation.

    scipy takes a .mat file at its word, and one wrong byte can crash it: it
    reads each file in a child process.

    Args:
        gt_dir (str or PathLike): ``eval_tools/ground_truth``: a folder with
            ``wider_face_val.mat`` and ``wider_easy_val.mat``,
            ``wider_medium_val.mat``, ``wider_hard_val.mat``.
        max_memory (int): Bytes that reading one of them may take; on Linux
            only.

    Returns:
        GroundTruth: See there.

    Raises:
        FileNotFoundError: One of the four files is not there.
        ValueError: A file is not of the official structure, crashes scipy, or
            takes more than ``max_memory`` or a minute, or they are not of the
            same pictures; says file and place.
    """
    path = os.path.join(gt_dir, 'wider_face_val.mat')
    images, boxes = _load_cells(path, 'face_bbx_list', max_memory)
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
        raise ValueError(
            f'{path}: face_bbx_list has NaN or infinity, expected numbers'
        )

    kept = {}
    for setting in SETTINGS:
        path_of_setting = os.path.join(gt_dir, f'wider_{setting}_val.mat')
        same_images, indices = _load_cells(
            path_of_setting, 'gt_list', max_memory
        )
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


def _load_cells(
    path: str, key: str, max_memory: int
) -> tuple[tuple[str, ...], list]:
    """Read the picture names and one array per picture of a .mat file."""
    # Here, as looking up any polynl_mm type imports this module, and so that
    # no child imports it anew.
    import scipy.io  # noqa: F401

    if not os.path.isfile(path):
        raise FileNotFoundError(
            f'{path}: not there, expected a file of the ground truth of the '
            f'official WIDER Face evaluation'
        )
    try:
        return call_in_child(
            *(_read_cells, path, key), memory=max_memory, seconds=60
        )
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def _read_cells(path: str, key: str) -> tuple[tuple[str, ...], list]:
    from scipy.io import loadmat

    names = ('event_list', 'file_list', key)
    try:
        mat = loadmat(path, variable_names=names)
    except MemoryError:
        raise
    except Exception as error:  # scipy raises all kinds on a damaged file
        raise ValueError(f'no MATLAB 5 file: {error}') from error
    images, arrays = [], []
    try:
        events, *columns = (mat[name].ravel() for name in names)
        for i, event in enumerate(events):
            stems, cells = (column[i].ravel() for column in columns)
            if stems.size != cells.size:
                raise ValueError(f'{stems.size} names, but {cells.size} cells')
            images += [f'{event.item()}/{stem.item()}' for stem in stems]
            arrays += map(np.asarray, cells)
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        after = f' after {images[-1]}' if images else ''
        raise ValueError(
            f'{", ".join(names)} are not cells by event and picture{after}: '
            f'{error}'
        ) from error
    if len(set(images)) < len(images):
        twice, _ = Counter(images).most_common(1)[0]
        raise ValueError(f'has {twice} more than once, expected once')
    for image, array in zip(images, arrays):
        if array.dtype.kind not in 'iuf':
            raise ValueError(
                f'{key} of {image} has dtype {array.dtype}, expected numbers'
            )
    return tuple(images), arrays


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
        image: _read_rows(found[image]) if image in found else np.empty((0, 5))
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


def _read_rows(path: str) -> np.ndarray:
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
            return _at(number, lines, f'5 finite numbers, {PREDICTION}')
        found += 1
    return (
        f', line 2: says {str(count)[:80]} detections, expected {found}, as '
        f'many as follow'
    )


def _at(number: int, lines: list[str], expected: str) -> str:
    text = lines[number - 1].strip()[:80]
    return f', line {number}: got {text!r}, expected {expected}'


def prediction_path(out_dir: str | os.PathLike, image: str) -> str:
    """Give the prediction file of a picture, ``event/name``.

    Raises:
        ValueError: It would not lie in ``out_dir``: the name is absolute or
            has ``..``, or a symbolic link leads elsewhere.
    """
    folder = os.path.realpath(out_dir)
    path = os.path.join(out_dir, f'{image}.txt')
    target = os.path.realpath(path)
    if os.path.commonpath([folder, target]) != folder:
        raise ValueError(
            f'{path}: the predictions of the picture {image!r} would be '
            f'written to {target}, outside {folder}: give no such name'
        )
    return path


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

    Raises:
        ValueError: A file would not lie in ``out_dir``, see
            :func:`prediction_path`; then nothing is written.
    """
    paths = {image: prediction_path(out_dir, image) for image in predictions}
    for image, rows in predictions.items():
        # The Python ports take the order of the file for that of the scores.
        rows = np.asarray(rows, np.float64)
        rows = rows[np.argsort(-rows[:, 4], kind='stable')]
        lines = [f'{image}.jpg', str(len(rows))]
        lines += [' '.join(map(repr, row)) for row in rows.tolist()]
        os.makedirs(os.path.dirname(paths[image]), exist_ok=True)
        with open(paths[image], 'w', encoding='utf-8', newline='\n') as file:
            file.write('\n'.join(lines) + '\n')
