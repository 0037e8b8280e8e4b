"""Which form is the cheapest: what each costs, and what a device takes for it.

Both are tables. The rule over them, :func:`choose`, is one for the layer on X
and for the layer behind a 1x1 convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import (
    HALF,
    autocast_dtype,
    has_kernels,
    is_for_every_size,
    switches,
)

__all__ = [
    'BEHIND',
    'ON_X',
    'TOKENS',
    'Cost',
    'Form',
    'Rate',
    'choose',
    'choose_for',
    'cost',
    'rate_of',
]


class Form(NamedTuple):
    """A way to compute the layer.

    Attributes:
        name: ``'direct'`` or ``'gram'``.
        behind: Whether from the input of the convolution before, H, in place
            of its output, X.
        tokens: Whether by linear layers, on tokens as they lie, as only the
            direct form of Poly-SA is.
    """

    name: str
    behind: bool = False
    tokens: bool = False


# Where two cost the same, the first is taken.
ON_X = (Form('gram'), Form('direct'))
BEHIND = (Form('gram', behind=True), Form('direct', behind=True))
TOKENS = (Form('gram', behind=True), Form('direct', behind=True, tokens=True))


class Cost(NamedTuple):
    """What one image takes.

    Attributes:
        convolutions: Multiply-adds of convolutions, per position.
        products: Multiply-adds of matrix products, per position.
        algebra: Multiply-adds of the C x C algebra, whatever N.
        temporaries: Elements written and read again, per position, besides
            those of the cheapest form; of lean kernels, all that are read and
            all that are written.
        launches: Kernels of the device for all images together.
    """

    convolutions: int = 0
    products: int = 0
    algebra: int = 0
    temporaries: int = 0
    launches: int = 0


def cost(
    form: Form, c: int | None, out: int, backward: bool, lean: bool = False
) -> Cost:
    """Cost of a form.

    Args:
        form (Form): The form.
        c (int, optional): Channels of H. None where there is no convolution.
        out (int): Channels of X.
        backward (bool): With all gradients, or the forward alone. That of a
            form behind a convolution is for weights that were projected once
            and for all.
        lean (bool): By kernels of our own, see
            :func:`polynl_mm.ops.precision.has_kernels`, in place of ordinary
            operations.
    """
    steps = 3 if backward else 1  # a product, and two for its gradients
    if form == Form('direct'):
        found = Cost(
            convolutions=steps * 3 * out**2,
            temporaries=(18 if backward else 7) * out,
            launches=40 if backward else 12,
        )
    elif form == Form('gram'):
        found = Cost(
            products=(5 if backward else 2) * out**2,
            algebra=steps * out**3,
            launches=32 if backward else 11,
        )
    elif form.tokens:  # no weights are projected
        found = Cost(
            convolutions=steps * 4 * out * c,
            temporaries=(5 if backward else 1) * out,
            launches=30 if backward else 10,
        )
    elif form == Form('direct', behind=True):
        found = Cost(
            convolutions=steps * (3 * out * c + out**2),
            algebra=6 * out**2 * c if backward else 0,
            temporaries=(18 if backward else 7) * out,
            launches=56 if backward else 13,
        )
    else:
        found = Cost(
            products=steps * out * c + (2 if backward else 1) * c**2,
            algebra=steps * out * c**2 + (9 if backward else 1) * out**2 * c,
            launches=95 if backward else 25,
        )
    if lean:
        if form == Form('direct', behind=True):  # folded, as gram is
            found = found._replace(
                convolutions=steps * 3 * out * c,
                algebra=(9 if backward else 1) * out**2 * c,
            )
        narrow, wide, launches = _LEAN[form][backward]
        temporaries = narrow * (c or 0) + wide * out
        found = found._replace(temporaries=temporaries, launches=launches)
    if c is not None and not form.behind:
        found = found._replace(
            convolutions=found.convolutions + steps * out * c
        )
        if lean:
            found = found._replace(
                temporaries=found.temporaries + steps * (c + out),
                launches=found.launches + steps,
            )
    return found


# How often lean kernels go over H and over X, and their launches: forward,
# and with backward. A product reads what it multiplies and writes the result;
# one that adds to it reads it, too.
_LEAN = {
    # u v, gate, Y; dM, T, two terms of dX.
    Form('direct'): ((0, 7, 5), (0, 18, 12)),
    # S, Y; dM, two terms of dX.
    Form('gram'): ((0, 3, 5), (0, 10, 15)),
    # As on X, and X of H; its gradient, and that of A and b. What is added to
    # every position is written first, and read again.
    Form('direct', behind=True): ((2, 11, 10), (8, 18, 31)),
    # m, H - m, S, Y; dA', db', two terms of dH.
    Form('gram', behind=True): ((5, 3, 10), (12, 6, 34)),
}

# A layer asks the same at every call.
_cost = lru_cache(cost)


class Rate(NamedTuple):
    """Picoseconds for each unit of a :class:`Cost`; bytes for temporaries.

    ``lean`` says of which kernels, as in :func:`cost`.
    """

    convolution: float
    product: float
    algebra: float
    byte: float
    launch: float
    lean: bool = False


# Estimates for two cores of an AMD EPYC: 100e9 multiply-adds a second, 16 of
# them in the time of a byte, 4 microseconds of Python and torch for an
# operation. Not fitted; tools/benchmark_layer.py checks what is chosen on X,
# and with --attention of tokens.
_CPU = Rate(10, 10, 10, 160, 4e6)
# An H100 80GB, torch 2.11, at 8074cc2: eight shapes, forward and backward, by
# captured graphs; tests/h100.py has them and how far each is from
# what these say. Least squares of relative errors, a launch taken as 4
# microseconds, for it was 3 to 5. The ceilings of that card: a copy at 3.0
# TB/s, products at 749 (bfloat16), 404 (TF32) and 51 (float32) TFLOP/s, of
# which 2.7e-3, 5.0e-3 and 39e-3 would be the rates.
_LAUNCH = 4e6
# Ordinary operations, all regimes in one fit. A byte in low precision is dear
# for the copies in float32 that come with it.
_HALF, _TF32, _FLOAT32, _TF32_ALGEBRA = 4.9e-3, 10.4e-3, 47e-3, 18e-3
_HALF_BYTE, _BYTE = 2.7, 0.93
# Kernels of few launches, those of a prototype; a byte as in a copy. Without
# the shape of 1050 positions, the rows of which are not at multiples of 16
# bytes: there the convolution itself is at half its speed. Passes over C x C
# matrices are part of the algebra.
_LEAN_HALF = Rate(2.4e-3, 2.4e-3, 27e-3, 0.33, _LAUNCH, lean=True)
_LEAN_TF32 = Rate(8.7e-3, 8.7e-3, 17e-3, 0.33, _LAUNCH, lean=True)


def rate_of(device: str, dtype: torch.dtype, lean: bool = False) -> Rate:
    """What a type of device takes, for features of a dtype.

    On a GPU ordinary convolutions and matrix products each follow their own
    switch for TF32. A device that was not measured is taken for a CPU.
    """
    if device != 'cuda':
        return _CPU
    if lean:
        return _LEAN_HALF if dtype in HALF else _LEAN_TF32
    allowed = switches()
    algebra = _TF32_ALGEBRA if allowed.products else _FLOAT32
    if dtype in HALF:
        return Rate(_HALF, _HALF, algebra, _HALF_BYTE, _LAUNCH)
    if dtype == torch.float64:
        return Rate(_FLOAT32, _FLOAT32, _FLOAT32, _BYTE, _LAUNCH)
    convolution, product = (_TF32 if tf32 else _FLOAT32 for tf32 in allowed)
    return Rate(convolution, product, algebra, _BYTE, _LAUNCH)


def choose(
    forms: Iterable[Form],
    n: int | None,
    c: int | None,
    out: int,
    backward: bool,
    rate: Rate | None = None,
    itemsize: int = 4,
    images: int = 1,
) -> Form:
    """The form expected to be the fastest.

    Args:
        forms (iterable of Form): Those that come into question, :data:`ON_X`,
            :data:`BEHIND` or both, or :data:`TOKENS`.
        n (int, optional): Positions per image. None stands for every size:
            the fastest for large ones is taken.
        c, out, backward: As in :func:`cost`.
        rate (Rate, optional): Of the device; of a CPU, if not given.
        itemsize (int): Bytes per element of the features.
        images (int): How many.
    """

    rate = rate or _CPU

    def time(form):
        found = _cost(form, c, out, backward, rate.lean)
        position = (
            found.convolutions * rate.convolution
            + found.products * rate.product
            + found.temporaries * itemsize * rate.byte
        )
        image = found.algebra * rate.algebra
        image += found.launches * rate.launch / max(images, 1)
        return (position, image) if n is None else n * position + image

    # Not min(): compilers do not follow its key where sizes are symbols.
    best, *others = forms
    least = time(best)
    for form in others:
        taken = time(form)
        if taken < least:
            best, least = form, taken
    return best


def choose_for(
    x: Tensor, forms: Iterable[Form], c: int | None, out: int, backward: bool
) -> Form:
    """:func:`choose` for features (B, c or C, \\*spatial) as they come.

    Where the choice becomes part of a program, it is that for every size.
    """
    dtype = autocast_dtype(x)
    rate = rate_of(x.device.type, dtype, has_kernels(x))
    # A tracer has tensors for sizes; these are the same for every input.
    c, out = (None if v is None else int(v) for v in (c, out))
    if is_for_every_size():
        return choose(forms, None, c, out, backward, rate, dtype.itemsize)
    n, images = math.prod(x.shape[2:]), x.shape[0]
    return choose(forms, n, c, out, backward, rate, dtype.itemsize, images)
