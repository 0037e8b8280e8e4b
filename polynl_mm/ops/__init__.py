r"""The Poly-NL operation: derivation, both of its forms, and their gradient.

Notation, for one image: :math:`X \in R^{C \times N}` holds the features as
columns, :math:`N` positions (``N = prod(spatial)``) of :math:`C` channels.
:math:`W_1, W_2, W_3 \in R^{C \times C}` act as 1x1 convolutions do, from the
left and indexed (out, in); :math:`\alpha, \beta` are scalars; :math:`\odot` is
the elementwise product.

**The layer** (Babiloni et al., "Poly-NL: Linear Complexity Non-local Layers
with 3rd Order Polynomials", ICCV 2021, arXiv 2107.02859), in this notation:

.. math::
    g &= \tfrac1N \textstyle\sum_n (W_1 x_n) \odot (W_2 x_n)
        && \text{average-pooled product, a C-vector} \\
    y_n &= \alpha x_n + \beta W_3 (g \odot x_n)
        && \text{gate, project, add to the input}

**direct** computes just that: three 1x1 convolutions, :math:`3NC^2`
multiply-adds forward and :math:`9NC^2` with backward, and several N x C
activations kept for backward.

**gram** computes the same function from the second moment of X:

.. math::
    S &= X X^T / N                                        && NC^2 \\
    g_c &= w_{1c}^T S\, w_{2c}, \quad\text{that is}\quad
        g = \operatorname{rowsum}((W_1 S) \odot W_2)      && C^3 \\
    M &= \alpha I + \beta W_3 \operatorname{diag}(g)      && C^2 \\
    Y &= M X                                              && NC^2

because :math:`(W_1 x)_c (W_2 x)_c = w_{1c}^T x x^T w_{2c}`, where
:math:`w_{ic}` is row c of :math:`W_i`. Nothing of size N x C is made but Y,
and only X and a few C x C matrices are kept for backward. With biases and the
mean position :math:`m = \tfrac1N \sum_n x_n`, :math:`u = W_1 x + b_1` and
:math:`v = W_2 x + b_2` add to the gate

.. math::
    g \mathrel{+}= b_1 \odot W_2 m + b_2 \odot W_1 m + b_1 \odot b_2

and :math:`\beta b_3` is added to every column of Y.

**Its gradient**, from :math:`\bar Y = \partial L / \partial Y` (sums over the
batch for the parameters):

.. math::
    \bar M &= \bar Y X^T                                  && NC^2 \\
    t_c &= \textstyle\sum_j \bar M_{jc} W_{3,jc}, \quad \bar g = \beta t \\
    \bar\alpha &= \operatorname{tr} \bar M, \quad
        \bar\beta = g^T t, \quad
        \bar W_3 = \beta \bar M \operatorname{diag}(g) \\
    \bar W_1 &= \operatorname{diag}(\bar g) W_2 S, \quad
        \bar W_2 = \operatorname{diag}(\bar g) W_1 S      && C^3 \\
    \bar S &= W_1^T \operatorname{diag}(\bar g) W_2       && C^3 \\
    \bar X &= M^T \bar Y + (\bar S + \bar S^T) X / N      && 2NC^2

and with biases :math:`\bar W_1 \mathrel{+}= (\bar g \odot b_2) m^T`,
:math:`\bar b_1 = \bar g \odot (W_2 m + b_2)`, the same with 1 and 2 exchanged,
:math:`\bar b_3 = \beta \sum_n \bar y_n`,
:math:`\bar\beta \mathrel{+}= b_3^T \sum_n \bar y_n`, and every column of
:math:`\bar X` gains
:math:`(W_1^T (\bar g \odot b_2) + W_2^T (\bar g \odot b_1)) / N`.

**Behind a 1x1 convolution**, :math:`x_n = A h_n + b` with
:math:`A \in R^{C \times c}` (an evaluated BatchNorm included), the layer can
be seen from the convolution's narrow input :math:`H \in R^{c \times N}`. Its
projections are projections of H,

.. math::
    W_i x + b_i = P_i h + p_i, \quad P_i = W_i A, \quad p_i = W_i b + b_i

so the gate is that of H, with :math:`P_i` and :math:`p_i` in the place of
:math:`W_i` and :math:`b_i`. From the mean m and the covariance of H,

.. math::
    S &= (H - m 1^T) (H - m 1^T)^T / N                      && Nc^2 \\
    g &= \operatorname{rowsum}((P_1 S) \odot P_2)
        + (P_1 m + p_1) \odot (P_2 m + p_2)                 && Cc^2

Centred, for a norm takes away much of what :math:`A m` is, and it would be
the square of that from which the rest had to be told. And once the gate is
known, the layer is linear and can be applied to the convolution
instead of its output:

.. math::
    A' &= \alpha A + \beta W_3 \operatorname{diag}(g) A           && C^2c \\
    b' &= \alpha b + \beta W_3 (g \odot b) + \beta b_3 \\
    Y &= A' H + b' 1^T                                          && NCc

The last product is the convolution, which is there without the layer, too.
W1 and W2 enter by :math:`P_i` only, constants of a trained model. That is the
gram form. Where N is small the direct form is cheaper: the gate from the
projections :math:`P_i h`, :math:`2NCc`, and the layer applied to the output of
the convolution, :math:`NC^2`. Where c is large, as before the laterals of an
FPN, neither is: :math:`Nc^2` is more than :func:`poly_nl` of X takes.

**Precision.** The branch is cubic in X: in float16 the product of two
projections overflows at magnitudes of 256. For float16 and bfloat16 input,
everything between X and the output (S, g and M; the product, its mean and the
gate; and their gradients) is float32, and only the N x C products run in the
input's dtype.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    'FORMS',
    'behind_pays',
    'choose_form',
    'conv1x1',
    'poly_nl',
    'poly_nl_behind',
    'poly_nl_direct',
    'poly_nl_gram',
    'project',
]

FORMS = ('auto', 'direct', 'gram')

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MIN_PANEL = 128
_HALF = (torch.float16, torch.bfloat16)
# Newer torch tells.
_is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)
_BMM_HAS_OUT_DTYPE = hasattr(torch.ops.aten.bmm, 'dtype')  # torch >= 2.8

# Multiply-adds that take as long as one byte of an N x C temporary written
# and read again. An estimate; tools/benchmark_layer.py checks what it chooses.
_MACS_PER_BYTE = 16.0


def poly_nl(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    alpha: Tensor | float,
    beta: Tensor | float,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    b3: Tensor | None = None,
    form: str = 'auto',
) -> Tensor:
    r"""Poly-NL, by the form asked for.

    .. math::
        Y = \alpha X + \beta W_3 (\Phi(W_1 X \odot W_2 X) \odot X)

    The mean :math:`\Phi` is taken over all positions of an image. Under
    autocast ``x`` is cast as a convolution would cast it.

    Args:
        x (Tensor): Features, float16, bfloat16, float32 or float64, of any
            strides. A channels-last ``x`` gives a channels-last result.
        w1, w2, w3 (Tensor): Weights of the three 1x1 convolutions, indexed
            (out, in).
        alpha, beta (Tensor or float): Scalars, tensors of one element.
        b1, b2, b3 (Tensor, optional): Biases of the convolutions.
        form (str): ``'direct'``, ``'gram'``, or ``'auto'``, which takes the
            one that :func:`choose_form` expects to be faster. All compute
            the same function; see the module's description.

    Shape:
        - x: (B, C, \*spatial) with one to three spatial axes.
        - w1, w2, w3: (C, C). b1, b2, b3: (C,).
        - result: as ``x``. It owns its memory: it may be changed in place.

    Raises:
        ValueError: If a shape, a dtype or ``form`` is not as stated.
        RuntimeError: On double backward through the gram form, which is not
            implemented; use ``form='direct'`` for second derivatives.
    """
    _check_form(form)
    x, p = _prepare(x, w1, w2, w3, alpha, beta, b1, b2, b3)
    needs_grad = _wants_grad(x, *p)
    if form == 'auto' and _is_exporting():
        # The choice would become part of the program, for every size.
        form = 'gram'
    if form == 'auto':
        n, c = math.prod(x.shape[2:]), x.shape[1]
        form = choose_form(n, c, needs_grad, x.element_size())
    with no_autocast(x):
        if form == 'direct':
            return _direct(x, p)
        if needs_grad:
            return _PolyNLGram.apply(x, *p)
        return _gram(x, p)[0]


def poly_nl_direct(x, w1, w2, w3, alpha, beta, b1=None, b2=None, b3=None):
    """:func:`poly_nl` as the paper writes it."""
    return poly_nl(x, w1, w2, w3, alpha, beta, b1, b2, b3, form='direct')


def poly_nl_gram(x, w1, w2, w3, alpha, beta, b1=None, b2=None, b3=None):
    """:func:`poly_nl` from the second moment.

    Where no gradient is wanted, it runs as ordinary tensor operations, so
    tracers, exporters and counters see matrix products.
    """
    return poly_nl(x, w1, w2, w3, alpha, beta, b1, b2, b3, form='gram')


def choose_form(n: int, c: int, backward: bool, itemsize: int = 4) -> str:
    """The form expected to be faster: the one place of the rule.

    Counts the multiply-adds of each form, and the bytes of the N x C
    temporaries that only the direct form makes, at one rate of
    exchange; ``python tools/benchmark_layer.py`` checks the choice (table in
    the README). The batch size cancels out.

    Args:
        n (int): Positions per image. c (int): Channels.
        backward (bool): Whether a gradient will be wanted.
        itemsize (int): Bytes per element of the features.

    Returns:
        str: ``'direct'`` or ``'gram'``.
    """
    if backward:
        direct, gram, temporaries = 9 * n * c**2, 5 * n * c**2 + 3 * c**3, 18
    else:
        direct, gram, temporaries = 3 * n * c**2, 2 * n * c**2 + c**3, 7
    direct = direct + _MACS_PER_BYTE * temporaries * n * c * itemsize
    return 'gram' if gram <= direct else 'direct'


def behind_pays(n: int, c: int, out: int, backward: bool) -> bool:
    """Whether the layer costs less from H than from X.

    Counts the multiply-adds besides those of the convolution. In a step of
    training, 3 of :func:`project` and 6 of the folded weight are C^2 c; for
    inference :func:`project` was called once and for all.

    Args:
        n (int): Positions per image. c, out (int): Channels of H and of X.
        backward (bool): Whether a gradient will be wanted.
    """
    if backward:
        behind = 9 * out**2 * c + 3 * out * c**2 + 2 * n * c**2
        return behind < min(9 * n * out**2, 5 * n * out**2 + 3 * out**3)
    behind = out**2 * c + out * c**2 + n * c**2
    return behind < min(3 * n * out**2, 2 * n * out**2 + out**3)


def project(
    a: Tensor,
    b: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make the first two convolutions those of H, where X = A H + b.

    Args:
        a, b (Tensor): Weight (C, c) and shift (C,) of the convolution before.
        w1, w2, b1, b2: As in :func:`poly_nl`.

    Returns:
        tuple: P1 (C, c), P2 (C, c), p1 (C,), p2 (C,) of the module's
        description.
    """
    q1, q2 = w1 @ b, w2 @ b
    return (
        w1 @ a,
        w2 @ a,
        q1 if b1 is None else q1 + b1,
        q2 if b2 is None else q2 + b2,
    )


