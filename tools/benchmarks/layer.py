"""Cost of one Poly-NL layer, in units of one 1x1 convolution C -> C.

In one run, the contenders taking turns: ``direct``, ``gram`` and ``auto`` of
``polynl_mm.ops``, and where mmcv is installed its ``NonLocal2d`` (as far as
its N x N matrix is reasonable) and ``ContextBlock``. Before anything is timed,
the three forms must agree in value and in all gradients. A turn times every
contender once; a ratio of two is the median of their ratios in the same turn,
its spread half the distance between the quartiles, so that a machine that is
slow for a second does not matter. Everything is allocated anew several times,
at other addresses: a convolution on a CPU can take twice as long for the place
where its tensors happen to lie. Memory is what one training step adds at its
peak, each case in a process of its own.

The numbers behind ``polynl_mm.ops.choose_form`` come from here.

    python tools/benchmark_layer.py --json out.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from polynl_mm.ops import FORMS, choose_form, poly_nl

try:
    from mmcv.cnn.bricks import ContextBlock, NonLocal2d
except ImportError:
    ContextBlock = NonLocal2d = None

UNIT = 'conv'
RIVALS = ('NonLocal2d', 'ContextBlock')
MODES = ('forward', 'training')
ROUNDS = 4


class Layer(nn.Module):
    """Poly-NL with nothing but torch: what ``PolyNL2d`` holds and calls."""

    def __init__(self, c: int, form: str) -> None:
        """Weights that keep the variance, beta != 0."""
        super().__init__()
        self.form = form
        self.weights = nn.ParameterList(
            torch.randn(c, c) / math.sqrt(c) for _ in range(3)
        )
        self.alpha = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x):
        """Shape: (B, C, H, W) -> the same."""
        return poly_nl(x, *self.weights, self.alpha, self.beta, form=self.form)


def build(name: str, c: int, n: int) -> nn.Module | None:
    """A contender, None where it is left out. All start alike."""
    torch.manual_seed(0)
    if name in FORMS:
        return Layer(c, name)
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


def training_step(module, x, dy):
    """Forward and backward; the gradients are left in ``.grad``."""
    x.grad = None
    module.zero_grad(set_to_none=True)
    module(x).backward(dy)


def check_agreement(modules: dict, x, dy) -> float:
    """Largest relative difference of the forms in value or gradient."""
    results = {}
    for form in FORMS:
        training_step(modules[form], x, dy)
        with torch.no_grad():
            y = modules[form](x)
        grads = [p.grad for p in modules[form].parameters()]
        results[form] = [y, x.grad.clone(), *grads]
    truth = results['direct']
    return max(
        ((a - b).norm() / b.norm()).item()
        for form in FORMS
        for a, b in zip(results[form], truth)
    )


def saved_bytes(module, x) -> dict:
    """Bytes kept for backward, parameters not counted."""
    own = {p.data_ptr() for p in module.parameters()}
    kept = {}

    def keep(t):
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(x)
    half = x.numel() * x.element_size() / 2
    return dict(
        all=sum(kept.values()),
        large=sum(b for b in kept.values() if b >= half),
    )


def flops(f) -> int:
    """Floating point operations of the products, two per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock reads what it did."""
    if device == 'cuda':
        torch.cuda.synchronize()


def seconds_of(f, device: str) -> float:
    """Time of one call."""
    synchronize(device)
    start = time.perf_counter()
    f()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(make_calls, seconds: float, device: str) -> dict:
    """Seconds of each call by turn; None in turns that a slow one sat out.

    ``make_calls(round)`` allocates and gives the calls by name.
    """
    times = {}
    for i in range(ROUNDS):
        calls = make_calls(i)
        if i == 0:
            for f in calls.values():
                f()
        spent = dict.fromkeys(calls, 0.0)
        order = list(calls)
        turns = 0
        while turns < 1 or (spent[UNIT] < seconds and turns < 100):
            # Nobody always follows the same one, which leaves the caches.
            random.shuffle(order)
            for name in order:
                f, taken = calls[name], None
                if turns < 1 or spent[name] < 2 * seconds:
                    taken = seconds_of(f, device)
                    spent[name] += taken
                times.setdefault(name, []).append(taken)
            turns += 1
    return times


def peak_memory(name: str, c: int, n: int, device: str) -> int:
    """Bytes that one training step adds at its peak. Run in a child."""
    module = build(name, c, n).to(device)
    x, dy = make_input(c, n, device)

    def clean():
        x.grad = None
        module.zero_grad(set_to_none=True)

    training_step(module, x, dy)
    clean()
    return added_at_peak(lambda: training_step(module, x, dy), device)


def added_at_peak(step, device: str) -> int:
    """Bytes above the present level at the peak of a call."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path('/proc/self/clear_refs').write_text('5')
    before = _status('VmRSS')
    step()
    return _status('VmHWM') - before


