r"""The Poly-NL operation: derivation, its forms, and their gradient.

All of the mathematics is in this package, and it needs only torch:

- here: what the operation is, its doors (:func:`poly_nl` for the layer on X,
  :func:`poly_nl_behind` for the layer behind a 1x1 convolution), and the
  five steps that both take; :func:`poly_nl_calling` for convolutions of which
  more is known than their weights;
- ``moments``: what touches every position, and its gradient;
- ``gate``: the C x C algebra, and its gradient;
- ``autograd``: both together, as the two steps that autograd is told of;
- ``triton``: both on a GPU, by ``kernels`` of few launches, and ``operators``,
  the same steps of these;
- ``choice``: what each form costs, and which is taken;
- ``attention``: Poly-SA, for tokens, on the door behind a convolution;
- ``precision``: what depends on torch's version or mode.

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

**Its gradient**, from :math:`\bar A' = \bar Y H^T`,
:math:`\bar b' = \sum_n \bar y_n` and :math:`\gamma = \beta g`:

.. math::
    Z &= W_3^T \bar A', \quad z = W_3^T \bar b'              && C^2c \\
    \bar\gamma &= \operatorname{rowsum}(Z \odot A) + z \odot b,
        \quad \bar g = \beta \bar\gamma,
        \quad \bar\beta = g^T \bar\gamma + b_3^T \bar b' \\
    \bar A &= \alpha \bar A' + \operatorname{diag}(\gamma) Z, \quad
        \bar b = \alpha \bar b' + \gamma \odot z \\
    \bar W_3 &= \bar A' (\operatorname{diag}(\gamma) A)^T
        + \bar b' (\gamma \odot b)^T                        && C^2c \\
    \bar\alpha &= \langle \bar A', A \rangle + \bar b'^T b, \quad
        \bar b_3 = \beta \bar b'

while that of g is the one above, with :math:`P_i` in the place of :math:`W_i`,
:math:`P_i m + p_i` in that of :math:`b_i` for the weights and the column, and
:math:`\bar p_1 = \bar g \odot (P_2 m + p_2)`; but :math:`\bar S` reaches H as
:math:`(\bar S + \bar S^T) (H - m 1^T) / N`.

**Five steps** compute all of this: moments (or projections), gate, pool, fold,
mix. The gate g is a mean over positions in every form, C numbers an image,
and all that a position knows of the others. So a layer on a part of an image
becomes that on the whole once the gates of the parts are averaged,
by their numbers of positions: what ``pool`` is for, between the gate and the
fold. In backward it is :math:`\bar g` that is averaged so; nothing else
changes. Where positions do not count alike (padding), g, S and m are weighted
means.

**What each position adds.** Before the mean is taken, position m adds

.. math::
    t_m = \tfrac1N (W_1 x_m + b_1) \odot (W_2 x_m + b_2)

to the gate, and so

.. math::
    \beta W_3 (t_m \odot x_n)

to the branch at position n: their sum over m is the branch there but for
:math:`\beta b_3`, which comes from no position. All :math:`t_m` cost
:math:`2NC^2`; seen from n along a direction d in the output, it is

.. math::
    \langle \beta W_3 (t_m \odot x_n), d \rangle =
        \langle t_m, \beta x_n \odot W_3^T d \rangle

of all m, :math:`C^2 + NC`: no matrix of N x N is needed to look at one row of
it. For d the gradient of any number by :math:`y_n`, summed over n, the vector
to the right is the gradient of that number by the gate.

**Precision.** The branch is cubic in X: in float16 the product of two
projections overflows at magnitudes of 256. For float16 and bfloat16 input,
everything between X and the output (S, g and M; the product, its mean and the
gate; and their gradients) is float32, and only the N x C products run in the
input's dtype. On a GPU, products that stand for convolutions follow the switch
of convolutions for TF32, and for float16 and bfloat16 input those of C x C
matrices run in TF32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .autograd import apply_gate, evaluated, gate_of, project
from .choice import BEHIND, ON_X, choose_for
from .gate import Conv, Params, finite_if_idle, gate_terms
from .precision import (
    HALF,
    autocast_dtype,
    float_dtype,
    is_autocast_on,
    no_autocast,
    wants_grad,
)

__all__ = [
    'FORMS',
    'Conv',
    'Params',
    'evaluated',
    'poly_nl',
    'poly_nl_behind',
    'poly_nl_calling',
    'poly_nl_terms',
    'project',
]

FORMS = ('auto', 'direct', 'gram')

Pool = Callable[[Tensor], Tensor]


def poly_nl(
    x: Tensor,
    p: Params,
    form: str = 'auto',
    pool: Pool | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Poly-NL, by the form asked for.

    .. math::
        Y = \alpha X + \beta W_3 (\Phi(W_1 X \odot W_2 X) \odot X)

    The mean :math:`\Phi` is taken over all positions of an image. Under
    autocast ``x`` is cast as a convolution would cast it.

    Args:
        x (Tensor): Features, float16, bfloat16, float32 or float64, of any
            strides. A channels-last ``x`` gives a channels-last result.
        p (Params): Weights, scalars and biases, of the dtype of ``x``, or of
            any under autocast.
        form (str): ``'direct'``, ``'gram'``, or ``'auto'``, which takes the
            one that :func:`polynl_mm.ops.choice.choose` expects to be faster.
            All compute the same function; see the package's description.
        pool (callable, optional): Given the gate (B, C) of this call, at
            least in float32, returns the one to go on with, of the same
            shape: for an image of which ``x`` is a part, the mean over all
            parts, weighted by their numbers of positions or sums of
            ``weights``. What it does must be differentiable where a gradient
            is wanted.
        weights (Tensor, optional): What each position counts in
            :math:`\Phi`, which becomes a weighted mean: of any scale and
            dtype; no gradient goes to them. Negative ones give NaN. The gate
            of an image that has no weight at all is 0.

    Shape:
        - x: (B, C, \*spatial) with one to three spatial axes.
        - p.w1, p.w2, p.w3: (C, C). p.b1, p.b2, p.b3: (C,).
        - weights: (B, \*spatial) or (1, \*spatial).
        - result: as ``x``. It owns its memory: it may be changed in place.

    Raises:
        ValueError: If a shape, a dtype or ``form`` is not as stated.
        RuntimeError: On double backward through the gram form, which is not
            implemented; use ``form='direct'`` for second derivatives.
    """
    return _poly_nl(x, None, p, form, pool, weights)