def poly_nl_behind(
    h: Tensor,
    a: Tensor,
    b: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    alpha: Tensor | float,
    beta: Tensor | float,
    b1: Tensor,
    b2: Tensor,
    b3: Tensor | None = None,
    form: str = 'auto',
) -> Tensor:
    r"""Poly-NL of X = A H + b, from H.

    Args:
        h (Tensor): Input of the convolution, as ``x`` of :func:`poly_nl`.
        a, b (Tensor): Weight and shift of the convolution.
        w1, w2, b1, b2 (Tensor): Weights and biases of the first two
            convolutions, made those of ``h`` by :func:`project`.
        w3, alpha, beta, b3: As in :func:`poly_nl`.
        form (str): ``'direct'``, ``'gram'``, or ``'auto'``, which takes the
            cheaper one for the shape of ``h``; see the module's description.

    Shape:
        - h: (B, c, \*spatial) with one to three spatial axes.
        - a, w1, w2: (C, c). w3: (C, C). b, b1, b2, b3: (C,).
        - result: (B, C, \*spatial), channels-last if ``h`` is. It owns its
          memory.

    Raises:
        ValueError: If a shape, a dtype or ``form`` is not as stated.
        RuntimeError: On double backward through the gram form, which is not
            implemented.
    """
    _check_form(form)
    h, p = _prepare(h, w1, w2, w3, alpha, beta, b1, b2, b3, a=a, b=b)
    a, b = a.to(p.dtype), b.to(p.dtype)
    if form == 'auto' and is_for_every_size():
        form = 'gram'
    n, c = math.prod(h.shape[2:]), h.shape[1]
    if form == 'auto':
        out = len(a)
        gram = n * c**2 + out * c**2 + out**2 * c + n * out * c
        direct = 3 * n * out * c + n * out**2
        form = 'gram' if gram <= direct else 'direct'
    with no_autocast(h):
        if form == 'direct':
            return _apply_gate(conv1x1(h, a, b), _direct_gate(h, p), p)
        s, m = _Moments.apply(h) if _wants_grad(h) else _moments(h)
        g = (_each(p.w1, s) * p.w2).sum(2) / n
        g = g + F.linear(m, p.w1, p.b1) * F.linear(m, p.w2, p.b2)
        gain = p.beta * g
        b = p.alpha * b + F.linear(gain * b, p.w3)
        b = b if p.b3 is None else b + p.beta * p.b3
        gated, own = gain.unsqueeze(2) * a, p.alpha * a
        w3 = p.w3.expand(g.shape[0], *p.w3.shape)
        a = torch.baddbmm(own.expand_as(gated), w3, gated)
        return (
            _Affine.apply(a, b, h) if _wants_grad(a, h) else _affine(a, b, h)
        )


