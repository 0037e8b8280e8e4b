"""Pictures in one folder per class, or in one folder with a list of labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import cv2
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import exists, get_local_path, join_path, list_dir_or_file
from mmengine.utils import is_abs

from polynl_mm.progress import with_estimate
from polynl_mm.registry import DATASETS

from .accuracy import TOP, check_topk
from .files import read_labels

SUFFIXES = (
    *('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff'),
    '.webp',
)


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """Pictures with one class each, such as ImageNet as it is unpacked.

    Either a folder for every class, with pictures at any depth in it::

        dict(type='polynl_mm.ImageFolder', data_root='data/imagenet',
             data_prefix=dict(img_path='train'))

    or all pictures in one folder, and a file that says what they are, see
    :func:`~.files.read_labels`::

        dict(type='polynl_mm.ImageFolder', data_root='data/imagenet',
             data_prefix=dict(img_path='val'), class_folder='train',
             ann_file='meta/val.txt', test_mode=True)

    The classes are the names of the class folders, sorted as Python sorts
    them; they are in ``metainfo`` as ``classes``. A sample has ``img_path``
    and ``gt_label``, an int from 0. Hidden files, and those without the
    suffix of a picture, are passed over.

    Args:
        class_folder (str, optional): Whose folders are the classes, under
            ``data_root`` if it is relative. If None, those of the picture
            folder. ``metainfo=dict(classes=...)`` takes its place.
        meta_file (str, optional): ``meta.mat`` of the official development
            kit, for its labels. If None, the one beside ``ann_file``.
        *args: See :class:`mmengine.dataset.BaseDataset`, and so for
            ``**kwargs``.

    Raises:
        FileNotFoundError: A folder, a file or a picture is not there.
        ValueError: There are no class folders; one of the picture folder is
            none of the classes, or, unless in ``test_mode``, has no picture;
            a label file is malformed, or has labels beyond the classes.
    """

    def __init__(
        self,
        *args,
        class_folder: str | None = None,
        meta_file: str | None = None,
        **kwargs,
    ) -> None:
        """Read the folders and the labels."""
        self.class_folder = class_folder
        self.meta_file = meta_file
        super().__init__(*args, **kwargs)

    def _join_prefix(self) -> None:
        super()._join_prefix()
        for key in ('class_folder', 'meta_file'):
            path = getattr(self, key)
            if path and not is_abs(path) and self.data_root:
                setattr(self, key, join_path(self.data_root, path))

    def load_data_list(self) -> list[dict]:
        """Find the pictures, and what they are."""
        folder = self.data_prefix['img_path']
        classes = self._metainfo['classes'] = self.find_classes()
        if self.ann_file:
            return self._listed(folder)
        index = {name: i for i, name in enumerate(classes)}
        data_list = []
        for name in self._folders(folder):
            place = join_path(folder, name)
            if name not in index:
                raise ValueError(
                    f'{place}: expected one of the {len(index)} classes of '
                    f'{self.class_folder or "metainfo"}'
                )
            pictures, _ = _pictures(place)
            if not (pictures or self.test_mode):
                raise ValueError(
                    f'{place}: a class without pictures, expected files '
                    f'{", ".join(SUFFIXES)}'
                )
            data_list += [
                dict(img_path=join_path(place, each), gt_label=index[name])
                for each in pictures
            ]
        return data_list

    def find_classes(self) -> tuple[str, ...]:
        """Give their names, without a look at the pictures."""
        named = self._metainfo.get('classes')
        if named is not None:
            return tuple(named)
        return self._folders(self.class_folder or self.data_prefix['img_path'])

    def _folders(self, folder: str) -> tuple[str, ...]:
        if not exists(folder):
            raise FileNotFoundError(
                f'{folder}: not there, expected a folder with one of each '
                'class'
            )
        found = list_dir_or_file(folder, list_file=False)
        names = tuple(sorted(n for n in found if not n.startswith('.')))
        if not names:
            raise ValueError(
                f'{folder}: no class folders in it, expected one for each '
                'class; where labels are in ann_file, class_folder or '
                'metainfo.classes tells the classes'
            )
        return names

    def _listed(self, folder: str) -> list[dict]:
        pictures, _ = _pictures(folder)
        meta = self.meta_file or join_path(
            os.path.dirname(self.ann_file), 'meta.mat'
        )
        with get_local_path(self.ann_file) as path:
            labels = read_labels(
                path, self._metainfo['classes'], pictures, meta
            )
        there = set(pictures)
        missing = [each for each in labels if each.picture not in there]
        if missing:
            first = missing[0]
            raise FileNotFoundError(
                f'{join_path(folder, first.picture)}: not there, expected by '
                f'{self.ann_file}, line {first.line}; missing are '
                f'{len(missing)} of {len(labels)} pictures'
            )
        return [
            dict(img_path=join_path(folder, each.picture), gt_label=each.label)
            for each in labels
        ]


def _pictures(folder: str) -> tuple[list[str], list[str]]:
    """Give the pictures of a folder, sorted, and the other files."""
    found = list_dir_or_file(folder, list_dir=False, recursive=True)
    # Hidden files are passed over by mmengine, those in hidden folders not.
    files = sorted(f for f in found if f'{os.sep}.' not in os.sep + f)
    pictures = [f for f in files if f.lower().endswith(SUFFIXES)]
    return pictures, [f for f in files if not f.lower().endswith(SUFFIXES)]


def check_image_folders(
    datasets: Iterable[dict],
    say: Callable[[str], None],
    part: slice = slice(None),
    training: bool = True,
) -> None:
    """Check that the pictures of local data sets may be pictures.

    The first bytes of each are read, in threads: that finds empty files and
    those that are something else. About 0.1 ms each, where files are near
    (850 digits in 0.09 s), and so minutes for ImageNet. One that is cut off
    is found when it is loaded, by ``polynl_mm.LoadImageFromFile``.

    Args:
        datasets: Configs of the data sets of a loader. A type that is no
            :class:`ImageFolder` is passed over.
        say: Told in a line what takes long, and what may be wrong: files
            that are passed over, classes without pictures.
        part: Which of the pictures to read, where several processes share
            the work.
        training: Not used; see :attr:`polynl_mm.engine.hosts.Host`.

    Raises:
        FileNotFoundError, ValueError: As :class:`ImageFolder`, and at a file
            that is no picture, which is named.
    """
    for dataset in datasets:
        # Millions of samples are faster as they are.
        data = _build(dataset, serialize_data=False)
        if data is None:
            continue
        samples, folder = data.data_list, data.data_prefix['img_path']
        pictures, others = _pictures(folder)
        if len(pictures) > len(samples):
            say(
                f'warning: {folder} has {len(pictures)} pictures, of which '
                f'{data.ann_file} names {len(samples)}: the others are '
                'passed over'
            )
        if others:
            say(
                f'warning: {folder} has {len(others)} files that have not '
                f'the suffix of a picture, such as {others[0]}: passed over'
            )
        held = {each['gt_label'] for each in samples}
        classes = data.metainfo['classes']
        bare = [n for i, n in enumerate(classes) if i not in held]
        if bare:
            say(
                f'warning: of {len(classes)} classes, {len(bare)} have no '
                f'picture in {folder}, such as {bare[0]}'
            )
        if len(samples) > 10000:
            say(
                f'reading the first bytes of {len(samples)} pictures in '
                f'{folder}'
            )
        paths = [each['img_path'] for each in samples[part]]
        with ThreadPoolExecutor() as pool:
            known = with_estimate(
                pool.map(_is_known, paths), len(paths), 'pictures', say
            )
            for path, is_known in zip(paths, known):
                if not is_known:
                    raise ValueError(
                        f'{path}: no picture, expected one that OpenCV '
                        f'reads, got {os.path.getsize(path)} bytes'
                    )


def _is_known(path: str) -> bool:
    return cv2.haveImageReader(path)


def _build(dataset: dict, **kwargs) -> ImageFolder | None:
    """Build one of ours; None for another type."""
    with DATASETS.switch_scope_and_registry('polynl_mm') as registry:
        kind = dataset.get('type')
        kind = registry.get(kind) if isinstance(kind, str) else kind
        # A type that nobody knows is left for the runner to complain about.
        if not (isinstance(kind, type) and issubclass(kind, ImageFolder)):
            return None
        return registry.build(dict(dataset, pipeline=[], **kwargs))


def check_classes(cfg: Config, phases: Iterable[str]) -> None:
    """Check that model, data sets and metric mean the same classes.

    A label beyond those of the model is an index error, and on a GPU one
    without a name; other classes in validation have other numbers.

    Args:
        cfg: Of a job. Data sets that are no :class:`ImageFolder` are passed
            over, and so are models without ``num_classes``.
        phases: Of the job: 'train', 'val' or 'test'.

    Raises:
        FileNotFoundError, ValueError: As :class:`ImageFolder`; where the
            numbers or the names differ, or the metric wants more classes
            than there are.
    """
    expected = (cfg.get('model') or {}).get('num_classes')
    learnt = None
    for phase in phases:
        loader = cfg.get(f'{phase}_dataloader') or {}
        data = _build(loader.get('dataset') or {}, lazy_init=True)
        if data is None:
            continue
        folder = data.data_prefix['img_path']
        where = f'the data set in {phase}_dataloader, {folder}'
        classes = tuple(data.find_classes())
        if expected not in (None, len(classes)):
            raise ValueError(
                f'model.num_classes={expected}, but {where}, has '
                f'{len(classes)} classes; its folders, those of class_folder '
                'or metainfo.classes tell them'
            )
        learnt = learnt or classes
        for number, pair in enumerate(zip(learnt, classes)):
            if pair[0] != pair[1]:
                raise ValueError(
                    f'class {number} is {pair[0]} in training, but {pair[1]} '
                    f'in {where}; class_folder gives it the classes of '
                    'another folder'
                )
        metrics = cfg.get(f'{phase}_evaluator') or []
        for metric in [metrics] if isinstance(metrics, dict) else metrics:
            if str(metric.get('type')).endswith('Accuracy'):
                check_topk(metric.get('topk', TOP), len(classes))
