"""Triton kernels: what stands between two large products, each in one launch.

What each computes stands in its first line, in the notation of ``triton``,
which calls them. An image is b; i, j and k are channels, n is a position. W1
and W2 are one tensor to a kernel, pair[0] and pair[1]: the distance of their
addresses is a stride. ACC is the dtype of what is C x C.
"""

import triton
import triton.language as tl

__all__ = [
    'centre_kernel',
    'columns_kernel',
    'evaluated_adjoint_kernel',
    'evaluated_kernel',
    'fold_adjoint_kernel',
    'fold_kernel',
    'fold_sums_kernel',
    'gate_adjoint_kernel',
    'gate_kernel',
    'gate_of_pair_kernel',
    'rows_kernel',
]


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
            weight = tl.load(
                weights + image.to(tl.int64) * weights_image + at, inside, 0.0
            )
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
    """z[b, i] = x[b, i] - m[b, i]."""
    image = tl.program_id(2)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    n = tl.program_id(1) * BN + tl.arange(0, BN).to(tl.int64)
    inside = (i < channels)[:, None] & (n < positions)[None, :]
    mean = tl.load(m + image * channels + i, i < channels, 0.0)
    at = x + image.to(tl.int64) * x_image + i.to(tl.int64)[:, None] * x_i
    one = tl.load(at + n[None, :] * x_n, inside, 0.0).to(ACC) - mean[:, None]
    at = z + image.to(tl.int64) * z_image + i.to(tl.int64)[:, None] * z_i
    tl.store(at + n[None, :] * z_n, one.to(z.dtype.element_ty), inside)


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
        # The gate may be infinite.
        gain = tl.where(beta == 0, 0.0, gain)
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
    BT: tl.constexpr,
    BJ: tl.constexpr,
):
    """Sums over the tiles of fold_adjoint_kernel."""
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    inside = j < channels
    scale = tl.load(beta)
    ti = tl.arange(0, BT)
    within = (ti < tiles_i)[:, None] & inside[None, :]
    for image in range(images):
        tile = (ti * images + image)[:, None] * channels + j[None, :]
        total = tl.sum(tl.load(of_gain + tile, within, 0.0), 0)
        tl.store(dg + image * channels + j, scale * total, inside)
    if of_b is not None:
        tile = ti[:, None] * channels + j[None, :]
        found = tl.sum(tl.load(of_b + tile, within, 0.0), 0)
        tl.store(db + j, found, inside)
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
