"""Rates of ``polynl_mm.ops.choice`` for the machine at hand, by measuring.

Both forms of the layer on X, forward and backward, are timed at a grid of
sizes; a launch and, where kernels of our own run, a byte are measured by
themselves. What multiply-adds take is the rest: least squares of the relative
errors, none below zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

import torch

from polynl_mm.ops.choice import ON_X, Form, Rate, choose, cost
from polynl_mm.ops.precision import HALF, has_kernels

from . import layer, timing

LAUNCHES, COPIED = 100, 2**26
PICO = 1e-12


class Regime(NamedTuple):
    """In what the features are, and whether convolutions may be in TF32."""

    name: str
    dtype: torch.dtype
    tf32: bool


REGIMES = dict(
    cpu=[Regime('float32', torch.float32, False)],
    cuda=[
        Regime('bfloat16', torch.bfloat16, True),
        Regime('float32, convolutions in TF32', torch.float32, True),
        Regime('float32', torch.float32, False),
    ],
)


class Case(NamedTuple):
    """What a form takes.

    Attributes:
        form, c, n: The form, on X of c channels and n positions.
        seconds: Forward and backward.
        images: So many at once.
    """

    form: Form
    c: int
    n: int
    seconds: float
    images: int = 1


class Found(NamedTuple):
    """Rates, and how well they say what was measured.

    Attributes:
        off: The largest relative error of a time.
        loss: What the form that is chosen takes, of the better one, at worst.
    """

    rate: Rate
    off: float
    loss: float


def run(
    device: str, sizes: Iterable[tuple[int, int]], seconds: float
) -> Iterator[str]:
    """Lines to print, a :class:`Rate` for each regime.

    Args:
        device (str): 'cpu' or 'cuda'.
        sizes (iterable): (C, N), two at least.
        seconds (float): About how long each is timed on a CPU.
    """
    sizes = list(sizes)
    for regime in REGIMES[device]:
        torch.backends.cudnn.allow_tf32 = regime.tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        lean = has_kernels(torch.empty(1, dtype=regime.dtype, device=device))
        cases = [
            Case(form, c, n, clock(call, device, seconds))
            for c, n in sizes
            for form, call in calls_of(c, n, device, regime.dtype).items()
        ]
        launch = seconds_of_launch(device, seconds) / PICO
        byte = seconds_of_byte(device, seconds) / PICO if lean else None
        found = fit(cases, regime.dtype.itemsize, launch, byte, lean)
        yield (
            f'{regime.name}: {found.rate}\n'
            f'  times within {found.off:.0%}, the choice at most '
            f'{found.loss:.2f} of the better form'
        )


# ------------------------------------------------------------ measurements


def calls_of(
    c: int, n: int, device: str, dtype: torch.dtype
) -> dict[Form, Callable]:
    """Forward and backward of each form at a size."""
    x, dy = (t.detach().to(dtype) for t in layer.make_input(c, n, device))
    x.requires_grad_()
    low = dtype in HALF

    def call_of(form):
        module = layer.build(form.name, c, n).to(device)
        inputs = [x, *module.parameters()]

        def call():
            with torch.autocast(device, torch.bfloat16, enabled=low):
                y = module(x)
            return torch.autograd.grad(y, inputs, dy)

        return call

    return {form: call_of(form) for form in ON_X}


def clock(f: Callable, device: str, seconds: float) -> float:
    """Seconds of a call; on a GPU without the host, by a captured graph."""
    if device == 'cuda':
        return _seconds_of_graph(f)
    times = timing.take_turns(
        lambda _: dict(call=f), device, 'call', 100, seconds, timing.ROUNDS
    )
    return timing.seconds(times['call'])[0]


def _seconds_of_graph(f, replays: int = 20) -> float:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    graph.reset()
    return statistics.median(times)


def seconds_of_launch(device: str, seconds: float) -> float:
    """What an operation takes that does nothing."""
    one = torch.zeros(1, device=device)

    def many():
        for _ in range(LAUNCHES):
            one.add_(1)

    return clock(many, device, seconds) / LAUNCHES


def seconds_of_byte(device: str, seconds: float) -> float:
    """What a copy takes for a byte that it reads or writes."""
    x = torch.zeros(COPIED, device=device)
    y = torch.empty_like(x)
    taken = clock(lambda: y.copy_(x), device, seconds)
    return taken / (2 * COPIED * x.element_size())


# --------------------------------------------------------------------- fit


def fit(
    cases: list[Case],
    itemsize: int,
    launch: float,
    byte: float | None,
    lean: bool,
) -> Found:
    """Rates that say what was measured.

    Args:
        cases (list of Case): Every size with both forms.
        itemsize (int): Bytes per element of the features.
        launch (float): Picoseconds of a launch.
        byte (float, optional): Those of a byte; to be found, too, where it is
            None.
        lean (bool): Whose costs, as in :func:`polynl_mm.ops.choice.cost`.
    """
    rows, known = [], []
    for case in cases:
        row, launches = _terms(case, itemsize, lean)
        if lean:  # it has one product for both
            row[:2] = [sum(row[:2])]
        moved = row.pop() if byte is not None else 0
        rows.append([term / case.seconds for term in row])
        spent = launches * launch + moved * (byte or 0)
        known.append(1 - spent * PICO / case.seconds)
    rows = torch.tensor(rows, dtype=torch.float64) * PICO
    solved = least_squares(rows, torch.tensor(known, dtype=torch.float64))
    values = [solved[0], *solved] if lean else solved
    if byte is not None:
        values = [*values, byte]
    rate = Rate(*(float(f'{v:.2g}') for v in (*values, launch)), lean)
    return Found(rate, *_quality(cases, rate, itemsize))


def _terms(case: Case, itemsize: int, lean: bool) -> tuple[list, int]:
    """What the rates multiply, in the order of Rate; launches apart."""
    taken = cost(case.form, None, case.c, True, lean)
    row = [
        case.n * taken.convolutions,
        case.n * taken.products,
        taken.algebra,
        case.n * taken.temporaries * itemsize,
    ]
    return [case.images * term for term in row], taken.launches


def least_squares(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """The x >= 0 with the least norm of a x - b, a (m, k) with a small k."""
    count = a.shape[1]
    best, least = [0.0] * count, b.norm()
    for size in range(1, count + 1):
        for used in combinations(range(count), size):
            part = a[:, used]
            x = torch.linalg.lstsq(part, b[:, None]).solution[:, 0]
            left = (part @ x - b).norm()
            if (x >= 0).all() and left < least:
                best, least = [0.0] * count, left
                for i, value in zip(used, x.tolist(), strict=True):
                    best[i] = value
    return best


def _quality(cases, rate: Rate, itemsize: int) -> tuple[float, float]:
    sizes, off = {}, 0.0
    for case in cases:
        row, launches = _terms(case, itemsize, rate.lean)
        told = launches * rate.launch
        told += sum(a * b for a, b in zip(row, rate[:4], strict=True))
        off = max(off, abs(told * PICO / case.seconds - 1))
        size = (case.c, case.n, case.images)
        sizes.setdefault(size, {})[case.form] = case.seconds
    losses = [
        times[choose(ON_X, n, None, c, True, rate, itemsize, images)]
        / min(times.values())
        for (c, n, images), times in sizes.items()
    ]
    return off, max(losses)
