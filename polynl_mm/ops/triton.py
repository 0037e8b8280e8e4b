r"""The operation on a GPU, in few launches.

A GPU waits for launches and for passes over memory before it waits for
arithmetic. So what stands between two products is one kernel here, casts
included, and what can be read along with something else is not read again.

The mathematics is that of the package's description, with more of it in
common. Let :math:`W = [W_1; W_2]`, 2C x c, and, for the gradient,
:math:`r = \bar g / n` and :math:`V = [\operatorname{diag}(r) W_2;
\operatorname{diag}(r) W_1]`. Then

.. math::
    T &= W (X X^T) = (W X) X^T, \quad
        \bar W_1 = \operatorname{diag}(r) T_2, \quad
        \bar W_2 = \operatorname{diag}(r) T_1 \\
    \bar X &\mathrel{+}= (W^T V) X = V^T (W X)

where :math:`W^T V` is symmetric: gram and direct differ in where the brackets
stand. Behind a convolution the matrix of the layer, M, becomes M A, and its
gradient comes back through that product.

What is C x C is float32 between its products (float64 for float64). Nothing
is summed by atomic operations: a result is the same in every run.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cublas import multiply
from .kernels import (
    centre_kernel,
    columns_kernel,
    evaluated_adjoint_kernel,
    evaluated_kernel,
    fold_adjoint_kernel,
    fold_kernel,
    fold_sums_kernel,
    gate_adjoint_kernel,
    gate_kernel,
    gate_of_pair_kernel,
    rows_kernel,
)
from .moments import empty_like
from .precision import float_dtype, precision_for

__all__ = [
    'add_product',
    'apply_gate',
    'apply_gate_adjoint',
    'evaluated',
    'evaluated_adjoint',
    'gate',
    'gate_adjoint',
    'project',
    'project_adjoint',
]

# --------------------------------------------------------------- launching


def launch(kernel, grid: tuple, *args, **meta) -> None:
    """Every launch of a kernel passes here; none where there is no image."""
    if 0 not in grid:
        kernel[grid](*args, **meta)


def _acc(t: Tensor):
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def _block(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), most)


def _on_device(f):
    """Launch on the device of the first tensor, whichever is current."""

    @wraps(f)
    def on_device(x, *args):
        with torch.cuda.device_of(x) if x.is_cuda else nullcontext():
            return f(x, *args)

    return on_device


# ---------------------------------------------------------------- products


def _distance(t1: Tensor, t2: Tensor) -> int:
    """How far apart two contiguous tensors of one dtype lie, in elements."""
    return (t2.data_ptr() - t1.data_ptr()) // t1.element_size()


def _both(w1: Tensor, w2: Tensor) -> Tensor:
    """Two contiguous (C, c) as one (2C, c): a view if they lie so."""
    storage = w1.untyped_storage().data_ptr()
    if w2.untyped_storage().data_ptr() == storage and (
        _distance(w1, w2) == w1.numel()
    ):
        return w1.as_strided((2 * len(w1), w1.shape[1]), w1.stride())
    return torch.cat((w1, w2))


def _each(matrix: Tensor, images: int) -> Tensor:
    """One matrix (m, k) for every image."""
    return matrix.expand(images, -1, -1)


def _contract(p: Tensor, q: Tensor) -> Tensor:
    """P Q^T of (B, C, N) and (B, c, N): (B, C, c), at least float32."""
    y = p.new_empty(
        (len(p), p.shape[1], q.shape[1]), dtype=float_dtype(p.dtype)
    )
    return multiply(y, p, q.mT, precision_for(p).products)


def _apply(
    matrix: Tensor,
    xf: Tensor,
    y: Tensor,
    column: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Matrices (B, C, c) times (B, c, N), written or added to y.

    A column (B, C) or (C,) is added to every position.
    """
    yf = y.view(*y.shape[:2], xf.shape[2])
    if column is not None:
        (yf.add_ if add else yf.copy_)(column.unsqueeze(-1))
        add = True
    multiply(yf, matrix, xf, precision_for(xf).products, add)
    return y


