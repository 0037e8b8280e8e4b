"""Images and labels of a data set of mmseg, looked at before training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import mmcv
import numpy as np
from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS, TRANSFORMS
from mmseg.datasets import BaseSegDataset
from PIL import Image

from polynl_mm.progress import with_estimate

# Those whose size PIL tells from the first bytes.
_SIZED = ('.png', '.jpg', '.jpeg', '.webp')
_ORIENTATION = 0x0112


def check_seg_data(
    datasets: Iterable[dict],
    say: Callable[[str], None],
    part: slice = slice(None),
    training: bool = True,
) -> None:
    """Check every image and label of local data sets of mmseg.

    That they belong together is told by their names; sizes of images are read
    from their headers; labels are read as the pipeline's ``LoadAnnotations``
    reads them, each once, in threads: about 15 ms of one core for a label of
    2048 x 1024, a minute for the 3,475 of Cityscapes, less by the number of
    cores.

    A class that no label of a data set holds is told, as it may be meant.
    Labels to train with that hold one class alone, in all of the data sets,
    teach nothing: a process whose part is like that reads on before it says
    so.

    Args:
        datasets: Configs of the data sets of a loader. A type that is no
            ``BaseSegDataset`` is passed over, and so are labels which the
            pipeline does not load by ``LoadAnnotations``.
        say: Told in a line what takes long, and what may be wrong.
        part: Which of the labels to read, where several processes share the
            work; that names belong together is checked of all.
        training: Whether these are all that a model is to learn from.

    Raises:
        ValueError: The image folder has no image with the suffix of the data
            set; an image is missing or has no label; a label has no image; a
            file can not be read; image and label differ in size; a label has
            an id that is neither one of the classes nor ``ignore_index``, or
            one above 255, which mmseg takes modulo 256; no label to train
            with holds more than one class. The message names the first such
            file, and what was expected.
    """
    found = [_find_labels(dataset, say) for dataset in datasets]
    known = [labels for labels in found if labels is not None]
    for labels in known:
        labels.read(part, say)
    if training and len(known) == len(found):
        _check_held(known)
    for labels in known:
        lacking = labels.lacking(part)
        if lacking:
            say(f'warning: {lacking}')


@dataclass
class _Labels:
    """Those of a data set: its images and their labels, the check of a pair.

    held: The classes in those that were read.
    """

    data: BaseSegDataset
    pairs: list[dict]
    check: Callable[[dict], set[int]]
    held: set[int] = field(default_factory=set)

    @property
    def folder(self) -> str:
        return self.data.data_prefix['seg_map_path']

    @property
    def classes(self) -> tuple[str, ...]:
        return self.data.metainfo.get('classes') or ()

    def read(self, part: slice, say: Callable[[str], None]) -> None:
        pairs = self.pairs[part]
        with ThreadPoolExecutor() as pool:
            # In order: the first file that is wrong is named, the rest not
            # read.
            held = pool.map(self.check, pairs)
            for each in with_estimate(held, len(pairs), 'labels', say):
                self.held |= each

    def lacking(self, part: slice) -> str | None:
        """Say which classes none of the labels read holds."""
        # One class alone is no choice between classes.
        names = [
            f'{k} ({name})'
            for k, name in enumerate(self.classes)
            if k not in self.held and len(self.classes) > 1
        ]
        return names and (
            f'none of the {len(self.pairs[part])} labels read of '
            f'{len(self.pairs)} in {self.folder} holds class '
            + ', '.join(names[:5])
            + (f' and {len(names) - 5} more' if names[5:] else '')
        )


def _find_labels(dataset: dict, say: Callable[[str], None]) -> _Labels | None:
    """Check the names, and give what there is to read."""
    with DATASETS.switch_scope_and_registry('mmseg') as registry:
        kind = dataset['type']
        kind = registry.get(kind) if isinstance(kind, str) else kind
        # A type that nobody knows is left for the runner to complain about.
        if kind is None or not issubclass(kind, BaseSegDataset):
            return None
        data = registry.build(dict(dataset, pipeline=[], lazy_init=True))
    pairs = data.load_data_list()
    if not pairs:
        raise ValueError(
            f'{data.data_prefix["img_path"]} has no file *{data.img_suffix}, '
            f'which a {kind.__name__} consists of'
        )
    for pair in pairs:
        if not os.path.isfile(pair['img_path']):
            raise ValueError(f'image {pair["img_path"]} does not exist')
    loaders = [
        step
        for step in dataset.get('pipeline') or []
        if step['type'] in ('LoadAnnotations', 'mmseg.LoadAnnotations')
    ]
    if not loaders or 'seg_map_path' not in pairs[0]:
        return None
    _check_names(data, pairs)
    if len(pairs) > 500:
        say(f'reading {len(pairs)} labels once, to check sizes and ids')
    with TRANSFORMS.switch_scope_and_registry('mmseg') as registry:
        check = partial(_check_pair, data, registry.build(loaders[0]))
    return _Labels(data, pairs, check)


def _check_held(found: list[_Labels]) -> None:
    """Check that there is more than one class in all of them together."""
    classes = min((labels.classes for labels in found), key=len, default=())
    if len(classes) < 2:
        return
    for labels in found:
        for pair in labels.pairs:
            held = set().union(*(labels.held for labels in found))
            if len(held) > 1:
                return
            labels.held |= labels.check(pair)
    held = set().union(*(labels.held for labels in found))
    if len(held) > 1:
        return
    alone = [f'{k} ({classes[k]})' for k in held] or ['none']
    raise ValueError(
        f'the {sum(len(labels.pairs) for labels in found)} labels in '
        f'{", ".join(labels.folder for labels in found)} hold, of '
        f'{len(classes)} classes, {alone[0]} alone, beside the ignored '
        f'{found[0].data.ignore_index}: expected the ids of at least two, '
        'such as 0 and 1, where a mask of two classes is often 0 and 255'
    )


def _check_names(data: BaseSegDataset, pairs: list[dict]) -> None:
    bare = [p for p in pairs if not os.path.isfile(p['seg_map_path'])]
    if bare:
        label = bare[0]['seg_map_path']
        raw = label.replace('_labelTrainIds.png', '_labelIds.png')
        raise ValueError(
            f'image {bare[0]["img_path"]} has no label: {label} does not '
            f'exist ({len(bare)} of {len(pairs)} images have none)'
            + (
                f'; make it from {raw} with csCreateTrainIdLabelImgs of '
                'cityscapesscripts'
                if os.path.isfile(raw)
                else ''
            )
        )
    if data.ann_file:
        return
    folder = data.data_prefix['seg_map_path']
    labels = {
        os.path.join(folder, name)
        for name in list_dir_or_file(
            folder, list_dir=False, suffix=data.seg_map_suffix, recursive=True
        )
    }
    lonely = sorted(labels - {pair['seg_map_path'] for pair in pairs})
    if lonely:
        raise ValueError(
            f'label {lonely[0]} has no image *{data.img_suffix} in '
            f'{data.data_prefix["img_path"]} ({len(lonely)} of {len(labels)} '
            'labels have none); to use a part of the images, list them in '
            'ann_file'
        )


def _check_pair(data: BaseSegDataset, load: Callable, pair: dict) -> set[int]:
    """Check one image and its label, and give the classes in it."""
    image, path = pair['img_path'], pair['seg_map_path']
    size = _read(image, _size) if image.lower().endswith(_SIZED) else None
    # The transform appends to seg_fields.
    label = _read(path, lambda _: load({**pair, 'seg_fields': []}))
    label = label['gt_seg_map']
    if label.ndim != 2:
        raise ValueError(
            f'label {path} has shape {label.shape}, expected one class id per '
            'pixel'
        )
    if size not in (None, label.shape):
        raise ValueError(
            f'label {path} is {label.shape[1]} x {label.shape[0]} pixels, but '
            f'its image {image} is {size[1]} x {size[0]}'
        )
    wide = _read(path, _wide_ids)
    if data.ignore_index == 255:
        # Such as 65535, which mmseg takes for 255.
        wide = [each for each in wide if each % 256 != 255]
    if wide:
        raise _wrong_ids(path, wide, '0 to 255, as mmseg takes 256 for 0')
    classes = data.metainfo.get('classes')
    if classes is None:
        return set()
    # Counting is ten times faster than sorting, and mmseg gives bytes.
    ids = (
        np.flatnonzero(np.bincount(label.ravel()))
        if label.dtype == np.uint8
        else np.unique(label)
    )
    ids = set(ids.tolist()) - {data.ignore_index}
    bad = sorted(ids - set(range(len(classes))))
    if bad:
        raise _wrong_ids(
            path,
            bad,
            f'0 to {len(classes) - 1}, or {data.ignore_index} for what is '
            'ignored',
        )
    return ids


def _wrong_ids(path: str, ids: list[int], expected: str) -> ValueError:
    return ValueError(
        f'label {path} has the ids {ids[:5] + ["..."] * (len(ids) > 5)}, '
        f'expected {expected}'
    )


def _read(path: str, reader: Callable):
    try:
        return reader(path)
    except Exception as error:  # decoders raise all kinds on a damaged file
        raise ValueError(f'{path} can not be read: {error}') from error


def _size(path: str) -> tuple[int, int]:
    """Give (height, width) from the header, or turned as the hosts turn it."""
    with Image.open(path) as image:
        if image.getexif().get(_ORIENTATION, 1) > 4:
            # Which formats OpenCV turns depends on its version.
            return mmcv.imread(path).shape[:2]
        return image.size[::-1]


def _wide_ids(path: str) -> list[int]:
    """Give the ids of a label that a byte does not hold."""
    if not path.lower().endswith(('.png', '.tif', '.tiff')):
        return []
    with Image.open(path) as image:
        if not image.mode.startswith('I'):
            return []
        ids = np.unique(np.asarray(image))
    return ids[ids > 255].tolist()
