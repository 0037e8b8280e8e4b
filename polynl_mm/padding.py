"""Which positions of a feature map are a picture's own.

Hosts pad the pictures of a batch on the right and at the bottom, to one size.
That padding is no part of a picture, and its layers must not have it in their
mean: what a model says of a picture would depend on what else is in the batch.
A layer is given a tensor only. So the sizes are left here for the time of a
call of the model, by whatever knows them (:mod:`polynl_mm.samples` does, for
models of mmengine).

Padding still reaches the features beside it through the convolutions of the
host, as in any convolutional network.

Only torch is needed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from threading import get_ident
from types import FrameType
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from .ops.precision import is_recorded

__all__ = [
    'Pictures',
    'begin_call',
    'calls_in_progress',
    'end_call',
    'pictures_in',
    'pictures_of',
    'warn_of_padding',
]

# Of calls in progress, the innermost last.
_calls: ContextVar[tuple[Call, ...]] = ContextVar('calls', default=())
# What each layer was called for since it was last asked in backward, where
# checkpointed activations are computed again when the call is over; two that
# differ are kept.
_past: WeakKeyDictionary[nn.Module, dict[object, Pictures | None]] = (
    WeakKeyDictionary()
)
_was_asked: WeakSet[nn.Module] = WeakSet()


class Pictures:
    """The sizes of pictures that were brought to one size by padding.

    Args:
        shape: Height and width of what the model is given.
        sizes: Those of each picture in it, at its top left.
    """

    def __init__(
        self, shape: tuple[int, int], sizes: Sequence[tuple[int, int]]
    ) -> None:
        """Take the arguments; see the class."""
        self.shape, self.sizes = tuple(shape), tuple(map(tuple, sizes))
        self._weights = {}

    def within(self, box: tuple[int, int, int, int]) -> Pictures:
        """What of the pictures is in a part x1, y1, x2, y2 of them all."""
        x1, y1, x2, y2 = box
        shape = (y2 - y1, x2 - x1)
        return Pictures(
            shape,
            [
                (min(max(h - y1, 0), shape[0]), min(max(w - x1, 0), shape[1]))
                for h, w in self.sizes
            ],
        )

    def weights(self, x: Tensor) -> Tensor | None:
        """What the positions of a feature map count: 1 each, 0 in padding.

        A cell is a picture's own if it begins in it: of a stride s they are
        ceil(size / s).

        Args:
            x (Tensor): (B, C, ..., h, w), B the number of pictures.

        Returns:
            Tensor: (B, ..., h, w) of bool; None where all count, and for
            regions (RoIs), which are not as many as there are pictures, and
            what is pooled to one position.
            With a warning for other maps whose positions can not be told:
            of one axis, or of another shape than the pictures'.
        """
        if len(x) != len(self.sizes) or x.shape[2:].numel() == 1:
            return None
        key = x.shape[2:], x.device
        if key not in self._weights:
            self._weights[key] = self._make(x)
        return self._weights[key]

    def _make(self, x):
        stride = _stride(self.shape, x.shape[2:])
        if stride is None:
            warn_of_padding('a layer is given no map of whole pictures')
            return None
        own = [[-(-n // stride) for n in size] for size in self.sizes]
        rows, columns = torch.tensor(own).unsqueeze(2).unbind(1)
        height, width = x.shape[-2:]
        own = (torch.arange(height) < rows).unsqueeze(2) & (
            torch.arange(width) < columns
        ).unsqueeze(1)
        if own.all():
            return None
        own = own.reshape(len(x), *(1,) * (x.dim() - 4), height, width)
        # Not waiting for what the device is at.
        own = own.to(x.device, non_blocking=True)
        return own.expand(len(x), *x.shape[2:])


def _stride(shape, axes) -> int | None:
    """Pixels that a cell of a map of the whole shape is wide and high."""
    if len(axes) < 2:
        return None
    axes = axes[-2:]
    # The least that it can be. Strides are powers of two, but for patches of
    # another size, which pictures are padded to.
    least = max(-(-n // cells) for n, cells in zip(shape, axes))
    if least > 128:
        return None
    stride = 1 << (least - 1).bit_length()
    if all(-(-n // stride) == cells for n, cells in zip(shape, axes)):
        return stride
    return least if tuple(shape) == tuple(least * n for n in axes) else None


class Call:
    """One in progress; the arguments are those of :func:`begin_call`.

    Attributes:
        was_asked: Whether a layer has asked for the pictures.
        has_backward: Whether a backward may follow. Not read when a layer
            asks: some checkpoints call it without gradients.
    """

    def __init__(
        self,
        owner: object,
        find: Callable[[], Pictures | None],
        frame: FrameType | None,
    ) -> None:
        """Take the arguments; see the class."""
        self.owner, self._find = owner, find
        self._frame, self._thread = frame, get_ident()
        self.was_asked = False
        self.has_backward = torch.is_grad_enabled() or any(
            call.has_backward for call in calls_in_progress()[-1:]
        )

    @cached_property
    def pictures(self) -> Pictures | None:
        """None where there is no padding."""
        return self._find()

    def is_over(self) -> bool:
        """Whether it is, and has not been ended."""
        if self._frame is None or self._thread != get_ident():
            return False
        frame = sys._getframe()
        while frame not in (None, self._frame):
            frame = frame.f_back
        return frame is None


def calls_in_progress() -> tuple[Call, ...]:
    """The innermost last."""
    calls = _calls.get()
    while calls and calls[-1].is_over():
        calls = calls[:-1]
        _calls.set(calls)
    return calls


def begin_call(
    owner: object,
    find: Callable[[], Pictures | None],
    frame: FrameType | None = None,
) -> None:
    """Let the layers that are called from now on know of the pictures.

    Args:
        owner: Whose call it is.
        find: Gives them, None where there is no padding; called if a layer
            asks.
        frame: Of the call, which is over when that is, also if nothing says
            so (of a KeyboardInterrupt torch tells no hook).
    """
    _calls.set((*calls_in_progress(), Call(owner, find, frame)))


def end_call(owner: object) -> Call | None:
    """Undo it, and whatever was begun since and never ended."""
    calls = _calls.get()
    for k in reversed(range(len(calls))):
        if calls[k].owner is owner:
            _calls.set(calls[:k])
            return calls[k]
    return None


@contextmanager
def pictures_in(pictures: Pictures | None) -> Iterator[None]:
    """Both, around what runs within."""
    owner = object()
    begin_call(owner, lambda: pictures)
    try:
        yield
    finally:
        end_call(owner)


def pictures_of(layer: nn.Module | None = None) -> Pictures | None:
    """Those of the call of the model in progress, None if there are none.

    In a program (traced, exported, compiled) there are none.

    Args:
        layer: Who asks; in backward it is given what it was called for.

    Raises:
        RuntimeError: In backward, when it was called for several.
    """
    if is_recorded():
        return None
    if torch._C._current_graph_task_id() != -1:
        return _again(layer)
    calls = calls_in_progress()
    pictures = calls[-1].pictures if calls else None
    if layer is not None:
        if calls:
            calls[-1].was_asked = True
        if calls[-1].has_backward if calls else torch.is_grad_enabled():
            _remember(layer, pictures)
    return pictures


def _remember(layer, pictures):
    if layer in _was_asked or layer not in _past:
        _was_asked.discard(layer)
        _past[layer] = {}
    if len(_past[layer]) < 2:
        key = pictures and (pictures.shape, pictures.sizes)
        _past[layer].setdefault(key, pictures)


def _again(layer):
    past = _past.get(layer, {})
    _was_asked.add(layer)
    if len(past) > 1:
        _past.clear()  # whoever goes on starts anew
        raise RuntimeError(
            'Poly-NL: a checkpointed layer is computed again in backward, '
            'after calls for pictures of different sizes: which of them it is '
            'can not be told. Have backward follow each call, or make those '
            'that have none under torch.no_grad()'
        )
    return next(iter(past.values()), None)


def warn_of_padding(why: str) -> None:
    """Say that padding counts, and what can be done."""
    warnings.warn(
        f'Poly-NL: {why}, so that the padding of pictures of different sizes '
        'enters its mean, and results depend on what else is in a batch: take '
        'batch_size=1, or pictures of one size',
        stacklevel=2,
    )
