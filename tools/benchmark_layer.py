#!/usr/bin/env python
"""Cost of one Poly-NL layer, in units of one 1x1 convolution C -> C.

In one run, the contenders taking turns: ``direct``, ``gram`` and ``auto`` of
``polynl_mm.ops``, and where mmcv is installed its ``NonLocal2d`` (as far as
its N x N matrix is reasonable) and ``ContextBlock``. Before anything is timed,
the three forms must agree in value and in all gradients. Time is the median
over the turns, its spread the distance between the quartiles; memory is what
one training step adds at its peak, each case in a process of its own.

The numbers behind ``polynl_mm.ops.choose_form`` come from here.

    python tools/benchmark_layer.py --json out.json
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'polynl_mm').is_dir():
    sys.path.insert(0, str(ROOT))

from polynl_mm.ops import FORMS, choose_form, poly_nl

try:
    from mmcv.cnn.bricks import ContextBlock, NonLocal2d
except ImportError:
    ContextBlock = NonLocal2d = None

UNIT = 'conv'
RIVALS = ('NonLocal2d', 'ContextBlock')
MODES = ('forward', 'training')


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


def make_input(c: int, n: int, device: str) -> tuple[torch.Tensor, ...]:
    """x, wanting a gradient, and dL/dy, both (1, C, H, W) with HW = N."""
    h = 2 ** (int(math.log2(n)) // 2)
    gen = torch.Generator().manual_seed(c + n)
    x, dy = (torch.randn(1, c, h, n // h, generator=gen) for _ in range(2))
    return x.to(device).requires_grad_(), dy.to(device)


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


def take_turns(calls: dict, seconds: float, device: str) -> dict:
    """Seconds of each call, again and again in turn, slow ones less often."""
    times = {name: [] for name in calls}
    for f in calls.values():
        f()
    while True:
        due = [
            name
            for name, t in times.items()
            if len(t) < 3
            or (sum(t) < 4 * seconds and len(t) < 5)
            or (sum(t) < seconds and len(t) < 200)
        ]
        if not due:
            return times
        for name in due:
            synchronize(device)
            start = time.perf_counter()
            calls[name]()
            synchronize(device)
            times[name].append(time.perf_counter() - start)


def peak_memory(name: str, c: int, n: int, device: str) -> int:
    """Bytes that one training step adds at its peak. Run in a child."""
    module = build(name, c, n).to(device)
    x, dy = make_input(c, n, device)

    def clean():
        x.grad = None
        module.zero_grad(set_to_none=True)

    training_step(module, x, dy)
    clean()
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        training_step(module, x, dy)
        return torch.cuda.max_memory_allocated() - before
    Path('/proc/self/clear_refs').write_text('5')
    before = _status('VmRSS')
    training_step(module, x, dy)
    return _status('VmHWM') - before


def _status(key: str) -> int:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f'/proc/self/status has no {key}')


def run_case(c: int, n: int, args, pool) -> dict:
    """One row of the table."""
    x, dy = make_input(c, n, args.device)
    modules = {name: build(name, c, n) for name in (UNIT, *FORMS, *RIVALS)}
    modules = {k: m.to(args.device) for k, m in modules.items() if m}
    error = check_agreement(modules, x, dy)
    if not error < 1e-3:
        sys.exit(f'C={c} N={n}: the forms differ by {error:.2g}')
    row = dict(c=c, n=n, disagreement=error, contenders={})
    row['auto'] = {
        mode: choose_form(n, c, backward=mode == 'training') for mode in MODES
    }
    calls = {
        'forward': {k: (lambda m=m: m(x)) for k, m in modules.items()},
        'training': {
            k: (lambda m=m: training_step(m, x, dy))
            for k, m in modules.items()
        },
    }
    for name, module in modules.items():
        row['contenders'][name] = dict(saved_bytes=saved_bytes(module, x))
        if not args.no_memory:
            row['contenders'][name]['peak_bytes'] = pool.apply(
                peak_memory, (name, c, n, args.device)
            )
    for mode in MODES:
        with torch.set_grad_enabled(mode == 'training'):
            for name, f in calls[mode].items():
                row['contenders'][name][f'{mode}_flops'] = flops(f)
            times = take_turns(calls[mode], args.seconds, args.device)
        for name, t in times.items():
            quartiles = statistics.quantiles(t, n=4)
            row['contenders'][name][mode] = dict(
                median_s=statistics.median(t),
                quartiles_s=[quartiles[0], quartiles[2]],
                runs=len(t),
            )
    return row


def relative(row: dict, name: str, mode: str, unit: str = UNIT) -> float:
    """Median time in units of another contender's."""
    contenders = row['contenders']
    return (
        contenders[name][mode]['median_s'] / contenders[unit][mode]['median_s']
    )


