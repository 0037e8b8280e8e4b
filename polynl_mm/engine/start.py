"""From a config to a runner, on any machine."""

from __future__ import annotations

import argparse
import os
import re
import traceback
from datetime import timedelta
from importlib.util import find_spec
from pkgutil import resolve_name

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import all_gather_object
from mmengine.hooks import LoggerHook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.distributed import constants

from polynl_mm import stack
from polynl_mm.shipped import config_path, know_forks

from . import safe_load
from .checks import check_loader, check_output, check_plugins, our_errors
from .cli import LAUNCHERS, StartError, say
from .hosts import HOSTS
from .runner import CollectHook, Evaluating, GlooRunner


def read_config(path: str, options: dict | None = None) -> Config:
    """Read a config and override settings in it.

    Args:
        path: A file, or the name of a config of this package.
        options: Settings, by their keys.

    Raises:
        StartError: The file or a base of it is missing or no Python, an
            option names no place in it, it has a transform that this
            package had once, its host is not installed, what we read of
            ``model.test_cfg`` is wrong, or what is given plugins takes none.
    """
    if not os.path.isfile(path):
        path = _shipped(path)
    know_forks()
    try:
        cfg = Config.fromfile(path)
    except (OSError, ImportError, SyntaxError, UnicodeError) as error:
        why = stack.reason(error) or error
        raise StartError(f'config {path}: {why}') from error
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError, AssertionError) as error:
        raise StartError(
            f'--cfg-options {options} does not fit config {path}: {error}'
        ) from error

    gone = re.search(r"'polynl_mm\.(RandomFlip|FilterAnnotations)'", str(cfg))
    if gone:
        # mmengine would look for the name among those of mmcv.
        raise StartError(
            f'config {path}: there is no {gone[0]} any more, as the '
            f"host's own moves landmarks, too: write type='{gone[1]}'"
        )
    host = cfg.get('default_scope')
    if host is not None and find_spec(host) is None:
        raise StartError(
            f'config {path} is for {host} (default_scope), which is not '
            'installed'
        )
    if host in HOSTS and HOSTS[host].set_up:
        resolve_name(HOSTS[host].set_up)()
    if host in HOSTS and HOSTS[host].check_test_cfg:
        test_cfg = (cfg.get('model') or {}).get('test_cfg')
        try:
            resolve_name(HOSTS[host].check_test_cfg)(test_cfg)
        except ValueError as error:
            raise StartError(f'config {path}: {error}') from error
    check_plugins(cfg)
    return cfg


def _shipped(name: str) -> str:
    """Give the path of a config of this package that has this very name."""
    if os.path.dirname(name):
        raise StartError(f'config {name} does not exist')
    try:
        path = config_path(name)
    except ValueError:
        path = ''
    # Not one that only begins so.
    if os.path.basename(path) != f'{name.removesuffix(".py")}.py':
        raise StartError(
            f'config {name} does not exist, and polynl_mm has none of that '
            'name'
        )
    say(f'config {name}: {path}')
    return path


def load_config(args: argparse.Namespace) -> Config:
    """Read the config of a job, see :class:`~polynl_mm.engine.cli.Parser`.

    Raises:
        StartError: As :func:`read_config`, and if its work directory is a
            file.
    """
    cfg = read_config(args.config, args.cfg_options)
    name = os.path.splitext(os.path.basename(cfg.filename))[0]
    cfg.work_dir = (
        args.work_dir or cfg.get('work_dir') or os.path.join('work_dirs', name)
    )
    if os.path.exists(cfg.work_dir) and not os.path.isdir(cfg.work_dir):
        raise StartError(f'work_dir={cfg.work_dir} is not a folder')
    cfg.launcher = args.launcher
    _name_safe_load(cfg)
    # torch.distributed.launch passes an argument where torchrun sets this, and
    # mmengine does not set it from what mpirun says.
    os.environ.setdefault(
        'LOCAL_RANK',
        os.environ.get('OMPI_COMM_WORLD_LOCAL_RANK', str(args.local_rank)),
    )
    return cfg


def _name_safe_load(cfg: Config) -> None:
    """Have what is saved beside the checkpoints import what reads them.

    The hosts' inferencers read these before they look up any type of ours.
    """
    imports = cfg.get('custom_imports') or dict(
        imports=[], allow_failed_imports=False
    )
    named = imports['imports']
    named = [named] if isinstance(named, str) else [*named]
    if safe_load.__name__ not in named:
        named.append(safe_load.__name__)
        cfg.custom_imports = dict(imports, imports=named)