# ---------------------------------------------------------------- the gate


@_on_device
def gate(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    weights: Tensor | None,
    count: Tensor | None,
    direct: bool,
    centred: bool,
    backward: bool,
) -> list[Tensor]:
    """The gate, and what its gradient takes.

    Args:
        x (Tensor): (B, c, \\*spatial).
        w1, w2, b1, b2: Of :class:`polynl_mm.ops.Params`, at least float32;
            the biases both or none.
        weights (Tensor, optional): (B or 1, 1, \\*spatial).
        count (Tensor, optional): Their sums, (B or 1, 1).
        direct (bool): Whether by projections, or by moments.
        centred (bool): Moments about the mean.
        backward (bool): Whether there is to be a gradient.

    Returns:
        list: g (B, C). With ``backward`` also, direct: the projections
        (B, 2, C, N), and with biases their sums (B, 2, C); by moments: T
        (B, 2, C, c), and with biases the mean (B, c).
    """
    channels, narrow = w1.shape
    images, xf = len(x), x.flatten(2)
    n = xf.shape[2]
    if count is not None:
        count = count.expand(images, 1).contiguous()
    g = w1.new_empty(images, channels)
    if direct:
        stack = x.new_empty(2 * channels, narrow)
        torch.cat((w1, w2), out=stack)
        column = None if b1 is None else torch.cat((b1, b2))
        uv = x.new_empty(images, 2 * channels, n)
        _apply(_each(stack, images), xf, uv, column)
        sums = None
        if b1 is not None and backward:
            sums = w1.new_empty(images, 2, channels)
        step = 0
        if weights is not None:
            weights = weights.flatten(1).contiguous()
            step = n if len(weights) > 1 else 0
        launch(
            gate_of_pair_kernel,
            (channels, images),
            *(uv, weights, step, count, g, sums, channels, n, n),
            ACC=_acc(w1),
            BN=_block(n, 1024),
        )
        kept = [uv.view(images, 2, channels, n)]
        kept += [] if sums is None else [sums]
        return [g, *kept] if backward else [g]
    m, z = None, xf
    if b1 is not None:
        m, z = _mean(x, weights, count, centred)
    if weights is not None:
        z = (z * weights.flatten(2).sqrt()).to(x.dtype)
    # Without a gradient there is a use for W1 alone.
    w = _both(w1, w2) if backward else w1
    t = multiply(
        w1.new_empty(images, len(w), narrow),
        _each(w, images),
        _contract(z, z),
        precision_for(x).algebra,
    )
    launch(
        gate_kernel,
        (channels, images),
        *(t, w1, m, b1, b2, count, g, channels, narrow, n),
        *(_distance(w1, w2), t.stride(0)),
        CENTRED=centred,
        ACC=_acc(w1),
        BJ=_block(narrow, 2**16),
    )
    t = t.unflatten(1, (-1, channels))
    kept = [t] if m is None else [t, m]
    return [g, *kept] if backward else [g]


def _mean(x, weights, count, centred):
    """The mean (B, c), and x (B, c, N), about it if it is to be centred."""
    xf = x.flatten(2)
    dtype = float_dtype(x.dtype)
    if weights is not None:
        m = (xf * weights.flatten(2)).sum(2) / count
        z = (xf - m.unsqueeze(2)).to(x.dtype) if centred else xf
        return m, z
    m = xf.mean(2, dtype=dtype)
    if not centred:
        return m, xf
    images, channels, n = xf.shape
    z = empty_like(x, channels)
    zf = z.flatten(2)
    inner = xf.stride(1) == 1 and n > 1  # channels last
    bi, bn = (64, 64) if inner else (1, _block(n, 2048))
    launch(
        centre_kernel,
        (triton.cdiv(channels, bi), triton.cdiv(n, bn), images),
        *(xf, m, zf, channels, n, *xf.stride(), *zf.stride()),
        ACC=_acc(m),
        BI=bi,
        BN=bn,
    )
    return m, zf


