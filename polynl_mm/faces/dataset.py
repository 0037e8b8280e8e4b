"""WIDER Face as its official release and its landmark labels lie on disk."""

from __future__ import annotations

import math
import os
import posixpath
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from mmdet.datasets import BaseDetDataset
from mmengine.fileio import get_file_backend, get_local_path, join_path
from mmengine.utils import is_abs

from polynl_mm.registry import DATASETS

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

# Left and right as the viewer sees them.
LANDMARKS = ('left eye', 'right eye', 'nose', 'left mouth', 'right mouth')
# Where each of them comes from in a mirrored picture.
FLIP_INDICES = (1, 0, 2, 4, 3)
_ABSENT = ((-1.0, -1.0, 0.0),) * len(LANDMARKS)
_POINTS = f'{len(LANDMARKS)} times x y flag'
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
    ``keypoints`` (n, 5, 3) float64: x and y in pixels and a flag, as in
    COCO 0 not annotated (x and y then mean nothing), 1 annotated but
    occluded, 2 visible; in the order of :data:`LANDMARKS`.
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
    keypoints = _ABSENT
    if len(numbers) >= 19:
        points = [numbers[i : i + 3] for i in range(4, 19, 3)]
        if any(flag not in (-1, 0, 1) for _, _, flag in points):
            raise ValueError('-1, 0 or 1 as the flag of a landmark')
        keypoints = [
            (-1.0, -1.0, 0.0) if flag < 0 else (x, y, 2 - flag)
            for x, y, flag in points
        ]
    return (x1, y1, x2, y2), keypoints, numbers[4:] == [1]


