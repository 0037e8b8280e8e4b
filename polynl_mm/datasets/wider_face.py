"""WIDER Face as its official release lies on disk."""

from __future__ import annotations

import os
import posixpath

import numpy as np
from mmdet.datasets import BaseDetDataset
from mmengine.fileio import get_file_backend, get_local_path

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


def read_bbx_gt(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read an official annotation file, ``wider_face_*_bbx_gt.txt``.

    A block of it is a line ``event/name.jpg``, a line with the number of
    faces, and a line per face. The release writes a line of zeros after a
    count of 0, and some copies of it do not: both are read. Boxes are given
    as they stand there, degenerate ones included.

    Args:
        path (str or PathLike): A local file.

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
    # utf-8-sig and 'replace': a byte order mark is dropped, and a file that
    # is no text is reported below, by its first line.
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        lines = [
            (number, line.strip())
            for number, line in enumerate(file, 1)
            if line.strip()
        ]

    def malformed(at: int, expected: str) -> ValueError:
        if at == len(lines):
            return ValueError(f'{path}: ends where {expected} is expected')
        number, text = lines[at]
        return ValueError(
            f'{path}, line {number}: got {text[:80]!r}, expected {expected}'
        )

    images = {}
    at = 0
    while at < len(lines):
        name = lines[at][1]
        event, stem = posixpath.split(name)
        if not (event and stem.lower().endswith(_IMAGE_SUFFIXES)):
            raise malformed(at, 'a picture, event/name.jpg')
        if name in images:
            raise malformed(at, 'a picture that has not come before')
        at += 1

        count = _integers(lines[at][1]) if at < len(lines) else None
        if count is None or len(count) != 1 or count[0] < 0:
            raise malformed(at, f'the number of faces of {name}')
        count = count[0]
        at += 1

        faces = []
        while len(faces) < count:
            face = _integers(lines[at][1]) if at < len(lines) else None
            if face is None or len(face) != _COLUMNS:
                raise malformed(
                    at,
                    f'face {len(faces) + 1} of {count} of {name}: '
                    f'{_FACE_LINE}',
                )
            faces.append(face)
            at += 1
        if count == 0 and at < len(lines):
            at += _integers(lines[at][1]) == [0] * _COLUMNS
        images[name] = np.array(faces, np.int64).reshape(-1, _COLUMNS)
    if not images:
        raise ValueError(f'{path}: empty, expected WIDER Face annotations')
    return images


def _integers(line: str) -> list[int] | None:
    try:
        return [int(word) for word in line.split()]
    except ValueError:
        return None


@DATASETS.register_module()
class WiderFaceDataset(BaseDetDataset):
    """WIDER Face, read from the official text annotation.

    No conversion is needed. ``data_root`` is where the official archives
    were unzipped::

        dict(type='polynl_mm.WiderFaceDataset',
             data_root='data/WIDERFace',
             ann_file='wider_face_split/wider_face_train_bbx_gt.txt',
             data_prefix=dict(img='WIDER_train/images'),
             filter_cfg=dict(filter_empty_gt=True))

    A picture has ``img_path``, ``img_id`` (``event/name`` without suffix, a
    str: what the official evaluation calls it) and ``instances``. An
    instance has ``bbox`` [x, y, x + w, y + h] (int, as annotated, so it may
    stick out of the picture), ``bbox_label`` 0, ``ignore_flag``, and the
    attributes of the face: ``blur``, ``expression``, ``illumination``,
    ``invalid``, ``occlusion``, ``pose``.

    - Faces that are flagged invalid or are smaller than ``min_size`` get
      ``ignore_flag`` 1.
    - Degenerate boxes (no width or no height) cover no pixel and are left
      out, in training and in testing.
    - The annotation has no picture sizes, so there is no ``height`` and
      ``width`` before a picture is loaded: ``AspectRatioBatchSampler`` and
      ``filter_cfg=dict(min_size=...)``, which need them, do not work here.

    Args:
        min_size (int, optional): Ignore faces with a side below this many
            pixels of the original picture. None ignores none.
        filter_cfg (dict, optional): Only ``filter_empty_gt`` (bool): leave
            out, in training, pictures in which no face is left that is not
            ignored.
        *args: See :class:`mmdet.datasets.BaseDetDataset`, and so for
            ``**kwargs``.

    Raises:
        FileNotFoundError: The annotation file, the picture folder or a
            picture is not there.
        ValueError: On an argument out of range and on malformed annotation.
    """

    METAINFO = {'classes': ('face',), 'palette': [(0, 255, 0)]}

    def __init__(
        self,
        *args,
        min_size: int | None = None,
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
        self.min_size = min_size
        super().__init__(*args, filter_cfg=filter_cfg, **kwargs)

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
             'wider_face_split/wider_face_train_bbx_gt.txt'),
            (folder, backend.isdir, 'picture folder, such as '
             'WIDER_train/images'),
        ):  # fmt: skip
            if not exists(place):
                raise FileNotFoundError(
                    f'{place}: not there, expected the {what} of the '
                    f'unzipped WIDER Face release'
                )
        with get_local_path(
            self.ann_file, backend_args=self.backend_args
        ) as local_path:
            images = read_bbx_gt(local_path)
        data_list = [
            self.parse_data_info(dict(name=name, faces=faces))
            for name, faces in images.items()
        ]
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

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """Bring one picture into mmdet's form.

        Args:
            raw_data_info (dict): ``name``, the picture as ``event/name.jpg``,
                and ``faces``, its (n, 10) array of :func:`read_bbx_gt`.

        Returns:
            dict: See the class.
        """
        name = raw_data_info['name']
        instances = []
        for x, y, w, h, *attributes in raw_data_info['faces'].tolist():
            if w <= 0 or h <= 0:
                continue
            face = dict(zip(ATTRIBUTES, attributes))
            small = self.min_size is not None and min(w, h) < self.min_size
            instances.append(
                dict(
                    bbox=[x, y, x + w, y + h],
                    bbox_label=0,
                    ignore_flag=int(small or face['invalid'] != 0),
                    **face,
                )
            )
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
