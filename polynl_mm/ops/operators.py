"""The kernels as operators of torch, and the steps of autograd made of them.

Of the kernels of ``triton``, compilers and counters see only operators
``polynl_mm::...``: how each is called, what comes out of it (its fake kernel),
and how many operations its products take. An operator has no gradient itself;
what belongs together is said by the steps, which are those of ``autograd``.
Imported at the first tensor that has kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import triton
from .gate import Conv, Params, gate_of_projections, gated, normed
from .moments import empty_like
from .precision import (
    convolution,
    float_dtype,
    is_recorded,
    no_autocast,
    refuse_second_derivative,
    wants_grad,
)

__all__ = ['apply_gate', 'evaluated', 'gate_of', 'project']


# ---------------------------------------------------------------- operators


def _operator(schema: str, mutates: tuple = ()):
    """Make an operator of a function of ``triton``; decorates its fake."""
    name, arguments = schema.split('(', 1)

    def register(fake):
        operator = torch.library.custom_op(
            f'polynl_mm::{name}',
            getattr(triton, name),
            mutates_args=mutates,
            schema=f'({arguments}',
        )
        operator.register_fake(fake)
        return operator

    return register


def _multiply_adds(name: str):
    """Decorates how many an operator takes, from its arguments."""

    def register(count):
        def flops(*args, out_val=None, **kwargs):
            return 2 * count(*args, **kwargs)

        operator = getattr(torch.ops.polynl_mm, name)
        register_flop_formula(operator, get_raw=True)(flops)
        return count

    return register


@_operator(
    'gate(Tensor x, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2, '
    'Tensor? weights, Tensor? count, bool direct, bool centred, '
    'bool backward) -> Tensor[]'
)
def _gate(x, w1, w2, b1, b2, weights, count, direct, centred, backward):
    images, (channels, narrow) = x.shape[0], w1.shape
    found = [w1.new_empty(images, channels)]
    if not backward:
        return found
    if direct:
        found.append(x.new_empty(images, 2, channels, x.shape[2:].numel()))
        if b1 is not None:
            found.append(w1.new_empty(images, 2, channels))
        return found
    found.append(w1.new_empty(images, 2, channels, narrow))
    if b1 is not None:
        found.append(w1.new_empty(images, narrow))
    return found


@_multiply_adds('gate')
def _(x, w1, w2, b1, b2, weights, count, direct, centred, backward):
    positions = x.shape[0] * x.shape[2:].numel()
    channels, narrow = w1.shape
    if direct:
        return 2 * positions * channels * narrow
    of_weights = (2 if backward else 1) * channels * narrow**2
    return positions * narrow**2 + x.shape[0] * of_weights


@_operator(
    'gate_adjoint(Tensor x, Tensor dg, Tensor[] kept, Tensor w1, Tensor w2, '
    'Tensor? b1, Tensor? b2, Tensor? count, bool direct, bool centred, '
    'bool need_x, bool need_w) -> Tensor[]'
)
def _gate_adjoint(
    x, dg, kept, w1, w2, b1, b2, count, direct, centred, need_x, need_w
):
    images, (channels, narrow), found = x.shape[0], w1.shape, []
    if need_w:
        found.append(w1.new_empty(2, channels, narrow))
        if b1 is not None:
            found.append(w1.new_empty(2, channels))
    if need_x and direct:
        found.append(x.new_empty(images, 2 * channels, narrow))
    elif need_x:
        found.append(x.new_empty(images, narrow, narrow))
        if b1 is not None:
            found.append(w1.new_empty(images, narrow))
    return found


@_multiply_adds('gate_adjoint')
def _(x, dg, kept, w1, w2, b1, b2, count, direct, centred, need_x, need_w):
    channels, narrow = w1.shape
    if direct:
        positions = x.shape[2:].numel()
        return 2 * need_w * x.shape[0] * positions * channels * narrow
    # Symmetric, of the sum of two products only one half is computed.
    return need_x * x.shape[0] * channels * narrow**2


@_operator(
    'add_product(Tensor(a!) y, Tensor matrix, Tensor x, Tensor? column) -> ()',
    mutates=('y',),
)
def _add_product(y, matrix, x, column):
    return None


@_multiply_adds('add_product')
def _(y, matrix, x, column):
    return y.shape[0] * y.shape[2:].numel() * matrix.shape[1:].numel()


@_operator(
    'apply_gate(Tensor x, Tensor g, Tensor w3, Tensor alpha, Tensor beta, '
    'Tensor? b3, Tensor? a, Tensor? b) -> Tensor[]'
)
def _apply_gate(x, g, w3, alpha, beta, b3, a, b):
    channels = w3.shape[0]
    matrix = x.new_empty(x.shape[0], channels, x.shape[1])
    return [empty_like(x, channels), matrix]


@_multiply_adds('apply_gate')
def _(x, g, w3, alpha, beta, b3, a, b):
    channels, narrow = w3.shape[0], x.shape[1]
    each = x.shape[2:].numel() * channels * narrow
    if a is not None:
        each += channels**2 * narrow
    return x.shape[0] * each


@_operator(
    'apply_gate_adjoint(Tensor x, Tensor dy, Tensor g, Tensor matrix, '
    'Tensor w3, Tensor alpha, Tensor beta, Tensor? b3, Tensor? a, Tensor? b, '
    'bool need_x, bool need_w) -> Tensor[]'
)
def _apply_gate_adjoint(
    x, dy, g, matrix, w3, alpha, beta, b3, a, b, need_x, need_w
):
    found = []
    if need_w:
        found += [w3.new_empty(g.shape), torch.empty_like(w3)]
        found.append(w3.new_empty(2))
        found += [torch.empty_like(t) for t in (b3, a, b) if t is not None]
    if need_x:
        found.append(empty_like(x, x.shape[1]))
    return found


@_multiply_adds('apply_gate_adjoint')
def _(x, dy, g, matrix, w3, alpha, beta, b3, a, b, need_x, need_w):
    channels, narrow = w3.shape[0], x.shape[1]
    each = x.shape[2:].numel() * channels * narrow * (need_x + need_w)
    if a is not None:
        each += 2 * need_w * channels**2 * narrow
    return x.shape[0] * each


@_operator(
    'project(Tensor w1, Tensor w2, Tensor a, Tensor b, Tensor? b1, '
    'Tensor? b2) -> Tensor[]'
)
def _project(w1, w2, a, b, b1, b2):
    return [w1.new_empty(2, *a.shape), w1.new_empty(2, a.shape[0])]


@_multiply_adds('project')
def _(w1, w2, a, b, b1, b2):
    return 2 * w1.shape[0] * a.numel()


@_operator(
    'project_adjoint(Tensor dp1, Tensor dp2, Tensor dq, Tensor w1, Tensor w2, '
    'Tensor a, Tensor b) -> Tensor[]'
)
def _project_adjoint(dp1, dp2, dq, w1, w2, a, b):
    return [w1.new_empty(2, *w1.shape), *map(torch.empty_like, (a, b))]


@_multiply_adds('project_adjoint')
def _(dp1, dp2, dq, w1, w2, a, b):
    return 4 * w1.shape[0] * a.numel()


@_operator(
    'evaluated(Tensor w, Tensor? bias, Tensor mean, Tensor variance, '
    'float eps, Tensor? weight, Tensor? offset) -> Tensor[]'
)
def _evaluated(w, bias, mean, variance, eps, weight, offset):
    return [torch.empty_like(w), w.new_empty(w.shape[0])]


@_operator(
    'evaluated_adjoint(Tensor w, Tensor da, Tensor db, Tensor? bias, '
    'Tensor mean, Tensor variance, float eps, Tensor? weight) -> Tensor[]'
)
def _evaluated_adjoint(w, da, db, bias, mean, variance, eps, weight):
    return [torch.empty_like(t) for t in (w, bias, weight) if t is not None]


# -------------------------------------------------------------------- steps


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As the kernels read weights and biases: one element after the other."""
    return tuple(t if t is None else t.contiguous() for t in tensors)