def spread(row: dict, name: str, mode: str) -> float:
    """Distance between the quartiles, relative to the median."""
    t = row['contenders'][name][mode]
    return (t['quartiles_s'][1] - t['quartiles_s'][0]) / t['median_s']


def table(rows: list, mode: str) -> str:
    """Markdown: time in units of the convolution, +- half the spread."""
    names = [*FORMS, *RIVALS]
    head = ['C', 'N', '1x1 conv, ms', *names, 'auto took', 'direct / auto']
    lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
    for row in rows:
        cells = [row['c'], row['n']]
        unit = row['contenders'][UNIT][mode]['median_s'] * 1e3
        cells.append(f'{unit:.3g} ± {50 * spread(row, UNIT, mode):.0f} %')
        for name in names:
            if name not in row['contenders']:
                cells.append('left out')
                continue
            value = relative(row, name, mode)
            half = value * spread(row, name, mode) / 2
            cells.append(f'{value:.2f} ± {half:.2f}')
        cells.append(row['auto'][mode])
        cells.append(f'{relative(row, "direct", mode, "auto"):.2f}')
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
    """(goal, what came out, reached), worst case of the table for each."""
    out = []

    def worst(goal, limit, values, at_most=True):
        if not values:
            return
        pick = max if at_most else min
        value, where = pick(values)
        out.append(
            dict(
                goal=goal,
                limit=limit,
                worst=value,
                where=where,
                reached=value <= limit if at_most else value >= limit,
            )
        )

    def collect(rows, f):
        return [(f(r), f'C={r["c"]} N={r["n"]}') for r in rows]

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
            collect(chosen, lambda r: relative(r, 'auto', 'training')),
        )
        worst(
            f'{label}: training, direct / auto',
            gain,
            collect(
                chosen, lambda r: relative(r, 'direct', 'training', 'auto')
            ),
            at_most=False,
        )
        worst(
            f'{label}: forward, auto / conv',
            2.2,
            collect(chosen, lambda r: relative(r, 'auto', 'forward')),
        )
        worst(
            f'{label}: large tensors kept for backward / input',
            1.1,
            collect(
                chosen,
                lambda r: (
                    r['contenders']['auto']['saved_bytes']['large']
                    / (r['c'] * r['n'] * 4)
                ),
            ),
        )
    for mode in MODES:
        worst(
            f'anywhere: {mode}, auto / better form',
            1.1,
            collect(
                rows,
                lambda r, mode=mode: max(
                    relative(r, 'auto', mode, form)
                    for form in ('direct', 'gram')
                ),
            ),
        )
    slopes = []
    # Two positions at least four times the channels, the largest ones.
    for c in sorted({r['c'] for r in rows}):
        few, many = ([None] * 2 + [r for r in rows if r['c'] == c])[-2:]
        if few is None or few['n'] < 4 * c:
            continue
        ratio = (
            many['contenders']['auto']['training']['median_s']
            / few['contenders']['auto']['training']['median_s']
        )
        slope = math.log(ratio) / math.log(many['n'] / few['n'])
        slopes.append((abs(slope - 1), f'C={c}: slope {slope:.3f}'))
    worst('large N: |slope of log time over log N - 1|', 0.1, slopes)
    return out


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
        help='time for each contender and mode (three runs at least)',
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
    # Large blocks go back to the system when freed, so that the level before
    # a step holds nothing of the warm-up. Read at the start of a process.
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch'])
    rows = []
    print(machine(args.device))
    if ContextBlock is None:
        print('mmcv is not installed: NonLocal2d and ContextBlock left out')
    with context.Pool(1, maxtasksperchild=1) as pool:
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
                        f'{mode} {relative(row, "auto", mode):.2f}'
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
        print(
            f'{"reached " if goal["reached"] else "SHORT OF"} '
            f'{goal["goal"]}: {goal["worst"]:.3g} (limit {goal["limit"]}, '
            f'worst at {goal["where"]})'
        )


if __name__ == '__main__':
    main()
