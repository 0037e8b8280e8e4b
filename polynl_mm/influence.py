"""Where Poly-NL layers look: what each position adds to chosen ones.

The mathematics is in :mod:`polynl_mm.ops`, under "what each position adds".
A layer is watched while its model runs::

    with looking(model, 'decode_head.poly_nl') as looks:
        model(x)
    maps = looks[0].maps([(row, column)])  # (1, H, W)

Only torch is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Call, InContext
from .ops import Conv, Params, poly_nl_terms
from .ops.gate import gated, gated_adjoint
from .ops.precision import convolution, float_dtype, no_autocast

__all__ = [
    'Look',
    'gate_spread',
    'influence',
    'layer_at',
    'looking',
    'only',
    'share',
]


class Look:
    """What one call of a layer saw.

    Args:
        path: Of the layer, for messages.
        layer: The layer.
        call: What it gave to the operation.

    Attributes:
        path: See above.
        spatial: Shape of the map, such as (H, W).
        images: How many there were in the batch.
    """

    def __init__(self, path: str, layer: nn.Module, call: Call) -> None:
        """Take the arguments; see the class."""
        self.path, self._layer, self._call = path, layer, call
        self.images, self.spatial = len(call.x), tuple(call.x.shape[2:])
        self._y = None

    def maps(
        self,
        cells: Sequence[Sequence[int]],
        image: int = 0,
        direction: Tensor | None = None,
    ) -> Tensor:
        """What each position adds to each of some, along a direction.

        Args:
            cells: Their indices on the map, such as (row, column).
            image: Which of the batch.
            direction (Tensor, optional): (C,), in the output of the layer. By
                default, for each of the cells, the unit vector of all that
                positions add there, so that a map sums up to its length: the
                length of the branch (without the layer's bias b3). Where that
                is 0, as at beta = 0, the map is 0.

        Shape: (len(cells), \\*spatial), float32 or float64.

        Raises:
            ValueError: A cell is not on the map, ``direction`` has another
                shape, or what a position adds is not known: see
                :meth:`why_not`.
        """
        for cell in cells:
            if len(cell) != len(self.spatial) or not all(
                0 <= index < size for index, size in zip(cell, self.spatial)
            ):
                raise ValueError(
                    f'{self.path}: cell {tuple(cell)} is not on its map of '
                    f'{self.spatial}'
                )
        p, terms, gate = self._p, self._terms[image], self._call.gate[image]
        x = self._x[image]
        x = torch.stack([x[(slice(None), *cell)] for cell in cells], 1)[None]
        with torch.no_grad(), no_autocast(x):
            x = x if self._conv is None else convolution(x, *self._conv)
            if direction is None:
                added = gated(x, gate[None], p._replace(alpha=0.0, b3=None))
                direction = F.normalize(added, dim=1)
            elif direction.shape != x.shape[1:2]:
                raise ValueError(
                    f'{self.path}: direction must have shape '
                    f'{tuple(x.shape[1:2])}, got {tuple(direction.shape)}'
                )
            else:
                direction = direction.to(x).reshape(1, -1, 1).expand_as(x)
            seen = gated_adjoint(x, direction, p)[0]
            return torch.tensordot(seen, terms, ([0], [0]))

    def map_of(self, score: Tensor, image: int = 0) -> Tensor:
        """What each position adds to a number that the model has computed.

        To first order: its sum is the derivative of the number by a factor
        before the branch of the layer (without b3), everywhere at once.

        Args:
            score (Tensor): One element; the model must have run with
                gradients, and more than one number can be asked for.
            image: Which of the batch.

        Shape: (\\*spatial), float32 or float64.

        Raises:
            ValueError: The score does not depend on the layer, or as
                :meth:`maps`.
        """
        p, terms, x = self._p, self._terms[image], self._x[image][None]
        dy = None
        if score.requires_grad:
            dy = torch.autograd.grad(
                score.sum(), self._y, retain_graph=True, allow_unused=True
            )[0]
        if dy is None:
            raise ValueError(f'{self.path}: the score does not depend on it')
        with torch.no_grad(), no_autocast(x):
            x = x if self._conv is None else convolution(x, *self._conv)
            dy = dy[image].to(x)[None]
            seen = gated_adjoint(x.flatten(2), dy.flatten(2), p).sum(2)[0]
            return torch.tensordot(seen, terms, ([0], [0]))

    def why_not(self) -> str | None:
        """Why what a position adds is not known; None if it is."""
        if self._call.pooled:
            return (
                'its gate is that of several calls (shared_context), of which '
                'this one knows its own positions only'
            )
        if self._call.p is not None:
            return None
        if getattr(self._layer, 'norm', None) is not None:
            return (
                'its branch is normalised (norm_cfg), by statistics of all '
                'positions'
            )
        return (
            'its convolutions are more than their weights (adapters, hooks): '
            'take those away first'
        )

    @property
    def _conv(self) -> Conv | None:
        conv = self._call.conv
        return None if conv is None else Conv(*map(_exact, conv))

    @property
    def _p(self) -> Params:
        why = self.why_not()
        if why is not None:
            raise ValueError(f'{self.path}: {why}')
        return Params(*map(_exact, self._call.p))

    @property
    def _x(self) -> Tensor:
        return _exact(self._call.x)

    @cached_property
    def _terms(self) -> Tensor:
        with torch.no_grad():
            return poly_nl_terms(self._x, self._p, self._call.weights)


def influence(
    model: nn.Module,
    *args,
    at: Sequence[Sequence[int]],
    layer: str | None = None,
    call: int | None = None,
    image: int = 0,
    direction: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """Run a model, or a layer, and see what each position adds to some.

    Args:
        model: A Poly-NL layer, or what has some.
        *args: What it is called with, and ``kwargs``.
        at: Cells of the layer's map, such as (row, column).
        layer: Path of the layer, see :func:`layer_at`.
        call: Which of the layer's calls, see :func:`only`.
        image, direction: See :meth:`Look.maps`.
        **kwargs: See ``args``.

    Shape: (len(at), \\*spatial).

    Raises:
        ValueError: As :func:`layer_at`, :func:`only` and :meth:`Look.maps`.
    """
    with torch.no_grad(), looking(model, layer) as looks:
        model(*args, **kwargs)
    return only(looks, call).maps(at, image, direction)


@contextmanager
def looking(
    model: nn.Module, layer: str | None = None
) -> Iterator[list[Look]]:
    """Watch a layer of a model.

    Args:
        model: See :func:`layer_at`.
        layer: See there.

    Yields:
        A list, to which every call of the layer within adds a look.
    """
    path, module = layer_at(model, layer)
    looks, before = [], module.watch

    def keep(module, args, y):
        if not looks or not torch.is_grad_enabled():
            return None
        # One that later modules do not write into; a fused layer of a frozen
        # model has no gradients of its own.
        looks[-1]._y = y if y.requires_grad else y.detach().requires_grad_()
        return looks[-1]._y.clone()

    handle = module.register_forward_hook(keep)
    module.watch = lambda call: looks.append(Look(path, module, call))
    try:
        yield looks
    finally:
        module.watch = before
        handle.remove()


def only(looks: Sequence[Look], call: int | None = None) -> Look:
    """Give the look at the one call there was, or at one of several.

    Args:
        looks: Of :func:`looking`.
        call: Its number, from 0.

    Raises:
        ValueError: There was none, or several and ``call`` is none of them.
    """
    if not looks:
        raise ValueError('the layer was called 0 times, expected 1 or more')
    if call is None and len(looks) == 1:
        return looks[0]
    if call is None or not 0 <= call < len(looks):
        shapes = ', '.join(str(look.spatial) for look in looks)
        raise ValueError(
            f'{looks[0].path} was called {len(looks)} times (levels of a '
            f'pyramid, windows), with maps of {shapes}: call must be one of '
            f'0..{len(looks) - 1}, got {call}'
        )
    return looks[call]


def layer_at(
    model: nn.Module, path: str | None = None
) -> tuple[str, nn.Module]:
    """Find a Poly-NL layer, fused or not.

    Args:
        model: A layer, or what has some.
        path: As in ``named_modules``; by default that of the last layer.

    Returns:
        tuple: path and layer.

    Raises:
        ValueError: There is none at that path; the message lists them.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, InContext) and hasattr(module, 'beta')
    }
    if not layers:
        raise ValueError(f'{type(model).__name__} has no Poly-NL layer')
    path = [*layers][-1] if path is None else path
    if path not in layers:
        raise ValueError(
            f'there is no Poly-NL layer {path!r}; there are '
            f'{", ".join(layers)}'
        )
    return path, layers[path]