def _stack(rows: list[tuple], header: int) -> LandmarkLabels:
    bboxes, keypoints, ignore, lines = zip(*rows) if rows else ([],) * 4
    return LandmarkLabels(
        np.array(bboxes, np.float64).reshape(-1, 4),
        np.array(keypoints, np.float64).reshape(-1, len(LANDMARKS), 3),
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
        name: np.tile(np.array(_ABSENT), (len(rows), 1, 1))
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


@DATASETS.register_module()
class WiderFaceDataset(BaseDetDataset):
    """WIDER Face, read from its text annotation, with landmarks if given.

    No conversion is needed, other than for mmdet's ``WIDERFaceDataset``, which
    reads PASCAL VOC files that a third party's script makes, and has neither
    attributes nor landmarks. ``data_root`` is where the official archives were
    unzipped::

        dict(type='polynl_mm.WiderFaceDataset',
             data_root='data/WIDERFace',
             ann_file='wider_face_split/wider_face_train_bbx_gt.txt',
             landmark_file='retinaface_gt_v1.1/train/label.txt',
             data_prefix=dict(img='WIDER_train/images'),
             filter_cfg=dict(filter_empty_gt=True))

    ``ann_file`` says which pictures and faces there are. Its content tells
    what it is: the official annotation, a landmark label file of RetinaFace
    or SCRFD, or, in ``test_mode``, the official list of test pictures.

    ``landmark_file`` adds landmarks to the faces of an official annotation.
    RetinaFace's own code trains on its label file alone, which has no
    attributes, so that invalid faces cannot be told from others. Here the
    official annotation stays in charge and each of its faces takes the
    landmarks of the equal box. To train on the same faces as that code, add
    ``ignore_invalid=False``, or, without the official annotation, give the
    label file as ``ann_file``.

    A picture has ``img_path``, ``img_id`` (``event/name`` without suffix, a
    str: what the official evaluation calls it) and ``instances``. An
    instance has ``bbox`` [x1, y1, x2, y2] (as annotated, so it may stick out
    of the picture; x2 is x + w), ``bbox_label`` 0, ``ignore_flag`` and, from
    the official annotation, the attributes of the face: ``blur``,
    ``expression``, ``illumination``, ``invalid``, ``occlusion``, ``pose``.
    With a label file it has ``keypoints``: five times x, y, flag, see
    :class:`LandmarkLabels`, which ``polynl_mm.LoadAnnotations`` loads.

    - Faces that are flagged invalid, are smaller than ``min_size``, or that
      SCRFD's file says to ignore if it is ``ann_file``, get ``ignore_flag``
      1.
    - Degenerate boxes (no width or no height) cover no pixel. Those of the
      official annotation are left out, in training and in testing, and those
      of ``landmark_file`` with them. In a label file alone they are an
      error, or left out with ``skip_degenerate``.
    - The annotation has no picture sizes, so there is no ``height`` and
      ``width`` before a picture is loaded: ``AspectRatioBatchSampler`` and
      ``filter_cfg=dict(min_size=...)``, which need them, do not work here.

    Args:
        landmark_file (str, optional): Landmark label file, under
            ``data_root`` if it is relative. A face or a picture in it that
            ``ann_file`` does not have is an error; a face that it does not
            have has no landmarks.
        min_size (int, optional): Ignore faces with a side below this many
            pixels of the original picture. None ignores none.
        ignore_invalid (bool): Ignore the faces that are flagged invalid.
        skip_degenerate (bool): Leave out degenerate boxes of a label file
            that is ``ann_file``, as RetinaFace's own code does.
        filter_cfg (dict, optional): Only ``filter_empty_gt`` (bool): leave
            out, in training, pictures in which no face is left that is not
            ignored.
        *args: See :class:`mmdet.datasets.BaseDetDataset`, and so for
            ``**kwargs``.

    Raises:
        FileNotFoundError: An annotation file, the picture folder or a
            picture is not there.
        ValueError: On an argument out of range and on malformed annotation.
    """

    METAINFO = {'classes': ('face',), 'palette': [(0, 255, 0)]}

    def __init__(
        self,
        *args,
        landmark_file: str | None = None,
        min_size: int | None = None,
        ignore_invalid: bool = True,
        skip_degenerate: bool = False,
        filter_cfg: dict | None = None,
        **kwargs,
    ) -> None:
        """Check the arguments and read the annotation."""
        if min_size is not None and min_size <= 0:
            raise ValueError(
                f'min_size must be None or above 0 pixels, got {min_size}'
            )
        unknown = set(filter_cfg or ()) - {'filter_empty_gt'}
        if unknown:
            raise ValueError(
                f'filter_cfg knows filter_empty_gt, got {sorted(unknown)}; '
                f'for small faces give min_size to the data set itself'
            )
        self.landmark_file = landmark_file
        self.min_size = min_size
        self.ignore_invalid = ignore_invalid
        self.skip_degenerate = skip_degenerate
        super().__init__(*args, filter_cfg=filter_cfg, **kwargs)

    def _join_prefix(self) -> None:
        super()._join_prefix()
        file = self.landmark_file
        if file and not is_abs(file) and self.data_root:
            self.landmark_file = join_path(self.data_root, file)

    def load_data_list(self) -> list[dict]:
        """Read the annotation and make sure that all pictures are there."""
        folder = self.data_prefix.get('img')
        if not folder:
            raise ValueError(
                "data_prefix must name the picture folder under 'img', such "
                f"as dict(img='WIDER_train/images'), got {self.data_prefix}"
            )
        backend = get_file_backend(folder, backend_args=self.backend_args)
        for place, exists, what in (
            (self.ann_file, backend.isfile, 'annotation file, such as '
             'wider_face_split/wider_face_train_bbx_gt.txt, of the unzipped '
             'WIDER Face release'),
            (self.landmark_file, backend.isfile, 'landmark label file, such '
             'as retinaface_gt_v1.1/train/label.txt, of WIDER Face'),
            (folder, backend.isdir, 'picture folder, such as '
             'WIDER_train/images, of the unzipped WIDER Face release'),
        ):  # fmt: skip
            if place is not None and not exists(place):
                raise FileNotFoundError(
                    f'{place}: not there, expected the {what}'
                )
        data_list = [self.parse_data_info(raw) for raw in self._read()]
        missing = [
            data['img_path']
            for data in data_list
            if not backend.exists(data['img_path'])
        ]
        if missing:
            raise FileNotFoundError(
                f'{missing[0]}: not there, expected by {self.ann_file}; '
                f'missing are {len(missing)} of {len(data_list)} pictures'
            )
        return data_list

    def _read(self) -> list[dict]:
        """Read the files into what :meth:`parse_data_info` takes."""
        with get_local_path(
            self.ann_file, backend_args=self.backend_args
        ) as path:
            kind = annotation_format(path)
            if kind == 'bbx_gt':
                faces = read_bbx_gt(path)
            elif kind == 'landmarks':
                labels = read_landmark_labels(
                    path, allow_degenerate=self.skip_degenerate
                )
            else:
                names = read_file_list(path)
        if kind != 'bbx_gt' and self.landmark_file:
            raise ValueError(
                f'{self.ann_file}: landmark_file goes with an official '
                f'wider_face_*_bbx_gt.txt, got a file of another format'
            )
        if kind == 'landmarks':
            return [dict(name=k, labels=v) for k, v in labels.items()]
        if kind == 'list':
            if not self.test_mode:
                raise ValueError(
                    f'{self.ann_file}: a list of pictures without faces, '
                    f'expected only with test_mode=True'
                )
            return [dict(name=name) for name in names]
        if not self.landmark_file:
            return [dict(name=k, faces=v) for k, v in faces.items()]
        with get_local_path(
            self.landmark_file, backend_args=self.backend_args
        ) as path:
            # The official annotation has some that are degenerate.
            labels = read_landmark_labels(path, allow_degenerate=True)
        matched = match_landmarks(
            faces, labels, self.ann_file, self.landmark_file
        )
        if not any((points[..., 2] > 0).any() for points in matched.values()):
            raise ValueError(
                f'{self.landmark_file}: none of its faces has landmarks'
            )
        return [
            dict(name=name, faces=faces[name], keypoints=matched[name])
            for name in faces
        ]

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """Bring one picture into mmdet's form.

        Args:
            raw_data_info (dict): ``name``, the picture as ``event/name.jpg``,
                and for a picture with annotation either ``labels``, its
                :class:`LandmarkLabels`, or ``faces``, its (n, 10) array of
                :func:`read_bbx_gt`, with or without ``keypoints``, its
                (n, 5, 3) array of :func:`match_landmarks`.

        Returns:
            dict: See the class.
        """
        name = raw_data_info['name']
        faces = raw_data_info.get('faces')
        labels = raw_data_info.get('labels')
        keypoints = raw_data_info.get('keypoints')
        attributes = ignore = None
        if faces is not None:
            bboxes = faces[:, :4].copy()
            bboxes[:, 2:] += bboxes[:, :2]
            attributes = [
                dict(zip(ATTRIBUTES, row)) for row in faces[:, 4:].tolist()
            ]
            invalid = faces[:, 4 + ATTRIBUTES.index('invalid')] != 0
            ignore = invalid & self.ignore_invalid
        elif labels is not None:
            bboxes, keypoints, ignore = labels[:3]
        else:
            bboxes = np.zeros((0, 4))
            ignore = np.zeros(0, bool)
        sides = bboxes[:, 2:] - bboxes[:, :2]
        if self.min_size is not None:
            ignore = ignore | (sides < self.min_size).any(1)
        instances = []
        for i in np.flatnonzero((sides > 0).all(1)):
            face = dict(
                bbox=bboxes[i].tolist(),
                bbox_label=0,
                ignore_flag=int(ignore[i]),
            )
            if attributes is not None:
                face.update(attributes[i])
            if keypoints is not None:
                face['keypoints'] = keypoints[i].ravel().tolist()
            instances.append(face)
        return dict(
            img_path=posixpath.join(self.data_prefix['img'], name),
            img_id=posixpath.splitext(name)[0],
            instances=instances,
        )

    def filter_data(self) -> list[dict]:
        """Leave out pictures without a face to learn, if asked to."""
        wanted = (self.filter_cfg or {}).get('filter_empty_gt', False)
        if self.test_mode or not wanted:
            return self.data_list
        kept = [
            data
            for data in self.data_list
            if not all(face['ignore_flag'] for face in data['instances'])
        ]
        if not kept:
            raise ValueError(
                f'{self.ann_file}: none of its {len(self.data_list)} '
                f'pictures has a face that is not ignored (min_size='
                f'{self.min_size}), expected at least one'
            )
        return kept
