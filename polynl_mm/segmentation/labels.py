"""Images and labels of a data set of mmseg, looked at before training."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS, TRANSFORMS
from mmseg.datasets import BaseSegDataset
from PIL import Image

# Those whose size PIL tells from the first bytes, as the hosts would see it.
_SIZED = ('.png', '.jpg', '.jpeg')
_ORIENTATION = 0x0112


def check_seg_data(
    dataset: dict,
    say: Callable[[str], None],
    part: slice = slice(None),
) -> None:
    """Check every image and label of a local data set of mmseg.

    That they belong together is told by their names; sizes of images are read
    from their headers; labels are read as the pipeline's ``LoadAnnotations``
    reads them, each once, in threads: about 10 ms of one core for a label of
    2048 x 1024, half a minute for the 3,475 of Cityscapes, less by the number
    of cores.

    Args:
        dataset: Config of the data set. A type that is no ``BaseSegDataset``
            is passed over, and so are labels which the pipeline does not load
            by ``LoadAnnotations``.
        say: Told in a line what takes long.
        part: Which of the labels to read, where several processes share the
            work; that names belong together is checked of all.

    Raises:
        ValueError: The image folder has no image with the suffix of the data
            set; an image is missing or has no label; a label has no image; a
            file can not be read; image and label differ in size; a label has
            an id that is neither one of the classes nor ``ignore_index``. The
            message names the first such file, and what was expected.
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
        for _ in pool.map(check, pairs[part]):
            pass


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


def _check_pair(data: BaseSegDataset, load: Callable, pair: dict) -> None:
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
    classes = data.metainfo.get('classes')
    if classes is None:
        return
    bad = (label >= len(classes)) & (label != data.ignore_index)
    if bad.any():
        ids = np.unique(label[bad]).tolist()
        raise ValueError(
            f'label {path} has the ids {ids[:5] + ["..."] * (len(ids) > 5)}, '
            f'expected 0 to {len(classes) - 1}, or {data.ignore_index} for '
            'what is ignored'
        )


def _read(path: str, reader: Callable):
    try:
        return reader(path)
    except Exception as error:  # decoders raise all kinds on a damaged file
        raise ValueError(f'{path} can not be read: {error}') from error


def _size(path: str) -> tuple[int, int]:
    """Give (height, width) from the header, turned as the hosts turn it."""
    with Image.open(path) as image:
        turned = image.format == 'JPEG' and (
            image.getexif().get(_ORIENTATION, 1) > 4
        )
        return image.size if turned else image.size[::-1]
