"""What a user often gets wrong, looked at before anything is started.

That is before a work directory is made or a process group is waited for; it
ends in a :class:`~polynl_mm.engine.cli.StartError`.
"""

from __future__ import annotations

import codecs
import os
import random
import re
import tempfile
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from inspect import getattr_static, isclass, signature
from pkgutil import resolve_name

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope, Registry
from torch import nn
from torch.utils.data import DataLoader, Dataset

from polynl_mm.registry import MODELS as OURS

from .cli import LAUNCHERS, StartError, rank, say
from .heads import check_heads
from .hosts import HOSTS
from .safe_load import read_checkpoint, reason

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@contextmanager
def our_errors(where: str = '') -> Iterator[None]:
    """Let what this package finds wrong in a config or a file end in a line.

    Args:
        where (str): What the line begins with.

    Raises:
        StartError: For a ValueError or OSError that code of this package has
            raised. That of a host keeps its traceback.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if not frame.filename.startswith(_PACKAGE + os.sep):
            raise
        raise StartError(f'{where}{error}') from error


def require(cfg: Config, *keys: str) -> None:
    """Check that the config has what the tool is about.

    Raises:
        StartError: A key is missing or None.
    """
    for key in keys:
        if cfg.get(key) is None:
            raise StartError(f'config {cfg.filename} has no {key}')


def check_plugins(cfg: Config) -> None:
    """Check that what is given ``plugins`` in the model takes them.

    Hosts end in a TypeError or an assertion that names neither the key nor
    another way.

    Raises:
        StartError: It takes none, or not such ones.
    """
    for path, part in _parts('model', cfg.get('model')):
        if 'plugins' not in part:
            continue
        # That of polynl_mm.Insert and Replace, also of one in the other.
        name = part
        while isinstance(name, dict):
            name = name.get('into', name.get('type'))
        with MODELS.switch_scope_and_registry(
            cfg.get('default_scope')
        ) as registry:
            kind = registry.get(name) if isinstance(name, str) else name
        if not isclass(kind):
            continue
        depth = part.get('depth')
        settings = getattr(kind, 'arch_settings', {}).get(depth)
        if not any(
            'plugins' in signature(each.__init__).parameters
            for each in kind.__mro__
        ):
            why = f'{kind.__name__} takes none'
        elif (
            part['plugins']
            and settings
            and not hasattr(settings[0], 'forward_plugin')
        ):
            why = f'{kind.__name__} of depth {depth} has no bottlenecks'
        else:
            if hasattr(kind, 'make_stage_plugins'):
                for number, plugin in enumerate(part['plugins'] or ()):
                    where = f'config {cfg.filename}: {path}.plugins.{number}'
                    count = part.get('num_stages', 4)
                    _check_plugin(where, plugin, count, registry)
            continue
        raise StartError(
            f'config {cfg.filename}: {path}.plugins: {why}: leave it out and '
            f"write type='polynl_mm.Insert', into={kind.__name__!r}, "
            'blocks=[dict(after=..., cfg=...)]'
        )


def _check_plugin(
    where: str, plugin: dict, stages: int, registry: Registry
) -> None:
    """Check one that a ResNet of a host is given."""
    positions = [f'after_conv{i}' for i in (1, 2, 3)]
    if plugin.get('position') not in positions:
        raise StartError(
            f'{where}.position={plugin.get("position")!r}, expected one of '
            + ', '.join(positions)
        )
    chosen = plugin.get('stages')
    if chosen is not None and len(chosen) != stages:
        raise StartError(
            f'{where}.stages={chosen}, expected one of True or False for each '
            f'of {stages} stages'
        )
    name = (plugin.get('cfg') or {}).get('type')
    if isinstance(name, str) and registry.get(name) is None:
        prefix, dot, _ = name.rpartition('.')
        known = {**MODELS.module_dict, **registry.module_dict}
        if prefix == 'polynl_mm':
            known = OURS.module_dict
        names = [f'{prefix}{dot}{each}' for each in known]
        near = get_close_matches(name, names, n=1)
        raise StartError(
            f'{where}.cfg.type={name!r} is not registered, expected a type '
            + (f'such as {near[0]!r}' if near else 'that is imported')
        )


def _parts(path: str, value) -> Iterator[tuple[str, dict]]:
    """Give the dicts in a config, by their paths."""
    if isinstance(value, dict):
        yield path, value
        for key, each in value.items():
            yield from _parts(f'{path}.{key}', each)
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from _parts(f'{path}.{number}', each)


def leaf_datasets(cfg: dict) -> Iterator[dict]:
    """Give the data sets inside a data loader or a wrapper such as Concat."""
    inner = cfg.get('dataset', cfg.get('datasets'))
    if inner is None:
        yield cfg
        return
    for each in inner if isinstance(inner, (list, tuple)) else [inner]:
        if isinstance(each, dict):
            yield from leaf_datasets(each)


def check_data(cfg: Config, *phases: str) -> None:
    """Check that the local files and folders named in the config are there.

    Paths are joined as ``mmengine.dataset.BaseDataset`` joins them. Samples
    themselves are checked, too, where the host has such a check, see
    :attr:`polynl_mm.engine.hosts.Host.check_datasets`, and a model to train is
    compared with its data.

    Args:
        cfg (Config): The config.
        phases (str): 'train', 'val' or 'test'; those that the config lacks
            are passed over.

    Raises:
        StartError: One is missing, or an annotation file is empty or no text
            that its data set can read, or images and labels do not fit, or a
            transform that mixes pictures stands where there is one alone.
    """
    for phase in phases:
        for dataset in leaf_datasets(cfg.get(f'{phase}_dataloader') or {}):
            _check_mixing(cfg, phase, dataset)
            root = dataset.get('data_root') or ''
            files = {'data_root': root}
            for key in ('ann_file', 'landmark_file'):
                files[key] = dataset.get(key)
            for key, prefix in (dataset.get('data_prefix') or {}).items():
                # A test set may come without its labels.
                if phase != 'test' or key.startswith('img'):
                    files[f'data_prefix.{key}'] = prefix
            for key, path in files.items():
                _check_path(
                    f'{phase}_dataloader: {key}', root, path, cfg, dataset
                )
        evaluators = cfg.get(f'{phase}_evaluator') or []
        if isinstance(evaluators, dict):
            evaluators = [evaluators]
        for evaluator in evaluators:
            for key in ('ann_file', 'gt_dir'):
                _check_path(
                    f'{phase}_evaluator: {key}',
                    '',
                    evaluator.get(key),
                    cfg,
                    evaluator,
                )
    host = HOSTS.get(cfg.get('default_scope'))
    if 'train' in phases:
        check_heads(cfg, leaf_datasets(cfg.get('train_dataloader') or {}))
    if host and host.check_job:
        try:
            resolve_name(host.check_job)(cfg, phases)
        except (OSError, ValueError) as error:
            raise StartError(f'config {cfg.filename}: {error}') from error
    if host and host.check_datasets:
        _check_samples(cfg, phases, resolve_name(host.check_datasets))


def _check_samples(
    cfg: Config, phases: Iterable[str], check_datasets: Callable
) -> None:
    part = slice(None)
    if cfg.get('launcher', 'none') != 'none':
        # Reading takes a while: every process looks at its share, and the
        # launcher ends the others where one fails.
        number, size, _ = LAUNCHERS[cfg.launcher]
        part = slice(int(os.environ[number]), None, int(os.environ[size]))
    for phase in phases:
        leaves = [*leaf_datasets(cfg.get(f'{phase}_dataloader') or {})]
        here = [leaf for leaf in leaves if 'type' in leaf and _local(leaf)]
        # Where some can not be looked at, they may hold what the others lack.
        training = phase == 'train' and len(here) == len(leaves)
        try:
            check_datasets(here, say, part, training)
        except (OSError, ValueError) as error:
            raise StartError(
                f'config {cfg.filename}: {phase}_dataloader: {error}'
            ) from error


def _check_mixing(cfg: Config, phase: str, dataset: dict) -> None:
    with TRANSFORMS.switch_scope_and_registry(
        cfg.get('default_scope')
    ) as registry:
        kinds = [
            registry.get(step['type'])
            for step in dataset.get('pipeline') or []
            if isinstance(step.get('type'), str)
        ]
    for kind in kinds:
        # The method by which mmdet's wrapper and that of mmseg ask it for
        # other samples; one with a cache takes them from there.
        choices = (
            getattr_static(kind, name, None)
            for name in ('get_indexes', 'get_indices')
        )
        if any(
            choose and 'dataset' in signature(choose).parameters
            for choose in choices
        ):
            raise StartError(
                f'config {cfg.filename}: {phase}_dataloader: {kind.__name__} '
                'mixes several pictures: it belongs into the pipeline of a '
                'MultiImageMixDataset around the data set, not into that of '
                f'the {dataset.get("type")} itself'
            )


def _local(dataset: dict) -> bool:
    prefixes = (dataset.get('data_prefix') or {}).values()
    return not _remote(dataset, dataset.get('data_root'), *prefixes)


def _remote(owner: dict, *paths: str | None) -> bool:
    backend = (owner.get('backend_args') or {}).get('backend', 'local')
    return backend != 'local' or any('://' in (path or '') for path in paths)


def _check_path(
    key: str, root: str, path: str | None, cfg: Config, owner: dict
) -> None:
    if not path or not isinstance(path, str) or _remote(owner, root, path):
        return
    full = path if key.endswith('data_root') else os.path.join(root, path)
    full = os.path.abspath(full)
    if not os.path.exists(full):
        raise StartError(
            f'config {cfg.filename}: {key}={path!r}: {full} does not exist'
        )
    if not key.endswith('_file'):
        return
    where = f'config {cfg.filename}: {key}={path!r}: {full}'
    if os.path.getsize(full) == 0:
        raise StartError(f'{where} is empty, expected annotations')
    # Our own readers say more, and pass over the mark.
    if full.endswith(('.json', '.txt')) and not str(
        owner.get('type')
    ).startswith('polynl_mm.'):
        _check_text(full, where)


def _check_text(path: str, where: str) -> None:
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                raise StartError(
                    f'{where} begins with a byte order mark, which would be '
                    'read as a part of its content: save it as UTF-8 without '
                    'one'
                )
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise StartError(
                    f'{where}, line {number}: got {line[:80].strip()!r}, '
                    'expected text in UTF-8'
                ) from error


def check_output(option: str, path: str, folder: bool = False) -> None:
    """Check that results can be written, before any are computed.

    Folders on the way are made. Process 0 looks, as it writes.

    Args:
        option (str): What asks for them, for the message.
        path (str): A file, which is left as it is.
        folder (bool): Whether it is a folder instead, which is made.

    Raises:
        StartError: They can not.
    """
    if rank() > 0:
        return
    try:
        parent = path if folder else os.path.dirname(os.path.abspath(path))
        os.makedirs(parent, exist_ok=True)
        if folder:
            tempfile.TemporaryFile(dir=parent).close()
            return
        there = os.path.lexists(path)
        open(path, 'ab').close()
        if not there:
            os.remove(path)
    except OSError as error:
        raise StartError(
            f'{option} {path} can not be written: {error.strerror}'
        ) from error


def check_device(device: str) -> None:
    """Check a device that is asked for by ``--device``.

    Raises:
        StartError: It is none, or this machine has no such one.
    """
    try:
        torch.device(device)
    except RuntimeError as error:
        raise StartError(
            f'--device {device} is none: expected one such as cuda:0 or cpu'
        ) from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise StartError(
            f'--device {device}, but this machine has no such device'
        ) from error


def check_names(dataset: Dataset, option: str, suffix: bool = True) -> None:
    """Check that what is named as its picture has a name of its own.

    Args:
        dataset (Dataset): That of the test; one that can not tell its
            pictures is passed over.
        option (str): What asks for the files, for the message.
        suffix (bool): Whether the name is that with the suffix.

    Raises:
        StartError: Two pictures, in different folders, would give one file.
    """
    if not hasattr(dataset, 'get_data_info'):
        return
    pictures = {}
    for index in range(len(dataset)):
        picture = dataset.get_data_info(index).get('img_path')
        name = os.path.basename(picture or '')
        name = name if suffix else os.path.splitext(name)[0]
        other = pictures.setdefault(name, picture)
        if other != picture:
            raise StartError(
                f'{option}: {other} and {picture} would both be written to '
                f'one file {name}: test them one after the other'
            )


def check_loader(cfg: Config, phase: str, loader: DataLoader) -> None:
    """Check what hosts ask of samples only when they are at work.

    Args:
        cfg (Config): The config.
        phase (str): Of the loader: 'train', 'val' or 'test'.
        loader (DataLoader): With at least one sample.

    Raises:
        StartError: A sample lacks it.
    """
    where = f'config {cfg.filename}: {phase}_dataloader'
    dataset = loader.dataset
    grouping = type(loader.batch_sampler).__name__
    if grouping == 'AspectRatioBatchSampler' and not (
        {'width', 'height'} <= dataset.get_data_info(0).keys()
    ):
        raise StartError(
            f'{where}: {grouping} needs the width and height of pictures, '
            f'which a {type(dataset).__name__} does not know before it loads '
            f'them: set {phase}_dataloader.batch_sampler=None'
        )
    host = HOSTS.get(cfg.get('default_scope'))
    if phase == 'train' or host is None:
        return
    with _same_randomness():
        packed = dataset[0].get('data_samples')
    # Several with test-time augmentation.
    packed = packed[0] if isinstance(packed, list) else packed
    if not isinstance(packed, resolve_name(host.sample)):
        return
    for key in host.meta_keys:
        if key not in packed.metainfo:
            raise StartError(
                f'{where}: samples have no {key}, which '
                f'{cfg.default_scope} needs to bring what it finds back to '
                'the picture: meta_keys of the last transform must list it, '
                "and a Resize, if only dict(type='Resize', scale_factor=1.0), "
                'must stand in the pipeline'
            )


@contextmanager
def _same_randomness() -> Iterator[None]:
    """Leave the random numbers as they were, so that runs stay the same."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def check_exists(checkpoint: str) -> None:
    """Check that a checkpoint is there, unless it is a URL.

    Raises:
        StartError: It is not.
    """
    if '://' not in checkpoint and not os.path.isfile(
        os.path.expanduser(checkpoint)
    ):
        raise StartError(f'checkpoint {checkpoint} does not exist')