@_on_device
def gate_adjoint(
    x: Tensor,
    dg: Tensor,
    kept: list[Tensor],
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    count: Tensor | None,
    direct: bool,
    centred: bool,
    need_x: bool,
    need_w: bool,
) -> list[Tensor]:
    """The gradient of :func:`gate`.

    Args:
        dg (Tensor): (B, C), of the gate.
        kept (list): What :func:`gate` gave beside the gate; projections
            weighted where positions are.
        need_x, need_w (bool): What is wanted: the gradient of x; that of the
            weights and biases.

    Returns:
        list: with ``need_w`` those of w1 and w2 (2, C, c), and with biases
        theirs (2, C). With ``need_x`` what makes that of x, by
        :func:`add_product`: direct, V (B, 2C, c), the transpose of the
        matrices for the projections; by moments, the matrices (B, c, c) for
        x, and with biases a column (B, c).
    """
    channels, narrow = w1.shape
    images, n = len(x), x.shape[2:].numel()
    dg = dg.contiguous()
    if count is not None:
        count = count.expand(images, 1).contiguous()
    m = sums = shift = t = v = dw = db = None
    if not direct:
        t, *means = kept
        m = means[0] if means else None
    elif need_w:
        t = _contract(kept[0], x.flatten(2))
        sums = kept[1] if len(kept) > 1 else None
    if m is not None:
        shift = w1.new_empty(images, 2, channels)
    if need_x:
        dtype = x.dtype if direct else w1.dtype
        v = w1.new_empty((images, 2 * channels, narrow), dtype=dtype)
    if need_w:
        dw = w1.new_empty(2, channels, narrow)
        db = None if b1 is None else w1.new_empty(2, channels)
    launch(
        gate_adjoint_kernel,
        (channels,),
        *(dg, t, w1, m, sums, b1, b2, count, v, dw, db, shift),
        *(images, channels, narrow, n, _distance(w1, w2)),
        CENTRED=centred,
        ACC=_acc(w1),
        BJ=_block(narrow, 2**16),
    )
    found = [d for d in (dw, db) if d is not None]
    if not need_x:
        return found
    if direct:
        return [*found, v]
    e = multiply(
        w1.new_empty(images, narrow, narrow),
        _each(_both(w1, w2).mT, images),
        v,
        precision_for(x).algebra,
    ).to(x.dtype)
    if m is None:
        return [*found, e]
    column = m.new_empty(images, narrow)
    _columns(column, shift, w1, w2, n, count, *((e, m) if centred else ()))
    return [*found, e, column]


@_on_device
def add_product(
    y: Tensor, matrix: Tensor, x: Tensor, column: Tensor | None
) -> None:
    """Add matrices times x, and a column, to y.

    Args:
        y (Tensor): (B, C, \\*spatial), overwritten.
        matrix (Tensor): (B, C, c), of the dtype of x.
        x (Tensor): (B, c, N).
        column (Tensor, optional): (B, C).
    """
    _apply(matrix, x, y, column, add=True)


def _columns(y, q, w1, w2, n=1, count=None, e=None, m=None) -> None:
    """columns_kernel, its result in y (B, c)."""
    rows, columns = w1.shape
    block = _block(columns, 16)
    launch(
        columns_kernel,
        (triton.cdiv(columns, block), len(y)),
        *(w1, q, e, m, count, y, 2, rows, columns, n, _distance(w1, w2)),
        ACC=_acc(w1),
        BI=256,
        BJ=block,
    )


# ------------------------------------------------- the layer, its gate known


