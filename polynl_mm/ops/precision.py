"""What depends on torch's version or mode: products, autocast, programs.

All that the operation asks of its surroundings is asked here: in which dtype a
product runs, whether autocast is on, whether a gradient is wanted, and whether
the operations become part of a program (traced, exported, compiled), in which
nothing is written in place and, but for a compiled one, no size is known.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# Newer torch tells.
_is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)
_BMM_HAS_OUT_DTYPE = hasattr(torch.ops.aten.bmm, 'dtype')  # torch >= 2.8


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
    if a.is_cuda and _BMM_HAS_OUT_DTYPE:
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


def allows_tf32() -> tuple[bool, bool]:
    """Whether convolutions and matrix products may run in TF32 on a GPU."""
    if is_recorded():  # by default: a compiler does not look up switches
        return True, False
    return (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
    )


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
