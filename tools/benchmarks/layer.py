"""The contenders for one Poly-NL layer, and what each costs in a case.

A case is C channels at N positions of one image, float32. The unit is a 1x1
convolution C -> C.
"""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from polynl_mm.layers import PolyNL2d
from polynl_mm.ops import FORMS

from . import timing
from .core import HERE, Core, core_in
from .timing import MODES

try:
    from mmcv.cnn.bricks import ContextBlock, NonLocal2d
except ImportError:
    ContextBlock = NonLocal2d = None

UNIT = 'conv'
RIVALS = ('NonLocal2d', 'ContextBlock')
DOORS = ('auto', 'behind')
# Of what a process holds, less than this is by chance.
LEAST_PEAK = 2**20
WHATS = (*MODES, 'peak of a training step')


class Disagreement(Exception):
    """Contenders that should compute the same do not."""


class Against(NamedTuple):
    """Another commit, and the folder that its package was extracted to."""

    commit: str
    folder: str

    def names(self, door: str) -> tuple[str, str]:
        """The contender with this operation, and the one with the other."""
        return f'{door}@here', f'{door}@{self.commit}'


class OnX(PolyNL2d):
    """The layer with the operation of any commit, all else the same.

    Shape:
        - input and output: (B, c, H, W)
    """

    def __init__(self, c: int, core: Core) -> None:
        """As :class:`PolyNL2d`, beta != 0."""
        super().__init__(c, beta_init=0.5)
        self.core = core

    def tensors(self) -> tuple:
        """The parameters as the operation takes them."""
        convs = (self.w1, self.w2, self.w3)
        weights = (conv.weight.flatten(1) for conv in convs)
        return self.core.params(*weights, self.alpha, self.beta)

    def forward(self, x):
        """Shape: (B, c, H, W) -> the same."""
        return self.core.poly_nl(x, self.tensors())


