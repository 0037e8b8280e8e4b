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
    is_for_every_size,
    switches,
)

__all__ = [
    'BEHIND',
    'ON_X',
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
    """

    name: str
    behind: bool = False


# Where two cost the same, the first is taken.
ON_X = (Form('gram'), Form('direct'))
BEHIND = (Form('gram', behind=True), Form('direct', behind=True))


class Cost(NamedTuple):
    """What one image takes.

    Attributes:
        convolutions: Multiply-adds of convolutions, per position.
        products: Multiply-adds of matrix products, per position.
        algebra: Multiply-adds of the C x C algebra, whatever N.
        temporaries: Elements written and read again, per position, besides
            those of the cheapest form.
        launches: Kernels of the device for all images together.
    """

    convolutions: int = 0
    products: int = 0
    algebra: int = 0
    temporaries: int = 0
    launches: int = 0


def cost(form: Form, c: int | None, out: int, backward: bool) -> Cost:
    """Cost of a form.

    Args:
        form (Form): The form.
        c (int, optional): Channels of H. None where there is no convolution.
        out (int): Channels of X.
        backward (bool): With all gradients, or the forward alone. That of a
            form behind a convolution is for weights that were projected once
            and for all.
    """
    steps = 3 if backward else 1  # a product, and two for its gradients
    if form == Form('direct'):
        found = Cost(
            convolutions=steps * 3 * out**2,
            temporaries=(18 if backward else 7) * out,
            launches=27 if backward else 9,
        )
    elif form == Form('gram'):
        found = Cost(
            products=(5 if backward else 2) * out**2,
            algebra=steps * out**3,
            launches=30 if backward else 9,
        )
    elif form == Form('direct', behind=True):
        found = Cost(
            convolutions=steps * (3 * out * c + out**2),
            algebra=6 * out**2 * c if backward else 0,
            temporaries=(18 if backward else 7) * out,
            launches=43 if backward else 10,
        )
    else:
        found = Cost(
            products=steps * out * c + (2 if backward else 1) * c**2,
            algebra=steps * out * c**2 + (9 if backward else 1) * out**2 * c,
            launches=93 if backward else 23,
        )
    if c is not None and not form.behind:
        convolutions = found.convolutions + steps * out * c
        found = found._replace(convolutions=convolutions)
    return found


# A layer asks the same at every call.
_cost = lru_cache(cost)


class Rate(NamedTuple):
    """Picoseconds for each unit of a :class:`Cost`; bytes for temporaries."""

    convolution: float
    product: float
    algebra: float
    byte: float
    launch: float


# Estimates for two cores of an AMD EPYC: 100e9 multiply-adds a second, 16 of
# them in the time of a byte, 4 microseconds of Python and torch for an
# operation. Not fitted; tools/benchmark_layer.py checks what is chosen on X.
_CPU = Rate(10, 10, 10, 160, 4e6)
# From ceilings of an H100 80GB, torch 2.11, not fitted: large products at 749
# (bfloat16), 404 (TF32) and 51 (float32) TFLOP/s, a copy at 3.0 TB/s, a launch
# in 3 to 5 microseconds.
_HALF, _TF32, _FLOAT32 = 2.7, 5.0, 39
_BYTE, _LAUNCH = 0.33, 4e6


def rate_of(device: str, dtype: torch.dtype) -> Rate:
    """What a type of device takes, for features of a dtype.

    On a GPU convolutions and matrix products each follow their own switch for
    TF32. A device that was not measured is taken for a CPU.
    """
    if device != 'cuda':
        return _CPU
    convolution, product = (
        _TF32 if allowed else _FLOAT32 for allowed in switches()
    )
    if dtype in HALF:
        return Rate(_HALF, _HALF, product, _BYTE, _LAUNCH)
    if dtype == torch.float64:
        convolution = product = _FLOAT32
    return Rate(convolution, product, product, _BYTE, _LAUNCH)


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
            :data:`BEHIND` or both.
        n (int, optional): Positions per image. None stands for every size:
            the fastest for large ones is taken.
        c, out, backward: As in :func:`cost`.
        rate (Rate, optional): Of the device; of a CPU, if not given.
        itemsize (int): Bytes per element of the features.
        images (int): How many.
    """

    rate = rate or _CPU

    def time(form):
        found = _cost(form, c, out, backward)
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
    rate = rate_of(x.device.type, dtype)
    # A tracer has tensors for sizes; these are the same for every input.
    c, out = (None if v is None else int(v) for v in (c, out))
    if is_for_every_size():
        return choose(forms, None, c, out, backward, rate, dtype.itemsize)
    n, images = math.prod(x.shape[2:]), x.shape[0]
    return choose(forms, n, c, out, backward, rate, dtype.itemsize, images)