class _Params(NamedTuple):
    """Weights, scalars and biases in the dtype of the C x C algebra.

    ``b1`` and ``b2`` are both there or both None.
    """

    w1: Tensor
    w2: Tensor
    w3: Tensor
    alpha: Tensor
    beta: Tensor
    b1: Tensor | None
    b2: Tensor | None
    b3: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return self.w1.dtype


def _wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd is to be told how; tracers take ordinary operations."""
    return (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
        and not torch.jit.is_tracing()
    )


def conv1x1(z: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """A convolution by a (C, c) matrix, in the dtype of z or autocast's."""
    axes = z.dim() - 2
    b = None if b is None else b.to(z.dtype)
    return _CONVS[axes](z, w.to(z.dtype).reshape(*w.shape, *(1,) * axes), b)


def _direct(x: Tensor, p: _Params) -> Tensor:
    return _apply_gate(x, _direct_gate(x, p), p)


def _direct_gate(x: Tensor, p: _Params) -> Tensor:
    """The gate (B, C) from both projections."""
    u, v = conv1x1(x, p.w1, p.b1), conv1x1(x, p.w2, p.b2)
    return (u.to(p.dtype) * v.to(p.dtype)).flatten(2).mean(2)


def _apply_gate(x: Tensor, g: Tensor, p: _Params) -> Tensor:
    """The layer with its gate known: alpha x + beta (W3 (g x) + b3)."""
    ones = (1,) * (x.dim() - 2)
    g = g.reshape(*g.shape, *ones)
    if x.dtype in _HALF:
        # x * g may exceed float16 where the output does not: project it
        # relative to the largest gate, which cancels out.
        scale = g.detach().abs().amax(1, keepdim=True)
        scale = scale.clamp_min(torch.finfo(p.dtype).tiny)
        branch = conv1x1((x * (g / scale)).to(x.dtype), p.w3) * scale
        if p.b3 is not None:
            branch = branch + p.b3.reshape(-1, *ones)
    else:
        branch = conv1x1(x * g, p.w3, p.b3)
    return (p.alpha * x + p.beta * branch).to(x.dtype)


