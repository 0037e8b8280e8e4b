"""What depends on torch's version or mode: products, autocast, programs.

All that the operation asks of its surroundings is asked here: in which dtype a
product runs, whether autocast is on, whether a gradient is wanted, and whether
the operations become part of a program (traced, exported, compiled), in which
nothing is written in place and, but for a compiled one, no size is known.
"""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cublas import HAS_CUBLAS

HALF = (torch.float16, torch.bfloat16)

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# Newer torch tells.
_is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)
# A product of low precision may have a result of float32: torch >= 2.8.
BMM_WIDENS = hasattr(torch.ops.aten.bmm, 'dtype')
# Operators that may be made in Python came with torch 2.4.
_HAS_TRITON = (
    find_spec('triton') is not None
    and hasattr(torch.library, 'custom_op')
    and os.environ.get('POLYNL_KERNELS') != '0'
)
_INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def float_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype, or float32 for one of low precision."""
    return torch.float32 if dtype in HALF else dtype


# ---------------------------------------------------------------- products


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices, at least in float32.

    Args:
        a (Tensor): (B, m, k), or (m, k) for every b.
        b (Tensor): (B, k, n), or (k, n) where a is (m, k).

    Returns:
        Tensor: (B, m, n) or (m, n).
    """
    if b.dim() == 2:
        return torch.mm(a, b)
    if a.dim() == 2:
        a = a.expand(b.shape[0], *a.shape)
    if a.dtype not in HALF:
        return torch.bmm(a, b)
    if a.is_cuda and BMM_WIDENS:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def matmul_as_is(a: Tensor, b: Tensor) -> Tensor:
    """The product of a (B, m, k) and b (B, k, n), in their dtype."""
    return torch.matmul(a, b)


def matmul_into(y: Tensor, a: Tensor, b: Tensor, add: bool = False) -> Tensor:
    """:func:`matmul_as_is`, written to y.

    Args:
        y (Tensor): (B, m, n), overwritten.
        add (bool): Add the product to what is in y.
    """
    return torch.baddbmm(y, a, b, beta=1 if add else 0, out=y)


