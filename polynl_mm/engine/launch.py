"""From the command line to a runner: what the training and test tools share.

What a user often gets wrong is looked at before a work directory is made or a
process group is waited for, and ends in a :class:`StartError`.
"""

from __future__ import annotations

import argparse
import atexit
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from importlib.util import find_spec

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import all_gather_object, is_distributed
from mmengine.hooks import LoggerHook
from mmengine.registry import MODELS, RUNNERS, DefaultScope
from mmengine.runner import CheckpointLoader, Runner

from .runner import GlooRunner

# mmengine 0.10 imports it, and the user can do nothing about that.
warnings.filterwarnings('ignore', 'pkg_resources is deprecated')

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# The variables in which a launcher tells every process its number and how many
# there are, and how to be started by it.
_LAUNCHERS = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'torchrun, as tools/dist_*.sh do'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'srun, as tools/slurm_*.sh do'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'mpirun'),
}


class StartError(Exception):
    """What the user gave can not be started; the message says why."""


def run(tool: Callable[[], None]) -> None:
    """Run a tool; end in one line and exit code 2 at a :class:`StartError`.

    Any other exception keeps its traceback.
    """
    code = 0
    try:
        tool()
    except StartError as error:
        if _rank() > 0:
            # Process 0 meets the same error and tells it, and the launcher
            # then ends the others. Where it does not, as on another node, the
            # first process there tells it for all of them.
            time.sleep(20 if int(os.environ.get('LOCAL_RANK', 0)) == 0 else 25)
        _print(f'error: {error}')
        code = 2
    if is_distributed():
        _leave_group(code)
    if code:
        sys.exit(code)


def _leave_group(code: int) -> None:
    gloo = torch.distributed.get_backend() == 'gloo'
    if code == 0:
        # Process 0 may still be writing.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if gloo:
        # DistributedDataParallel keeps the group's threads alive, and one that
        # meets the finalisation of Python aborts the process ("terminate
        # called without an active exception"): end without it.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def say(message: str) -> None:
    """Print a line to stderr, once per job."""
    if _rank() == 0:
        _print(message)


def _print(message: str) -> None:
    prog = os.path.basename(sys.argv[0])
    # Blanks may belong to a path.
    line = re.sub(r'\s*\n\s*', ' ', message.strip())
    print(f'{prog}: {line}', file=sys.stderr, flush=True)


def _rank() -> int:
    # Those that are not set, or set before the launcher knows, count as 0.
    names = ['LOCAL_RANK', *(names[0] for names in _LAUNCHERS.values())]
    return max(int(os.environ.get(name, 0)) for name in names)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a :class:`StartError`."""

    def add_config_options(self) -> None:
        """Take settings that override the config."""
        self.add_argument(
            '--cfg-options',
            nargs='+',
            action=DictAction,
            metavar='KEY=VALUE',
            help='settings to override in the config; lists as key="[a,b]" '
            'or key=a,b, nested ones as key="[(a,b),(c,d)]", without spaces',
        )

    def add_job(self) -> None:
        """Take what training and test tools have in common, by mm custom."""
        self.add_argument('config', help='config file')
        self.add_argument(
            '--work-dir',
            help='where logs and results go; if not given, work_dir of the '
            'config, or work_dirs/<name of the config>',
        )
        self.add_config_options()
        self.add_argument(
            '--launcher',
            choices=['none', *_LAUNCHERS],
            default='none',
            help='what started the processes of a distributed job',
        )
        self.add_argument('--local_rank', '--local-rank', type=int, default=0)

    def parse_args(self, args=None, namespace=None):
        """Parse; DictAction itself does not look for the '='."""
        try:
            return super().parse_args(args, namespace)
        except (ValueError, AssertionError) as error:
            raise StartError(
                f'--cfg-options takes KEY=VALUE ...: {error}'
            ) from error

    def error(self, message: str):
        """Leave the output to :func:`run`: one line in a distributed job."""
        raise StartError(f'{message} (see {self.prog} --help)')


def read_config(path: str, options: dict | None = None) -> Config:
    """Read a config and override settings in it.

    Raises:
        StartError: The file or a base of it is missing or no Python, an
            option names no place in it, or its host is not installed.
    """
    if not os.path.isfile(path):
        raise StartError(f'config {path} does not exist')
    try:
        cfg = Config.fromfile(path)
    except (OSError, ImportError, SyntaxError) as error:
        raise StartError(f'config {path}: {error}') from error
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError, AssertionError) as error:
        raise StartError(
            f'--cfg-options {options} does not fit config {path}: {error}'
        ) from error

    host = cfg.get('default_scope')
    if host is not None and find_spec(host) is None:
        raise StartError(
            f'config {path} is for {host} (default_scope), which is not '
            'installed'
        )
    if host == 'mmdet':
        from mmdet.utils import setup_cache_size_limit_of_dynamo

        setup_cache_size_limit_of_dynamo()
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read the config of a job, see :meth:`Parser.add_job`.

    Raises:
        StartError: As :func:`read_config`, and if its work directory is a
            file.
    """
    cfg = read_config(args.config, args.cfg_options)
    name = os.path.splitext(os.path.basename(args.config))[0]
    cfg.work_dir = (
        args.work_dir or cfg.get('work_dir') or os.path.join('work_dirs', name)
    )
    if os.path.exists(cfg.work_dir) and not os.path.isdir(cfg.work_dir):
        raise StartError(f'work_dir={cfg.work_dir} is not a folder')
    cfg.launcher = args.launcher
    # torch.distributed.launch passes an argument where torchrun sets this, and
    # mmengine does not set it from what mpirun says.
    os.environ.setdefault(
        'LOCAL_RANK',
        os.environ.get('OMPI_COMM_WORLD_LOCAL_RANK', str(args.local_rank)),
    )
    return cfg


