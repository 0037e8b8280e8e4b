r"""One gate for several calls: windows, processes, frames, crops of an image.

All that a position of a Poly-NL layer knows of the others is the gate g, a
mean over positions: C numbers an image and layer (:mod:`polynl_mm.ops`). So a
layer on a part of an image is exactly that on the whole once

.. math::
    g = \textstyle\sum_k a_k\, g_k \,/\, \sum_k a_k

is taken over the parts k, :math:`a_k` the area that part k counts for.
Where parts overlap, every position counts in one of them: weights (``weights``
of :func:`polynl_mm.ops.poly_nl`) leave the rest out of :math:`g_k`. What
remains of the borders between parts is that of the convolutions.

:func:`shared_context` has the layers of a model take part, in

- :class:`Windows`: windows of one image, one after the other;
- :class:`Processes`: parts of one image, each in a process of its own;
- :class:`Frames`: the frames of a video;
- :class:`Crops`: crops of several images, in one batch.

mmcv's ``ContextBlock`` (GCNet) pools by a softmax over positions. Its sums of
exponentials take the place of the areas: C + 1 numbers.

Only torch is needed.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .layers import InContext
from .ops.precision import autocast_dtype, is_autocast_on
from .padding import Pictures, pictures_of

__all__ = [
    'Crops',
    'Frames',
    'Processes',
    'Window',
    'WindowError',
    'Windows',
    'bands',
    'grid',
    'shared_context',
]

MIB = 2**20


# ------------------------------------------------------------ parts of images


@dataclass(frozen=True)
class Window:
    """A part of an image.

    Attributes:
        box: x1, y1, x2, y2, in pixels of the image: what the model is given.
        core: The same of the part of it that counts in the gate; those of all
            windows of an image tile it. May lie between pixels.
    """

    box: tuple[int, int, int, int]
    core: tuple[float, float, float, float]

    @property
    def area(self) -> float:
        """Of the core, in pixels of the image."""
        return _area(self.core)

    def weights(self, x: Tensor) -> Tensor | None:
        """What each position of a feature map of the window counts.

        Args:
            x (Tensor): (B, C, ..., h, w), a map of the whole box, evenly.

        Returns:
            Tensor: (1, ..., h, w), the share in [0, 1] of each position's
            cell that is in the core; None where all of it is.

        Raises:
            RuntimeError: ``x`` has one spatial axis, from which it can not be
                told where a position lies.
        """
        if self.core == self.box:
            return None
        if x.dim() < 4:
            raise RuntimeError(
                f'features of shape {tuple(x.shape)} have no height and width:'
                ' which of them lie where windows overlap can not be told; '
                'take windows that do not overlap'
            )
        axes = [
            _shares(count, self.box[k::2], self.core[k::2], x.device)
            for k, count in ((1, x.shape[-2]), (0, x.shape[-1]))
        ]
        return (axes[0][:, None] * axes[1]).expand(1, *x.shape[2:])

    def padded(self, pictures: Pictures) -> Window:
        """Have the box reach over what a window was padded by, if it does not.

        Args:
            pictures: The window, at any scale, as the model is given it.
        """
        x1, y1, x2, y2 = self.box
        if pictures.shape == (y2 - y1, x2 - x1):
            return self
        height, width = map(max, zip(*pictures.sizes))
        right = x1 + pictures.shape[1] * (x2 - x1) / width
        bottom = y1 + pictures.shape[0] * (y2 - y1) / height
        return replace(self, box=(x1, y1, right, bottom))

    def __str__(self) -> str:
        """Give the box, as it is written in messages."""
        return 'x {0}..{2}, y {1}..{3}'.format(*self.box)


def _area(box):
    x1, y1, x2, y2 = box
    return (x2 - x1) * (y2 - y1)


def _shares(n, ends, core, device):
    edges = torch.linspace(*ends, n + 1, dtype=torch.float64, device=device)
    inside = edges.clamp(*core).diff()
    return (inside / edges.diff()).float()


def grid(
    shape: tuple[int, int], size: tuple[int, int], stride: tuple[int, int]
) -> list[Window]:
    """Windows over an image, as mmseg's slide inference lays them.

    The last of a row or column ends at the border of the image. Overlaps are
    divided among windows at their middle.

    Args:
        shape: Height and width of the image.
        size: Those of a window; what is larger than the image is cut.
        stride: Steps downwards and to the right, at most the size.

    Returns:
        list[Window]: Row by row.

    Raises:
        ValueError: On what is not positive, and on a stride that leaves gaps.
    """
    axes = [_axis(*each) for each in zip(shape, size, stride)]
    return [
        Window((x1, y1, x2, y2), (u1, v1, u2, v2))
        for (y1, y2, v1, v2), (x1, x2, u1, u2) in product(*axes)
    ]


def _axis(length, size, stride):
    """Begin and end of each window along an axis, and of its core."""
    if min(length, size, stride) < 1 or stride > size < length:
        raise ValueError(
            f'an axis of {length} pixels can not be covered by windows of '
            f'{size} at steps of {stride}'
        )
    size = min(size, length)
    count = -(-(length - size) // stride) + 1
    begins = [min(k * stride, length - size) for k in range(count)]
    middles = [(a + size + b) / 2 for a, b in zip(begins, begins[1:])]
    cores = zip([0, *middles], [*middles, length])
    return [(b, b + size, *core) for b, core in zip(begins, cores)]


def bands(
    shape: tuple[int, int], count: int, halo: int = 0, multiple: int = 1
) -> list[Window]:
    """Cut an image into bands of rows, one for each of several processes.

    Args:
        shape: Height and width of the image.
        count: How many.
        halo: Rows that a band has beyond each end of its core, where there
            are any: what the convolutions of the model see of the neighbours.
        multiple: What every band begins at a multiple of: the stride of the
            model, so that its positions are those of the whole.

    Raises:
        ValueError: The image has too few rows.
    """
    height, width = shape
    halo = -(-halo // multiple) * multiple
    cuts = [round(height * k / count / multiple) for k in range(count)]
    cuts = [*(cut * multiple for cut in cuts), height]
    if any(a >= b for a, b in zip(cuts, cuts[1:])):
        raise ValueError(
            f'{height} rows can not be cut into {count} bands that begin at '
            f'multiples of {multiple}'
        )
    return [
        Window((0, max(a - halo, 0), width, min(b + halo, height)), core)
        for a, b, core in (
            (a, b, (0, a, width, b)) for a, b in zip(cuts, cuts[1:])
        )
    ]


# ------------------------------------------------------- how layers take part

# Contexts that this thread has entered, the innermost last.
_entered: ContextVar[tuple] = ContextVar('entered', default=())
# Modules that take part in a context of any thread.
_joined: dict[nn.Module, _Around] = {}
_lock = threading.Lock()


@contextmanager
def shared_context(
    model: nn.Module,
    over: Windows | Processes | Frames | Crops,
    exclude: Sequence[str] = ('*roi_head*',),
):
    """Have the layers of a model share their gates over several calls.

    ::

        with shared_context(model, Windows()) as windows:
            results = windows(step, grid(image.shape[-2:], (512, 512),
                                         (384, 384)))

    All Poly-NL and Poly-SA layers take part, fused or not, whatever wraps the
    model, and all of mmcv's ``ContextBlock``. Only calls of the thread that
    entered do: others may use the model at the same time, also in a context of
    theirs.
    Contexts may be nested: the gate goes through the innermost first, and
    parts of parts must not overlap but in the innermost. Where activations
    are checkpointed, backward belongs within.

    Args:
        model: Left as it was.
        over: What the calls are of.
        exclude: Patterns of the paths of layers that keep to themselves. By
            default those of RoI heads, whose features are of one RoI each.

    Yields:
        ``over``.

    Raises:
        ValueError: If no layer takes part, and for a layer that can not: one
            whose branch is normalised (``norm_cfg``) by statistics of the
            features at hand, but for an evaluated BatchNorm; a Poly-SA with
            vectors or tokens that belong to a whole image.
        RuntimeError: If ``over`` is in use already, and if none of the layers
            was called: what ran was a copy, or in another thread.
    """
    layers = _layers_of(model, exclude)
    if over.layers is not None:
        raise RuntimeError(
            f'this {type(over).__name__} is in use already: make one for '
            'each shared_context'
        )
    with ExitStack() as stack:
        over.layers = layers
        stack.callback(setattr, over, 'layers', None)
        over.enter()
        for layer in layers:
            stack.enter_context(_join(layer, over))
        _entered.set((*_others_than(over), over))
        stack.callback(lambda: _entered.set(_others_than(over)))
        yield over
        over.leave()


def _others_than(context):
    """What this thread has entered and not left, but for one.

    Not by a token: generators may be left in another order.
    """
    return tuple(
        each
        for each in _entered.get()
        if each is not context and each.layers is not None
    )


def _layers_of(model, exclude):
    exclude = [exclude] if isinstance(exclude, str) else exclude
    context_block = getattr(
        sys.modules.get('mmcv.cnn'), 'ContextBlock', InContext
    )
    layers = {
        module: path
        for path, module in model.named_modules()
        if isinstance(module, (InContext, context_block))
        and not any(fnmatchcase(path, pattern) for pattern in exclude)
    }
    if not layers:
        raise ValueError(
            f'{type(model).__name__} has no Poly-NL layer and no '
            f'ContextBlock, beside what {tuple(exclude)} excludes: no call '
            'would know of another'
        )
    for layer, path in layers.items():
        why = layer.why_alone() if isinstance(layer, InContext) else None
        if why is not None:
            raise ValueError(
                f'{path!r} can not share its gate: {why}. Leave it out by '
                'exclude'
            )
    return layers


@contextmanager
def _join(layer: nn.Module, context):
    name = 'around' if isinstance(layer, InContext) else 'spatial_pool'
    with _lock:
        around = _joined.get(layer)
        if around is None:
            if vars(layer).get(name) is not None:
                path = context.layers[layer]
                raise RuntimeError(
                    f'{path!r} has a {name} of its own, and takes no other: '
                    'set it to None, or exclude the layer'
                )
            around = _joined[layer] = _Around(layer)
            pools = name == 'spatial_pool'
            call = partial(_attend, around, layer) if pools else around
            setattr(layer, name, call)
        around.contexts.append(context)
    try:
        yield
    finally:
        with _lock:
            around.contexts.remove(context)
            if not around.contexts:
                del _joined[layer]
                delattr(layer, name)


class _Around:
    """What :attr:`InContext.around` is while a layer takes part."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = weakref.ref(layer)
        self.contexts = []  # of all threads

    def __call__(self, layer: nn.Module, x: Tensor):
        contexts = self._of_this_thread(layer)
        # mmcv's block is what it is outside: it sees padding.
        pictures = pictures_of(layer) if isinstance(layer, InContext) else None
        if not contexts:
            return None, pictures and pictures.weights(x)
        *outer, innermost = [c for c in contexts if c.is_of_parts] or [None]
        part = innermost and innermost.part
        is_outside = pictures and part and pictures is innermost.outside
        for context in outer:
            if is_outside or context.part.weights(x) is not None:
                raise RuntimeError(
                    f'{context.layers[layer]!r} is in a '
                    f'{type(innermost).__name__} within a '
                    f'{type(context).__name__} '
                    + (
                        'of padded pictures: parts of parts must have none'
                        if is_outside
                        else 'whose parts overlap: only those of the '
                        'innermost may'
                    )
                )
        if is_outside:
            pictures = pictures.within(part.box)
        elif pictures and part:
            part = part.padded(pictures)
        weights = part and part.weights(x)
        own = pictures and pictures.weights(x)
        pool = partial(_through, contexts, layer)
        if own is not None:
            weights = own if weights is None else own * weights
            # What is left of an image, of which there may be nothing.
            count = weights.flatten(1).double().mean(1, keepdim=True)
            count = count * (_area(part.box) if part else 1)
            pool = partial(pool, count=count)
        return pool, weights

    def __deepcopy__(self, memo):
        # The copy of a layer is in no context, and is to say so.
        return self

    def _of_this_thread(self, layer):
        if self.contexts and layer is not self.layer():
            raise RuntimeError(
                'a Poly-NL layer was copied or fused within shared_context: '
                'that must be done before'
            )
        mine = [c for c in _entered.get() if layer in (c.layers or ())]
        # Checkpointed activations are computed again, on a GPU by a thread
        # of autograd's, which is none of Python's.
        if (
            not mine
            and torch._C._current_graph_task_id() != -1
            and isinstance(threading.current_thread(), threading._DummyThread)
        ):
            mine = list(self.contexts)
            if len(mine) > 1:
                raise RuntimeError(
                    f'{mine[0].layers[layer]!r} is computed again in '
                    'backward, and which of several contexts it was in can '
                    'not be told'
                )
        return mine


