"""What touches every position: second moments of X, and a matrix times X.

These carry all the work that grows with N. A function whose name ends in
``_adjoint`` is the gradient of the one before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import (
    HALF,
    add_,
    float_dtype,
    is_recorded,
    matmul,
    matmul_as_is,
    matmul_into,
    transposed,
)

__all__ = [
    'empty_like',
    'mix',
    'mix_adjoint',
    'moments_adjoint',
    'moments_of',
]

_MIN_PANEL = 128


def moments_of(
    x: Tensor,
    weights: Tensor | None,
    n: int | Tensor,
    mean: bool,
    centred: bool,
) -> tuple[Tensor, Tensor | None]:
    """n times the second moment, and the mean of the positions of an image.

    Args:
        x (Tensor): (B, C, \\*spatial).
        weights (Tensor, optional): (B, 1, \\*spatial), what each position
            counts, 1 at most; no gradient goes to them.
        n (int or Tensor): Their sum (B, 1), or the number of positions.
        mean (bool): Whether the mean is wanted.
        centred (bool): Take the second moment about the mean, which must be
            wanted.

    Returns:
        tuple: n S (B, C, C), and m (B, C) or None, at least in float32.
    """
    z, m = x, None
    if mean:
        if weights is None:
            m = x.flatten(2).mean(2, dtype=float_dtype(x.dtype))
        else:
            m = (x * weights).flatten(2).sum(2) / n
    if centred:
        z = (x - m.reshape(*m.shape, *(1,) * (x.dim() - 2))).to(x.dtype)
    if weights is not None:
        z = _counted(z, weights.sqrt())
    return _times_own_transpose(z.flatten(2)), m


def moments_adjoint(
    ds: Tensor,
    dm: Tensor | None,
    x: Tensor,
    weights: Tensor | None,
    n: int | Tensor,
    centre: Tensor | None,
    dx: Tensor | None,
) -> Tensor:
    """(dS + dS^T) (X - m) + dm / n, times weights; added to dx, in place.

    ``ds`` is the gradient of n S; ``centre`` is m where S is about it.
    """
    column = None if dm is None else dm / n
    ds = ds + transposed(ds)
    dx = _mix(ds, _counted(x, weights), onto=dx)
    if centre is not None:
        shift = matmul(ds, centre.unsqueeze(2)).squeeze(2)
        column = -shift if column is None else column - shift
    if column is not None:
        dx = add_(dx, _counted(_per_channel(column, x), weights))
    return dx


def mix(matrix: Tensor, column: Tensor | None, x: Tensor) -> Tensor:
    """Apply a matrix to every position of an image and add a column.

    Args:
        matrix (Tensor): (B, C, c).
        column (Tensor, optional): (B, C).
        x (Tensor): (B, c, \\*spatial).

    Returns:
        Tensor: (B, C, \\*spatial) in the dtype and the memory format of
        ``x``. It owns its memory: host blocks add to it in place, which
        autograd forbids on a view that a function or a checkpoint returns.
    """
    y = _mix(matrix, x)
    return y if column is None else add_(y, _per_channel(column, y))


def mix_adjoint(
    dy: Tensor, matrix: Tensor, x: Tensor, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """dY X^T, the sum of dY over positions, and M^T dY; None if not needed."""
    dyf = dy.flatten(2)
    return (
        matmul(dyf, transposed(x.flatten(2))) if need[0] else None,
        dyf.sum(2, dtype=matrix.dtype) if need[1] else None,
        _mix(transposed(matrix), dy, like=x) if need[2] else None,
    )


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """(B, C) values as a tensor that broadcasts over the positions of x."""
    return v.to(x.dtype).reshape(*v.shape, *(1,) * (x.dim() - 2))


def _counted(x: Tensor, weights: Tensor | None) -> Tensor:
    return x if weights is None else (x * weights).to(x.dtype)


def _times_own_transpose(xf: Tensor) -> Tensor:
    """X X^T of (B, C, N) features, at least in float32: (B, C, C).

    On a CPU only the lower block triangle is multiplied out, in row panels.
    """
    c = xf.shape[1]
    if is_recorded() or xf.device.type != 'cpu' or c < 2 * _MIN_PANEL:
        return matmul(xf, transposed(xf))
    xf = xf.float() if xf.dtype in HALF else xf
    s = xf.new_empty(len(xf), c, c)
    step = max(c // 4, _MIN_PANEL)
    for start in range(0, c, step):
        stop = min(start + step, c)
        panel = matmul(xf[:, start:stop], transposed(xf[:, :stop]))
        s[:, start:stop, :stop] = panel
        s[:, :start, start:stop] = transposed(panel[..., :start])
    return s


def _mix(
    matrix: Tensor,
    x: Tensor,
    like: Tensor | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """Apply (B, C, c) matrices to every position of (B, c, *spatial) x.

    The result has the memory format of ``like`` (by default x) and owns its
    memory. With ``onto``, it is added to that tensor, in place.
    """
    matrix, xf, c = matrix.to(x.dtype), x.flatten(2), matrix.shape[1]
    if is_recorded():
        y = matmul_as_is(matrix, xf).view(x.shape[0], c, *x.shape[2:])
        # A copy owns its memory, too; compilers remove it where they can.
        y = y if torch.jit.is_tracing() else y.clone()
        return y if onto is None else onto + y
    y = empty_like(x if like is None else like, c) if onto is None else onto
    yf = y.view(*y.shape[:2], -1) if y.numel() else y.flatten(2)
    add = onto is not None
    if yf.is_contiguous():
        matmul_into(yf, matrix, xf, add)
    else:
        matmul_into(*map(transposed, (yf, xf, matrix)), add)
    return y


def empty_like(x: Tensor, c: int) -> Tensor:
    """Uninitialised, of c channels, C innermost where that is so in x."""
    shape = (x.shape[0], c, *x.shape[2:])
    if x.is_contiguous() or not transposed(x.flatten(2)).is_contiguous():
        return x.new_empty(shape)
    strides, step = [], c
    for size in reversed(shape[2:]):
        strides.append(step)
        step *= size
    return x.new_empty_strided(shape, (step, 1, *reversed(strides)))