def check_checkpoint(cfg: Config, path: str, resume: bool = False) -> None:
    """Check that a checkpoint is one of exactly this model.

    mmengine loads what fits and only logs the rest, so that a checkpoint of
    another model is evaluated as if it were right.

    Args:
        cfg (Config): Its ``model``, before any test-time wrapper.
        path (str): A local file or a URL, as mmengine takes it.
        resume (bool): Whether it must hold a training state, too.

    Raises:
        StartError: It is missing, can not be read safely, holds no training
            state, or has other keys or shapes. Keys without a meaning for the
            result are passed over: BatchNorm's counters, and the
            preprocessor's constants and the averaged second copy of the
            weights (``ema_*``), which older versions stored.
    """
    check_exists(path)
    if rank() > 0:
        # Once is enough. A launcher ends this process if that fails.
        return
    try:
        checkpoint = read_checkpoint(path)
    except Exception as error:  # torch raises all kinds on a damaged file
        raise StartError(
            f'checkpoint {path} can not be read: {reason(error)}'
        ) from error
    if not isinstance(checkpoint, dict):
        raise StartError(
            f'checkpoint {path} holds a {type(checkpoint).__name__}, not a '
            'dict with a state_dict'
        )
    needed = ('meta', 'message_hub', 'optimizer') if resume else ()
    for key in needed:
        if key not in checkpoint:
            raise StartError(
                f'checkpoint {path} has no {key!r}: it can not be resumed '
                'from; to start anew with its weights, set load_from'
            )
    state_dict = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) for name in state_dict
    ):
        raise StartError(
            f'checkpoint {path}: its state_dict, a '
            f'{type(state_dict).__name__}, is no dict by names'
        )
    misfits = _misfits(cfg, state_dict)
    if misfits:
        raise StartError(
            f'checkpoint {path} does not fit the model of {cfg.filename}: '
            + ', '.join(misfits)
        )


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config, as a runner does.

    Raises:
        StartError: Code of this package refuses a part of it.
    """
    model_cfg = deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
    with (
        our_errors(f'config {cfg.filename}: '),
        DefaultScope.overwrite_default_scope(cfg.get('default_scope')),
    ):
        return MODELS.build(model_cfg)


def _misfits(cfg: Config, state_dict: dict) -> list[str]:
    model = build_model(cfg)
    # Some modules read an old checkpoint by the versions in here.
    versions = getattr(state_dict, '_metadata', OrderedDict())
    state_dict = OrderedDict(
        (re.sub(r'^module\.', '', key), value)
        for key, value in state_dict.items()
    )
    state_dict._metadata = versions
    reshaped = []
    try:
        keys = model.load_state_dict(state_dict, strict=False)
    except Exception as error:  # a module may meet anything in the file
        reshaped = re.findall(r'size mismatch for (\S+):', str(error))
        if not reshaped:
            return [str(error)]
        for key in reshaped:
            state_dict.pop(key)
        keys = model.load_state_dict(state_dict, strict=False)
    found = {
        'missing keys': set(keys.missing_keys) - set(reshaped),
        'unexpected keys': set(keys.unexpected_keys),
        'keys of another shape': set(reshaped),
    }
    misfits = []
    for what, names in found.items():
        names = sorted(
            name
            for name in names
            if not name.endswith('num_batches_tracked')
            and not name.startswith(('data_preprocessor.', 'ema_'))
        )
        if names:
            some = ', '.join(names[:3]) + (', ...' if names[3:] else '')
            misfits.append(f'{len(names)} {what} ({some})')
    return misfits
