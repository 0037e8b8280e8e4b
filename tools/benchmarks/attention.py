"""Poly-SA beside softmax attention and a linear one, and what each costs.

A case is N tokens of C channels of one image, float32. All have the same two
linear layers, ``qkv`` and ``proj``; the unit is these alone.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from polynl_mm.attention import PolySA
from polynl_mm.ops import FORMS

from . import timing
from .layer import Disagreement, call_of, disagreement
from .rivals import not_written_out
from .timing import MODES

UNIT = 'projections'
NAMES = (*FORMS, 'learnt', 'softmax', 'efficient')
CHANNELS = (256,)
POSITIONS = (196, 784, 3136, 12544, 65536)
HEAD = 32  # channels of a head, of which there are C / HEAD
# Tokens of the call before the peak of memory is read.
WARM_UP = 196


class Projections(nn.Module):
    """The two linear layers, and nothing between them.

    Shape: (B, N, c) -> the same, as of all contenders.
    """

    def __init__(self, c: int) -> None:
        """Draw them; see the class."""
        super().__init__()
        self.heads = c // HEAD
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x):
        """The queries alone go on."""
        return self.proj(self.qkv(x)[..., : x.shape[2]])


class Softmax(Projections):
    """Softmax attention; its N x N matrix is never written out."""

    def forward(self, x):
        """Mix the values of each head."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, HEAD))
        y = self.mixed(*qkv.permute(2, 0, 3, 1, 4).unbind())
        return self.proj(y.transpose(1, 2).flatten(2))

    def mixed(self, q, k, v):
        """Shape: (B, heads, N, HEAD), three times -> the same."""
        with not_written_out():
            return F.scaled_dot_product_attention(q, k, v)


class Efficient(Softmax):
    """Efficient attention (Shen et al., WACV 2021), linear in N.

    Queries are normalised over channels, keys over tokens, and keys meet
    values first.
    """

    def mixed(self, q, k, v):
        """As of :class:`Softmax`."""
        return q.softmax(3) @ (k.softmax(2).mT @ v)


def build(name: str, c: int, n: int) -> nn.Module:
    """A contender; Poly-SA in every form has the same weights."""
    torch.manual_seed(0)
    if name == UNIT:
        return Projections(c)
    if name in FORMS:
        return PolySA(c, c // HEAD, form=name)
    if name == 'learnt':
        return PolySA(c, c // HEAD, pooling='learnt', num_tokens=n)
    return dict(softmax=Softmax, efficient=Efficient)[name](c)


def make_input(c: int, n: int, device: str) -> tuple[torch.Tensor, ...]:
    """x (1, N, C), wanting a gradient, and dL/dy."""
    gen = torch.Generator().manual_seed(c + n)
    x, dy = (torch.randn(1, n, c, generator=gen).to(device) for _ in '12')
    return x.requires_grad_(), dy


def peak_memory(name: str, c: int, n: int, device: str, mode: str) -> int:
    """Bytes that a call adds at its peak. Run in a child.

    Before it comes a call with few tokens, as one with many may take long.
    """
    call, warm_up = (
        call_of(build(name, c, k).to(device), *make_input(c, k, device), mode)
        for k in (n, min(n, WARM_UP))
    )
    return timing.added_at_peak(call, device, warm_up)


def expected(name: str, mode: str, n: int, before: list) -> float | None:
    """Seconds of a call, from the last case that ran; None if none did."""
    for row in reversed(before):
        times = row['contenders'][name].get(mode)
        if times:
            growth = n / row['n']
            return timing.seconds(times)[0] * growth ** (
                2 if name == 'softmax' else 1
            )
    return None


def run_case(
    c: int,
    n: int,
    device: str,
    seconds: float,
    limit: float,
    before: list,
    pool=None,
) -> dict:
    """One row of the tables.

    Args:
        c, n (int): Channels and tokens.
        device (str): 'cpu' or 'cuda'.
        seconds (float): Time for each contender and mode.
        limit (float): What is expected to take more seconds in a mode is not
            run; the row has what is expected of a call.
        before (list): The rows of the same channels and fewer tokens.
        pool: :func:`timing.one_process_each`; peak memory is left out if None.

    Raises:
        Disagreement: The forms of Poly-SA differ in value or in a gradient.
    """
    forms = [build(name, c, n).to(device) for name in FORMS]
    error = disagreement(forms[0], forms[1:], *make_input(c, n, device))
    if not error < 1e-3:
        raise Disagreement(
            f'C={c} N={n}: the forms differ by {error:.2g}, expected at most '
            '1e-3'
        )
    row = dict(c=c, n=n, disagreement=error)
    row['contenders'] = {name: {} for name in (UNIT, *NAMES)}
    for mode in MODES:
        names = []
        for name, case in row['contenders'].items():
            call = expected(name, mode, n, before)
            # Once before the first round, and once at least in each.
            if call is None or call * (timing.ROUNDS + 1) <= limit:
                names.append(name)
            else:
                case[f'{mode}_expected'] = call

        def make_calls(i, mode=mode, names=names):
            inputs = make_input(c, n, device)
            modules = {name: build(name, c, n).to(device) for name in names}
            return {k: call_of(m, *inputs, mode) for k, m in modules.items()}

        times = timing.take_turns(
            make_calls, device, UNIT, seconds=seconds, rounds=timing.ROUNDS
        )
        for name, taken in times.items():
            case = row['contenders'][name]
            case[mode] = taken
            if pool is not None:
                case[f'{mode}_peak_bytes'] = pool.apply(
                    peak_memory, (name, c, n, device, mode)
                )
    return row


def _cell(case: dict, mode: str, tell) -> str:
    if mode in case:
        return tell(case)
    return f'not run ({case[f"{mode}_expected"]:.0f} s a call)'


def time_table(rows: list, mode: str) -> str:
    """Markdown: time in units of the projections, +- half the spread."""
    lines = []
    for row in rows:
        unit = row['contenders'][UNIT][mode]
        middle, half = timing.seconds(unit)
        spread = f'{middle * 1e3:.3g} ± {100 * half / middle:.0f} %'

        def ratio(case, unit=unit):
            return '{:.2f} ± {:.2f}'.format(*timing.ratio(case[mode], unit))

        cells = [_cell(row['contenders'][name], mode, ratio) for name in NAMES]
        lines.append([row['c'], row['n'], spread, *cells])
    return timing.table(['C', 'N', f'{UNIT}, ms', *NAMES], lines)


def memory_table(rows: list, mode: str) -> str:
    """Markdown: peak in units of the tokens' bytes."""
    lines = []
    for row in rows:
        size = row['c'] * row['n'] * 4
        tell = partial(_peak, size, f'{mode}_peak_bytes')
        cells = [
            _cell(row['contenders'][name], mode, tell)
            for name in (UNIT, *NAMES)
        ]
        lines.append([row['c'], row['n'], f'{size / 2**20:.3g}', *cells])
    return timing.table(['C', 'N', 'tokens, MiB', UNIT, *NAMES], lines)


def _peak(size, key, case):
    return f'{case[key] / size:.1f}' if key in case else '-'