def _through(contexts, layer, value, count=None):
    """Pool by the innermost context, which is the last, and on outwards."""
    if not contexts:
        return value
    *outer, context = contexts
    context.was_called = True
    return context.pool(
        layer, value, count, then=partial(_through, outer, layer)
    )


def _attend(around: _Around, block: nn.Module, x: Tensor) -> Tensor:
    """Do what ``ContextBlock.spatial_pool`` does, in a context."""
    pool, weights = around(block, x)
    if pool is None:
        return type(block).spatial_pool(block, x)
    features = x.flatten(2)
    logs = features.new_zeros(1, 1, features.shape[2])
    if weights is not None:
        logs = weights.to(x.dtype).log().flatten(1).unsqueeze(1)
    count = None
    if block.pooling_type == 'att':
        logs = block.conv_mask(x).flatten(2) + logs
        count = logs.double().logsumexp(2).exp()
    value = torch.matmul(features, logs.softmax(2).mT).squeeze(2)
    return pool(value, count).reshape(*x.shape[:2], 1, 1)


class _Context:
    """Base of the contexts.

    Attributes:
        is_of_parts: Whether its calls are given parts of an image.
        part: The part that a call is given, of those.
        outside: Pictures that were called for when its parts were begun,
            which they are parts of.
        layers: Module -> path of what takes part, None while none does.
        was_called: Whether any of them was called.
    """

    is_of_parts = False
    part: Window
    outside: Pictures | None = None
    layers: dict[nn.Module, str] | None = None
    was_called = False

    def enter(self) -> None:
        """Do what is to be done once; ``layers`` are known."""
        self.was_called = False

    def leave(self) -> None:
        """Raise RuntimeError if no layer was called, but should have been."""

    def _check_called(self) -> None:
        if not self.was_called:
            raise RuntimeError(
                f'{type(self).__name__}: no layer of the model given to '
                'shared_context was called: call that model, and no copy of '
                'it, in the thread that entered the context'
            )

    def pool(
        self,
        layer: nn.Module,
        value: Tensor,
        count: Tensor | None,
        then: Callable[..., Tensor],
    ) -> Tensor:
        """Give the mean to go on with.

        Args:
            layer: Whose.
            value (Tensor): (B, C), that of this call.
            count (Tensor, optional): (B, 1) of float64, what it counts; None
                where that is the area of its part.
            then: Takes the mean and its count through the contexts around.
        """
        raise NotImplementedError