def _gram(x: Tensor, p: _Params) -> tuple[Tensor | None, ...]:
    """Y, and what its gradient needs besides: M, g, N S, N W1 S and m."""
    xf = x.flatten(2)
    n = xf.shape[-1]
    s = _gram_matrix(xf)
    w1s = _each(p.w1, s)
    m = None if p.b1 is None else xf.sum(-1, dtype=p.dtype) / n
    g = _gate(p, w1s, m, n)
    mixing = p.w3 * (p.beta * g).unsqueeze(1)
    mixing.diagonal(dim1=1, dim2=2).add_(p.alpha)
    y = _mix(mixing, x)
    if p.b3 is not None:
        y.add_(_per_channel(p.beta * p.b3, y))
    return y, mixing, g, s, w1s, m


def _gate(p: _Params, w1s: Tensor, m: Tensor | None, n: int) -> Tensor:
    """The gate (B, C) from N W1 S and, where there are biases, the mean."""
    g = (w1s * p.w2).sum(2) / n
    if m is None:
        return g
    return g + p.b1 * F.linear(m, p.w2, p.b2) + p.b2 * F.linear(m, p.w1)


class _PolyNLGram(torch.autograd.Function):
    """The gram form with the gradient of the module's description."""

    @staticmethod
    def forward(ctx, x, *params):
        y, *moments = _gram(x, _Params(*params))
        ctx.save_for_backward(x, *params, *moments)
        return y

    @staticmethod
    def backward(ctx, dy):
        _refuse_second_derivative()
        x, *saved = ctx.saved_tensors
        with no_autocast(x):
            return _gram_backward(
                dy, x, _Params(*saved[:8]), *saved[8:], ctx.needs_input_grad
            )