class Behind(OnX):
    """The same behind a 1x1 convolution c/4 -> c and a norm that is frozen.

    Computed from the input of the convolution. In evaluation, the constants
    are those of the moment :meth:`eval` was called.

    Shape:
        - input: (B, c // 4, H, W)
        - output: (B, c, H, W)
    """

    def __init__(self, c: int, core: Core, form: str = 'auto') -> None:
        """Draw the convolution and the norm, too."""
        super().__init__(c, core)
        self.form, self.constants = form, None
        self.conv = nn.Conv2d(c // 4, c, 1, bias=False)
        nn.init.normal_(self.conv.weight, std=(c // 4) ** -0.5)
        self.register_buffer('scale', 0.5 + torch.rand(c))
        self.register_buffer('shift', torch.randn(c))

    def train(self, mode: bool = True):
        """Make the constants where it is for evaluation."""
        super().train(mode)
        with torch.no_grad():
            self.constants = None if mode else self.projected()
        return self

    def projected(self) -> tuple:
        """The convolution and the parameters as the operation takes them."""
        a = self.conv.weight.flatten(1) * self.scale.unsqueeze(1)
        conv = self.core.conv(a, self.shift)
        return conv, self.core.project(conv, self.tensors())

    def forward(self, h):
        """Shape: (B, c // 4, H, W) -> (B, c, H, W)."""
        return self.core.poly_nl_behind(
            h, *(self.constants or self.projected()), form=self.form
        )


def build(
    name: str, c: int, n: int, against: Against | None = None
) -> nn.Module | None:
    """A contender, None where it is left out. All start alike."""
    torch.manual_seed(0)
    door, _, commit = name.partition('@')
    if commit:
        core = HERE if commit == 'here' else core_in(against.folder)
        return (OnX if door == 'auto' else Behind)(c, core)
    if name in FORMS:
        # Its weights keep the variance.
        return PolyNL2d(c, beta_init=0.5, form=name)
    if name == UNIT:
        return nn.Conv2d(c, c, 1, bias=False)
    if name == 'NonLocal2d':
        if NonLocal2d is None or n * n * c > 2**34:
            return None
        return NonLocal2d(c, zeros_init=False)
    return None if ContextBlock is None else ContextBlock(c, ratio=1 / 16)


def make_input(
    c: int, n: int, device: str, offset: int = 0
) -> tuple[torch.Tensor, ...]:
    """x, wanting a gradient, and dL/dy, both (1, C, H, W) with HW = N.

    They begin ``offset`` elements after an address of the allocator's choice.
    """
    h = 2 ** (int(math.log2(n)) // 2)
    gen = torch.Generator().manual_seed(c + n)

    def draw():
        memory = torch.empty(offset + c * n, device=device)
        values = torch.randn(1, c, h, n // h, generator=gen)
        return memory[offset:].view_as(values).copy_(values)

    return draw().requires_grad_(), draw()


def offset_in(round_: int) -> int:
    """An offset for a round: whole cache lines, never a whole page."""
    return 16 * (1 + 11 * round_)


def make_inputs(c: int, n: int, device: str, offset: int = 0):
    """Give a function of a module: what it takes, and dL/dy."""
    x, dy = make_input(c, n, device, offset)
    h, _ = make_input(c // 4, n, device, offset)
    return lambda module: (h if isinstance(module, Behind) else x, dy)


def call_of(module, x, dy, mode: str, autocast=None):
    """Give a function: a forward, or one with backward.

    No gradient is left.
    """
    autocast = autocast or contextlib.nullcontext()

    def call():
        with torch.set_grad_enabled(mode == 'training'), autocast:
            y = module(x)
        if mode == 'training':
            y.backward(dy.to(y.dtype))
            x.grad = None
            module.zero_grad(set_to_none=True)

    return call


def peak_memory(
    name: str, c: int, n: int, device: str, against: Against | None
) -> int:
    """Bytes that one training step adds at its peak. Run in a child."""
    module = build(name, c, n, against).to(device)
    inputs = make_inputs(c, n, device)(module)
    return timing.added_at_peak(call_of(module, *inputs, 'training'), device)


def disagreement(truth, others, x, dy) -> float:
    """Largest relative difference in value or gradient of modules."""

    def results(module):
        x.grad = None
        module.zero_grad(set_to_none=True)
        y = module(x)
        y.backward(dy)
        return [y.detach(), x.grad, *(p.grad for p in module.parameters())]

    expected = results(truth)
    return max(
        ((a - b).norm() / b.norm()).item()
        for module in others
        for a, b in zip(results(module), expected)
    )


def run_case(
    c: int,
    n: int,
    device: str,
    seconds: float,
    pool=None,
    against: Against | None = None,
) -> dict:
    """One row of the tables.

    Args:
        c, n (int): Channels and positions.
        device (str): 'cpu' or 'cuda'.
        seconds (float): Time for each contender and mode.
        pool: :func:`timing.one_process_each`; peak memory is left out if None.
        against (Against, optional): Whose operation takes part, too.

    Raises:
        Disagreement: The forms, or the operations, differ in value or in a
            gradient.
    """
    names = [UNIT, *FORMS, *RIVALS]
    doors = DOORS if against else ()
    pairs = [against.names(door) for door in doors]
    names += [name for pair in pairs for name in pair]

    def build_all(mode):
        modules = {name: build(name, c, n, against) for name in names}
        return {
            name: module.to(device).train(mode == 'training')
            for name, module in modules.items()
            if module is not None
        }

    def make_calls(mode, i):
        inputs = make_inputs(c, n, device, offset_in(i))
        return {
            name: call_of(module, *inputs(module), mode)
            for name, module in build_all(mode).items()
        }

    modules, inputs = build_all('training'), make_inputs(c, n, device)
    error = max(
        disagreement(
            modules[truth],
            [modules[name] for name in others],
            *inputs(modules[truth]),
        )
        for truth, others in (
            ('direct', FORMS),
            *((b, (a,)) for a, b in pairs),
        )
    )
    if not error < 1e-3:
        raise Disagreement(
            f'C={c} N={n}: the forms differ by {error:.2g}, expected at most '
            '1e-3'
        )
    row = dict(c=c, n=n, disagreement=error, contenders={})
    x, _ = inputs(modules[UNIT])
    cores = {'auto': HERE}
    if against:
        cores[f'auto@{against.commit}'] = core_in(against.folder)
    for name, core in cores.items():
        row[name] = {
            mode: core.chosen(x, backward=mode == 'training') for mode in MODES
        }
    for name, module in modules.items():
        case = timing.saved_bytes(module, inputs(module)[0])
        row['contenders'][name] = dict(saved_bytes=case)
        if pool is not None:
            row['contenders'][name]['peak_bytes'] = pool.apply(
                peak_memory, (name, c, n, device, against)
            )
    for mode in MODES:
        for name, f in make_calls(mode, 0).items():
            row['contenders'][name][f'{mode}_flops'] = timing.flops(f)
        times = timing.take_turns(
            partial(make_calls, mode),
            device,
            UNIT,
            seconds=seconds,
            rounds=timing.ROUNDS,
        )
        for name, t in times.items():
            row['contenders'][name][mode] = t
    return row


def relative(
    row: dict, name: str, mode: str, unit: str = UNIT
) -> tuple[float, float]:
    """:func:`timing.ratio` of two contenders of a row."""
    contenders = row['contenders']
    return timing.ratio(contenders[name][mode], contenders[unit][mode])


def where(row: dict) -> str:
    """Name of a case."""
    return f'C={row["c"]} N={row["n"]}'


def time_table(rows: list, mode: str) -> str:
    """Markdown: time in units of the convolution, +- half the spread."""
    names = [*FORMS, *RIVALS]
    head = ['C', 'N', '1x1 conv, ms', *names, 'auto took', 'direct / auto']
    lines = []
    for row in rows:
        cells = [row['c'], row['n']]
        unit, half = timing.seconds(row['contenders'][UNIT][mode])
        cells.append(f'{unit * 1e3:.3g} ± {100 * half / unit:.0f} %')
        for name in names:
            if name not in row['contenders']:
                cells.append('left out')
                continue
            cells.append('{:.2f} ± {:.2f}'.format(*relative(row, name, mode)))
        cells.append(row['auto'][mode])
        cells.append(f'{relative(row, "direct", mode, "auto")[0]:.2f}')
        lines.append(cells)
    return timing.table(head, lines)


def memory_table(rows: list) -> str:
    """Markdown: in units of the input's bytes; GFLOPs of a training step."""
    names = [UNIT, *FORMS, *RIVALS]
    lines = []
    for row in rows:
        size = row['c'] * row['n'] * 4
        cells = [row['c'], row['n'], f'{size / 2**20:.3g}']
        for name in names:
            case = row['contenders'].get(name)
            if case is None:
                cells.append('left out')
                continue
            peak = case.get('peak_bytes')
            cells.append(
                f'{case["saved_bytes"]["all"] / size:.2f} / '
                + ('-' if peak is None else f'{peak / size:.1f}')
                + f' / {case["training_flops"] / 1e9:.2f}'
            )
        lines.append(cells)
    return timing.table(['C', 'N', 'input, MiB', *names], lines)


def against_table(rows: list, against: Against) -> str:
    """Markdown: this commit's time and peak in units of the other's.

    Where the two take another form, the other's is in brackets.
    """
    head = ['C', 'N', *(f'auto took, {mode}' for mode in MODES)]
    for door in DOORS:
        head += [f'{door} / {door}@{against.commit}, {what}' for what in WHATS]
    lines = []
    for row in rows:
        cells = [row['c'], row['n']]
        for mode in MODES:
            took, other = row['auto'], row[f'auto@{against.commit}']
            took, other = took[mode], other[mode]
            cells.append(took if took == other else f'{took} ({other})')
        for door in DOORS:
            for what in WHATS:
                found = against_of(row, door, what, against)
                cells.append(' ± '.join(f'{v:.3f}' for v in found) or '-')
        lines.append(cells)
    return timing.table(head, lines)


def against_of(row: dict, door: str, what: str, against: Against) -> tuple:
    """A figure in units of the other commit's, and its spread if it has one.

    Nothing where it was not measured, or is too small to be.
    """
    here, there = against.names(door)
    if what in MODES:
        return relative(row, here, what, there)
    here, there = (
        row['contenders'][name].get('peak_bytes', 0) for name in (here, there)
    )
    return (here / there,) if min(here, there) >= LEAST_PEAK else ()


def worst_against(rows: list, against: Against) -> list:
    """For each column of :func:`against_table` the largest, and where."""
    out = []
    for door in DOORS:
        for what in WHATS:
            cases = [
                (found[0], where(row), found)
                for row in rows
                for found in [against_of(row, door, what, against)]
                if found
            ]
            if cases:
                value, place, found = max(cases)
                ratio = f'{door} / {door}@{against.commit}, {what}'
                spread = found[1] if found[1:] else None
                out.append(
                    dict(ratio=ratio, worst=value, spread=spread, where=place)
                )
    return out
