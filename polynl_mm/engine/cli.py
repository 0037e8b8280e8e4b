"""The command line, and how a tool ends: in a line if it can not start."""

from __future__ import annotations

import argparse
import ast
import atexit
import ctypes
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from mmengine.config import DictAction
from mmengine.dist import is_distributed

from polynl_mm import stack

# mmengine 0.10 imports it, and the user can do nothing about that.
warnings.filterwarnings('ignore', 'pkg_resources is deprecated')

# The variables in which a launcher tells every process its number and how many
# there are, and how to be started by it.
LAUNCHERS = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'torchrun, as tools/dist_*.sh do'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'srun, as tools/slurm_*.sh do'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'mpirun'),
}


class StartError(Exception):
    """What the user gave can not be started; the message says why."""


def run(tool: Callable[[], int | None]) -> None:
    """Run a tool; end in one line and exit code 2 at a :class:`StartError`.

    So it ends at packages that do not fit each other, see
    :mod:`polynl_mm.stack`.

    Otherwise the exit code is what the tool gives, None for 0. Any other
    exception keeps its traceback.
    """
    code = 0
    _end_with_launcher()
    try:
        with stack.explained():
            code = tool() or 0
    except (StartError, stack.StackError) as error:
        if rank() > 0:
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


def _end_with_launcher() -> None:
    """Have a killed torchrun take its processes with it, and those theirs.

    Else they would train on, and write into the folder of a resumed run.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ or sys.platform != 'linux':
        return
    # PR_SET_PDEATHSIG; what is forked later, to load data, has to ask itself.
    end_with_parent = partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL)
    os.register_at_fork(after_in_child=end_with_parent)
    end_with_parent()
    if os.getppid() == 1:
        # It was killed already.
        os._exit(1)


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
    if rank() == 0:
        _print(message)


def _print(message: str) -> None:
    prog = os.path.basename(sys.argv[0])
    # Blanks may belong to a path.
    line = re.sub(r'\s*\n\s*', ' ', message.strip())
    print(f'{prog}: {line}', file=sys.stderr, flush=True)


def rank() -> int:
    """Give the number of this process, also before there is a group."""
    # Those that are not set, or set before the launcher knows, count as 0.
    names = ['LOCAL_RANK', *(names[0] for names in LAUNCHERS.values())]
    return max(int(os.environ.get(name, 0)) for name in names)


class _Options(DictAction):
    """mmengine's reader of KEY=VALUE, and what it stumbles on.

    Values may have blanks and be dicts, alone or in lists, as Python writes
    them; all else is read as mmengine reads it.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        """Add the settings to those there are."""
        options = dict(getattr(namespace, self.dest) or {})
        for setting in values:
            key, equals, text = setting.partition('=')
            if not equals:
                raise ValueError(f'{setting!r} has no =')
            try:
                options[key] = _read_value(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f'{setting[:80]}: {error}') from error
        setattr(namespace, self.dest, options)


def _read_value(text: str):
    text = text.strip()
    if re.search(r'\{|\bdict\(', text):
        return _read_literal(text)
    text = text.strip('\'"')
    parts, kind = _split(text), list
    if parts == [text]:
        if text[:1] + text[-1:] not in ('()', '[]'):
            return DictAction._parse_int_float_bool(text)
        parts, kind = _split(text[1:-1]), list if text[0] == '[' else tuple
    # A comma at the end is none.
    return kind(map(_read_value, parts[: -1 if parts[-1] == '' else None]))


def _split(text: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    parts, depth = [''], 0
    for char in text:
        depth += (char in '([') - (char in ')]')
        if depth < 0:
            break
        if char == ',' and not depth:
            parts.append('')
        else:
            parts[-1] += char
    if depth:
        raise ValueError(
            f'Imbalanced brackets in {text[:80]}, expected each to be closed'
        )
    return [part.strip() for part in parts]


class _DictCalls(ast.NodeTransformer):
    """Reads dict(a=1) as {'a': 1}."""

    def visit_Call(self, node: ast.Call) -> ast.AST:  # noqa: D102
        self.generic_visit(node)
        keys = [keyword.arg for keyword in node.keywords]
        # Without a key it is **{...}.
        named = not node.args and None not in keys
        if getattr(node.func, 'id', None) != 'dict' or not named:
            return node
        values = [keyword.value for keyword in node.keywords]
        return ast.Dict([ast.Constant(key) for key in keys], values)


def _read_literal(text: str):
    try:
        tree = _DictCalls().visit(ast.parse(text, mode='eval'))
        return ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, RecursionError) as error:
        raise ValueError(
            'a value with dicts must be written as in Python, strings in '
            "quotes, such as [dict(type='A')]"
        ) from error


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a :class:`StartError`."""

    def add_config_options(self) -> None:
        """Take settings that override the config."""
        self.add_argument(
            '--cfg-options',
            nargs='+',
            action=_Options,
            metavar='KEY=VALUE',
            help='settings to override in the config; lists as key="[a,b]" '
            'or key=a,b, nested ones as key="[(a,b),(c,d)]", dicts as '
            'key="[dict(type=\'A\')]", with strings in quotes',
        )

    def add_device(self) -> None:
        """Take where one process computes, of the hosts' inferencers."""
        self.add_argument(
            '--device', help='such as cuda:0 or cpu; by default a GPU if any'
        )

    def add_tiles(self) -> None:
        """Take how a detector is given large pictures."""
        self.add_argument(
            '--tile',
            type=int,
            metavar='PIXELS',
            help='mmdet: detect in square tiles of this side, of the pictures '
            'at their own size (Resize in the test pipeline is left out; the '
            "views of a config's tta_pipeline keep theirs); Poly-NL layers "
            'see the whole picture, unless model.context=None is set',
        )
        self.add_argument(
            '--overlap',
            type=int,
            metavar='PIXELS',
            default=128,
            help='of neighbouring tiles, best as large as the objects '
            '(default: 128)',
        )

    def add_job(self) -> None:
        """Take what training and test tools have in common, by mm custom."""
        self.add_argument(
            'config', help='config file, or the name of one of polynl_mm'
        )
        self.add_argument(
            '--work-dir',
            help='where logs and results go; if not given, work_dir of the '
            'config, or work_dirs/<name of the config>',
        )
        self.add_config_options()
        self.add_argument(
            '--launcher',
            choices=['none', *LAUNCHERS],
            default='none',
            help='what started the processes of a distributed job',
        )
        self.add_argument('--local_rank', '--local-rank', type=int, default=0)

    def parse_args(self, args=None, namespace=None):
        """Parse; what is wrong with a setting is said like all else."""
        try:
            return super().parse_args(args, namespace)
        except ValueError as error:
            raise StartError(
                f'--cfg-options takes KEY=VALUE ...: {error}'
            ) from error

    def error(self, message: str):
        """Leave the output to :func:`run`: one line in a distributed job."""
        raise StartError(f'{message} (see {self.prog} --help)')