def add_matmul(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a b of two-dimensional matrices, in y if it may be overwritten."""
    if _is_kept(y, a, b):
        return y + a @ b
    return torch.addmm(y, a, b, out=y)


def convolution(z: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """A 1x1 convolution by a (C, c) matrix, in the dtype of z or autocast's.

    Shape: (B, c, \\*spatial) -> (B, C, \\*spatial).
    """
    axes = z.dim() - 2
    b = None if b is None else b.to(z.dtype)
    return _CONVS[axes](z, w.to(z.dtype).reshape(*w.shape, *(1,) * axes), b)


def transposed(matrices: Tensor) -> Tensor:
    """A view with the last two axes exchanged.

    Not ``.mT``, of which the older exporter to ONNX knows nothing.
    """
    return matrices.transpose(-2, -1)


def _is_kept(*tensors: Tensor) -> bool:
    """Whether a program or the gradient of a gradient needs what there is."""
    return is_recorded() or wants_grad(*tensors)


def add_(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in x if it may be overwritten."""
    return x + y if _is_kept(x, y) else x.add_(y)


def mul_(x: Tensor, y: Tensor) -> Tensor:
    """x * y, in x if it may be overwritten."""
    return x * y if _is_kept(x, y) else x.mul_(y)


def add_mul(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x + y * z, in x if it may be overwritten."""
    return x + y * z if _is_kept(x, y, z) else x.addcmul_(y, z)


def add_to_diagonal(matrices: Tensor, value: Tensor) -> Tensor:
    """Add a (1,) value to the diagonals, in place but for a program.

    There, the older exporter to ONNX drops, without a word, what is written
    to a view, and the newer one refuses it.

    Shape: (B, C, C) -> the same.
    """
    if is_recorded():
        eye = torch.eye(
            matrices.shape[1], dtype=matrices.dtype, device=matrices.device
        )
        return matrices + value * eye
    matrices.diagonal(dim1=1, dim2=2).add_(value)
    return matrices


# ---------------------------------------------------------------- precision


class Switches(NamedTuple):
    """Whether a GPU may run float32 in TF32.

    Attributes:
        convolutions: By default it may.
        products: Matrix products; by default it may not.
    """

    convolutions: bool
    products: bool


class Precision(NamedTuple):
    """In what the layer runs on a GPU; sums are float32 at least.

    ``'tf32'``, or ``'ieee'``, the dtype of the operands as it is.

    Attributes:
        products: Those with features, which stand for convolutions.
        algebra: Those of C x C matrices, which are never of low precision.
    """

    products: str
    algebra: str


def policy(
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    convolutions: bool,
) -> Precision:
    """The precision for features of a dtype.

    What stands for a convolution follows the switch of convolutions, whatever
    that of matrix products says. For features of low precision the algebra is
    in TF32, the error of which is an eighth of bfloat16's.

    Args:
        dtype (torch.dtype): Of the features.
        capability (tuple, optional): Of the device, see :func:`capability`.
        convolutions (bool): As in :class:`Switches`.
    """
    has_tf32 = capability is not None and capability >= (8, 0)
    if dtype == torch.float64:
        return Precision('ieee', 'ieee')
    if dtype in HALF:
        return Precision('ieee', 'tf32' if has_tf32 else 'ieee')
    wanted = 'tf32' if has_tf32 and convolutions else 'ieee'
    return Precision(wanted, wanted)


def switches() -> Switches:
    """As they are set, by whichever of torch's ways, now."""
    if is_recorded():  # by default: a compiler does not look up switches
        return Switches(True, False)
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return Switches(
        _allows_tf32(getattr(cudnn, 'conv', None), cudnn),
        _allows_tf32(cuda.matmul, cuda.matmul),
    )


def _allows_tf32(switch, legacy) -> bool:
    # Where there are both, the new one knows what was set by the old one and
    # what it takes from those above it, while the old one raises once the new
    # one has been used.
    precision = getattr(switch, 'fp32_precision', None)
    if precision is None:  # torch < 2.9
        return legacy.allow_tf32
    return precision == 'tf32'


def capability(device: torch.device) -> tuple[int, int] | None:
    """Of an NVIDIA GPU: (8, 0) and above have TF32. None of all else."""
    # On AMD's, a device is called 'cuda', too, and its capability is another.
    if device.type != 'cuda' or torch.version.hip is not None:
        return None
    return _capability(device)


def _capability(device):
    return _asked_once(device)


# A compiler takes what it is told for a constant. As
# torch.compiler.assume_constant_result, which loads the compiler for it.
_capability._dynamo_marked_constant = True


@lru_cache
def _asked_once(device):
    if not torch.cuda.is_available():  # a tensor that only has a shape
        return None
    found = torch.cuda.get_device_properties(device)
    return found.major, found.minor


def precision_for(x: Tensor) -> Precision:
    """:func:`policy` for features as they come, under autocast or not."""
    return policy(
        autocast_dtype(x), capability(x.device), switches().convolutions
    )


def has_kernels(x: Tensor) -> bool:
    """Whether kernels of our own are for features such as x.

    They are for tensor cores: an NVIDIA GPU that has TF32; float16, bfloat16,
    or float32 where convolutions may run in TF32, or where they may not and
    torch's products would all the same. They need cuBLAS and Triton, the
    interpreter of which runs them on a CPU. A program that is to run anywhere
    (traced, exported) has none of them; nor has anybody who sets
    POLYNL_KERNELS=0 before the package is imported.
    """
    if not _HAS_TRITON or is_for_every_size():
        return False
    if _INTERPRETED or x.device.type != 'cuda':
        return _INTERPRETED and x.device.type == 'cpu'
    found = capability(x.device)
    if not HAS_CUBLAS or found is None or found < (8, 0):
        return False
    dtype = autocast_dtype(x)
    return dtype in HALF or dtype == torch.float32 and any(switches())


# ---------------------------------------------------------------- autocast


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast, if it is on, hands x to a convolution."""
    device = x.device.type
    if x.dtype == torch.float64 or not is_autocast_on(device):
        return x.dtype
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.get_autocast_dtype(device)
    if device == 'cpu':  # torch < 2.4
        return torch.get_autocast_cpu_dtype()
    return torch.get_autocast_gpu_dtype()


def no_autocast(x: Tensor):
    """Within it every product runs in the dtype it is given."""
    # A compiler sees a gradient where it has seen the forward, while it may
    # be taken under autocast.
    if not is_autocast_on(x.device.type) and not is_recorded():
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def is_autocast_on(device: str) -> bool:
    """Whether it is, on this type of device."""
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:  # torch < 2.4
        if device == 'cpu':
            return torch.is_autocast_cpu_enabled()
        return torch.is_autocast_enabled()
    except RuntimeError:  # a device without autocast, such as 'meta'
        return False


# --------------------------------------------------- gradients and programs


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd is to be told how; tracers take ordinary operations."""
    return (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
        and not torch.jit.is_tracing()
    )


def refuse_second_derivative() -> None:
    """Raise if a gradient is taken that is to be differentiated itself.

    Not once_differentiable: it lets a penalty on a gradient pass that another
    term of the loss hides, with the second derivative missing.
    """
    if torch.is_grad_enabled() and not is_recorded():
        raise RuntimeError(
            "Poly-NL's gram form has no second derivative "
            "(create_graph=True); use form='direct'"
        )


def is_recorded() -> bool:
    """Whether the operations become part of a program."""
    return torch.jit.is_tracing() or _is_compiling()


def is_for_every_size() -> bool:
    """Whether a choice by size would become part of a program."""
    return torch.jit.is_tracing() or _is_exporting()