def _by_operations(f, inputs: tuple, grads: tuple) -> list[Tensor | None]:
    """The gradients of f by operations that have a gradient themselves."""
    with torch.enable_grad(), no_autocast(inputs[0]):
        results = f(*inputs)
        if isinstance(results, Tensor):
            results = (results,)
        # One that depends on none of what is wanted has no gradient to give.
        pairs = [(y, dy) for y, dy in zip(results, grads) if y.requires_grad]
        wanted = [t is not None and t.requires_grad for t in inputs]
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            [t for t, is_wanted in zip(inputs, wanted) if is_wanted],
            [dy for _, dy in pairs],
            create_graph=True,
            allow_unused=True,
        )
    found = iter(found)
    return [next(found) if is_wanted else None for is_wanted in wanted]


def _is_differentiated(direct: bool) -> bool:
    """Whether the gradient is to have one itself, which only direct has."""
    if direct:
        return torch.is_grad_enabled() and not is_recorded()
    refuse_second_derivative()
    return False


def gate_of(
    x: Tensor,
    p: Params,
    weights: Tensor | None,
    n: int | Tensor,
    direct: bool,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`polynl_mm.ops.autograd.gate_of`."""
    count = n if isinstance(n, Tensor) else None
    args = (*_dense(p.w1, p.w2, p.b1, p.b2), weights, count, direct, centred)
    if not wants_grad(x, p.w1, p.w2, p.b1, p.b2):
        return _gate(x, *args, False)[0], x
    g, through = _GateOf.apply(x, *args)
    return g, through if x.requires_grad else x


def _counted(features: Tensor, weights: Tensor | None) -> Tensor:
    """(B, C, N) features times the weights of the positions."""
    if weights is None:
        return features
    return (features * weights.flatten(2)).to(features.dtype)


class _GateOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *args):
        *tensors, direct, centred = args
        g, *kept = _gate(x, *args, True)
        ctx.save_for_backward(x, *tensors, *kept)
        ctx.direct, ctx.centred = direct, centred
        ctx.set_materialize_grads(False)
        return g, x.view_as(x)

    @staticmethod
    def backward(ctx, dg, dx):
        x, w1, w2, b1, b2, weights, count, *kept = ctx.saved_tensors
        need_x, *need = ctx.needs_input_grad[:5]
        dw1 = dw2 = db1 = db2 = None
        if dg is None:  # a pool may have passed over it
            pass
        elif _is_differentiated(ctx.direct):
            n = x.shape[2:].numel() if count is None else count

            def by_projections(x, *w):
                p = Params(*w[:2], None, None, None, *w[2:])
                return gate_of_projections(x, p, weights, n)

            more, dw1, dw2, db1, db2 = _by_operations(
                by_projections, (x, w1, w2, b1, b2), (dg,)
            )
            dx = more if dx is None or more is None else dx + more
        else:
            features = x.flatten(2)
            if ctx.direct:
                features = kept[0] = _counted(kept[0].flatten(1, 2), weights)
            args = (w1, w2, b1, b2, count, ctx.direct, ctx.centred)
            with no_autocast(x):
                found = _gate_adjoint(x, dg, kept, *args, need_x, any(need))
            found = iter(found)
            if any(need):
                dw1, dw2 = next(found).unbind()
                if b1 is not None:
                    db1, db2 = next(found).unbind()
            if need_x:
                matrix, column = next(found), next(found, None)
                if ctx.direct:
                    matrix = matrix.mT
                else:
                    features = _counted(features, weights)
                if dx is None:
                    dx = empty_like(x, x.shape[1]).zero_()
                if column is not None and weights is not None:
                    columns = column.unsqueeze(2) * weights.flatten(2)
                    dx += columns.to(x.dtype).view_as(x)
                    column = None
                with no_autocast(x):
                    _add_product(dx, matrix, features, column)
        return dx, dw1, dw2, db1, db2, *(None,) * 4


def apply_gate(
    g: Tensor, p: Params, conv: Conv | None, x: Tensor, direct: bool
) -> Tensor:
    """As :func:`polynl_mm.ops.autograd.apply_gate`."""
    args = (p.w3, p.alpha, p.beta, p.b3, *(conv or (None, None)))
    args = (g, *_dense(*args))
    if wants_grad(x, *args):
        return _ApplyGate.apply(x, *args, direct)
    return _apply_gate(x, *args)[0]


class _ApplyGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *args):
        *args, direct = args
        y, matrix = _apply_gate(x, *args)
        ctx.save_for_backward(x, matrix, *args)
        ctx.direct = direct
        return y

    @staticmethod
    def backward(ctx, dy):
        x, matrix, *args = ctx.saved_tensors
        need_x, *need = ctx.needs_input_grad[:-1]
        g, w3, alpha, beta, b3, a, b = args
        if _is_differentiated(ctx.direct):

            def by_convolutions(x, g, w3, alpha, beta, b3, a, b):
                p = Params(None, None, w3, alpha, beta, None, None, b3)
                return gated(x if a is None else convolution(x, a, b), g, p)

            found = _by_operations(by_convolutions, (x, *args), (dy,))
            return *found, None
        with no_autocast(x):
            found = _apply_gate_adjoint(
                *(x, dy, g, matrix, w3, alpha, beta, b3, a, b),
                *(need_x, any(need)),
            )
        dx = found[-1] if need_x else None
        if not any(need):
            return dx, *(None,) * 8
        found = iter(found)
        dg, dw3, dscalars = next(found), next(found), next(found)
        more = (None if t is None else next(found) for t in (b3, a, b))
        return dx, dg, dw3, *dscalars.split(1), *more, None


def project(conv: Conv, p: Params) -> Params:
    """As :func:`polynl_mm.ops.project`."""
    dtype = p.w1.dtype
    args = _dense(p.w1, p.w2, *conv, p.b1, p.b2)
    args = tuple(t if t is None else t.to(float_dtype(dtype)) for t in args)
    if wants_grad(*args):
        made = _Project.apply(*args)
    else:
        made = (t for pair in _project(*args) for t in pair.unbind())
    return p._replace(
        **{k: t.to(dtype) for k, t in zip(('w1', 'w2', 'b1', 'b2'), made)}
    )


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args[:4])
        p, q = _project(*args)
        return *p.unbind(), *q.unbind()

    @staticmethod
    def backward(ctx, dp1, dp2, dq1, dq2):
        args = ctx.saved_tensors
        *_, need1, need2 = ctx.needs_input_grad
        if torch.is_grad_enabled() and not is_recorded():

            def by_products(w1, w2, a, b):
                return w1 @ a, w2 @ a, w1 @ b, w2 @ b

            found = _by_operations(by_products, args, (dp1, dp2, dq1, dq2))
        else:
            dq = torch.stack((dq1, dq2))
            dw, da, db = _project_adjoint(dp1, dp2, dq, *args)
            found = *dw.unbind(), da, db
        return *found, dq1 if need1 else None, dq2 if need2 else None


def evaluated(w, bias, mean, variance, eps, weight, offset) -> Conv:
    """As :func:`polynl_mm.ops.evaluated`."""
    args = (*_dense(w, bias, mean, variance), eps, *_dense(weight, offset))
    if wants_grad(w, bias, weight, offset):
        return Conv(*_Evaluated.apply(*args))
    return Conv(*_evaluated(*args))


class _Evaluated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        w, bias, mean, variance, ctx.eps, *affine = args
        ctx.save_for_backward(w, bias, mean, variance, *affine)
        return tuple(_evaluated(*args))

    @staticmethod
    def backward(ctx, da, db):
        w, bias, mean, variance, weight, offset = ctx.saved_tensors
        if torch.is_grad_enabled() and not is_recorded():

            def by_operations(w, bias, weight, offset):
                kept = (mean, variance, ctx.eps)
                return normed(w, bias, *kept, weight, offset)

            dw, dbias, *daffine = _by_operations(
                by_operations, (w, bias, weight, offset), (da, db)
            )
            return dw, dbias, None, None, None, *daffine
        found = _evaluated_adjoint(
            w, da, db, bias, mean, variance, ctx.eps, weight
        )
        found = iter(found)
        dw, dbias, dweight = (
            None if t is None else next(found) for t in (w, bias, weight)
        )
        doffset = db if ctx.needs_input_grad[6] else None
        return dw, dbias, None, None, None, dweight, doffset
