r"""Poly-SA: self-attention of linear complexity, on the core of Poly-NL.

Of F. Babiloni et al., "Linear Complexity Self-Attention with 3rd Order
Polynomials", TPAMI 45(11), 2023, doi 10.1109/TPAMI.2022.3231971: Poly-NL made
a drop-in replacement of the attention of vision transformers. Only the
abstract of that paper could be read here ("accessing the same data pattern",
"a complexity equivalent to a standard linear layer"), no code of its authors
was found, and two accounts by others differ. Both are here:

Tokens are rows, as in transformers: :math:`X \in R^{N \times C}` of one image,
H heads of :math:`d = C / H` channels each, and

.. math::
    Q = X W_q + b_q, \quad K = X W_k + b_k, \quad V = X W_v + b_v

**mean**: the tokens are pooled by their mean, as in Poly-NL,

.. math::
    g &= \tfrac1N \textstyle\sum_n k_n \odot v_n && \text{C numbers an image}\\
    y_n &= W_o (\nu(g) \odot q_n) + b_o

as QT-ViT (NeurIPS 2024) accounts for it: the linear attention that has a plain
mean for its kernel. Any N.

**learnt**: each head pools by a learnt vector over the positions, and spreads
what it pooled by another, :math:`p_2, p_1 \in R^{H \times N}`,

.. math::
    g_h &= \textstyle\sum_n p_{2,hn}\, k_{nh} \odot v_{nh} \\
    y_n &= W_o \operatorname{concat}_h
        (p_{1,hn}\, \nu(g_h) \odot q_{nh}) + b_o

as T. C. Nauen et al. wrote it from the paper's text for a comparison of
transformers ("Which Transformer to Favor", WACV 2025, arXiv 2308.09372). One
N only.

:math:`\nu` is a LayerNorm over the d numbers of each head, its affine map
shared by all heads and its epsilon 1e-6, as Nauen et al. have it, or the
identity, as QT-ViT does. Their dropout of the gate is left out. Which of it is
the paper's own, and its initial values, is not known.

Without softmax and without an N x N matrix: beside the four projections,
O(N C) of time and memory. There are heads only in :math:`\nu` and in the
vectors: by the mean and without a norm, the result is the same for any H.

**By the core.** By the mean, :math:`Y` is Poly-NL behind a 1x1 convolution,
:func:`polynl_mm.ops.poly_nl_behind`, with :math:`W_q` the convolution,
:math:`W_k, W_v, W_o` in the places of :math:`P_1, P_2, W_3`, alpha = 0 and
beta = 1. So it has a gram form as well, :math:`2NC^2 + 2C^3` multiply-adds in
place of :math:`4NC^2`, and the pool: :math:`\nu` comes after it, between gate
and fold, so that an image in parts stays exact. The learnt vectors have signs
and differ from head to head: they would need H second moments, and have the
direct form only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import (
    FORMS,
    Pool,
    _check_tensor,
    _counts,
    _pooled,
    poly_nl_behind,
)
from .choice import BEHIND, TOKENS, choose_for
from .gate import Conv, Params
from .precision import (
    HALF,
    float_dtype,
    has_kernels,
    no_autocast,
    transposed,
    wants_grad,
)

__all__ = ['HeadNorm', 'SAParams', 'poly_sa', 'poly_sa_calling']


class SAParams(NamedTuple):
    """Weights and biases of the four projections, as ``nn.Linear`` has them.

    Shape:
        - wq, wk, wv, wo: (C, C), indexed (out, in).
        - bq, bk, bv, bo: (C,) or None.
    """

    wq: Tensor
    wk: Tensor
    wv: Tensor
    wo: Tensor
    bq: Tensor | None = None
    bk: Tensor | None = None
    bv: Tensor | None = None
    bo: Tensor | None = None


class HeadNorm(NamedTuple):
    """A LayerNorm over the channels of each head; weight and bias (d,)."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-6


