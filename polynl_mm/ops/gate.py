"""The C x C algebra: from moments or projections to the gate, and from the
gate to a matrix and a column per image.

All of it is small beside what touches every position, and at least float32.
The gradients of both steps are written out here, once, for the layer on X and
for the layer behind a convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .precision import (
    HALF,
    add_,
    add_to_diagonal,
    convolution,
    matmul,
    mul_,
    no_autocast,
    refuse_second_derivative,
    transposed,
    wants_grad,
)

__all__ = [
    'Conv',
    'Params',
    'fold',
    'gate_of_moments',
    'gate_of_projections',
    'gated',
    'project',
]


class Params(NamedTuple):
    r"""Weights, scalars and biases of the layer, in the order of its formula.

    .. math::
        Y = \alpha X + \beta W_3 (\Phi((W_1 X + b_1) \odot (W_2 X + b_2))
        \odot X) + \beta b_3

    Shape:
        - w1, w2, w3: (C, C), indexed (out, in); w1 and w2 are (C, c) where
          :func:`project` made them those of a convolution's input.
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


def project(conv: Conv, p: Params) -> Params:
    """Make the first two convolutions those of H, where X = A H + b.

    Returns:
        Params: ``p`` with P1 (C, c), P2 (C, c), p1 (C,), p2 (C,) of the
        package's description in the places of w1, w2, b1, b2.
    """
    with no_autocast(conv.a):
        p1, p2 = (matmul(w, conv.a) for w in (p.w1, p.w2))
        q1, q2 = (
            matmul(w, conv.b.unsqueeze(1)).squeeze(1) for w in (p.w1, p.w2)
        )
    return p._replace(
        w1=p1,
        w2=p2,
        b1=q1 if p.b1 is None else q1 + p.b1,
        b2=q2 if p.b2 is None else q2 + p.b2,
    )


# ----------------------------------------------------------------- the gate


def gate_of_projections(
    x: Tensor, p: Params, weights: Tensor | None = None
) -> Tensor:
    """The gate (B, C) as the paper has it: the mean of W1 x * W2 x."""
    u, v = convolution(x, p.w1, p.b1), convolution(x, p.w2, p.b2)
    uv = u.to(p.w1.dtype) * v.to(p.w1.dtype)
    return (uv if weights is None else uv * weights).flatten(2).mean(2)


def gate_of_moments(
    s: Tensor, m: Tensor | None, p: Params, n: int, centred: bool
) -> Tensor:
    """The gate (B, C) from the moments of n positions.

    Args:
        s (Tensor): (B, c, c), n times the second moment, about the mean if
            ``centred``.
        m (Tensor, optional): (B, c), the mean; None where p has no biases.
    """
    args = (s, m, p.w1, p.w2, p.b1, p.b2)
    if wants_grad(*args):
        return _Gate.apply(*args, n, centred)
    return _gate(*args, n, centred)[0]


def _gate(s, m, w1, w2, b1, b2, n, centred):
    w1s = matmul(w1, s)
    g = (w1s * w2).sum(2) / n
    if m is not None:
        u, v = matmul(m, transposed(w1)), matmul(m, transposed(w2)) + b2
        g = g + (u + b1) * v if centred else g + b1 * v + b2 * u
    return g, w1s


class _Gate(torch.autograd.Function):
    """:func:`gate_of_moments`, with the gradient of the description."""

    @staticmethod
    def forward(ctx, *args):
        g, w1s = _gate(*args)
        ctx.save_for_backward(*args[:6], w1s)
        ctx.n, ctx.centred = args[6:]
        return g

    @staticmethod
    def backward(ctx, dg):
        refuse_second_derivative()
        s, m, w1, w2, b1, b2, w1s = ctx.saved_tensors
        need_s, need_m, need_w1, need_w2 = ctx.needs_input_grad[:4]
        rows = (dg / ctx.n).unsqueeze(2)
        ds = dm = dw1 = dw2 = db1 = db2 = None
        with no_autocast(dg):
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
                if not ctx.centred:
                    du, dv = dg * b2, dg * b1
                if need_m:
                    dm = matmul(du, w1) + matmul(dv, w2)
                if need_w1:
                    dw1 = add_(dw1, matmul(transposed(du), m))
                if need_w2:
                    dw2 = add_(dw2, matmul(transposed(dv), m))
        return ds, dm, dw1, dw2, db1, db2, None, None