def runner_class(cfg: Config) -> type[Runner]:
    """Give the runner that the config, the launcher and the machine demand.

    Raises:
        StartError: The launcher did not start this process, or can not on
            this machine; more processes than GPUs; the config has a runner of
            its own where it would need :class:`GlooRunner`, or one that
            nobody knows.
    """
    own = cfg.get('runner_type', 'Runner')
    kind = RUNNERS.get(own) if isinstance(own, str) else own
    if kind is None:
        raise StartError(
            f'config {cfg.filename}: runner_type={own!r} is not registered'
        )
    if cfg.launcher == 'none':
        return kind
    device = get_device()
    if device == 'cpu' and cfg.launcher != 'pytorch':
        raise StartError(
            f'--launcher {cfg.launcher} needs a GPU per process, and this '
            'machine has none: use tools/dist_*.sh'
        )
    variable, _, starter = LAUNCHERS[cfg.launcher]
    if variable not in os.environ:
        raise StartError(
            f'--launcher {cfg.launcher}, but {variable} is not set: start it '
            f'through {starter}'
        )
    if cfg.launcher == 'mpi' and 'MASTER_ADDR' not in os.environ:
        raise StartError('--launcher mpi, but MASTER_ADDR is not set')
    if device == 'cuda':
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        gpus = torch.cuda.device_count()
        if processes > gpus:
            raise StartError(
                f'{processes} processes for {gpus} GPU(s): every process '
                'needs a GPU of its own'
            )
    elif device == 'cpu':
        if kind not in (Runner, GlooRunner):
            raise StartError(
                f'config {cfg.filename} has runner_type={own!r}, but several '
                'processes without a GPU need polynl_mm.GlooRunner: run it '
                'in one process, or leave runner_type out'
            )
        # Not into cfg, which is saved beside the results for other machines.
        return GlooRunner
    return kind


def build_runner(kind: type[Runner], cfg: Config, *phases: str) -> Runner:
    """Build a runner of this kind and the data sets of these phases.

    Raises:
        StartError: The work directory can not be written, a data set is
            empty or its samples lack what they are asked for, a reader of
            this package says what is wrong with its file, or some processes
            would resume and others start anew.
    """
    check_output('work_dir', cfg.work_dir, folder=True)
    if phases == ('test',):
        kind = type(kind.__name__, (Evaluating, kind), {})
    with our_errors(f'config {cfg.filename}: '):
        runner = kind.from_cfg(cfg)
    if len(set(all_gather_object(bool(cfg.get('resume'))))) > 1:
        raise StartError(
            f'--resume: some nodes have a checkpoint in {cfg.work_dir} and '
            'others not: put work_dir on a disk that all of them share'
        )
    runner.register_hook(CollectHook())
    if runner.distributed:
        runner.logger.info(
            'A process that is stopped, or whose machine is gone, ends the '
            f'others after {_patience(cfg)}, when they have waited that long '
            'for it (env_cfg.dist_cfg.timeout, in seconds)'
        )
    if runner.rank > 0:
        # mmengine lets every process write the test metrics, each with its
        # own times, into one and the same file, at the same moment.
        for hook in runner.hooks:
            if isinstance(hook, LoggerHook):
                hook.after_test_epoch = lambda *args, **kwargs: None
    for phase in phases:
        if cfg.get(f'{phase}_dataloader') is None:
            continue
        empty = f'config {cfg.filename}: {phase}_dataloader has no sample'
        try:
            with our_errors():
                loader = getattr(runner, f'{phase}_dataloader')
        except ValueError as error:
            # mmengine's BaseDataset stumbles when it packs an empty list.
            if traceback.extract_tb(error.__traceback__)[-1].name == (
                '_serialize_data'
            ):
                raise StartError(empty) from error
            raise
        if len(loader.dataset) == 0:
            raise StartError(empty)
        with our_errors():
            check_loader(cfg, phase, loader)
    return runner


def _patience(cfg: Config) -> timedelta:
    """How long a process waits for the others."""
    env = cfg.get('env_cfg') or {}
    timeout = (env.get('dist_cfg') or {}).get('timeout')
    if timeout is not None:
        return timedelta(seconds=timeout)
    if torch.distributed.get_backend() == 'nccl':
        return constants.default_pg_nccl_timeout
    return constants.default_pg_timeout