def poly_sa(
    x: Tensor,
    p: SAParams,
    num_heads: int,
    *,
    form: str = 'auto',
    norm: HeadNorm | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    pool: Pool | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Poly-SA of tokens, by the form asked for.

    Args:
        x (Tensor): Tokens, float16, bfloat16, float32 or float64, of any
            strides. Under autocast it is cast as a linear layer would be.
        p (SAParams): Of the dtype of ``x``, or of any under autocast.
        num_heads (int): A divisor of C.
        form (str): ``'direct'``, ``'gram'``, or ``'auto'``, which takes the
            one that is expected to be faster. All compute the same function.
        norm (HeadNorm, optional): Of the gate, after ``pool``.
        positions: The learnt vectors p1 and p2, (num_heads, N) each; by
            default tokens are pooled by their mean.
        pool (callable, optional): As in :func:`polynl_mm.ops.poly_nl`.
        weights (Tensor, optional): What each token counts in the gate, 0 for
            one that is padding; as in :func:`polynl_mm.ops.poly_nl`. With
            ``positions`` p2 is multiplied by them, the largest scaled to 1.

    Shape:
        - x: (B, N, C).
        - weights: (B, N) or (1, N).
        - result: (B, N, C), contiguous if ``x`` is.

    Raises:
        ValueError: If a shape, a dtype or ``form`` is not as stated, and for
            ``form='gram'`` with ``positions``.
        RuntimeError: On double backward through the gram form, which is not
            implemented.
    """
    _check(x, p, num_heads, form, norm, positions)
    features = transposed(x)
    if form == 'auto' and positions is None:
        forms = BEHIND if has_kernels(x) else TOKENS
        channels, backward = x.shape[2], wants_grad(x, *p)
        form = choose_for(features, forms, channels, channels, backward).name
    if positions is None and (form == 'gram' or has_kernels(x)):
        bq = p.wq.new_zeros(len(p.wq)) if p.bq is None else p.bq
        bk = p.wk.new_zeros(len(p.wk)) if p.bk is None else p.bk
        bv = p.wv.new_zeros(len(p.wv)) if p.bv is None else p.bv
        core = Params(p.wk, p.wv, p.wo, 0.0, 1.0, bk, bv, p.bo)
        after = _after(pool, norm, num_heads)
        conv = Conv(p.wq, bq)
        y = poly_nl_behind(features, conv, core, form, after, weights)
        return transposed(y)

    def projected(x):
        pairs = zip((p.wq, p.wk, p.wv), (p.bq, p.bk, p.bv))
        return [_linear(x, w, b) for w, b in pairs]

    def out(q, gain):
        if q.dtype not in HALF:
            return _linear(q * gain, p.wo, p.bo)
        # q * gain may exceed float16 where the result does not: projected
        # relative to the largest gain, which cancels out.
        scale = gain.detach().abs().amax((1, 2), keepdim=True)
        scale = scale.clamp_min(torch.finfo(gain.dtype).tiny)
        y = _linear((q * (gain / scale)).to(q.dtype), p.wo) * scale
        return (y if p.bo is None else y + p.bo).to(q.dtype)

    return _directly(
        x, projected, out, num_heads, norm, positions, pool, weights
    )


def poly_sa_calling(
    x: Tensor,
    qkv: Callable[[Tensor], Tensor],
    proj: Callable[[Tensor], Tensor],
    num_heads: int,
    *,
    norm: HeadNorm | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    pool: Pool | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Poly-SA by calling its projections, which are more than their weights.

    Args:
        x (Tensor): (B, N, C), as ``qkv`` takes it.
        qkv: (B, N, C) -> (B, N, 3C): queries, keys and values.
        proj: (B, N, C) -> the same.
        num_heads, norm, positions, pool, weights: As in :func:`poly_sa`.
    """

    def out(q, gain):
        return proj((q * gain).to(q.dtype))

    return _directly(
        x,
        lambda x: qkv(x).chunk(3, -1),
        out,
        *(num_heads, norm, positions, pool, weights),
    )


def _directly(x, project, out, heads, norm, positions, pool, weights):
    """As the formula is written: projections, gate, gain of the queries."""
    q, k, v = project(x)
    dtype, n = float_dtype(q.dtype), x.shape[1]
    with no_autocast(x):
        kv = k.to(dtype) * v.to(dtype)
        if weights is not None:
            weights, total = _counts(weights, transposed(kv))
            n = torch.where(total > 0, total, 1)
            kv = kv * transposed(weights)
        if positions is None:
            g = kv.sum(1) / n
        else:  # of every channel of a head alike
            p1, p2 = (
                transposed(t.to(dtype)).contiguous().unsqueeze(2)
                for t in positions
            )
            g = (kv.unflatten(2, (heads, -1)) * p2).sum(1).flatten(1)
        gain = _after(pool, norm, heads)(g).unsqueeze(1)
        if positions is not None:
            gain = (gain.unflatten(2, (heads, -1)) * p1).flatten(2)
    return out(q, gain)


def _after(pool: Pool | None, norm: HeadNorm | None, heads: int) -> Pool:
    """What becomes of the gate (B, C): pooled, then normalised."""

    def after(g):
        if pool is not None:
            g = _pooled(g, pool)
        if norm is None:
            return g
        weight, bias, eps = norm
        weight, bias = weight.to(g.dtype), bias.to(g.dtype)
        # Not unflatten, behind which the older exporter to ONNX takes the
        # size of the batch for a constant.
        g = g.reshape(-1, heads, len(weight))
        return F.layer_norm(g, weight.shape, weight, bias, eps).flatten(1)

    return after


def _linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return F.linear(x, w.to(x.dtype), b if b is None else b.to(x.dtype))


def _check(x, p, heads, form, norm, positions) -> None:
    if not isinstance(x, Tensor) or x.dim() != 3 or 0 in x.shape[1:]:
        raise ValueError(
            'x must have shape (B, N, C), with tokens and channels, got '
            f'{tuple(x.shape) if isinstance(x, Tensor) else x!r}'
        )
    if x.dtype not in (*HALF, torch.float32, torch.float64):
        raise ValueError(f'x must be floating point, got {x.dtype}')
    if not isinstance(p, SAParams):
        raise ValueError(f'p must be SAParams, got a {type(p).__name__}')
    if form not in FORMS:
        raise ValueError(f'form must be one of {FORMS}, got {form!r}')
    n, c = x.shape[1:]
    if not isinstance(heads, int) or heads < 1 or c % heads:
        raise ValueError(
            f'num_heads must be a divisor of the {c} channels of x, got '
            f'{heads!r}'
        )
    features = transposed(x)
    for name, t in p._asdict().items():
        if name[0] == 'w':
            _check_tensor(name, t, (c, c), features)
        elif t is not None:
            _check_tensor(name, t, (c,), features)
    for name in ('weight', 'bias') if norm is not None else ():
        _check_tensor(
            f'{name} of norm', getattr(norm, name), (c // heads,), features
        )
    if positions is None:
        return
    if form == 'gram':
        raise ValueError(
            "form='gram' is for the mean of the tokens: with learnt vectors "
            "(positions) there is form='direct' only"
        )
    for name, t in zip(('p1', 'p2'), positions):
        _check_tensor(f'{name} of positions', t, (heads, n), features)
