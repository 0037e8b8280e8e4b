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
from functools import lru_cache, wraps
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .moments import empty_like
from .precision import (
    BMM_WIDENS,
    HALF,
    float_dtype,
    matmul,
    matmul_into,
    precision_for,
)

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

# ------------------------------------------------------------------ kernels
#
# An image is b; i, j and k are channels, n is a position. W1 and W2 are one
# tensor to a kernel, pair[0] and pair[1]: the distance of their addresses is
# a stride. ACC is the dtype of what is C x C.


@triton.jit
def product_kernel(
    a,
    b,
    y,
    add,
    column,
    u,
    v,
    rows,
    columns,
    depth,
    part,
    terms,
    a_image,
    a_pair,
    a_term,
    a_i,
    a_k,
    b_image,
    b_pair,
    b_term,
    b_k,
    b_j,
    y_image,
    y_pair,
    y_i,
    y_j,
    column_image,
    u_pair,
    PRECISION: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ACC: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
):
    """y = sum of terms a b, + add, + column[i], + u[pair, i] v[j].

    For every image and pair. With ``part``, a pair is a part of a long sum
    over k, of so many steps. SYMMETRIC: the upper triangle is the lower's.
    """
    tiles = tl.cdiv(rows, BI)
    ti = tl.program_id(0) % tiles
    tj = tl.program_id(0) // tiles
    if SYMMETRIC:
        if tj > ti:
            return
    image = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(2).to(tl.int64)
    # Where the tile begins may be far; within it 32 bits reach, and they take
    # half the registers.
    first_i = (ti * BI).to(tl.int64)
    first_j = (tj * BJ).to(tl.int64)
    i = tl.arange(0, BI)
    j = tl.arange(0, BJ)
    k = tl.arange(0, BK)
    is_row = i < rows - ti * BI
    is_column = j < columns - tj * BJ
    in_a = i[:, None] * a_i + k[None, :] * a_k
    in_b = k[:, None] * b_k + j[None, :] * b_j
    limit = depth
    if part > 0:
        limit = tl.minimum(part, depth - tl.program_id(2) * part)
    a += image * a_image + pair * a_pair + first_i * a_i
    b += image * b_image + pair * b_pair + first_j * b_j
    total = tl.zeros((BI, BJ), ACC)
    # One loop, that loads run ahead across terms.
    steps = tl.cdiv(limit, BK)
    for step in range(0, terms * steps):
        term = (step // steps).to(tl.int64)
        start = (step % steps) * BK
        there = k < limit - start
        at_a = a + term * a_term + start.to(tl.int64) * a_k
        at_b = b + term * b_term + start.to(tl.int64) * b_k
        left = tl.load(at_a + in_a, is_row[:, None] & there[None, :], 0.0)
        right = tl.load(at_b + in_b, there[:, None] & is_column[None, :], 0.0)
        total = tl.dot(
            left, right, total, input_precision=PRECISION, out_dtype=ACC
        )
    if column is not None:
        at = column + image * column_image + first_i + i
        total += tl.load(at, is_row, 0.0)[:, None]
    if u is not None:
        along_i = tl.load(u + pair * u_pair + first_i + i, is_row, 0.0)
        along_j = tl.load(v + first_j + j, is_column, 0.0)
        total += along_i[:, None] * along_j[None, :]
    inside = is_row[:, None] & is_column[None, :]
    at = image * y_image + pair * y_pair
    here = at + first_i * y_i + first_j * y_j
    in_y = i[:, None] * y_i + j[None, :] * y_j
    if add is not None:
        total += tl.load(add + here + in_y, inside, 0.0).to(ACC)
    total = total.to(y.dtype.element_ty)
    tl.store(y + here + in_y, total, inside)
    if SYMMETRIC:
        if ti > tj:
            there = at + first_j * y_i + first_i * y_j
            in_y = j[:, None] * y_i + i[None, :] * y_j
            tl.store(y + there + in_y, tl.trans(total), tl.trans(inside))


@triton.jit
def gate_kernel(
    t,
    w,
    m,
    b1,
    b2,
    count,
    g,
    channels,
    narrow,
    n,
    w_pair,
    t_image,
    CENTRED: tl.constexpr,
    ACC: tl.constexpr,
    BJ: tl.constexpr,
):
    """g[b, i] = sum_j t[b, i, j] w2[i, j] / n, and what biases add."""
    i = tl.program_id(0)
    image = tl.program_id(1)
    j = tl.arange(0, BJ)
    inside = j < narrow
    row = i.to(tl.int64) * narrow + j
    w2 = tl.load(w + w_pair + row, inside, 0.0)
    t1 = tl.load(t + image.to(tl.int64) * t_image + row, inside, 0.0)
    if count is not None:
        n = tl.load(count + image)
    gate = tl.sum(t1 * w2, 0) / n
    if m is not None:
        mean = tl.load(m + image * narrow + j, inside, 0.0)
        c1 = tl.load(b1 + i)
        c2 = tl.load(b2 + i)
        u = tl.sum(tl.load(w + row, inside, 0.0) * mean, 0)
        v = tl.sum(w2 * mean, 0) + c2
        if CENTRED:
            gate += (u + c1) * v
        else:
            gate += c1 * v + c2 * u
    tl.store(g + image * channels + i, gate.to(ACC))


@triton.jit
def gate_of_pair_kernel(
    uv,
    weights,
    weights_image,
    count,
    g,
    sums,
    channels,
    positions,
    n,
    ACC: tl.constexpr,
    BN: tl.constexpr,
):
    """g[b, i] = sum_n u[b, i, n] v[b, i, n] / n, and the sums of u and v."""
    i = tl.program_id(0)
    image = tl.program_id(1)
    first = (image * 2 * channels + i).to(tl.int64)
    u = uv + first * positions
    v = uv + (first + channels) * positions
    gate = tl.zeros((BN,), ACC)
    sum_u = tl.zeros((BN,), ACC)
    sum_v = tl.zeros((BN,), ACC)
    for start in range(0, positions, BN):
        at = start + tl.arange(0, BN)
        inside = at < positions
        x = tl.load(u + at, inside, 0.0).to(ACC)
        y = tl.load(v + at, inside, 0.0).to(ACC)
        if weights is not None:
            weight = tl.load(weights + image * weights_image + at, inside, 0.0)
            gate += x * y * weight
            x *= weight
            y *= weight
        else:
            gate += x * y
        sum_u += x
        sum_v += y
    if count is not None:
        n = tl.load(count + image)
    tl.store(g + image * channels + i, tl.sum(gate, 0) / n)
    if sums is not None:
        tl.store(sums + image * 2 * channels + i, tl.sum(sum_u, 0))
        tl.store(sums + image * 2 * channels + channels + i, tl.sum(sum_v, 0))


@triton.jit
def gate_adjoint_kernel(
    dg,
    t,
    w,
    m,
    sums,
    b1,
    b2,
    count,
    v,
    dw,
    db,
    shift,
    images,
    channels,
    narrow,
    n,
    w_pair,
    CENTRED: tl.constexpr,
    ACC: tl.constexpr,
    BJ: tl.constexpr,
):
    """V, and the gradients of the weights, the biases and (by W) the mean."""
    i = tl.program_id(0)
    j = tl.arange(0, BJ)
    inside = j < narrow
    row = i.to(tl.int64) * narrow + j
    second = (i + channels).to(tl.int64) * narrow + j
    w1 = tl.load(w + row, inside, 0.0)
    w2 = tl.load(w + w_pair + row, inside, 0.0)
    dw1 = tl.zeros((BJ,), ACC)
    dw2 = tl.zeros((BJ,), ACC)
    db1 = tl.zeros((1,), ACC)
    db2 = tl.zeros((1,), ACC)
    for image in range(images):
        gate = tl.load(dg + image * channels + i)
        if count is not None:
            r = gate / tl.load(count + image)
        else:
            r = gate / n
        if v is not None:
            dtype = v.dtype.element_ty
            tl.store(v + row, (r * w2).to(dtype), inside)
            tl.store(v + second, (r * w1).to(dtype), inside)
            v += 2 * channels * narrow
        if dw is not None:
            dw1 += r * tl.load(t + second, inside, 0.0)
            dw2 += r * tl.load(t + row, inside, 0.0)
            t += 2 * channels * narrow
        if sums is not None:
            db1 += r * tl.load(sums + image * 2 * channels + channels + i)
            db2 += r * tl.load(sums + image * 2 * channels + i)
        if m is not None:
            mean = tl.load(m + image * narrow + j, inside, 0.0)
            c1 = tl.load(b1 + i)
            c2 = tl.load(b2 + i)
            du = gate * (tl.sum(w2 * mean, 0) + c2)
            dv = gate * (tl.sum(w1 * mean, 0) + c1)
            db1 += du
            db2 += dv
            if not CENTRED:
                du = gate * c2
                dv = gate * c1
            dw1 += du * mean
            dw2 += dv * mean
            tl.store(shift + image * 2 * channels + i, du)
            tl.store(shift + image * 2 * channels + channels + i, dv)
    if dw is not None:
        tl.store(dw + row, dw1, inside)
        tl.store(dw + second, dw2, inside)
    if db is not None:
        one = tl.arange(0, 1)
        tl.store(db + i + one, db1)
        tl.store(db + channels + i + one, db2)


@triton.jit
def columns_kernel(
    w,
    q,
    e,
    m,
    count,
    y,
    terms,
    rows,
    columns,
    n,
    w_pair,
    ACC: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
):
    """y[b] = sum of terms w^T q[b, term] / n, - e[b]^T m[b]."""
    image = tl.program_id(1)
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    total = tl.zeros((BJ,), ACC)
    for term in range(terms):
        at_w = w + term * w_pair
        at_q = q + (image * terms + term) * rows
        for start in range(0, rows, BI):
            i = start + tl.arange(0, BI)
            inside = (i < rows)[:, None] & (j < columns)[None, :]
            at = at_w + i.to(tl.int64)[:, None] * columns + j[None, :]
            one = tl.load(at_q + i, i < rows, 0.0)
            total += tl.sum(tl.load(at, inside, 0.0) * one[:, None], 0)
    if count is not None:
        n = tl.load(count + image)
    total /= n
    if e is not None:
        at_e = e + image.to(tl.int64) * columns * columns
        for start in range(0, columns, BI):
            i = start + tl.arange(0, BI)
            inside = (i < columns)[:, None] & (j < columns)[None, :]
            at = at_e + i.to(tl.int64)[:, None] * columns + j[None, :]
            one = tl.load(m + image * columns + i, i < columns, 0.0)
            total -= tl.sum(tl.load(at, inside, 0.0).to(ACC) * one[:, None], 0)
    tl.store(y + image * columns + j, total, j < columns)


@triton.jit
def rows_kernel(
    w,
    x,
    y,
    b1,
    b2,
    rows,
    columns,
    w_pair,
    ACC: tl.constexpr,
    BJ: tl.constexpr,
):
    """y[pair, i] = sum_j w[pair, i, j] x[j] + b[pair, i]."""
    i = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    at = w + pair * w_pair + i.to(tl.int64) * columns
    total = tl.zeros((BJ,), ACC)
    for start in range(0, columns, BJ):
        j = start + tl.arange(0, BJ)
        one = tl.load(at + j, j < columns, 0.0)
        total += one * tl.load(x + j, j < columns, 0.0)
    found = tl.sum(total, 0)
    if b1 is not None:
        if pair == 0:
            found += tl.load(b1 + i)
    if b2 is not None:
        if pair == 1:
            found += tl.load(b2 + i)
    tl.store(y + pair * rows + i, found)


@triton.jit
def centre_kernel(
    x,
    m,
    z,
    channels,
    positions,
    x_image,
    x_i,
    x_n,
    z_image,
    z_i,
    z_n,
    ACC: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """m[b, i], the mean of x[b, i] over positions, and z = x - m."""
    image = tl.program_id(1)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    n = tl.arange(0, BN).to(tl.int64)
    total = tl.zeros((BI, BN), ACC)
    at = x + image.to(tl.int64) * x_image + i.to(tl.int64)[:, None] * x_i
    for start in range(0, positions, BN):
        inside = (i < channels)[:, None] & (start + n < positions)[None, :]
        one = tl.load(at + (start + n)[None, :] * x_n, inside, 0.0)
        total += one.to(ACC)
    mean = tl.sum(total, 1) / positions
    tl.store(m + image * channels + i, mean, i < channels)
    to = z + image.to(tl.int64) * z_image + i.to(tl.int64)[:, None] * z_i
    for start in range(0, positions, BN):
        inside = (i < channels)[:, None] & (start + n < positions)[None, :]
        one = tl.load(at + (start + n)[None, :] * x_n, inside, 0.0)
        one = (one.to(ACC) - mean[:, None]).to(z.dtype.element_ty)
        tl.store(to + (start + n)[None, :] * z_n, one, inside)


@triton.jit
def fold_kernel(
    g,
    w3,
    alpha,
    beta,
    b3,
    b,
    matrix,
    column,
    channels,
    ACC: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
):
    """M[b] = alpha I + beta W3 diag(g[b]), and M[b] b + beta b3."""
    image = tl.program_id(1)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    alpha = tl.load(alpha)
    beta = tl.load(beta)
    total = tl.zeros((BI,), ACC)
    rows = i.to(tl.int64)[:, None] * channels
    to = matrix + image.to(tl.int64) * channels * channels + rows
    for start in range(0, channels, BJ):
        j = start + tl.arange(0, BJ)
        inside = (i < channels)[:, None] & (j < channels)[None, :]
        gain = beta * tl.load(g + image * channels + j, j < channels, 0.0)
        one = tl.load(w3 + rows + j[None, :], inside, 0.0) * gain[None, :]
        one += tl.where(i[:, None] == j[None, :], alpha, 0.0)
        tl.store(to + j[None, :], one.to(matrix.dtype.element_ty), inside)
        if b is not None:
            along = tl.load(b + j, j < channels, 0.0)
            total += tl.sum(one * along[None, :], 1)
    if column is not None:
        if b3 is not None:
            total += beta * tl.load(b3 + i, i < channels, 0.0)
        tl.store(column + image * channels + i, total, i < channels)


@triton.jit
def fold_adjoint_kernel(
    dmatrix,
    dcolumn,
    g,
    w3,
    alpha,
    beta,
    b,
    dw3,
    matrix,
    of_gain,
    of_b,
    of_scalars,
    images,
    channels,
    ACC: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
):
    """dW3, and what a tile adds to the other gradients of fold_kernel.

    The gradient of M is dmatrix + dcolumn b^T. M itself is written, too,
    where it is wanted.
    """
    ti = tl.program_id(0)
    tj = tl.program_id(1)
    i = ti * BI + tl.arange(0, BI)
    j = tj * BJ + tl.arange(0, BJ)
    inside = (i < channels)[:, None] & (j < channels)[None, :]
    tile = i.to(tl.int64)[:, None] * channels + j[None, :]
    w = tl.load(w3 + tile, inside, 0.0)
    scale = tl.load(beta)
    diagonal = inside & (i[:, None] == j[None, :])
    total = tl.zeros((BI, BJ), ACC)
    trace = tl.zeros((BI, BJ), ACC)
    found_b = tl.zeros((BJ,), ACC)
    for image in range(images):
        d = tl.load(dmatrix + tile, inside, 0.0)
        dmatrix += channels * channels
        gain = tl.load(g + image * channels + j, j < channels, 0.0)
        if b is not None:
            dc = tl.load(dcolumn + image * channels + i, i < channels, 0.0)
            d += dc[:, None] * tl.load(b + j, j < channels, 0.0)[None, :]
            one = w * (scale * gain)[None, :]
            one += tl.where(diagonal, tl.load(alpha), 0.0)
            found_b += tl.sum(one * dc[:, None], 0)
            tl.store(matrix + tile, one, inside)
            matrix += channels * channels
        trace += tl.where(diagonal, d, 0.0)
        at = (ti * images + image) * channels + j
        tl.store(of_gain + at, tl.sum(d * w, 0), j < channels)
        total += d * gain[None, :]
    tl.store(dw3 + tile, scale * total, inside)
    if b is not None:
        tl.store(of_b + ti * channels + j, found_b, j < channels)
    at = of_scalars + ti * tl.num_programs(1) + tj
    tl.store(at, tl.sum(tl.sum(trace, 1), 0))
    at += tl.num_programs(0) * tl.num_programs(1)
    tl.store(at, tl.sum(tl.sum(total * w, 1), 0))


@triton.jit
def fold_sums_kernel(
    of_gain,
    of_b,
    of_scalars,
    dcolumn,
    beta,
    b3,
    dg,
    db,
    db3,
    dscalars,
    tiles_i,
    tiles,
    images,
    channels,
    ACC: tl.constexpr,
    BJ: tl.constexpr,
):
    """Sums over the tiles of fold_adjoint_kernel."""
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    inside = j < channels
    scale = tl.load(beta)
    for image in range(images):
        total = tl.zeros((BJ,), ACC)
        for ti in range(tiles_i):
            at = (ti * images + image) * channels + j
            total += tl.load(of_gain + at, inside, 0.0)
        tl.store(dg + image * channels + j, scale * total, inside)
    if of_b is not None:
        total = tl.zeros((BJ,), ACC)
        for ti in range(tiles_i):
            total += tl.load(of_b + ti * channels + j, inside, 0.0)
        tl.store(db + j, total, inside)
    if b3 is not None:
        total = tl.zeros((BJ,), ACC)
        for image in range(images):
            total += tl.load(dcolumn + image * channels + j, inside, 0.0)
        tl.store(db3 + j, scale * total, inside)
    if tl.program_id(0) == 0:
        alphas = tl.zeros((BJ,), ACC)
        betas = tl.zeros((BJ,), ACC)
        for start in range(0, tiles, BJ):
            at = start + tl.arange(0, BJ)
            alphas += tl.load(of_scalars + at, at < tiles, 0.0)
            betas += tl.load(of_scalars + tiles + at, at < tiles, 0.0)
        if b3 is not None:
            for start in range(0, channels, BJ):
                at = start + tl.arange(0, BJ)
                bias = tl.load(b3 + at, at < channels, 0.0)
                for image in range(images):
                    dc = dcolumn + image * channels + at
                    betas += bias * tl.load(dc, at < channels, 0.0)
        tl.store(dscalars, tl.sum(alphas, 0))
        tl.store(dscalars + 1, tl.sum(betas, 0))


@triton.jit
def evaluated_kernel(
    w,
    bias,
    mean,
    variance,
    weight,
    offset,
    a,
    b,
    columns,
    eps,
    ACC: tl.constexpr,
    BJ: tl.constexpr,
):
    """A convolution and an evaluated BatchNorm as one: a and b."""
    i = tl.program_id(0)
    scale = 1 / tl.sqrt(tl.load(variance + i).to(ACC) + eps)
    if weight is not None:
        scale *= tl.load(weight + i)
    shift = -tl.load(mean + i).to(ACC)
    if bias is not None:
        shift += tl.load(bias + i)
    shift *= scale
    if offset is not None:
        shift += tl.load(offset + i)
    tl.store(b + i, shift)
    row = i.to(tl.int64) * columns
    for start in range(0, columns, BJ):
        j = start + tl.arange(0, BJ)
        one = tl.load(w + row + j, j < columns, 0.0)
        tl.store(a + row + j, one * scale, j < columns)


@triton.jit
def evaluated_adjoint_kernel(
    da,
    db,
    w,
    bias,
    mean,
    variance,
    weight,
    dw,
    dbias,
    dweight,
    columns,
    eps,
    ACC: tl.constexpr,
    BJ: tl.constexpr,
):
    """Gradients of evaluated_kernel; that of the offset is db."""
    i = tl.program_id(0)
    spread = 1 / tl.sqrt(tl.load(variance + i).to(ACC) + eps)
    scale = spread
    if weight is not None:
        scale *= tl.load(weight + i)
    row = i.to(tl.int64) * columns
    total = tl.zeros((BJ,), ACC)
    for start in range(0, columns, BJ):
        j = start + tl.arange(0, BJ)
        one = tl.load(da + row + j, j < columns, 0.0)
        tl.store(dw + row + j, one * scale, j < columns)
        total += one * tl.load(w + row + j, j < columns, 0.0)
    found = tl.load(db + i)
    if dbias is not None:
        tl.store(dbias + i, found * scale)
    if dweight is not None:
        shift = -tl.load(mean + i).to(ACC)
        if bias is not None:
            shift += tl.load(bias + i)
        tl.store(dweight + i, (tl.sum(total, 0) + found * shift) * spread)


# --------------------------------------------------------------- launching


def launch(kernel, grid: tuple, *args, **meta) -> None:
    """Every launch of a kernel passes here; none where there is no image."""
    if 0 not in grid:
        kernel[grid](*args, **meta)


def _acc(t: Tensor):
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def _block(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), most)


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != 'cuda':
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on_device(f):
    """Launch on the device of the first tensor, whichever is current."""

    @wraps(f)
    def on_device(x, *args):
        with torch.cuda.device_of(x) if x.is_cuda else nullcontext():
            return f(x, *args)

    return on_device


# ---------------------------------------------------------------- products


class _Matrices(NamedTuple):
    """Matrices in memory: for each image, pair and term, by strides."""

    data: Tensor
    rows: int
    columns: int
    i: int
    j: int
    image: int = 0
    pair: int = 0
    term: int = 0

    @property
    def mT(self) -> _Matrices:  # noqa: N802, as torch has it
        return self._replace(
            rows=self.columns, columns=self.rows, i=self.j, j=self.i
        )


def _matrices(t: Tensor, *axes: str) -> _Matrices:
    """Matrices of t; what its axes before the last two number."""
    steps = dict(zip(axes, t.stride()))
    return _Matrices(t, *t.shape[-2:], *t.stride()[-2:], **steps)


def _distance(t1: Tensor, t2: Tensor) -> int:
    """How far apart two contiguous tensors of one dtype lie, in elements."""
    return (t2.data_ptr() - t1.data_ptr()) // t1.element_size()


def _two(w1: Tensor, w2: Tensor, axis: str) -> _Matrices:
    """Two contiguous matrices of one shape, numbered by ``axis``."""
    return _matrices(w1)._replace(**{axis: _distance(w1, w2)})


def _multiply(
    y: _Matrices,
    a: _Matrices,
    b: _Matrices,
    precision: str,
    images: int = 1,
    pairs: int = 1,
    terms: int = 1,
    part: int = 0,
    add: Tensor | None = None,
    column: Tensor | None = None,
    outer: tuple[Tensor, int, Tensor] | None = None,
    symmetric: bool = False,
) -> Tensor:
    """product_kernel, its result in y."""
    rows, columns = y.rows, y.columns
    large = -(-rows // 128) * -(-columns // 128) * images * pairs
    tile = 128 if large >= _processors(y.data.device) else 64
    acc = tl.float64 if a.data.dtype == torch.float64 else tl.float32
    u, u_pair, v = outer or (None, 0, None)
    tiles = triton.cdiv(rows, tile) * triton.cdiv(columns, tile)
    launch(
        product_kernel,
        (tiles, images, pairs),
        *(a.data, b.data, y.data, add, column, u, v),
        *(rows, columns, a.columns, part, terms),
        *(a.image, a.pair, a.term, a.i, a.j),
        *(b.image, b.pair, b.term, b.i, b.j),
        *(y.image, y.pair, y.i, y.j),
        0 if column is None or column.dim() == 1 else column.stride(0),
        u_pair,
        PRECISION=precision,
        SYMMETRIC=symmetric,
        ACC=acc,
        BI=tile,
        BJ=tile,
        BK=64 if a.data.dtype in HALF else 32,
        num_warps=8 if tile == 128 else 4,
        num_stages=3,
    )
    return y.data


def _by_torch(x: Tensor) -> bool:
    """Whether cuBLAS, asked by torch, runs a product with x as it should."""
    return x.is_cuda and precision_for(x).products_by_torch


def _contract(p: Tensor, q: Tensor, symmetric: bool = False) -> Tensor:
    """P Q^T of (B, C, N) and (B, c, N): (B, C, c), at least float32."""
    precision = precision_for(p).products
    if _by_torch(p) and (p.dtype not in HALF or BMM_WIDENS):
        return matmul(p, q.mT)
    images, rows, depth = p.shape
    columns = q.shape[1]
    tiles = triton.cdiv(rows, 128) * triton.cdiv(columns, 128) * images
    # A sum is shared out where the tiles leave processors idle; a part is at
    # least 512 long.
    parts = min(2 * _processors(p.device) // max(tiles, 1), depth // 512)
    dtype = float_dtype(p.dtype)
    a, b = _matrices(p, 'image'), _matrices(q, 'image').mT
    if parts < 2:
        y = p.new_empty((images, rows, columns), dtype=dtype)
        return _multiply(
            *(_matrices(y, 'image'), a, b, precision),
            images=images,
            symmetric=symmetric,
        )
    part = triton.cdiv(triton.cdiv(depth, parts), 64) * 64
    parts = triton.cdiv(depth, part)
    y = p.new_empty((parts, images, rows, columns), dtype=dtype)
    _multiply(
        _matrices(y, 'pair', 'image'),
        a._replace(pair=part * a.j),
        b._replace(pair=part * b.i),
        precision,
        images=images,
        pairs=parts,
        part=part,
        symmetric=symmetric,
    )
    return y.sum(0)


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
    if _by_torch(xf) and column is None:
        if yf.is_contiguous():
            matmul_into(yf, matrix, xf, add)
        else:
            matmul_into(yf.mT, xf.mT, matrix.mT, add)
    else:
        _multiply(
            _matrices(yf, 'image'),
            _matrices(matrix, 'image'),
            _matrices(xf, 'image'),
            precision_for(xf).products,
            images=len(xf),
            column=column,
            add=yf if add else None,
        )
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
        _apply(stack.expand(images, -1, -1), xf, uv, column)
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
    s = _contract(z, z, symmetric=True)
    pairs = 2 if backward else 1
    t = _multiply(
        _matrices(
            w1.new_empty(images, pairs, channels, narrow), 'image', 'pair'
        ),
        _two(w1, w2, 'pair'),
        _matrices(s, 'image'),
        precision_for(x).algebra,
        images=images,
        pairs=pairs,
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
    if not centred:
        return xf.mean(2, dtype=dtype), xf
    images, channels, n = xf.shape
    m, z = x.new_empty(images, channels, dtype=dtype), empty_like(x, channels)
    zf = z.flatten(2)
    inner = xf.stride(1) == 1 and n > 1  # channels last
    launch(
        centre_kernel,
        (triton.cdiv(channels, 16 if inner else 1), images),
        *(xf, m, zf, channels, n, *xf.stride(), *zf.stride()),
        ACC=_acc(m),
        BI=16 if inner else 1,
        BN=64 if inner else _block(n, 2048),
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
    e = _multiply(
        _matrices(x.new_empty(images, narrow, narrow), 'image'),
        _two(w1, w2, 'term').mT,
        _matrices(v.unflatten(1, (2, channels)), 'image', 'term'),
        precision_for(x).algebra,
        images=images,
        terms=2,
        symmetric=True,
    )
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
    block = _block(columns, 64)
    launch(
        columns_kernel,
        (triton.cdiv(columns, block), len(y)),
        *(w1, q, e, m, count, y, 2, rows, columns, n, _distance(w1, w2)),
        ACC=_acc(w1),
        BI=64,
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
        matrix = _multiply(
            _matrices(x.new_empty(images, *a.shape), 'image'),
            _matrices(matrix, 'image'),
            _matrices(a),
            precision_for(x).algebra,
            images=images,
        )
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
        dmatrix = _multiply(
            _matrices(w3.new_empty(images, channels, channels), 'image'),
            _matrices(dmap, 'image'),
            _matrices(a).mT,
            algebra,
            images=images,
        )
        matrix = torch.empty_like(dmatrix)
    tiles = [triton.cdiv(channels, 64)] * 2
    of_gain = w3.new_empty(tiles[0], images, channels)
    of_b = None if b is None else w3.new_empty(tiles[0], channels)
    of_scalars = w3.new_empty(2, *tiles)
    dg, dw3 = torch.empty_like(g), torch.empty_like(w3)
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
        (triton.cdiv(channels, 128),),
        *(of_gain, of_b, of_scalars, dcolumn, beta, b3),
        *(dg, db, db3, dscalars, tiles[0], tiles[0] * tiles[1]),
        *(images, channels),
        ACC=_acc(w3),
        BJ=128,
    )
    found = [d for d in (dg, dw3, dscalars, db3) if d is not None]
    if a is not None:
        da = _multiply(
            _matrices(torch.empty_like(a)),
            _matrices(matrix, 'term').mT,
            _matrices(dmap, 'term'),
            algebra,
            terms=images,
        )
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
    p = _multiply(
        _matrices(w1.new_empty(2, channels, narrow), 'pair'),
        _two(w1, w2, 'pair'),
        _matrices(a),
        precision_for(a).algebra,
        pairs=2,
    )
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
    dp1, dp2 = dp1.contiguous(), dp2.contiguous()
    precision = precision_for(a).algebra
    dw = _multiply(
        _matrices(w1.new_empty(2, channels, channels), 'pair'),
        _two(dp1, dp2, 'pair'),
        _matrices(a).mT,
        precision,
        pairs=2,
        outer=(dq, channels, b),
    )
    da = _multiply(
        _matrices(torch.empty_like(a)),
        _two(w1, w2, 'term').mT,
        _two(dp1, dp2, 'term'),
        precision,
        terms=2,
    )
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