@_on_device
def apply_gate(
    x: Tensor,
    g: Tensor,
    w3: Tensor,
    alpha: Tensor,
    beta: Tensor,
    b3: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
) -> list[Tensor]:
    """The layer, and the convolution before it, from the gate.

    Args:
        x (Tensor): (B, c, \\*spatial).
        g (Tensor): (B, C).
        w3, alpha, beta, b3: Of :class:`polynl_mm.ops.Params`.
        a, b (Tensor, optional): Of :class:`polynl_mm.ops.Conv`.

    Returns:
        list: Y (B, C, \\*spatial), and the matrices (B, C, c) that make it of
        x, in its dtype.
    """
    images, channels = g.shape
    g = g.contiguous()
    algebra = precision_for(x).algebra
    dtype = x.dtype if a is None else w3.dtype
    matrix = w3.new_empty((images, channels, channels), dtype=dtype)
    column = None
    if b3 is not None or b is not None:
        column = w3.new_empty(images, channels)
    launch(
        fold_kernel,
        (triton.cdiv(channels, 16), images),
        *(g, w3, alpha, beta, b3, b, matrix, column, channels),
        ACC=_acc(w3),
        BI=16,
        BJ=_block(channels, 128),
    )
    if a is not None:
        product = w3.new_empty(images, *a.shape)
        multiply(product, matrix, _each(a, images), algebra)
        matrix = product.to(x.dtype)
    y = empty_like(x, channels)
    return [_apply(matrix, x.flatten(2), y, column), matrix]


@_on_device
def apply_gate_adjoint(
    x: Tensor,
    dy: Tensor,
    g: Tensor,
    matrix: Tensor,
    w3: Tensor,
    alpha: Tensor,
    beta: Tensor,
    b3: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    need_x: bool,
    need_w: bool,
) -> list[Tensor]:
    """The gradient of :func:`apply_gate`.

    Args:
        dy (Tensor): As Y.
        matrix (Tensor): What :func:`apply_gate` gave beside Y.
        need_x, need_w (bool): What is wanted: the gradient of x; all others.

    Returns:
        list: with ``need_w`` those of g, of w3, of alpha and beta (2,), with
        b3 its (C,), with a convolution those of a and b; with ``need_x`` that
        of x.
    """
    images, channels = g.shape
    xf, dyf, found = x.flatten(2), dy.flatten(2), []
    if need_w:
        found = _fold_adjoint(xf, dyf, g, w3, alpha, beta, b3, a, b)
    if need_x:
        found.append(_apply(matrix.mT, dyf, empty_like(x, x.shape[1])))
    return found


def _fold_adjoint(xf, dyf, g, w3, alpha, beta, b3, a, b):
    images, channels = g.shape
    g = g.contiguous()
    dmap = _contract(dyf, xf)
    dcolumn = None
    if b3 is not None or b is not None:
        dcolumn = dyf.sum(2, dtype=w3.dtype)
    dmatrix, matrix, algebra = dmap, None, precision_for(xf).algebra
    if a is not None:
        dmatrix = w3.new_empty(images, channels, channels)
        multiply(dmatrix, dmap, _each(a.mT, images), algebra)
        matrix = torch.empty_like(dmatrix)
    tiles = [triton.cdiv(channels, 64)] * 2
    of_gain = w3.new_empty(tiles[0], images, channels)
    of_b = None if b is None else w3.new_empty(tiles[0], channels)
    of_scalars = w3.new_empty(2, *tiles)
    dg, dw3 = w3.new_empty(g.shape), torch.empty_like(w3)
    db = None if b is None else torch.empty_like(b)
    db3 = None if b3 is None else torch.empty_like(b3)
    dscalars = w3.new_empty(2)
    launch(
        fold_adjoint_kernel,
        tuple(tiles),
        *(dmatrix, dcolumn, g, w3, alpha, beta, b, dw3, matrix),
        *(of_gain, of_b, of_scalars, images, channels),
        ACC=_acc(w3),
        BI=64,
        BJ=64,
        num_warps=8,
    )
    launch(
        fold_sums_kernel,
        (triton.cdiv(channels, 32),),
        *(of_gain, of_b, of_scalars, dcolumn, beta, b3),
        *(dg, db, db3, dscalars, tiles[0], tiles[0] * tiles[1]),
        *(images, channels),
        ACC=_acc(w3),
        BT=triton.next_power_of_2(tiles[0]),
        BJ=32,
    )
    found = [d for d in (dg, dw3, dscalars, db3) if d is not None]
    if a is not None:
        # A sum over images is one over the rows of all.
        da = torch.empty_like(a)
        of_all = matrix.flatten(0, 1).mT, dmap.flatten(0, 1)
        multiply(da[None], *(m[None] for m in of_all), algebra)
        found += [da, db]
    return found


