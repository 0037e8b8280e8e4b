"""The steps that autograd is told of, whose gradients are written out.

Before the pool, from features to the gate; behind it, from the gate and the
features to the result. Each takes a gradient in the precision of its forward,
also under autocast. Where no gradient is wanted, and for a tracer, they are
ordinary operations.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from .gate import (
    Conv,
    Params,
    fold,
    fold_adjoint,
    gate_adjoint,
    gate_of_moments,
    gate_of_projections,
    gated,
    normed,
    projected,
    projected_adjoint,
)
from .moments import mix, mix_adjoint, moments_adjoint, moments_of
from .precision import (
    convolution,
    has_kernels,
    no_autocast,
    refuse_second_derivative,
    wants_grad,
)

__all__ = ['apply_gate', 'evaluated', 'gate_of', 'project']


def gate_of(
    x: Tensor,
    p: Params,
    weights: Tensor | None,
    n: int | Tensor,
    direct: bool,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """The gate.

    Args:
        x (Tensor): (B, c, \\*spatial).
        p (Params): w1, w2 (C, c), b1 and b2.
        weights (Tensor, optional): (B, 1, \\*spatial), 1 at most.
        n (int or Tensor): The sum of the weights, (B, 1); without them the
            number of positions.
        direct (bool): By projections, as the paper has it; else by moments.
        centred (bool): Take the second moment about the mean.

    Returns:
        tuple: the gate (B, C), and X, to go on with: its own gradient is
        added in place to what comes back through it.
    """
    if has_kernels(x):
        from . import operators

        return operators.gate_of(x, p, weights, n, direct, centred)
    if direct:
        return gate_of_projections(x, p, weights, n), x
    args = (x, weights, n, p.w1, p.w2, p.b1, p.b2, centred)
    if not wants_grad(x, p.w1, p.w2, p.b1, p.b2):
        return _gate(*args)[0], x
    g, through = _GateOf.apply(*args)
    return g, through if x.requires_grad else x


def _gate(x, weights, n, w1, w2, b1, b2, centred):
    s, m = moments_of(x, weights, n, b1 is not None, centred)
    return *gate_of_moments(s, m, w1, w2, b1, b2, n, centred), s, m


class _GateOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, n, w1, w2, b1, b2, centred):
        args = (w1, w2, b1, b2)
        g, w1s, s, m = _gate(x, weights, n, *args, centred)
        ctx.save_for_backward(x, weights, w1s, s, m, *args)
        ctx.n, ctx.centred = n, centred
        ctx.set_materialize_grads(False)
        return g, x.view_as(x)

    @staticmethod
    def backward(ctx, dg, dx):
        refuse_second_derivative()
        x, weights, w1s, s, m, *args = ctx.saved_tensors
        need_x, _, _, *need = ctx.needs_input_grad[:5]
        n, dparams = ctx.n, (None,) * 4
        if dg is not None:  # a pool may have passed over it
            with no_autocast(x):
                ds, dm, *dparams = gate_adjoint(
                    dg, w1s, s, m, *args, n, ctx.centred, (need_x, *need)
                )
                if need_x:
                    centre = m if ctx.centred else None
                    dx = moments_adjoint(ds, dm, x, weights, n, centre, dx)
        return dx, None, None, *dparams, None


def apply_gate(
    g: Tensor, p: Params, conv: Conv | None, x: Tensor, direct: bool
) -> Tensor:
    """The layer, its gate known.

    Args:
        g (Tensor): (B, C), the gate.
        p (Params): w3, alpha, beta and b3.
        conv (Conv, optional): The convolution that makes X of what is given.
        x (Tensor): (B, c, \\*spatial).
        direct (bool): As the paper has it; else by one matrix an image.

    Returns:
        Tensor: (B, C, \\*spatial). It owns its memory.
    """
    if has_kernels(x):
        from . import operators

        return operators.apply_gate(g, p, conv, x, direct)
    if direct:
        return gated(convolution(x, *conv) if conv else x, g, p)
    args = (g, p.w3, p.alpha, p.beta, p.b3, *(conv or (None, None)))
    if wants_grad(x, *args):
        return _ApplyGate.apply(x, *args)
    return mix(*fold(*args), x)


class _ApplyGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *args):
        matrix, column = fold(*args)
        ctx.save_for_backward(x, matrix, *args)
        ctx.has_column = column is not None
        return mix(matrix, column, x)

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative()
        x, matrix, *args = ctx.saved_tensors
        need_x, *need = ctx.needs_input_grad
        with no_autocast(x):
            needed = (any(need), any(need) and ctx.has_column, need_x)
            *dmap, dx = mix_adjoint(dy, matrix, x, needed)
            dargs = (None,) * 7
            if any(need):
                dargs = fold_adjoint(*dmap, *args, need)
        return dx, *dargs


def project(conv: Conv, p: Params) -> Params:
    """Make the first two convolutions those of H, where X = A H + b.

    Returns:
        Params: ``p`` with P1 (C, c), P2 (C, c), p1 (C,), p2 (C,) of the
        package's description in the places of w1, w2, b1, b2.
    """
    args = (p.w1, p.w2, *conv)
    # Under autocast a convolution of low precision may come with others.
    if len({t.dtype for t in args}) > 1:
        dtype = reduce(torch.promote_types, (t.dtype for t in args))
        args = tuple(t.to(dtype) for t in args)
    p = p._replace(w1=args[0], w2=args[1])
    if has_kernels(conv.a):
        from . import operators

        return operators.project(Conv(*args[2:]), p)
    with no_autocast(conv.a):
        if wants_grad(*args):
            w1, w2, b1, b2 = _Project.apply(*args)
        else:
            w1, w2, b1, b2 = projected(*args)
    return p._replace(
        w1=w1,
        w2=w2,
        b1=b1 if p.b1 is None else b1 + p.b1,
        b2=b2 if p.b2 is None else b2 + p.b2,
    )


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args)
        return projected(*args)

    @staticmethod
    def backward(ctx, *grads):
        args = ctx.saved_tensors
        with no_autocast(args[0]):
            return projected_adjoint(*grads, *args, ctx.needs_input_grad)


def evaluated(
    w: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    weight: Tensor | None,
    offset: Tensor | None,
) -> Conv:
    r"""A 1x1 convolution and the evaluated BatchNorm behind it as one.

    Args:
        w, bias (Tensor): (C, c), (C,), of the convolution.
        mean, variance, eps, weight, offset: Of the norm, (C,): what it has
            kept, and its affine map.

    Returns:
        Conv: in the dtype of ``w``.
    """
    tensors = (w, bias, mean, variance, weight, offset)
    one_dtype = all(t is None or t.dtype == w.dtype for t in tensors)
    with no_autocast(w):
        if one_dtype and has_kernels(w):
            from . import operators

            return operators.evaluated(
                w, bias, mean, variance, eps, weight, offset
            )
        return normed(w, bias, mean, variance, eps, weight, offset)