# -------------------------------------------------------------------- windows


class WindowError(RuntimeError):
    """The step failed in a window; its cause is what it raised."""


class Windows(_Context):
    """Windows of one image.

    In a deep network the gate of a layer needs all windows before any goes
    on. So they march together: each runs up to the next layer and is held
    there, in a thread of its own, of which one runs at a time. As many are
    held as the budget has room for. Of the others only the gates are kept,
    and each is computed again from its beginning for every layer. With
    gradients all must be held.

    The step must call the same layers in the same order for every window. A
    model that keeps what it is computing in its attributes, not in local
    variables, can not be held; one that draws random numbers (dropout in
    training) can not be computed again. Gradients, inference mode and autocast
    are in a thread what they are around it; other modes of torch, such as a
    default device or a counter of operations, do not reach it.

    Args:
        budget (float, optional): MiB of features that are held; 0 holds none,
            None all.
        images (int): Images of one size that each call is given windows of,
            the batch size of the layers.
        wait_on (str, optional): Device on which features wait, such as
            ``'cpu'``, by default where they are. Storages are moved as a
            whole, and only what the window itself has made.

    Raises:
        ValueError: On a budget below 0.
    """

    is_of_parts = True

    def __init__(
        self,
        budget: float | None = 2048,
        images: int = 1,
        wait_on: str | None = None,
    ) -> None:
        """Take the arguments; see the class."""
        if budget is not None and not budget >= 0:
            raise ValueError(f'budget must be 0 or more MiB, got {budget!r}')
        self.budget, self.images, self.wait_on = budget, images, wait_on
        self._means = None

    def __call__(
        self, step: Callable[[Window], Any], windows: Iterable[Window]
    ) -> list:
        """Compute all windows of an image, with one gate for each layer.

        Args:
            step: Given a window, cuts it out and runs the model on it. Where
                a window is not held, it is called again for every layer, and
                abandoned there, by an exception that is no ``Exception``.
                It ends once for every window, in their order.
            windows: Of one image, see :func:`grid`.

        Returns:
            list: What ``step`` returned for each.

        Raises:
            ValueError: The cores of the windows do not tile an image.
            WindowError: The step raised for a window, which is named.
            RuntimeError: Windows call different layers, or none, a layer is
                called with another number of images, or the budget is too
                small for gradients.
        """
        if self.layers is None or self._means is not None:
            raise RuntimeError(
                'Windows must be called within shared_context, one image at '
                'a time'
            )
        windows = list(windows)
        _check_cores(windows)
        flights = [_Flight(self, step, window) for window in windows]
        # What the first window holds tells what the others will.
        for flight in flights[:1]:
            flight.is_measured = self.budget is not None
        self._means, self.away, self.was_called = [], {}, False
        self.outside = pictures_of()
        try:
            while not all(flight.ended for flight in flights):
                self._advance(flights)
            if flights:
                self._check_called()
            return [flight.result for flight in flights]
        finally:
            _abandon(flights)
            self._means = None

    def _advance(self, flights):
        """Bring all to the next layer, or to their end."""
        room = float('inf') if self.budget is None else self.budget * MIB
        rate = 0.0  # bytes that a pixel holds: the first that is held tells
        for flight in flights:
            held = flight.advance(keep=rate * flight.pixels < room)
            if flight.is_held:
                rate = rate or held / flight.pixels
                room -= rate * flight.pixels
                if room < 0:
                    _abandon([flight])
        stops = [flight.stop for flight in flights]
        if stops != [None] * len(stops):
            for stop, flight in zip(stops, flights):
                if (stop and stop.where) != (stops[0] and stops[0].where):
                    raise RuntimeError(
                        f'window {flights[0].window} goes through '
                        f'{_text(stops[0])}, but window {flight.window} '
                        f'through {_text(stop)}: layers that not every '
                        'window calls alike are to be excluded'
                    )
            areas = [flight.window.area for flight in flights]
            # Once for all windows, as contexts around count their calls.
            self._means.append(stops[0].then(*_mean(stops, areas)))

    @property
    def part(self) -> Window:
        """The window that is being computed."""
        return self._current().window

    def pool(self, layer, value, count, then):
        """Give the mean over all windows, once all have come so far."""
        path = self.layers[layer]
        if value.shape[0] != self.images:
            raise RuntimeError(
                f'{path!r} is called with {value.shape[0]} images or regions, '
                f'where a window is of {self.images}: give such a layer in '
                'exclude=...'
            )
        stop = _Stop(path, value, count, then)
        return self._current().reach(stop, self._means)

    def _current(self):
        for flight in reversed(_flying.get()):
            if flight.windows is self:
                return flight
        raise RuntimeError(
            'the model was called within shared_context(model, Windows()), '
            'but not by a step that Windows was given'
        )