# ------------------------------------------------ the convolution before it


@_on_device
def project(
    w1: Tensor,
    w2: Tensor,
    a: Tensor,
    b: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
) -> list[Tensor]:
    """P1 and P2 (2, C, c); p1 and p2 (2, C)."""
    channels, narrow = a.shape
    p = w1.new_empty(2, channels, narrow)
    w, algebra = _both(w1, w2), precision_for(a).algebra
    multiply(p.view(1, -1, narrow), w[None], a[None], algebra)
    q = w1.new_empty(2, channels)
    launch(
        rows_kernel,
        (channels, 2),
        *(w1, b, q, b1, b2, channels, channels, _distance(w1, w2)),
        ACC=_acc(w1),
        BJ=_block(channels, 1024),
    )
    return [p, q]


@_on_device
def project_adjoint(
    dp1: Tensor,
    dp2: Tensor,
    dq: Tensor,
    w1: Tensor,
    w2: Tensor,
    a: Tensor,
    b: Tensor,
) -> list[Tensor]:
    """Gradients of w1 and w2 (2, C, C), of a and of b.

    Args:
        dp1, dp2 (Tensor): (C, c), of P1 and P2.
        dq (Tensor): (2, C), of p1 and p2.
        w1, w2, a, b: As of :func:`project`.
    """
    channels = len(a)
    dp = _both(dp1.contiguous(), dp2.contiguous())
    algebra = precision_for(a).algebra
    dw = torch.outer(dq.flatten(), b)
    multiply(dw[None], dp[None], a.mT[None], algebra, add=True)
    dw, da = dw.view(2, channels, channels), torch.empty_like(a)
    multiply(da[None], _both(w1, w2).mT[None], dp[None], algebra)
    db = torch.empty_like(b)
    _columns(db.unsqueeze(0), dq, w1, w2)
    return [dw, da, db]


@_on_device
def evaluated(
    w: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    weight: Tensor | None,
    offset: Tensor | None,
) -> list[Tensor]:
    """A 1x1 convolution and an evaluated BatchNorm as one: a (C, c), b (C,).

    Args:
        w (Tensor): (C, c), and bias (C,) of the convolution.
        mean, variance, eps, weight, offset: Of the norm, (C,).
    """
    a = torch.empty_like(w)
    b = w.new_empty(len(w))
    launch(
        evaluated_kernel,
        (len(w),),
        *(w, bias, mean, variance, weight, offset, a, b, w.shape[1], eps),
        ACC=_acc(w),
        BJ=_block(w.shape[1], 1024),
    )
    return [a, b]


@_on_device
def evaluated_adjoint(
    w: Tensor,
    da: Tensor,
    db: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    weight: Tensor | None,
) -> list[Tensor]:
    """Gradients of w and, where they are there, of bias and weight."""
    dw = torch.empty_like(w)
    dbias = None if bias is None else torch.empty_like(bias)
    dweight = None if weight is None else torch.empty_like(weight)
    launch(
        evaluated_adjoint_kernel,
        (len(w),),
        *(da.contiguous(), db.contiguous(), w, bias, mean, variance, weight),
        *(dw, dbias, dweight, w.shape[1], eps),
        ACC=_acc(w),
        BJ=_block(w.shape[1], 1024),
    )
    return [d for d in (dw, dbias, dweight) if d is not None]