def _status(key: str) -> int:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f'/proc/self/status has no {key}')


def one_process_each(*preload: str):
    """Pool that runs every task in a fresh process, for its peak memory.

    Modules of these names are there already when it starts.
    """
    # Large blocks go back to the system when freed, so that the level before
    # a step holds nothing of the warm-up. Read at the start of a process.
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch', *preload])
    return context.Pool(1, maxtasksperchild=1)


def run_case(c: int, n: int, args, pool) -> dict:
    """One row of the table."""

    def build_all():
        modules = {name: build(name, c, n) for name in (UNIT, *FORMS, *RIVALS)}
        return {k: m.to(args.device) for k, m in modules.items() if m}

    def make_calls(mode, i):
        # Whole cache lines, never a whole page.
        x, dy = make_input(c, n, args.device, offset=16 * (1 + 11 * i))
        call = {
            'forward': lambda m: m(x),
            'training': lambda m: training_step(m, x, dy),
        }[mode]
        return {k: (lambda m=m: call(m)) for k, m in build_all().items()}

    x, dy = make_input(c, n, args.device)
    modules = build_all()
    error = check_agreement(modules, x, dy)
    if not error < 1e-3:
        sys.exit(f'C={c} N={n}: the forms differ by {error:.2g}')
    row = dict(c=c, n=n, disagreement=error, contenders={})
    row['auto'] = {
        mode: choose_form(n, c, backward=mode == 'training') for mode in MODES
    }
    for name, module in modules.items():
        row['contenders'][name] = dict(saved_bytes=saved_bytes(module, x))
        if not args.no_memory:
            row['contenders'][name]['peak_bytes'] = pool.apply(
                peak_memory, (name, c, n, args.device)
            )
    for mode in MODES:
        with torch.set_grad_enabled(mode == 'training'):
            for name, f in make_calls(mode, 0).items():
                row['contenders'][name][f'{mode}_flops'] = flops(f)
            times = take_turns(
                partial(make_calls, mode), args.seconds / ROUNDS, args.device
            )
        for name, t in times.items():
            row['contenders'][name][mode] = t
    return row


def seconds(row: dict, name: str, mode: str) -> tuple[float, float]:
    """Median time over the turns, and half the distance of the quartiles."""
    return _median([t for t in row['contenders'][name][mode] if t])


def relative(
    row: dict, name: str, mode: str, unit: str = UNIT
) -> tuple[float, float]:
    """Time in units of another contender's: median over the turns of both.

    With half the distance of the quartiles.
    """
    contenders = row['contenders']
    turns = zip(contenders[name][mode], contenders[unit][mode])
    return _median([a / b for a, b in turns if a and b])


def _median(values: list) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
    return middle, (high - low) / 2


def table(rows: list, mode: str) -> str:
    """Markdown: time in units of the convolution, +- half the spread."""
    names = [*FORMS, *RIVALS]
    head = ['C', 'N', '1x1 conv, ms', *names, 'auto took', 'direct / auto']
    lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
    for row in rows:
        cells = [row['c'], row['n']]
        unit, half = seconds(row, UNIT, mode)
        cells.append(f'{unit * 1e3:.3g} ± {100 * half / unit:.0f} %')
        for name in names:
            if name not in row['contenders']:
                cells.append('left out')
                continue
            value, half = relative(row, name, mode)
            cells.append(f'{value:.2f} ± {half:.2f}')
        cells.append(row['auto'][mode])
        cells.append(f'{relative(row, "direct", mode, "auto")[0]:.2f}')
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines)


def memory_table(rows: list) -> str:
    """Markdown: in units of the input's bytes; GFLOPs of a training step."""
    names = [UNIT, *FORMS, *RIVALS]
    head = ['C', 'N', 'input, MiB', *names]
    lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
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
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines)