def require(cfg: Config, *keys: str) -> None:
    """Check that the config has what the tool is about.

    Raises:
        StartError: A key is missing or None.
    """
    for key in keys:
        if cfg.get(key) is None:
            raise StartError(f'config {cfg.filename} has no {key}')


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
    variable, _, starter = _LAUNCHERS[cfg.launcher]
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

    Paths are joined as ``mmengine.dataset.BaseDataset`` joins them. For mmseg
    the images and labels themselves are checked, too, see
    :func:`polynl_mm.segmentation.labels.check_seg_data`.

    Args:
        cfg (Config): The config.
        phases (str): 'train', 'val' or 'test'; those that the config lacks
            are passed over.

    Raises:
        StartError: One is missing, or an annotation file is empty, or images
            and labels do not fit.
    """
    for phase in phases:
        for dataset in leaf_datasets(cfg.get(f'{phase}_dataloader') or {}):
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
    if cfg.get('default_scope') == 'mmseg':
        _check_labels(cfg, phases)


def _check_labels(cfg: Config, phases: Iterable[str]) -> None:
    from polynl_mm.segmentation.labels import check_seg_data

    part = slice(None)
    if cfg.get('launcher', 'none') != 'none':
        # Reading takes a while: every process looks at its share, and the
        # launcher ends the others where one fails.
        rank, size, _ = _LAUNCHERS[cfg.launcher]
        part = slice(int(os.environ[rank]), None, int(os.environ[size]))
    for phase in phases:
        for dataset in leaf_datasets(cfg.get(f'{phase}_dataloader') or {}):
            paths = [dataset.get('data_root') or '']
            paths += (dataset.get('data_prefix') or {}).values()
            if 'type' not in dataset or _remote(dataset, *paths):
                continue
            try:
                check_seg_data(dataset, say, part)
            except ValueError as error:
                raise StartError(
                    f'config {cfg.filename}: {phase}_dataloader: {error}'
                ) from error


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
    if key.endswith('_file') and os.path.getsize(full) == 0:
        raise StartError(
            f'config {cfg.filename}: {key}={path!r}: {full} is empty'
        )


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
    if _rank() > 0:
        # Once is enough. A launcher ends this process if that fails.
        return
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu', 'silent')
    except Exception as error:  # torch raises all kinds on a damaged file
        raise StartError(
            f'checkpoint {path} can not be read: {_reason(error)}'
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
    misfits = _misfits(cfg, checkpoint.get('state_dict', checkpoint))
    if misfits:
        raise StartError(
            f'checkpoint {path} does not fit the model of {cfg.filename}: '
            + ', '.join(misfits)
        )


def _reason(error: Exception) -> str:
    """Say in a line why a file was not read.

    torch puts the reason amid the advice to switch the safe loader off.
    """
    text = str(error) or 'it is cut short'
    if text.startswith('Weights only load failed'):
        text = text.split('\n\nCheck the documentation')[0].split('\n')[-1]
        text = text.replace('WeightsUnpickler error: ', '').strip()
    return text.split('\n')[0].split(' Please use')[0]


def _misfits(cfg: Config, state_dict: dict) -> list[str]:
    model_cfg = deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        model = MODELS.build(model_cfg)
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
    except RuntimeError as error:
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


def build_runner(kind: type[Runner], cfg: Config, *phases: str) -> Runner:
    """Build a runner of this kind and the data sets of these phases.

    Raises:
        StartError: A data set is empty, a reader of this package says what
            is wrong with its file, or some processes would resume and others
            start anew.
    """
    runner = kind.from_cfg(cfg)
    if len(set(all_gather_object(bool(cfg.get('resume'))))) > 1:
        raise StartError(
            f'--resume: some nodes have a checkpoint in {cfg.work_dir} and '
            'others not: put work_dir on a disk that all of them share'
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
            loader = getattr(runner, f'{phase}_dataloader')
        except (ValueError, FileNotFoundError) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            # mmengine's BaseDataset stumbles when it packs an empty list.
            if where.name == '_serialize_data':
                raise StartError(empty) from error
            if where.filename.startswith(_PACKAGE + os.sep):
                raise StartError(str(error)) from error
            raise
        if len(loader.dataset) == 0:
            raise StartError(empty)
    return runner
