"""Whether the heads of a model have as many classes as its data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy

from mmengine.config import Config
from mmengine.registry import DATASETS

from .cli import StartError

_CLASS_HEADS = ('decode_head', 'auxiliary_head', 'bbox_head', 'mask_head')
# These learn edges, and masks that are matched to texts.
_OWN_LABELS = ('STDCHead', 'SideAdapterCLIPHead')


def check_heads(cfg: Config, datasets: Iterable[dict]) -> None:
    """Check that no head has fewer classes than the data it learns from.

    A label beyond them is an index error, and on a GPU one without a name.

    Args:
        cfg (Config): Its ``model`` and ``default_scope``.
        datasets (Iterable[dict]): Configs of data sets. Those of a type that
            nobody knows are left for the runner to complain about, and those
            that name no classes for the first step.

    Raises:
        StartError: A head has; says which.
    """
    most, owner = 0, None
    scope = cfg.get('default_scope')
    with DATASETS.switch_scope_and_registry(scope) as registry:
        for dataset in datasets:
            kind = dataset.get('type')
            kind = registry.get(kind) if isinstance(kind, str) else kind
            if kind is None or not hasattr(kind, '_load_metainfo'):
                continue
            metainfo = kind._load_metainfo(deepcopy(dataset.get('metainfo')))
            # Of panoptic data the heads below learn the things alone.
            classes = metainfo.get('thing_classes') or metainfo.get('classes')
            count = len(classes or ())
            if count > most:
                most, owner = count, kind.__name__
    for key, number in _class_counts(cfg.get('model') or {}, 'model'):
        if number < most:
            raise StartError(
                f'config {cfg.filename}: {key}.num_classes={number}, expected '
                f'at least the {most} classes of {owner} in train_dataloader '
                '(of others, metainfo=dict(classes=(...)) of the data set '
                'tells them)'
            )


def _class_counts(model: dict, path: str) -> Iterator[tuple[str, int]]:
    """Give the heads for the classes of the data, and their numbers of them.

    Others have classes of their own, such as the one of an RPN.
    """
    for key, value in model.items():
        if key == 'roi_head':
            yield from _class_counts(value, f'{path}.{key}')
        if key not in _CLASS_HEADS:
            continue
        listed = isinstance(value, (list, tuple))
        for number, head in enumerate(value if listed else [value]):
            if not isinstance(head, dict) or 'num_classes' not in head:
                continue
            if str(head.get('type')).rpartition('.')[2] not in _OWN_LABELS:
                place = f'{path}.{key}' + f'.{number}' * listed
                yield place, head['num_classes']