def _check_cores(windows):
    if windows:
        ends = list(zip(*(window.core for window in windows)))
        width, height = (max(ends[k + 2]) - min(ends[k]) for k in (0, 1))
        area = sum(window.area for window in windows)
        if not math.isclose(area, width * height, rel_tol=1e-9):
            raise ValueError(
                f'the cores of the windows have {area:g} pixels, while the '
                f'image that they span has {width * height:g}: every position '
                'must count once'
            )


class _Stop(NamedTuple):
    """Where a window is at, and its own mean."""

    path: str
    value: Tensor
    count: Tensor | None
    then: Callable[..., Tensor]

    @property
    def where(self):
        return self.path, self.value.shape, self.value.dtype


def _text(stop):
    if stop is None:
        return 'no further layer'
    return f'{stop.path!r} with {tuple(stop.value.shape)}'


def _mean(stops, areas):
    """Mean of what has come, and what it counts."""
    counts = [
        area if stop.count is None else stop.count
        for stop, area in zip(stops, areas)
    ]
    total = sum(counts)
    # In double precision, so that their order does not matter.
    mean = sum(
        stop.value.double() * (count / total)
        for stop, count in zip(stops, counts)
    )
    return mean.to(stops[0].value.dtype), (
        total if isinstance(total, Tensor) else None
    )


