"""Images and labels of a data set of mmseg, looked at before training."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import mmcv
import numpy as np
from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS, TRANSFORMS
from mmseg.datasets import BaseSegDataset
from PIL import Image

# Those whose size PIL tells from the first bytes.
_SIZED = ('.png', '.jpg', '.jpeg', '.webp')
_ORIENTATION = 0x0112


def check_seg_data(
    dataset: dict,
    say: Callable[[str], None],
    part: slice = slice(None),
) -> None:
    """Check every image and label of a local data set of mmseg.

    That they belong together is told by their names; sizes of images are read
    from their headers; labels are read as the pipeline's ``LoadAnnotations``
    reads them, each once, in threads: about 15 ms of one core for a label of
    2048 x 1024, a minute for the 3,475 of Cityscapes, less by the number of
    cores.

    A class that no label holds is told, as it may be meant. Labels that hold
    one class alone teach nothing: a process whose part is like that reads on
    before it says so.

    Args:
        dataset: Config of the data set. A type that is no ``BaseSegDataset``
            is passed over, and so are labels which the pipeline does not load
            by ``LoadAnnotations``.
        say: Told in a line what takes long, and what may be wrong.
        part: Which of the labels to read, where several processes share the
            work; that names belong together is checked of all.

    Raises:
        ValueError: The image folder has no image with the suffix of the data
            set; an image is missing or has no label; a label has no image; a
            file can not be read; image and label differ in size; a label has
            an id that is neither one of the classes nor ``ignore_index``, or
            one above 255, which mmseg takes modulo 256; no label holds more
            than one class. The message names the first such file, and what
            was expected.
    """
    with DATASETS.switch_scope_and_registry('mmseg') as registry:
        kind = dataset['type']
        kind = registry.get(kind) if isinstance(kind, str) else kind
        # A type that nobody knows is left for the runner to complain about.
        if kind is None or not issubclass(kind, BaseSegDataset):
            return
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
        return
    _check_names(data, pairs)
    if len(pairs) > 500:
        say(f'reading {len(pairs)} labels once, to check sizes and ids')
    with TRANSFORMS.switch_scope_and_registry('mmseg') as registry:
        check = partial(_check_pair, data, registry.build(loaders[0]))
    with ThreadPoolExecutor() as pool:
        # In order: the first file that is wrong is named, the rest not read.
        held = set().union(*pool.map(check, pairs[part]))
    classes = data.metainfo.get('classes')
    if classes is not None and len(classes) > 1:
        for pair in pairs:
            if len(held) > 1:
                break
            held |= check(pair)
        _check_held(held, classes, data, len(pairs[part]), len(pairs), say)


def _check_held(
    held: set[int],
    classes: tuple[str, ...],
    data: BaseSegDataset,
    read: int,
    total: int,
    say: Callable[[str], None],
) -> None:
    folder = data.data_prefix['seg_map_path']
    if len(held) < 2:
        alone = [f'{k} ({classes[k]})' for k in held] or ['none']
        raise ValueError(
            f'the {total} labels in {folder} hold, of {len(classes)} classes, '
            f'{alone[0]} alone, beside the ignored {data.ignore_index}: '
            'expected the ids of at least two, such as 0 and 1, where a mask '
            'of two classes is often 0 and 255'
        )
    lacking = [
        f'{k} ({name})' for k, name in enumerate(classes) if k not in held
    ]
    if lacking:
        say(
            f'warning: none of the {read} labels read of {total} in {folder} '
            f'holds class {", ".join(lacking[:5])}'
            + (f' and {len(lacking) - 5} more' if lacking[5:] else '')
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
            f'label {path} is {label.shape[1]} x {label.shape[0]} pixels, its '
            f'image {image} is {size[1]} x {size[0]}'
        )
    wide = _read(path, _wide_ids)
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
