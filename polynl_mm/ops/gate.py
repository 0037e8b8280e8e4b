"""The C x C algebra: from moments or projections to the gate, and from the
gate to a matrix and a column per image.

All of it is small beside what touches every position, and at least float32. A
function whose name ends in ``_adjoint`` is the gradient of the one before it,
in the order of its arguments, with None for what is not needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .precision import (
    HALF,
    add_matmul,
    add_mul,
    add_to_diagonal,
    convolution,
    matmul,
    mul_,
    transposed,
)

__all__ = [
    'Conv',
    'Params',
    'finite_if_idle',
    'fold',
    'fold_adjoint',
    'gate_adjoint',
    'gate_of_moments',
    'gate_of_projections',
    'gate_terms',
    'gated',
    'gated_adjoint',
    'normed',
    'projected',
    'projected_adjoint',
]


class Params(NamedTuple):
    r"""Weights, scalars and biases of the layer, in the order of its formula.

    .. math::
        Y = \alpha X + \beta W_3 (\Phi((W_1 X + b_1) \odot (W_2 X + b_2))
        \odot X) + \beta b_3

    Shape:
        - w1, w2, w3: (C, C), indexed (out, in); w1 and w2 are (C, c) where
          :func:`polynl_mm.ops.project` made them those of the input of a
          convolution.
        - alpha, beta: one element, or a Python number.
        - b1, b2, b3: (C,) or None.
    """

    w1: Tensor
    w2: Tensor
    w3: Tensor
    alpha: Tensor | float
    beta: Tensor | float
    b1: Tensor | None = None
    b2: Tensor | None = None
    b3: Tensor | None = None


class Conv(NamedTuple):
    """The 1x1 convolution before the layer: a (C, c) and its shift b (C,)."""

    a: Tensor
    b: Tensor


# ------------------------------------------------ the convolution before it


def normed(
    w: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    weight: Tensor | None,
    offset: Tensor | None,
) -> Conv:
    """:func:`polynl_mm.ops.evaluated`, by ordinary operations."""
    scale = torch.rsqrt(variance.to(w.dtype) + eps)
    if weight is not None:
        scale = scale * weight
    b = -mean * scale if bias is None else (bias - mean) * scale
    b = b if offset is None else b + offset
    return Conv(w * scale.unsqueeze(1), b.to(w.dtype))


def projected(
    w1: Tensor, w2: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, ...]:
    """W1 A, W2 A (C, c) and W1 b, W2 b (C,)."""
    column = b.unsqueeze(1)
    return (
        matmul(w1, a),
        matmul(w2, a),
        matmul(w1, column).squeeze(1),
        matmul(w2, column).squeeze(1),
    )


def projected_adjoint(dp1, dp2, dq1, dq2, w1, w2, a, b, need):
    """Gradients of w1, w2, a and b. They have gradients themselves."""
    dw1 = dw2 = da = db = None
    if need[0]:
        dw1 = add_mul(matmul(dp1, transposed(a)), dq1.unsqueeze(1), b)
    if need[1]:
        dw2 = add_mul(matmul(dp2, transposed(a)), dq2.unsqueeze(1), b)
    if need[2]:
        da = add_matmul(matmul(transposed(w1), dp1), transposed(w2), dp2)
    if need[3]:
        dq1, dq2 = dq1.unsqueeze(0), dq2.unsqueeze(0)
        db = add_matmul(matmul(dq1, w1), dq2, w2).squeeze(0)
    return dw1, dw2, da, db


# ----------------------------------------------------------------- the gate


def gate_of_projections(
    x: Tensor, p: Params, weights: Tensor | None, n: int | Tensor
) -> Tensor:
    """The gate (B, C) as the paper has it: the mean of W1 x * W2 x."""
    uv = _products(x, p)
    if weights is None:
        return uv.flatten(2).mean(2)
    return (uv * weights).flatten(2).sum(2) / n


def gate_terms(
    x: Tensor, p: Params, weights: Tensor | None, n: int | Tensor
) -> Tensor:
    """What each position adds to the gate, (B, C, \\*spatial)."""
    uv = _products(x, p)
    if weights is None:
        return uv / n
    return uv * weights / n.reshape(-1, *(1,) * (x.dim() - 1))


def _products(x, p):
    u, v = convolution(x, p.w1, p.b1), convolution(x, p.w2, p.b2)
    return u.to(p.w1.dtype) * v.to(p.w1.dtype)


def gate_of_moments(
    s: Tensor,
    m: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    n: int | Tensor,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """The gate from the moments of n positions.

    Args:
        s (Tensor): (B, c, c), n times the second moment, about the mean if
            ``centred``.
        m (Tensor, optional): (B, c), the mean; None where there are no biases.
        w1, w2, b1, b2: Of :class:`Params`.

    Returns:
        tuple: the gate (B, C), and W1 S (B, C, c), which its gradient takes.
    """
    w1s = matmul(w1, s)
    g = (w1s * w2).sum(2) / n
    if m is not None:
        u, v = matmul(m, transposed(w1)), matmul(m, transposed(w2)) + b2
        g = g + (u + b1) * v if centred else g + b1 * v + b2 * u
    return g, w1s


def gate_adjoint(dg, w1s, s, m, w1, w2, b1, b2, n, centred, need):
    """Gradients of s, m, w1, w2, b1 and b2; of the last two always."""
    need_s, need_w1, need_w2 = need
    ds = dm = dw1 = dw2 = db1 = db2 = None
    rows = (dg / n).unsqueeze(2)
    if need_s:
        ds = matmul(transposed(w1), w2 * rows)
    if need_w1:
        dw1 = _sum_images(mul_(matmul(w2, s), rows))
    if need_w2:
        dw2 = _sum_images(w1s * rows)
    if m is not None:
        du = dg * (matmul(m, transposed(w2)) + b2)
        dv = dg * (matmul(m, transposed(w1)) + b1)
        db1, db2 = du.sum(0), dv.sum(0)
        if not centred:
            du, dv = dg * b2, dg * b1
        if need_s:
            dm = add_matmul(matmul(du, w1), dv, w2)
        if need_w1:
            dw1 = add_matmul(dw1, transposed(du), m)
        if need_w2:
            dw2 = add_matmul(dw2, transposed(dv), m)
    return ds, dm, dw1, dw2, db1, db2


# ------------------------------------------------- the layer, its gate known


def finite_if_idle(t: Tensor, beta: Tensor) -> Tensor:
    """At beta = 0 the layer is the identity, and 0 * inf would be NaN."""
    return torch.where(beta == 0, t.nan_to_num(0, 0, 0), t)


def gated(x: Tensor, g: Tensor, p: Params) -> Tensor:
    """The layer as the paper has it: alpha x + beta (W3 (g x) + b3)."""
    g = finite_if_idle(g, p.beta)
    gain = g.reshape(*g.shape, *(1,) * (x.dim() - 2))
    if x.dtype in HALF:
        # x * g may exceed float16 where the output does not: project it
        # relative to the largest gate, which cancels out. At beta = 0 with
        # room for what W3 sums up.
        scale = gain.detach().abs().amax(1, keepdim=True)
        scale = scale.clamp_min(torch.finfo(g.dtype).tiny)
        scale = scale * torch.where(p.beta == 0, 256.0, 1.0)
        branch = convolution((x * (gain / scale)).to(x.dtype), p.w3) * scale
        if p.b3 is not None:
            branch = branch + p.b3.reshape(-1, *(1,) * (x.dim() - 2))
    else:
        branch = convolution(x * gain, p.w3, p.b3)
    return (p.alpha * x + p.beta * branch).to(x.dtype)


def gated_adjoint(x: Tensor, dy: Tensor, p: Params) -> Tensor:
    """What each position has to say on the gate, by a gradient dy of Y.

    Shape: x, dy (B, C, K) -> (B, C, K); over all positions of an image the
    sum is the gradient of the gate.
    """
    return p.beta * x * matmul(transposed(p.w3), dy)


def fold(
    g: Tensor,
    w3: Tensor,
    alpha: Tensor,
    beta: Tensor,
    b3: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The layer, and the convolution before it, as an affine map.

    Args:
        g (Tensor): (B, C), the gate.
        w3, alpha, beta, b3: Of :class:`Params`.
        a, b: Of the convolution before, :class:`Conv`, or None.

    Returns:
        tuple: matrix (B, C, c), c = C without a convolution, and column
        (B, C) or None: Y = matrix H + column at every position.
    """
    # As finite_if_idle. The gradient takes g as it is: that of beta may be
    # infinite.
    gain = torch.where(beta == 0, beta, beta * g)
    column = None if b3 is None else (beta * b3).expand_as(g)
    if a is None:
        return add_to_diagonal(w3 * gain.unsqueeze(1), alpha), column
    matrix = add_mul(matmul(w3, gain.unsqueeze(2) * a), a, alpha)
    shift = alpha * b + matmul(gain * b, transposed(w3))
    return matrix, shift if column is None else shift + column