# Windows that this thread is computing, of nested contexts the innermost last.
_flying: ContextVar[tuple[_Flight, ...]] = ContextVar('flying', default=())


class _Enough(BaseException):
    """Ends a window at a layer; no Exception, so that no step catches it."""


class _Flight:
    """One window on its way through the model.

    Attributes:
        stop: The layer that it has come to, None before the first and after
            the last.
        ended: Whether ``result`` is there.
        is_measured: Whether it is of interest what it holds.
    """

    is_measured = False

    def __init__(self, windows: Windows, step: Callable, window: Window):
        self.windows, self.step, self.window = windows, step, window
        x1, y1, x2, y2 = window.box
        self.pixels = (x2 - x1) * (y2 - y1)
        self.stop = self.result = self.made = None
        self.ended = False
        self._thread = None

    @property
    def is_held(self) -> bool:
        return self._thread is not None

    def advance(self, keep: bool) -> int:
        """Go on to the next layer; gives the bytes that are held there."""
        self.stop = None
        if self.ended:
            return 0
        if self.is_held:
            self._go.release()
        elif keep:
            self._start()
        else:
            self._run_and_abandon()
            return 0
        self._back.acquire()
        # Not kept here, or the features in its traceback would be.
        error, self._error = self._error, None
        if self.stop is None or error is not None:
            self._thread.join()
            self._thread = None
        if isinstance(error, Exception):
            raise self._named(error) from error
        if error is not None:
            raise error
        return self.made.bytes() if self.is_held and self.made else 0

    def reach(self, stop, means):
        """Give the mean of the layer, once there is one; in the step."""
        self._calls += 1
        if self._calls > len(means):
            self.stop = stop
            if threading.current_thread() is not self._thread:
                if stop.value.requires_grad:
                    raise RuntimeError(
                        f'a budget of {self.windows.budget} MiB does not hold '
                        'all windows, which gradients need'
                    )
                raise _Enough
            self._hold(stop)
        return means[self._calls - 1]

    def _hold(self, stop):
        device = self.windows.wait_on
        if device is not None:
            self.made.move_to(device, but=(stop.value, stop.count))
        self._back.release()
        self._go.acquire()
        if self._is_abandoned:
            raise _Enough
        if device is not None:
            self.made.move_back()

    def let_go(self) -> None:
        """End it where it is held, or comes to be held; see ``abandon``."""
        if self.is_held:
            self._is_abandoned = True
            self._go.release()

    def abandon(self) -> None:
        """Wait for the end of one that was let go."""
        if self.is_held:
            self._thread.join()
            self._thread = None
            # Some of it may be others', such as what a module has cached.
            self.made and self.made.move_back()

    def _run(self):
        self._calls = 0
        self.made = None
        token = _flying.set((*_flying.get(), self))
        # Whether it is held or not, it may use what others have moved.
        moves = self.windows.wait_on is not None
        if moves or (self.is_measured and self.is_held):
            self.made = _Made(self.windows.away)
        try:
            with self.made or nullcontext():
                self.result = self.step(self.window)
        finally:
            _flying.reset(token)
        if self.stop is not None:
            raise RuntimeError(
                'the step went on after what ends a window at a layer: it '
                'must catch nothing but an Exception, no BaseException'
            )
        self.ended = True

    def _run_and_abandon(self):
        try:
            # What a call has begun, and is not let to end, is forgotten.
            copy_context().run(self._run)
        except _Enough:
            pass
        except Exception as error:
            raise self._named(error) from error

    def _named(self, error):
        return WindowError(
            f'window {self.window}: {type(error).__name__}: {error}'
        )

    def _start(self):
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._is_abandoned, self._error = False, None
        # Casts that autocast keeps for all threads are not a window's own.
        cached = self.windows.wait_on is None
        self._thread = threading.Thread(
            target=copy_context().run,
            args=(self._in_thread, _modes_of_torch(cached)),
            daemon=True,
        )
        self._thread.start()

    def _in_thread(self, modes):
        try:
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode())
                self._run()
        except _Enough:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._back.release()


