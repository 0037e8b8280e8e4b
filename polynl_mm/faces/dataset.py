"""WIDER Face as a data set of mmdet."""

from __future__ import annotations

import posixpath
from collections.abc import Callable

import numpy as np
from mmdet.datasets import BaseDetDataset
from mmengine.dataset import Compose
from mmengine.fileio import get_file_backend, get_local_path, join_path
from mmengine.utils import is_abs

from polynl_mm.registry import DATASETS

from .boxes import FaceBoxes
from .files import (
    ATTRIBUTES,
    annotation_format,
    match_landmarks,
    read_bbx_gt,
    read_file_list,
    read_landmark_labels,
)


class _FacePipeline(Compose):
    """mmengine's, and a transform that loses landmarks is refused by name."""

    def __call__(self, data: dict) -> dict | None:
        for step in self.transforms:
            carried = _carries_landmarks(data)
            try:
                data = step(data)
            except (AssertionError, NotImplementedError) as error:
                # So the host refuses boxes that are not its horizontal ones.
                if not carried:
                    raise
                raise _lost(step, f' ({error!r})') from error
            if data is None:
                return None
            if (
                carried
                and 'gt_bboxes' in data
                and not _carries_landmarks(data)
            ):
                raise _lost(step)
        return data


def _carries_landmarks(data: dict) -> bool:
    return isinstance(data.get('gt_bboxes'), FaceBoxes)


def _lost(step: Callable, detail: str = '') -> ValueError:
    return ValueError(
        f'{type(step).__name__} failed, or gave boxes without landmarks, on '
        f'boxes with them{detail}: expected a transform that moves gt_bboxes '
        "by the methods of mmdet's BaseBoxes; take it out of the pipeline, or "
        'with_keypoints=True out of LoadAnnotations'
    )


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
    Absolute names below the picture folder, as ``find`` writes them, are read
    as ``event/name.jpg``; any other absolute name is an error.

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
    :mod:`polynl_mm.faces.landmarks`, which ``polynl_mm.LoadAnnotations``
    loads.

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
        self.pipeline = _FacePipeline(self.pipeline.transforms)

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
        folder = self.data_prefix['img']
        with get_local_path(
            self.ann_file, backend_args=self.backend_args
        ) as path:
            kind = annotation_format(path)
            if kind == 'bbx_gt':
                faces = read_bbx_gt(path, folder=folder)
            elif kind == 'landmarks':
                labels = read_landmark_labels(
                    path,
                    allow_degenerate=self.skip_degenerate,
                    folder=folder,
                )
            else:
                names = read_file_list(path, folder=folder)
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
            labels = read_landmark_labels(
                path, allow_degenerate=True, folder=folder
            )
        matched = match_landmarks(
            faces, labels, self.ann_file, self.landmark_file
        )
        if not any((points[..., 2] > 0).any() for points in matched.values()):
            raise ValueError(
                f'{self.landmark_file}: none of its faces has landmarks; set '
                'landmark_file=None to train without them'
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
                :class:`~.files.LandmarkLabels`, or ``faces``, its (n, 10)
                array of :func:`~.files.read_bbx_gt`, with or without
                ``keypoints``, its (n, 5, 3) array of
                :func:`~.files.match_landmarks`.

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