def _refuse_second_derivative() -> None:
    # Not once_differentiable: it lets a penalty on a gradient pass that
    # another term of the loss hides, with the second derivative missing.
    if torch.is_grad_enabled() and not _is_traced():
        raise RuntimeError(
            "Poly-NL's gram form has no second derivative "
            "(create_graph=True); use form='direct'"
        )


def _gram_backward(dy, x, p, mixing, g, s, w1s, m, needed):
    """Gradients of x and of every member of ``p``, None where not needed."""
    need = dict(zip(('x', *p._fields), needed))
    need_gate = any(need[k] for k in ('x', 'w1', 'w2', 'b1', 'b2'))
    d = dict.fromkeys(need)
    xf, dyf = x.flatten(2), dy.flatten(2)
    n = xf.shape[-1]

    if need_gate or need['w3'] or need['alpha'] or need['beta']:
        dm = _matmul(dyf, xf.mT)
        t = (dm * p.w3).sum(1)
        dg = p.beta * t
        rows = (dg / n).unsqueeze(2)
    if need['alpha']:
        d['alpha'] = dm.diagonal(dim1=1, dim2=2).sum().reshape(1)
    if need['beta']:
        d['beta'] = (g * t).sum().reshape(1)
    if need['w3']:
        d['w3'] = _sum_images(dm.mul_((p.beta * g).unsqueeze(1)))
    if p.b3 is not None:
        dy_sum = dyf.sum((0, 2), dtype=p.dtype)
        d['b3'] = p.beta * dy_sum
        if need['beta']:
            d['beta'] += p.b3 @ dy_sum

    if need['w1']:
        d['w1'] = _sum_images(_each(p.w2, s).mul_(rows))
    if need['w2']:
        d['w2'] = _sum_images(w1s * rows)
    if p.b1 is not None and need_gate:
        if need['w1']:
            d['w1'] = d['w1'] + (dg * p.b2).mT @ m
        if need['w2']:
            d['w2'] = d['w2'] + (dg * p.b1).mT @ m
        d['b1'] = (dg * F.linear(m, p.w2, p.b2)).sum(0)
        d['b2'] = (dg * F.linear(m, p.w1, p.b1)).sum(0)

    if need['x']:
        ds = _each(p.w1.mT, p.w2 * rows)
        d['x'] = _mix(mixing.mT, dy, like=x)
        d['x'] = _mix(ds + ds.mT, x, onto=d['x'])
        if p.b1 is not None:
            column = (dg * p.b2) @ p.w1 + (dg * p.b1) @ p.w2
            d['x'].add_(_per_channel(column / n, x))
    return tuple(d[k] if need[k] else None for k in need)


def _moments(h: Tensor) -> tuple[Tensor, Tensor]:
    """N times the covariance, and the mean, at least in float32."""
    hf = h.flatten(2)
    m = hf.mean(2, dtype=torch.float32 if h.dtype in _HALF else h.dtype)
    return _gram_matrix((hf - m.unsqueeze(2)).to(h.dtype)), m