def _abandon(flights):
    """Free what is held: all are let go before any is waited for."""
    for flight in flights:
        flight.let_go()
    for flight in flights:
        flight.abandon()


def _modes_of_torch(cached: bool):
    """What makes the modes of this thread, for another."""
    modes = [
        partial(torch.inference_mode, torch.is_inference_mode_enabled()),
        partial(torch.set_grad_enabled, torch.is_grad_enabled()),
    ]
    devices = ['cpu']
    if torch.cuda.is_initialized():
        devices.append('cuda')
        modes.append(partial(torch.cuda.stream, torch.cuda.current_stream()))
    for device in filter(is_autocast_on, devices):
        options = dict(
            dtype=autocast_dtype(torch.empty(0, device=device)),
            cache_enabled=cached and torch.is_autocast_cache_enabled(),
        )
        modes.append(partial(torch.autocast, device, **options))
    return modes


class _Made(TorchDispatchMode):
    """Knows the storages that were made within, as long as they live.

    Args:
        away: What all windows of an image have moved: key -> whose it is, the
            storage and its copy.
    """

    def __init__(self, away: dict) -> None:
        super().__init__()
        self._away = away
        self._own, self._others = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for key in self._note(self._others, (args, kwargs)):
            if key in self._away:
                self._share(key)
        results = func(*args, **kwargs)
        self._note(self._own, results)
        return results

    def _note(self, kind, tensors):
        """Keep what is seen for the first time; gives all keys."""
        keys = []
        for each in tree_flatten(tensors)[0]:
            if isinstance(each, Tensor):
                # While there is a reference, no other gets the same key.
                weak = StorageWeakRef(each.untyped_storage())
                if not any(
                    weak.cdata in known for known in (self._own, self._others)
                ):
                    kind[weak.cdata] = weak
                keys.append(weak.cdata)
        return keys

    def _share(self, key):
        """Bring back what another window made, and did not keep to itself."""
        owner = self._away[key][0]
        owner.move_back(key)
        owner._others[key] = owner._own.pop(key)

    def _storages(self):
        """Those of the window's own that are alive, by their keys."""
        for storages in (self._own, self._others):
            for key in [k for k, ref in storages.items() if ref.expired()]:
                del storages[key]
        found = {key: _storage(ref) for key, ref in self._own.items()}
        return {key: each for key, each in found.items() if each is not None}

    def bytes(self) -> int:
        """Sum of their sizes, wherever they are."""
        return sum(
            (self._away[key][2] if key in self._away else each).nbytes()
            for key, each in self._storages().items()
        )

    def move_to(self, device: str, but: Iterable) -> None:
        """Copy all to a device, and free them, but those of some tensors."""
        stay = self._note({}, but)
        for key, storage in self._storages().items():
            if key in stay:
                continue
            copy = torch.UntypedStorage(storage.nbytes(), device=device)
            self._others[copy._cdata] = StorageWeakRef(copy)
            copy.copy_(storage)
            storage.resize_(0)
            self._away[key] = (self, self._own[key], copy)

    def move_back(self, *keys: int) -> None:
        """Undo it, for some or for all that are still in use."""
        mine = [k for k, (owner, *_) in self._away.items() if owner is self]
        for key in keys or mine:
            _, ref, copy = self._away.pop(key)
            storage = None if ref.expired() else _storage(ref)
            if storage is not None:
                storage.resize_(copy.nbytes())
                storage.copy_(copy)