def goals(rows: list) -> list:
    """Each goal with the worst case of the table, and whether it is reached.

    ``by_flops`` is what a ratio of two times would be there if time were
    floating point operations alone.
    """
    out = []

    def worst(goal, limit, cases, at_most=True):
        """Of ``cases``: (value, where, ratio of operations or None)."""
        if not cases:
            return
        value, where, by_flops = (max if at_most else min)(cases)
        out.append(
            dict(
                goal=goal,
                limit=limit,
                worst=value,
                where=where,
                by_flops=by_flops,
                reached=value <= limit if at_most else value >= limit,
            )
        )

    def ratios(rows, mode, name, unit):
        """Cases of one time in units of another."""
        cases = []
        for row in rows:
            flops = [
                row['contenders'][k][f'{mode}_flops'] for k in (name, unit)
            ]
            value = relative(row, name, mode, unit)[0]
            cases.append((value, _where(row), flops[0] / flops[1]))
        return cases

    wide = [r for r in rows if r['c'] >= 256]
    for label, chosen, cost, gain in (
        ('N >= 8C', [r for r in wide if r['n'] >= 8 * r['c']], 1.6, 2.1),
        (
            '4C <= N < 8C',
            [r for r in wide if 4 * r['c'] <= r['n'] < 8 * r['c']],
            2.0,
            1.7,
        ),
    ):
        worst(
            f'{label}: training, auto / conv',
            cost,
            ratios(chosen, 'training', 'auto', UNIT),
        )
        worst(
            f'{label}: training, direct / auto',
            gain,
            ratios(chosen, 'training', 'direct', 'auto'),
            at_most=False,
        )
        worst(
            f'{label}: forward, auto / conv',
            2.2,
            ratios(chosen, 'forward', 'auto', UNIT),
        )
        kept = [
            (
                r['contenders']['auto']['saved_bytes']['large']
                / (r['c'] * r['n'] * 4),
                _where(r),
                None,
            )
            for r in chosen
        ]
        worst(f'{label}: large tensors kept for backward / input', 1.1, kept)
    for mode in MODES:
        for form in ('direct', 'gram'):
            worst(
                f'anywhere: {mode}, auto / {form}',
                1.1,
                ratios(rows, mode, 'auto', form),
            )
    slopes = []
    # Two positions at least four times the channels, the largest ones.
    for c in sorted({r['c'] for r in rows}):
        few, many = ([None] * 2 + [r for r in rows if r['c'] == c])[-2:]
        if few is None or few['n'] < 4 * c:
            continue
        ratio = (
            seconds(many, 'auto', 'training')[0]
            / seconds(few, 'auto', 'training')[0]
        )
        slope = math.log(ratio) / math.log(many['n'] / few['n'])
        slopes.append((abs(slope - 1), f'C={c}: slope {slope:.3f}', None))
    worst('large N: |slope of log time over log N - 1|', 0.1, slopes)
    return out


def _where(row: dict) -> str:
    return f'C={row["c"]} N={row["n"]}'


def machine(device: str) -> str:
    """One line that says where the numbers come from."""
    name = platform.processor() or platform.machine()
    if device == 'cuda':
        name = torch.cuda.get_device_name()
    elif Path('/proc/cpuinfo').exists():
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                name = line.split(':')[1].strip()
                break
    return (
        f'{name}, {torch.get_num_threads()} threads, torch '
        f'{torch.__version__}, Python {platform.python_version()}, float32'
    )


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--json', help='write all figures to this file')
    parser.add_argument(
        '--channels',
        type=int,
        nargs='+',
        default=[64, 256, 512, 1024, 2048],
        metavar='C',
    )
    parser.add_argument(
        '--positions',
        type=int,
        nargs='+',
        default=[256, 1024, 2048, 4096, 8192, 16384],
        metavar='N',
    )
    parser.add_argument(
        '--seconds',
        type=float,
        default=2.0,
        help='time for each contender and mode, four runs at least',
    )
    parser.add_argument(
        '--no-memory', action='store_true', help='leave out peak memory'
    )
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    return parser.parse_args()


def main() -> None:
    """Run all cases, print the tables and the goals, write the JSON."""
    args = parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    rows = []
    print(machine(args.device))
    if ContextBlock is None:
        print('mmcv is not installed: NonLocal2d and ContextBlock left out')
    with one_process_each() as pool:
        for c in args.channels:
            for n in args.positions:
                rows.append(run_case(c, n, args, pool))
                row = rows[-1]
                result = dict(
                    machine=machine(args.device), rows=rows, goals=goals(rows)
                )
                if args.json:
                    Path(args.json).write_text(json.dumps(result, indent=1))
                print(
                    f'C={c} N={n}: auto / conv '
                    + ', '.join(
                        f'{mode} {relative(row, "auto", mode)[0]:.2f}'
                        for mode in MODES
                    ),
                    flush=True,
                )
    for mode in MODES:
        print(f'\n{mode}, time in units of one 1x1 convolution\n')
        print(table(rows, mode))
    print(
        '\nkept for backward / peak of a training step (both in units of the '
        'input) / GFLOPs of a training step\n'
    )
    print(memory_table(rows))
    print()
    for goal in result['goals']:
        flops = goal['by_flops']
        print(
            f'{"reached " if goal["reached"] else "SHORT OF"} '
            f'{goal["goal"]}: {goal["worst"]:.3g} (limit {goal["limit"]}, '
            f'worst at {goal["where"]}'
            + (f', by operations {flops:.2f})' if flops else ')')
        )