# ------------------------------------------------- the layer, its gate known


def gated(x: Tensor, g: Tensor, p: Params) -> Tensor:
    """The layer as the paper has it: alpha x + beta (W3 (g x) + b3)."""
    gain = g.reshape(*g.shape, *(1,) * (x.dim() - 2))
    if x.dtype in HALF:
        # x * g may exceed float16 where the output does not: project it
        # relative to the largest gate, which cancels out.
        scale = gain.detach().abs().amax(1, keepdim=True)
        scale = scale.clamp_min(torch.finfo(g.dtype).tiny)
        branch = convolution((x * (gain / scale)).to(x.dtype), p.w3) * scale
        if p.b3 is not None:
            branch = branch + p.b3.reshape(-1, *(1,) * (x.dim() - 2))
    else:
        branch = convolution(x * gain, p.w3, p.b3)
    return (p.alpha * x + p.beta * branch).to(x.dtype)


def fold(
    g: Tensor, p: Params, conv: Conv | None = None
) -> tuple[Tensor, Tensor | None]:
    """The layer, and the convolution before it, as an affine map.

    Args:
        g (Tensor): (B, C), the gate.
        conv (Conv, optional): The convolution before.

    Returns:
        tuple: matrix (B, C, c), c = C without ``conv``, and column (B, C) or
        None: Y = matrix H + column at every position.
    """
    args = (g, p.w3, p.alpha, p.beta, p.b3, *(conv or (None, None)))
    return _Fold.apply(*args) if wants_grad(*args) else _folded(*args)


def _folded(g, w3, alpha, beta, b3, a, b):
    gain = beta * g
    column = None if b3 is None else (beta * b3).expand_as(g)
    if a is None:
        return add_to_diagonal(w3 * gain.unsqueeze(1), alpha), column
    matrix = alpha * a + matmul(w3, gain.unsqueeze(2) * a)
    shift = alpha * b + matmul(gain * b, transposed(w3))
    return matrix, shift if column is None else shift + column


class _Fold(torch.autograd.Function):
    """:func:`fold`, with the gradient of the description."""

    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args)
        ctx.set_materialize_grads(False)
        return _folded(*args)

    @staticmethod
    def backward(ctx, dmatrix, dcolumn):
        refuse_second_derivative()
        g, w3, alpha, beta, b3, a, b = ctx.saved_tensors
        need_g, need_w3, need_alpha, need_beta, _, need_a, need_b = (
            ctx.needs_input_grad
        )
        gain, need_gain = beta * g, need_g or need_beta
        dgain = dg = dw3 = dalpha = dbeta = db3 = da = db = None
        with no_autocast(g):
            if a is None:
                if need_gain:
                    dgain = (dmatrix * w3).sum(1)
                if need_alpha:
                    dalpha = dmatrix.diagonal(dim1=1, dim2=2).sum()
                if need_w3:
                    # In place, for mix has made it and nobody else seen it.
                    dw3 = _sum_images(mul_(dmatrix, gain.unsqueeze(1)))
            else:
                if need_w3:
                    behind = transposed(gain.unsqueeze(2) * a)
                    dw3 = _sum_images(matmul(dmatrix, behind))
                    dw3 = add_(dw3, matmul(transposed(dcolumn), gain * b))
                if need_alpha:
                    dalpha = (dmatrix * a).sum() + (dcolumn * b).sum()
                if need_gain or need_a or need_b:
                    back = matmul(transposed(w3), dmatrix)
                    shift = matmul(dcolumn, w3)
                    dgain = (back * a).sum(2) + shift * b
                if need_a:
                    back = mul_(back, gain.unsqueeze(2))
                    da = _sum_images(add_(back, alpha * dmatrix))
                if need_b:
                    db = (gain * shift + alpha * dcolumn).sum(0)
            if need_gain:
                dg, dbeta = beta * dgain, (g * dgain).sum()
            if b3 is not None:
                total = dcolumn.sum(0)
                db3 = beta * total
                dbeta = dbeta + (b3 * total).sum() if need_beta else None
        return dg, dw3, _one(dalpha), _one(dbeta), db3, da, db


def _one(scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.reshape(1)


def _sum_images(t: Tensor) -> Tensor:
    """Sum over the batch, without a copy where it is one image."""
    return t[0] if len(t) == 1 else t.sum(0)