def _storage(weak: StorageWeakRef) -> torch.UntypedStorage | None:
    return torch.UntypedStorage._new_with_weak_ptr(weak.cdata)


# ------------------------------------------ processes, frames, crops of images


class Processes(_Context):
    """Parts of one image, each in a process of its own.

    Each layer adds up C + 1 numbers over the processes in forward, the last of
    them what its part counts, and as many in backward; nothing else is sent.
    All processes must call the same layers in the same order. Gradients are
    those of the sum of the losses of all processes: summed over them, or
    averaged as DDP does, those of the parameters are exactly those of the
    whole image, but for what convolutions see at borders.

    Args:
        part (Window): Box and core of this process's part.
        group (ProcessGroup, optional): The processes that hold the image, by
            default all.

    Attributes:
        share (float): Of the image's area, within the context: what the mean
            loss of this process counts in that of the image.
    """

    is_of_parts = True

    def __init__(
        self, part: Window, group: dist.ProcessGroup | None = None
    ) -> None:
        """Take the arguments; see the class."""
        self.part, self.group = part, group

    def enter(self) -> None:
        """Find the area of the whole image."""
        super().enter()
        layer = next(iter(self.layers))
        device = next(chain(layer.parameters(), layer.buffers())).device
        area = torch.tensor(
            [self.part.area], dtype=torch.float64, device=device
        )
        dist.all_reduce(area, group=self.group)
        self.share = self.part.area / area.item()
        self.outside = pictures_of()

    def leave(self) -> None:
        """Check."""
        self._check_called()

    def pool(self, layer, value, count, then):
        """Give the mean over all processes."""
        is_area = count is None
        if is_area:  # of another process it may be something else
            count = value.new_full((len(value), 1), self.part.area).double()
        sums = torch.cat([value.double() * count, count], 1)
        sums = _Summed.apply(sums, self.group)
        value = (sums[:, :-1] / sums[:, -1:]).to(value.dtype)
        return then(value, None if is_area else sums[:, -1:])