# ----------------------------------------------------------------- summaries


def share(call: Call) -> Tensor | None:
    """Length of the branch, of that of the output: 0 is the identity.

    Over all positions that count, of all images; b3 is part of the branch.

    Args:
        call: Of a layer.

    Returns:
        Tensor: One number, on the device. None where the call does not know
        all that the layer computes, see :class:`polynl_mm.layers.Call`.
    """
    if call.p is None:
        return None
    p, conv = Params(*map(_exact, call.p)), call.conv
    counts = call.weights
    added = total = 0
    with torch.no_grad(), no_autocast(call.x):
        # One by one: what is made here is as large as the features.
        for i, gate in enumerate(call.gate):
            x = _exact(call.x[i : i + 1])
            x = x if conv is None else convolution(x, *map(_exact, conv))
            branch = gated(x, gate[None], p._replace(alpha=0.0))
            sums = torch.stack(
                [
                    each.square().sum(1)
                    for each in (branch, p.alpha * x + branch)
                ]
            )
            if counts is not None:
                sums = sums * (counts[i % len(counts)] != 0)
            branch, y = sums.flatten(1).sum(1)
            added, total = added + branch, total + y
        tiny = torch.finfo(total.dtype).tiny
        return (added / total.clamp_min(tiny)).sqrt()


def gate_spread(gate: Tensor) -> Tensor:
    """How much the gate differs between channels, of its size; mean of images.

    Its standard deviation over the channels, by their mean absolute value. At
    0 all channels are weighed alike, and the branch is the same in every
    picture but for a factor; it is 1 where they are as often negative as
    positive, and more where few count.

    Shape: gate (B, C) -> (), on the device.
    """
    gate = _exact(gate)
    size = gate.abs().mean(1).clamp_min(torch.finfo(gate.dtype).tiny)
    return (gate.std(1, unbiased=False) / size).mean()


def _exact(value):
    """Detached and at least float32; None and numbers as they are."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(float_dtype(value.dtype))
