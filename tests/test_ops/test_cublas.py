"""What cuBLAS is given, and what a card then makes of it."""

import ctypes
import itertools

import numpy as np
import pytest
import torch
from helpers import assert_near

from polynl_mm.ops import cublas

LAYOUTS = ['rows', 'columns', 'gaps', 'expanded', 'sliced rows']


def laid_out(t, layout):
    """The same matrices, otherwise in memory."""
    if layout == 'rows':
        return t.contiguous()
    if layout == 'columns':
        return t.mT.contiguous().mT
    if layout == 'gaps':
        return torch.stack((t, t + 1), -1)[..., 0]
    if layout == 'expanded':
        return t[:1].expand_as(t)
    return torch.cat((t, t + 1), 2)[..., : t.shape[2]]


def gemm(handle, opa, opb, m, n, k, alpha, *rest):
    """cublasGemmStridedBatchedEx, for float64, by its documentation."""
    (a, b), beta, (c,) = (rest[:4], rest[4:8]), rest[8], (rest[9:13],)
    images, compute, _ = rest[13:]

    def matrix(data, kind, leading, step, rows, columns, image):
        assert kind == cublas._TYPES[torch.float64] and leading >= rows
        at = data + 8 * step * image
        flat = ctypes.c_double * (leading * (columns - 1) + rows)
        flat = np.frombuffer(flat.from_address(at), dtype=np.float64)
        return np.lib.stride_tricks.as_strided(
            flat, (rows, columns), (8, 8 * leading)
        )

    for image in range(images):
        one = matrix(*a, *((k, m) if opa else (m, k)), image)
        two = matrix(*b, *((n, k) if opb else (k, n)), image)
        out = matrix(*c, m, n, image)
        found = (one.T if opa else one) @ (two.T if opb else two)
        before = beta._obj.value * out if beta._obj.value else 0
        out[...] = alpha._obj.value * found + before
    return 0


@pytest.mark.parametrize('size', [(3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1)])
@pytest.mark.parametrize('add', [False, True])
def test_what_is_given(size, add, monkeypatch):
    """Every layout of both operands and of the result."""
    if torch.cuda.is_available():
        pytest.skip('for a machine without a card')
    monkeypatch.setattr(cublas, '_gemm', gemm)
    monkeypatch.setitem(cublas._TYPES, torch.float64, 1)
    monkeypatch.setattr(torch.cuda, 'current_blas_handle', lambda: 0)
    m, k, n = size
    a = torch.randn(2, m, k, dtype=torch.float64)
    b = torch.randn(2, k, n, dtype=torch.float64)
    ways = itertools.product(LAYOUTS, LAYOUTS, ('rows', 'columns'))
    for of_a, of_b, of_y in ways:
        one, two = laid_out(a, of_a), laid_out(b, of_b)
        y = laid_out(torch.ones(2, m, n, dtype=torch.float64), of_y)
        cublas._by_cublas(y, one, two, 'ieee', add)
        assert_near(y, one @ two + add, 1e-13)


def test_refusal_is_told(monkeypatch):
    monkeypatch.setattr(cublas, '_gemm', lambda *args: 15)
    monkeypatch.setattr(torch.cuda, 'current_blas_handle', lambda: 0)
    y, a = torch.empty(1, 2, 2), torch.ones(1, 2, 2)
    with pytest.raises(RuntimeError, match=r'refused \(15\).*\(1, 2, 2\)'):
        cublas._by_cublas(y, a, a, 'ieee', False)


def allow_tf32(value):
    torch.backends.cuda.matmul.allow_tf32 = value


# What a product is in, by the operands' dtype and the precision asked for.
@pytest.mark.parametrize(
    'dtype, precision, compute',
    [
        (torch.bfloat16, 'ieee', 68),
        (torch.float16, 'ieee', 68),
        # PyTorch's handle may be set to TF32, which this leaves alone.
        (torch.float32, 'ieee', 69),
        (torch.float32, 'tf32', 77),
    ],
)
def test_precision_of_the_call(dtype, precision, compute, monkeypatch):
    given = []
    monkeypatch.setattr(
        cublas, '_gemm', lambda *args: given.append(args[-2]) or 0
    )
    monkeypatch.setattr(torch.cuda, 'current_blas_handle', lambda: 0)
    a = torch.ones(1, 2, 2, dtype=dtype)
    cublas._by_cublas(torch.empty(1, 2, 2), a, a, precision, False)
    assert given == [compute]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize('precision', ['ieee', 'tf32'])
@pytest.mark.parametrize('allowed', [False, True])
def test_on_the_device(dtype, precision, allowed, device, request):
    """The error is that of the precision, whatever PyTorch's switch says."""
    request.addfinalizer(lambda: allow_tf32(False))
    allow_tf32(allowed)
    a = torch.randn(3, 65, 300).to(dtype or torch.float32)
    b = torch.randn(3, 300, 70).to(dtype or torch.float32)
    truth = a.double() @ b.double()
    y = torch.ones(3, 65, 70)
    cublas.multiply(y, a, b, precision, add=True)
    error = (y - 1 - truth).norm() / truth.norm()
    in_tf32 = device == 'cuda' and dtype is None and precision == 'tf32'
    assert (1e-5 < error < 1e-3) if in_tf32 else (error < 2e-6)