class _Summed(torch.autograd.Function):
    """Sum over processes, which is its own adjoint."""

    @staticmethod
    def forward(ctx, value, group):
        ctx.group = group
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx, grad):
        return _Summed.apply(grad, ctx.group), None


class Frames(_Context):
    """The frames of a video, in their order: a running mean.

    ::

        with shared_context(model, Frames(horizon=25)) as frames:
            for frame in video:
                result = frames(model, frame)

    Frame t counts 1 / min(t, horizon): the mean of all so far is taken, and
    after ``horizon`` frames one that forgets exponentially. Gradients go
    through the frame at hand only.

    Args:
        horizon (float, optional): In frames, 1 or more; None never forgets.

    Raises:
        ValueError: On a horizon below 1.
    """

    def __init__(self, horizon: float | None = None) -> None:
        """Take the argument; see the class."""
        if horizon is not None and not horizon >= 1:
            raise ValueError(f'horizon must be 1 frame or more, got {horizon}')
        self.horizon = horizon
        self.reset()

    def reset(self) -> None:
        """Forget all frames, as after a cut."""
        self._time, self._before, self._now = 0, [], None

    def __call__(self, step: Callable, *args, **kwargs):
        """Compute one frame; gives what ``step`` returns.

        A frame in which it raises does not count.

        Raises:
            RuntimeError: It calls other layers than for the frames before, or
                with other shapes.
        """
        if self.layers is None or self._now is not None:
            raise RuntimeError(
                'Frames must be called within shared_context, one at a time'
            )
        self._now, self.was_called = [], False
        try:
            result = step(*args, **kwargs)
            self._check_called()
            if self._time and len(self._now) < len(self._before):
                path = self._before[len(self._now)][0]
                raise RuntimeError(
                    f'this frame did not go through {path!r}, as those before '
                    'did: call reset() to begin another video'
                )
            self._before = self._now
            self._time += 1
            return result
        finally:
            self._now = None

    def pool(self, layer, value, count, then):
        """Give the running mean."""
        if self._now is None:
            raise RuntimeError(
                'the model was called within shared_context(model, Frames()), '
                'but not by a step that Frames was given'
            )
        one = value.new_ones(1, dtype=torch.float64)
        sums = value.double() * (one if count is None else count)
        total, path = one if count is None else count, self.layers[layer]
        if self._time:
            past = self._before[len(self._now) :][:1]
            if not past or (path, sums.shape) != (
                past[0][0],
                past[0][1].shape,
            ):
                raise RuntimeError(
                    f'{path!r} with {tuple(sums.shape)} was not in the frames '
                    'before: call reset() to begin another video'
                )
            time = self._time + 1
            rate = 1 / min(time, self.horizon or time)
            sums = past[0][1].lerp(sums, rate)
            total = past[0][2].lerp(total, rate)
        self._now.append((path, sums.detach(), total.detach()))
        value = (sums / total).to(value.dtype)
        return then(value, None if count is None else total)


class Crops(_Context):
    """Crops of several images, in one batch.

    Args:
        images: Which image each item of the batch is of, such as its path.

    Attributes:
        images: May be changed from batch to batch.
    """

    def __init__(self, images: Sequence[Hashable] = ()) -> None:
        """Take the argument; see the class."""
        self.images = images

    def leave(self) -> None:
        """Check."""
        if self.images:
            self._check_called()

    def pool(self, layer, value, count, then):
        """Give every crop the mean over all crops of its image."""
        if len(value) != len(self.images):
            raise RuntimeError(
                f'{self.layers[layer]!r} is called with {len(value)} images or'
                f' regions, where the batch has {len(self.images)}: give such '
                'a layer in exclude=...'
            )
        numbers = {
            image: k for k, image in enumerate(dict.fromkeys(self.images))
        }
        index = torch.tensor(
            [numbers[image] for image in self.images], device=value.device
        )
        counts = count
        if count is None:
            counts = value.new_ones(len(value), 1, dtype=torch.float64)
        shape = (len(numbers), value.shape[1])
        sums = counts.new_zeros(shape)
        sums = sums.index_add(0, index, value.double() * counts)
        totals = counts.new_zeros(len(numbers), 1).index_add(0, index, counts)
        return then(
            (sums / totals)[index].to(value.dtype),
            None if count is None else totals[index],
        )
