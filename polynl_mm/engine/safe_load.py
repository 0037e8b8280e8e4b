"""Let torch's safe loader read what mmengine saves.

Since version 2.6, ``torch.load`` builds only types it knows to be harmless
(``weights_only=True``) and so refuses mmengine's checkpoints, which carry a
message hub: log histories (``HistoryBuffer``) over numpy arrays. Importing
this module tells the safe loader how to build these, and nothing more.

numpy's own constructors are not put on torch's list: with them, a crafted file
could make numpy take bytes for object pointers (``ndarray(1, 'O', bytes)``),
or give a dtype any size after an array was made of it. The stand-ins below
accept plain numbers and text only.

A file that is built of harmless types can still fill the memory, hang or crash
the loader: :func:`read_checkpoint` finds out in a child process.
"""

import os
from collections.abc import Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as loading
from mmengine.utils import apply_to, digit_version

from polynl_mm.limits import MB, call_in_child

_STATISTICS = ('min', 'max', 'mean', 'current')

# bool, integer, unsigned, float, complex, bytes, str
_PLAIN_KINDS = 'biufcSU'


def statistic(owner: type, name: str):
    """Stand in for ``getattr`` in a checkpoint.

    ``HistoryBuffer`` pickles its statistics as ``getattr(HistoryBuffer,
    name)``. With the real ``getattr``, a crafted file could walk from there
    to ``__globals__``, and so to any function.

    Args:
        owner: Must be ``HistoryBuffer``.
        name: 'min', 'max', 'mean' or 'current'.

    Raises:
        ValueError: For any other pair.
    """
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise ValueError(
            f'a checkpoint may fetch only {", ".join(_STATISTICS)} of '
            f'HistoryBuffer, but this one asks for {name!r} of {owner!r}: it '
            'is damaged or malicious'
        )
    return getattr(HistoryBuffer, name)


class PlainDtype:
    """Stand in for ``numpy.dtype`` in a checkpoint.

    Args:
        code: Such as 'f8' or 'U3'.
        align, copy: What numpy pickles beside it; without a meaning here.

    Raises:
        ValueError: If it is not a plain number or text.
    """

    def __init__(self, code, align=False, copy=True):
        """Take what numpy pickles; see the class."""
        self.dtype = np.dtype(code) if isinstance(code, str) else None
        if self.dtype is None or self.dtype.kind not in _PLAIN_KINDS:
            raise ValueError(
                'a checkpoint may hold arrays of numbers and text only, but '
                f'this one has dtype {code!r}'
            )

    def __setstate__(self, state):
        """Take the byte order, the only thing a plain state tells."""
        dtype = self.dtype.newbyteorder(state[1])
        if state != dtype.__reduce__()[2]:
            raise ValueError(
                f'state {state} does not belong to dtype {dtype} in a '
                'checkpoint: it is damaged or malicious'
            )
        self.dtype = dtype


class PlainArray(np.ndarray):
    """Stand in for ``numpy.ndarray`` in a checkpoint; pickles as the latter.

    It is created empty, whatever the file asks for, and gets shape, dtype and
    data from its state.
    """

    def __new__(cls):
        """Take no arguments, above all no buffer."""
        return super().__new__(cls, 0, np.int8)

    def __setstate__(self, state):
        """Take numpy's (version, shape, dtype, is_fortran, data)."""
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, dtype.dtype, is_fortran, data))

    def __reduce_ex__(self, protocol):
        """Be saved as a numpy array, which any loader knows."""
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _reconstruct(kind, shape, code):
    """Stand in for the function by which numpy pickles an empty array."""
    return PlainArray()


def _scalar(dtype, data):
    """Stand in for the function by which numpy pickles a scalar."""
    return np.frombuffer(data, dtype.dtype, 1)[0]


def _no_bytes():
    """Stand in for ``bytes``, the data of an empty array."""
    return b''


# Before 2.6, torch.load is not restricted unless asked, and can not list an
# object under another name.
if digit_version(torch.__version__) >= digit_version('2.6.0'):
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (statistic, 'builtins.getattr'),
            (_no_bytes, 'builtins.bytes'),
            (PlainDtype, 'numpy.dtype'),
            (PlainArray, 'numpy.ndarray'),
        ]
        + [
            # The module moved in numpy 2; files of both ages are read.
            (stand_in, f'numpy.{core}.multiarray.{name}')
            for core in ('core', '_core')
            for name, stand_in in (
                ('_reconstruct', _reconstruct),
                ('scalar', _scalar),
            )
        ]
    )
    # The onedl distribution of mmengine lists numpy's own constructors, and
    # reads what the safe loader refuses with the unsafe one.
    if hasattr(loading, '_safe_torch_load'):
        loading._safe_torch_load = torch.load


def read_checkpoint(path: str):
    """Read a checkpoint to the CPU; a local file in a child process first.

    Args:
        path (str): As mmengine takes it. What is no local file is read as
            mmengine reads it.

    Raises:
        ValueError: The file can not be read, not safely, or not with 1 GB of
            memory and four times its size, or not in a minute and a second
            for every 10 MB.
    """
    if '://' not in path:
        call_on_checkpoint(_try, path)
    return CheckpointLoader.load_checkpoint(path, 'cpu', 'silent')


def call_on_checkpoint(read: Callable, path: str):
    """Call a reader of a local checkpoint in a child process.

    Within the limits of :func:`read_checkpoint`; it raises as that.
    """
    size = os.path.getsize(os.path.expanduser(path))
    return call_in_child(
        *(_with_one_thread, read, path),
        memory=1024 * MB + 4 * size,
        seconds=60 + size // (10 * MB),
    )


def reason(error: Exception) -> str:
    """Say in a line why a file was not read.

    torch puts the reason amid the advice to switch the safe loader off.
    """
    text = str(error) or 'it is cut short'
    if text.startswith('Weights only load failed'):
        text = text.split('\n\nCheck the documentation')[0].split('\n')[-1]
        text = text.replace('WeightsUnpickler error: ', '').strip()
    return text.split('\n')[0].split(' Please use')[0]


def _with_one_thread(read: Callable, path: str):
    # The threads of the parent are not in the child.
    torch.set_num_threads(1)
    return read(path)


def _try(path: str) -> None:
    checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu', 'silent')
    # As mmengine walks what it saves again: not all that can be loaded in no
    # time can be walked in any.
    apply_to(checkpoint, lambda value: False, None)