def fold_adjoint(dmatrix, dcolumn, g, w3, alpha, beta, b3, a, b, need):
    """Gradients of the arguments of :func:`fold`; overwrites dmatrix."""
    need_g, need_w3, need_alpha, need_beta, _, need_a, need_b = need
    gain, need_gain = beta * g, need_g or need_beta
    dgain = dg = dw3 = dalpha = dbeta = db3 = da = db = None
    if a is None:
        if need_gain:
            dgain = (dmatrix * w3).sum(1)
        if need_alpha:
            dalpha = dmatrix.diagonal(dim1=1, dim2=2).sum().reshape(1)
        if need_w3:
            dw3 = _sum_images(mul_(dmatrix, gain.unsqueeze(1)))
    else:
        if need_w3:
            behind = transposed(gain.unsqueeze(2) * a)
            dw3 = _sum_images(matmul(dmatrix, behind))
            dw3 = add_matmul(dw3, transposed(dcolumn), gain * b)
        if need_alpha:
            dalpha = ((dmatrix * a).sum() + (dcolumn * b).sum()).reshape(1)
        if need_gain or need_a or need_b:
            back = matmul(transposed(w3), dmatrix)
            shift = matmul(dcolumn, w3)
            dgain = (back * a).sum(2) + shift * b
        if need_a:
            back = mul_(back, gain.unsqueeze(2))
            da = _sum_images(add_mul(back, dmatrix, alpha))
        if need_b:
            db = (gain * shift + alpha * dcolumn).sum(0)
    if need_gain:
        dg, dbeta = beta * dgain, (g * dgain).sum().reshape(1)
    if b3 is not None:
        total = dcolumn.sum(0)
        db3 = beta * total
        if need_beta:
            dbeta = dbeta + (b3 * total).sum()
    return dg, dw3, dalpha, dbeta, db3, da, db


def _sum_images(t: Tensor) -> Tensor:
    """Sum over the batch, without a copy where it is one image."""
    return t[0] if len(t) == 1 else t.sum(0)