class _Moments(torch.autograd.Function):
    """:func:`_moments`; its gradient is (dS + dS^T) (H - m) + dm / N."""

    @staticmethod
    def forward(ctx, h):
        s, m = _moments(h)
        ctx.save_for_backward(h, m)
        return s, m

    @staticmethod
    def backward(ctx, ds, dm):
        _refuse_second_derivative()
        h, m = ctx.saved_tensors
        with no_autocast(h):
            ds = ds + ds.mT
            column = (
                dm / math.prod(h.shape[2:]) - (ds @ m.unsqueeze(2))[..., 0]
            )
            return _affine(ds, column, h)


def _affine(matrix: Tensor, column: Tensor, h: Tensor) -> Tensor:
    """Every position times (B, C, c) matrices, plus (B, C) columns."""
    y = _mix(matrix, h)
    return y.add_(_per_channel(column, y))


class _Affine(torch.autograd.Function):
    """:func:`_affine` of any tensors; only H and the matrices are kept."""

    @staticmethod
    def forward(ctx, matrix, column, h):
        ctx.save_for_backward(matrix, h)
        return _affine(matrix, column, h)

    @staticmethod
    def backward(ctx, dy):
        _refuse_second_derivative()
        matrix, h = ctx.saved_tensors
        dyf = dy.flatten(2)
        with no_autocast(h):
            return (
                _matmul(dyf, h.flatten(2).mT),
                dyf.sum(2, dtype=matrix.dtype),
                _mix(matrix.mT, dy, like=h),
            )