def poly_nl_behind(
    h: Tensor,
    conv: Conv,
    p: Params,
    form: str = 'auto',
    pool: Pool | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Poly-NL of X = A H + b, from H.

    Args:
        h (Tensor): Input of the convolution, as ``x`` of :func:`poly_nl`.
        conv (Conv): Weight and shift of the convolution.
        p (Params): Of the layer, w1, w2, b1 and b2 made those of ``h`` by
            :func:`project`.
        form, pool, weights: As in :func:`poly_nl`; ``'auto'`` takes the form
            that is expected to be faster of the two behind a convolution.

    Shape:
        - h: (B, c, \*spatial) with one to three spatial axes.
        - conv.a, p.w1, p.w2: (C, c). p.w3: (C, C). conv.b, biases: (C,).
        - result: (B, C, \*spatial), channels-last if ``h`` is. It owns its
          memory.

    Raises:
        ValueError: If a shape, a dtype or ``form`` is not as stated.
        RuntimeError: On double backward through the gram form, which is not
            implemented.
    """
    if not isinstance(conv, tuple):
        raise ValueError(f'conv must be a Conv, got {conv!r}')
    return _poly_nl(h, Conv(*conv), p, form, pool, weights)


def poly_nl_calling(
    x: Tensor,
    convs: Sequence[Callable[[Tensor], Tensor]],
    alpha: Tensor,
    beta: Tensor,
    pool: Pool | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Poly-NL as the paper has it, by calling the three convolutions.

    For those that are more than their weights: adapters, observers, hooks.

    Args:
        x (Tensor): As the convolutions take it.
        convs: The three convolutions, (B, C, \*spatial) to the same.
        alpha, beta (Tensor): One element.
        pool, weights: As in :func:`poly_nl`.

    Shape: (B, C, \*spatial) -> the same, in the dtype of the convolutions.
    """
    w1, w2, w3 = convs
    u, v = w1(x), w2(x)
    dtype = float_dtype(u.dtype)
    with no_autocast(x):
        uv = u.to(dtype) * v.to(dtype)
        if weights is None:
            g = uv.flatten(2).mean(2)
        else:
            weights, n = _counts(weights, u)
            uv = (uv * weights).flatten(2).sum(2)
            g = torch.where(n > 0, uv / torch.where(n > 0, n, 1), 0)
        if pool is not None:
            g = _pooled(g, pool)
    gain = g.reshape(*g.shape, *(1,) * (x.dim() - 2))
    branch = finite_if_idle(w3((x * gain).to(x.dtype)), beta)
    return (alpha * x + beta * branch).to(u.dtype)


def poly_nl_terms(
    x: Tensor, p: Params, weights: Tensor | None = None
) -> Tensor:
    r"""What each position adds to the gate: see the package's description.

    Args:
        x (Tensor): Of float32 or float64, as of :func:`poly_nl`, or of
            :func:`poly_nl_behind`.
        p (Params): As there, of the dtype of ``x``.
        weights (Tensor, optional): As there.

    Shape:
        - x: (B, c, \*spatial), c that of p.w1 (C, c).
        - result: (B, C, \*spatial). Over the positions it sums up to the gate.
    """
    n = math.prod(x.shape[2:])
    if weights is not None:
        weights, n = _counts(weights, x)
        n = torch.where(n > 0, n, 1)
    with no_autocast(x):
        return gate_terms(x, p, weights, n)


def _poly_nl(x, conv, p, form, pool, weights):
    """Both doors: second moment or projections, gate, pool, fold, mix."""
    if form not in FORMS:
        raise ValueError(f'form must be one of {FORMS}, got {form!r}')
    x, conv, p = _prepare(x, conv, p)
    n = math.prod(x.shape[2:])
    if weights is not None:
        weights, n = _counts(weights, x)
        some = n > 0
        n = torch.where(some, n, 1)
    behind = conv is not None
    if form == 'auto':
        forms, c = (BEHIND, x.shape[1]) if behind else (ON_X, None)
        backward = wants_grad(x, *(conv or ()), *p)
        form = choose_for(x, forms, c, p.w3.shape[0], backward).name
    with no_autocast(x):
        direct = form == 'direct'
        g, x = gate_of(x, p, weights, n, direct, centred=behind)
        if weights is not None:
            g = g * some
        if pool is not None:
            g = _pooled(g, pool)
        return apply_gate(g, p, conv, x, direct)


def _pooled(g: Tensor, pool: Pool) -> Tensor:
    pooled = pool(g)
    if not isinstance(pooled, Tensor) or (
        (pooled.shape, pooled.dtype) != (g.shape, g.dtype)
    ):
        raise ValueError(
            f'pool must return a gate like the one it is given, {g.dtype} of '
            f'shape {tuple(g.shape)}, got '
            + (
                f'{pooled.dtype} of shape {tuple(pooled.shape)}'
                if isinstance(pooled, Tensor)
                else f'{pooled!r}'
            )
        )
    return pooled


def _counts(weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, 1, *spatial), the largest 1, and their sums (B, 1)."""
    shapes = [(b, *x.shape[2:]) for b in (x.shape[0], 1)]
    if not isinstance(weights, Tensor) or (
        tuple(weights.shape) not in shapes or weights.is_complex()
    ):
        raise ValueError(
            f'weights must be a real tensor of shape {shapes[0]} or '
            f'{shapes[1]} for x of shape {tuple(x.shape)}, got '
            f'{weights.dtype if isinstance(weights, Tensor) else weights!r}'
            f' of shape {tuple(getattr(weights, "shape", ()))}'
        )
    dtype = float_dtype(x.dtype)
    weights = weights.detach()
    weights = weights.to(torch.promote_types(weights.dtype, dtype))
    weights = weights.unsqueeze(1)
    largest = weights.flatten(1).amax(1).reshape(-1, *(1,) * (x.dim() - 1))
    weights = weights / torch.where(largest > 0, largest, 1)
    # A square of a root, so that a negative one is NaN in every form.
    weights = weights.to(dtype).sqrt().square()
    return weights, weights.flatten(1).sum(1, keepdim=True)


def _prepare(x, conv, p):
    """Check the arguments; bring them to the dtypes to compute in.

    ``b1`` and ``b2`` are then both there or both None.
    """
    if not isinstance(p, Params):
        raise ValueError(f'p must be Params, got a {type(p).__name__}')
    _check(x, conv, p)
    x = x.to(autocast_dtype(x))
    dtype = float_dtype(x.dtype)

    def cast(t):
        return t if t is None or t.dtype == dtype else t.to(dtype)

    def scalar(v):
        if not isinstance(v, Tensor):
            return x.new_full((1,), v, dtype=dtype)
        return cast(v if v.dim() == 1 else v.reshape(1))

    w1, w2, w3, alpha, beta, b1, b2, b3 = p
    if (b1 is None) != (b2 is None):
        b1 = w1.new_zeros(len(w1)) if b1 is None else b1
        b2 = w2.new_zeros(len(w2)) if b2 is None else b2
    p = Params(
        *(cast(w1), cast(w2), cast(w3), scalar(alpha), scalar(beta)),
        *(cast(b1), cast(b2), cast(b3)),
    )
    return x, conv and Conv(cast(conv.a), cast(conv.b)), p


def _check(x: Tensor, conv: Conv | None, p: Params) -> None:
    if not 3 <= x.dim() <= 5 or 0 in x.shape[1:]:
        raise ValueError(
            'x must have shape (B, C, *spatial) with one to three spatial '
            f'axes, none of them empty, got {tuple(x.shape)}'
        )
    if x.dtype not in (*HALF, torch.float32, torch.float64):
        raise ValueError(f'x must be floating point, got {x.dtype}')
    narrow = x.shape[1]
    a, b = conv or (None, None)
    c = len(a) if isinstance(a, Tensor) and a.dim() else narrow
    wide, square, vector = (c, narrow), (c, c), (c,)
    if conv is not None:
        _check_tensor('a', a, wide, x)
        _check_tensor('b', b, vector, x)
    _check_tensor('w1', p.w1, wide, x)
    _check_tensor('w2', p.w2, wide, x)
    _check_tensor('w3', p.w3, square, x)
    for name, v in (('alpha', p.alpha), ('beta', p.beta)):
        if not isinstance(v, (int, float)):
            _check_tensor(name, v, None, x)
    for name, v in (('b1', p.b1), ('b2', p.b2), ('b3', p.b3)):
        if v is not None or (conv is not None and name != 'b3'):
            _check_tensor(name, v, vector, x)


def _check_tensor(
    name: str, t: Tensor, shape: tuple | None, x: Tensor
) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f'{name} must be a tensor, got {t!r}')
    if t.dtype != x.dtype and not is_autocast_on(x.device.type):
        raise ValueError(
            f'{name} has dtype {t.dtype} but x has {x.dtype}; only under '
            'autocast may they differ'
        )
    if shape and t.shape != shape:
        raise ValueError(
            f'{name} must have shape {shape} for x with {x.shape[1]} '
            f'channels, got {tuple(t.shape)}'
        )
    if not shape and t.numel() != 1:
        raise ValueError(
            f'{name} must have one element, got shape {tuple(t.shape)}'
        )
