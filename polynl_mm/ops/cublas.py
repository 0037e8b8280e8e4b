"""Products of matrices on a GPU, each in the precision that it is given.

PyTorch has one switch for all matrix products of a process, off by default,
and another one for convolutions, on by default. Products that stand for
convolutions have to follow the second one and to leave the first one alone,
which other threads and the user's own products follow. So cuBLAS is called
here as PyTorch calls it, with PyTorch's handle (its stream, its workspace),
but with a precision for the call.
"""

from __future__ import annotations

import ctypes
import sys
import warnings

import torch
from torch import Tensor

__all__ = ['HAS_CUBLAS', 'multiply']

# cudaDataType_t and cublasComputeType_t
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_FLOAT32, _PEDANTIC_FLOAT32, _TF32 = 68, 69, 77
_DEFAULT_ALGORITHM = -1
_SCALE = {value: ctypes.c_float(value) for value in (0, 1)}


def _load():
    """cublasGemmStridedBatchedEx, None where PyTorch has no cuBLAS."""
    if torch.version.cuda is None:
        return None
    major = torch.version.cuda.split('.')[0]
    name = f'libcublas.so.{major}'
    if sys.platform == 'win32':
        name = f'cublas64_{major}.dll'
    try:  # PyTorch has it loaded: its name is enough.
        gemm = ctypes.CDLL(name).cublasGemmStridedBatchedEx
    except (OSError, AttributeError) as e:
        warnings.warn(
            f'polynl_mm: {e}; GPUs do without the kernels for them',
            stacklevel=2,
        )
        return None
    pointer, size, step = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
    matrices = [pointer, size, size, step]  # type, leading dimension, stride
    gemm.argtypes = [pointer, *[size] * 5, pointer, *matrices, *matrices]
    gemm.argtypes += [pointer, *matrices, size, size, size]
    return gemm


_gemm = _load()
# Whether there is one, that of PyTorch.
HAS_CUBLAS = _gemm is not None


def multiply(
    y: Tensor, a: Tensor, b: Tensor, precision: str, add: bool = False
) -> Tensor:
    """Matrices times matrices, written or added to y.

    Sums are at least float32. On a CPU, where the kernels are interpreted,
    torch multiplies.

    Args:
        y (Tensor): (B, m, n), overwritten; of the dtype of a or float32; its
            rows or its columns without gaps.
        a (Tensor): (B, m, k), its images maybe one and the same, expanded.
        b (Tensor): (B, k, n), likewise, of the dtype of a.
        precision (str): ``'tf32'`` for float32 that may run in TF32, else
            ``'ieee'``.
        add (bool): Add to what is in y.

    Returns:
        Tensor: y.

    Raises:
        RuntimeError: With cuBLAS's status, if it refuses.
    """
    if 0 in y.shape:
        return y
    if not y.is_cuda:
        dtype = torch.promote_types(y.dtype, torch.float32)
        found = torch.bmm(a.to(dtype), b.to(dtype))
        return y.copy_(y + found if add else found)
    _by_cublas(y, a, b, precision, add)
    return y


def _by_cublas(y, a, b, precision, add) -> None:
    if _layout(y)[0]:
        y, a, b = y.mT, b.mT, a.mT
    images, m, n = y.shape
    compute = _TF32 if precision == 'tf32' else _FLOAT32
    if a.dtype == torch.float32 and precision == 'ieee':
        # PyTorch's switch is set in its handle, too.
        compute = _PEDANTIC_FLOAT32
    a, b = (t.contiguous() if _layout(t) is None else t for t in (a, b))
    # cuBLAS counts by columns, and so has y^T = b^T a^T.
    operands, transposed = [], []
    for t in (b, a):
        is_transposed, leading = _layout(t)
        transposed.append(is_transposed)
        operands += [t.data_ptr(), _TYPES[t.dtype], leading, t.stride(0)]
    status = _gemm(
        torch.cuda.current_blas_handle(),
        *(*transposed, n, m, a.shape[2]),
        ctypes.byref(_SCALE[1]),
        *operands,
        ctypes.byref(_SCALE[int(add)]),
        *(y.data_ptr(), _TYPES[y.dtype], _layout(y)[1], y.stride(0)),
        *(images, compute, _DEFAULT_ALGORITHM),
    )
    if status:
        raise RuntimeError(
            f'cuBLAS refused ({status}) to multiply {tuple(a.shape)} and '
            f'{tuple(b.shape)} of {a.dtype}'
        )


def _layout(t: Tensor) -> tuple[bool, int] | None:
    """Whether matrices lie by columns, and how far apart those (rows) are.

    None of matrices between whose numbers there are gaps.
    """
    _, rows, columns = t.shape
    _, i, j = t.stride()
    if (j == 1 or columns == 1) and (i >= columns or rows == 1):
        return False, max(i, columns)
    if (i == 1 or rows == 1) and (j >= rows or columns == 1):
        return True, max(j, rows)
    return None