def _mix(
    matrix: Tensor,
    x: Tensor,
    like: Tensor | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """Apply (B, C, c) matrices to every position of (B, c, *spatial) ``x``.

    The result has the memory layout of ``like`` (by default ``x``) and owns
    its memory: host blocks add to it in place, which autograd forbids on a
    view that a custom function or a checkpoint returns. With ``onto``, the
    result is added to that tensor, in place.
    """
    matrix, xf, c = matrix.to(x.dtype), x.flatten(2), matrix.shape[1]
    if _is_traced():
        # Exporters know no ``out=``.
        y = torch.matmul(matrix, xf).view(x.shape[0], c, *x.shape[2:])
        # A copy owns its memory, too; compilers remove it where they can.
        y = y if torch.jit.is_tracing() else y.clone()
        return y if onto is None else onto + y
    y = _empty_like(x if like is None else like, c) if onto is None else onto
    yf = y.view(*y.shape[:2], -1) if y.numel() else y.flatten(2)
    beta = 0 if onto is None else 1
    if yf.is_contiguous():
        torch.baddbmm(yf, matrix, xf, beta=beta, out=yf)
    else:
        torch.baddbmm(yf.mT, xf.mT, matrix.mT, beta=beta, out=yf.mT)
    return y


def _empty_like(x: Tensor, c: int) -> Tensor:
    """Uninitialised, of c channels, C innermost where that is so in x."""
    shape = (x.shape[0], c, *x.shape[2:])
    if x.is_contiguous() or not x.flatten(2).mT.is_contiguous():
        return x.new_empty(shape)
    strides, step = [], c
    for size in reversed(shape[2:]):
        strides.append(step)
        step *= size
    return x.new_empty_strided(shape, (step, 1, *reversed(strides)))


def _sum_images(t: Tensor) -> Tensor:
    """Sum over the batch, without a copy where it is one image."""
    return t[0] if len(t) == 1 else t.sum(0)


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """(C,) or (B, C) values as a tensor that adds to every position of x."""
    return v.to(x.dtype).reshape(*v.shape, *(1,) * (x.dim() - 2))


def _each(w: Tensor, matrices: Tensor) -> Tensor:
    """W A for every matrix A of a batch."""
    return torch.bmm(w.expand(matrices.shape[0], *w.shape), matrices)


def _gram_matrix(xf: Tensor) -> Tensor:
    """X X^T of (B, C, N) features, at least in float32: (B, C, C).

    On a CPU only the lower block triangle is multiplied out, in row panels.
    """
    c = xf.shape[1]
    if _is_traced() or xf.device.type != 'cpu' or c < 2 * _MIN_PANEL:
        return _matmul(xf, xf.mT)
    xf = xf.float() if xf.dtype in _HALF else xf
    s = xf.new_empty(len(xf), c, c)
    step = max(c // 4, _MIN_PANEL)
    for start in range(0, c, step):
        stop = min(start + step, c)
        panel = torch.bmm(xf[:, start:stop], xf[:, :stop].mT)
        s[:, start:stop, :stop] = panel
        s[:, :start, start:stop] = panel[..., :start].mT
    return s


def is_for_every_size() -> bool:
    """Whether a choice by size would become part of a program."""
    return torch.jit.is_tracing() or _is_exporting()


def _is_traced() -> bool:
    return torch.jit.is_tracing() or _is_compiling()


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched product, at least in float32: (B, m, k) x (B, k, n)."""
    if a.dtype not in _HALF:
        return torch.bmm(a, b)
    if a.is_cuda and _BMM_HAS_OUT_DTYPE:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _prepare(x, w1, w2, w3, alpha, beta, b1, b2, b3, **conv):
    """Check the arguments; bring them to the dtypes to compute in.

    ``conv`` are a and b where x is what the convolution before is given.
    """
    _check(x, w1, w2, w3, alpha, beta, b1, b2, b3, **conv)
    x = x.to(autocast_dtype(x))
    dtype = torch.float32 if x.dtype in _HALF else x.dtype
    if (b1 is None) != (b2 is None):
        b1 = w1.new_zeros(len(w1)) if b1 is None else b1
        b2 = w2.new_zeros(len(w2)) if b2 is None else b2

    def scalar(v):
        if isinstance(v, Tensor):
            return v.to(dtype).reshape(1)
        return x.new_full((1,), v, dtype=dtype)

    return x, _Params(
        *(w.to(dtype) for w in (w1, w2, w3)),
        *(scalar(v) for v in (alpha, beta)),
        *(None if b is None else b.to(dtype) for b in (b1, b2, b3)),
    )


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f'form must be one of {FORMS}, got {form!r}')


def _check(x, w1, w2, w3, alpha, beta, b1, b2, b3, **conv):
    if not 3 <= x.dim() <= 5 or 0 in x.shape[1:]:
        raise ValueError(
            'x must have shape (B, C, *spatial) with one to three spatial '
            f'axes, none of them empty, got {tuple(x.shape)}'
        )
    if x.dtype not in (*_HALF, torch.float32, torch.float64):
        raise ValueError(f'x must be floating point, got {x.dtype}')
    narrow = x.shape[1]
    a = conv.get('a')
    c = len(a) if isinstance(a, Tensor) and a.dim() else narrow
    autocast = _is_autocast_on(x.device.type)
    shapes = {
        **dict.fromkeys(('a', 'w1', 'w2'), (c, narrow)),
        'w3': (c, c),
        **dict.fromkeys(('b', 'b1', 'b2', 'b3'), (c,)),
    }
    optional = ('b3',) if conv else ('b1', 'b2', 'b3')
    for name, t in dict(
        **conv,
        w1=w1,
        w2=w2,
        w3=w3,
        b1=b1,
        b2=b2,
        b3=b3,
        alpha=alpha,
        beta=beta,
    ).items():
        if not isinstance(t, Tensor):
            allowed = (type(None),) if name in optional else ()
            allowed = allowed if name in shapes else (int, float)
            if not isinstance(t, allowed):
                raise ValueError(f'{name} must be a tensor, got {t!r}')
            continue
        if t.dtype != x.dtype and not autocast:
            raise ValueError(
                f'{name} has dtype {t.dtype} but x has {x.dtype}; only under '
                'autocast may they differ'
            )
        shape = shapes.get(name)
        if shape and tuple(t.shape) != shape:
            raise ValueError(
                f'{name} must have shape {shape} for x with {narrow} '
                f'channels, got {tuple(t.shape)}'
            )
        if not shape and t.numel() != 1:
            raise ValueError(
                f'{name} must have one element, got shape {tuple(t.shape)}'
            )


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast, if it is on, hands x to a convolution."""
    device = x.device.type
    if x.dtype == torch.float64 or not _is_autocast_on(device):
        return x.dtype
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.get_autocast_dtype(device)
    if device == 'cpu':  # torch < 2.4
        return torch.get_autocast_cpu_dtype()
    return torch.get_autocast_gpu_dtype()


def no_autocast(x: Tensor):
    """Within it every product runs in the dtype it is given."""
    if not _is_autocast_on(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _is_autocast_on(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:  # torch < 2.4
        if device == 'cpu':
            return torch.is_autocast_cpu_enabled()
        return torch.is_autocast_enabled()
    except RuntimeError:  # a device without autocast, such as 'meta'
        return False
