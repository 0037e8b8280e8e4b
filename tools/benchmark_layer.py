#!/usr/bin/env python
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

The numbers behind ``form='auto'`` come from here.

    python tools/benchmark_layer.py --json out.json

On a GPU, where torch and Triton are enough:

    python tools/benchmark_layer.py --device cuda --json out.json

the shapes, the regimes (bf16 autocast, and float32 as PyTorch runs it: with
convolutions in TF32) and the rivals are others, and a whole ResNet-50 comes
behind. Every contender alone: the time of the GPU (a captured graph replayed),
that of an eager step, launches, peak memory, and what it reaches of what the
card can do. First the errors of all forms against float64. What fails is told,
and the rest goes on.

With --attention Poly-SA in all forms, and by learnt vectors, against softmax
attention (``scaled_dot_product_attention``) and efficient attention, in units
of the projections that all of them have:

    python tools/benchmark_layer.py --attention --json out.json

With --calibrate nothing but the rates of this machine, in the form in which
polynl_mm/ops/choice.py holds them.

With --against COMMIT, before a change of the operation is taken for as fast
as what was: two modules of the same weights call the operation of here, and
two that of another commit of this repository; the last table has their
ratios, the last lines the worst of each.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
if (HERE.parent / 'polynl_mm').is_dir():
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, str(HERE.parent))
# Where this file is run as a script, it is there already.
sys.path.append(str(HERE))

from polynl_mm import stack

stack.end_in_a_line()

import torch
from benchmarks import attention, calibrate, gpu, layer, timing
from benchmarks.card import Card
from benchmarks.core import extract
from benchmarks.goals import goals, gpu_goals, told
from benchmarks.timing import MODES

CHANNELS = (64, 256, 512, 1024, 2048)
POSITIONS = (256, 1024, 2048, 4096, 8192, 16384)
# These say how it is measured on a CPU.
ON_CPU = ('channels', 'positions', 'seconds', 'no_memory', 'against')


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
        metavar='C',
        help=f'by default {CHANNELS}, with --attention {attention.CHANNELS}',
    )
    parser.add_argument(
        '--positions',
        type=int,
        nargs='+',
        metavar='N',
        help=f'by default {POSITIONS}, with --attention {attention.POSITIONS}',
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
    parser.add_argument(
        '--against',
        metavar='COMMIT',
        help='the operation of this commit takes part, too: on X, and behind\n'
        'a 1x1 convolution C/4 -> C with a frozen norm',
    )
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument(
        '--attention',
        action='store_true',
        help='Poly-SA against the attention of transformers, no more',
    )
    parser.add_argument(
        '--calibrate',
        action='store_true',
        help='print the rates of this machine that choice.py wants, no more',
    )
    parser.add_argument(
        '--limit',
        type=float,
        default=140.0,
        metavar='SECONDS',
        help='on a GPU: what has not begun by then is left out; with\n'
        '--attention: what is expected to take longer in a case is not run',
    )
    args = parser.parse_args()
    if args.attention and (args.against or args.calibrate):
        refuse('--attention is for none of --against and --calibrate')
    if args.device == 'cuda':
        for name in () if args.calibrate or args.attention else ON_CPU:
            if getattr(args, name) != parser.get_default(name):
                option = '--' + name.replace('_', '-')
                refuse(f'{option} is not for --device cuda')
        if not torch.cuda.is_available():
            refuse('--device cuda, but this machine has no such GPU')
    if args.json and not Path(args.json).absolute().parent.is_dir():
        refuse(f'--json {args.json}: its folder does not exist')
    args.channels = args.channels or (
        attention.CHANNELS if args.attention else CHANNELS
    )
    args.positions = args.positions or (
        attention.POSITIONS if args.attention else POSITIONS
    )
    for c in args.channels if args.attention else ():
        if c % attention.HEAD:
            refuse(
                f'--channels {c}: heads have {attention.HEAD} channels, of '
                'which it must be a multiple'
            )
    return args


def refuse(why: str) -> None:
    """End with one line."""
    sys.exit(f'benchmark_layer.py: {why}')


def main() -> None:
    """Run all cases, print the tables and the goals, write the JSON."""
    args = parse_args()
    if args.calibrate:
        print(timing.machine(args.device))
        sizes = itertools.product(args.channels, args.positions)
        for line in calibrate.run(args.device, sizes, args.seconds):
            print(line, flush=True)
        return
    if args.attention:
        return on_tokens(args)
    if args.device == 'cuda':
        return on_gpu(args)
    timing.allow_tf32(False)
    print(timing.machine(args.device))
    if layer.ContextBlock is None:
        print('mmcv is not installed: NonLocal2d and ContextBlock left out')
    with tempfile.TemporaryDirectory() as folder:
        against = None
        if args.against:
            against = layer.Against(args.against, folder)
            try:
                extract(*against)
            except ValueError as error:
                refuse(f'--against: {error}')
        result = measure(args, against)
    report(result, against)


def on_gpu(args) -> None:
    """The same on a GPU; see the module."""
    # As a user has it, whatever the environment says.
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False
    start = time.monotonic()

    def keep(result, news):
        result['seconds'] = time.monotonic() - start
        result['goals'] = gpu_goals(result)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1))
        print(news, flush=True)

    card = Card()
    print(card, flush=True)
    result = gpu.run(card, lambda: time.monotonic() - start > args.limit, keep)
    print(f'{result["seconds"]:.0f} s\n\n{gpu.tables(result)}\n')
    print(told(result['goals']))
    wrong = [case for case in result['errors'] if not case['right']]
    if wrong:
        refuse(f'{len(wrong)} results are wrong')


def on_tokens(args) -> None:
    """Poly-SA and its rivals; see the module."""
    timing.allow_tf32(False)
    print(timing.machine(args.device), flush=True)
    rows = []
    with contextlib.ExitStack() as stack:
        pool = None
        if not args.no_memory:
            pool = stack.enter_context(
                timing.one_process_each(args.device, 'mmcv.cnn.bricks')
            )
        for c in args.channels:
            before = []
            for n in sorted(args.positions):
                case = (c, n, args.device, args.seconds, args.limit, before)
                try:
                    before.append(attention.run_case(*case, pool))
                except layer.Disagreement as error:
                    sys.exit(str(error))
                rows.append(before[-1])
                result = dict(machine=timing.machine(args.device), rows=rows)
                if args.json:
                    Path(args.json).write_text(json.dumps(result, indent=1))
                print(f'C={c} N={n} done, {case_of(rows, args)}', flush=True)
    for mode in MODES:
        print(f'\n{mode}, time in units of the projections\n')
        print(attention.time_table(rows, mode))
        print(f'\n{mode}, peak of memory in units of the tokens\n')
        print(attention.memory_table(rows, mode))


def case_of(rows: list, args) -> str:
    """Say how many of the cases are done."""
    return f'{len(rows)} of {len(args.channels) * len(args.positions)}'


def measure(args, against: layer.Against | None) -> dict:
    """All figures, also into the JSON, which grows case by case."""
    rows = []
    with contextlib.ExitStack() as stack:
        pool = None
        if not args.no_memory:
            pool = stack.enter_context(
                timing.one_process_each(args.device, 'mmcv.cnn.bricks')
            )
        for c in args.channels:
            for n in args.positions:
                try:
                    row = layer.run_case(
                        c, n, args.device, args.seconds, pool, against
                    )
                except layer.Disagreement as error:
                    sys.exit(str(error))
                rows.append(row)
                result = dict(
                    machine=timing.machine(args.device),
                    rows=rows,
                    goals=goals(rows),
                )
                if against:
                    result['against'] = layer.worst_against(rows, against)
                if args.json:
                    Path(args.json).write_text(json.dumps(result, indent=1))
                print(
                    f'C={c} N={n}: auto / conv '
                    + ', '.join(
                        f'{mode} {layer.relative(row, "auto", mode)[0]:.2f}'
                        for mode in MODES
                    )
                    + f' ({case_of(rows, args)})',
                    flush=True,
                )
    return result


def report(result: dict, against: layer.Against | None) -> None:
    """Print the tables and the goals."""
    rows = result['rows']
    for mode in MODES:
        print(f'\n{mode}, time in units of one 1x1 convolution\n')
        print(layer.time_table(rows, mode))
    print(
        '\nkept for backward / peak of a training step (both in units of the '
        'input) / GFLOPs of a training step\n'
    )
    print(layer.memory_table(rows))
    if against:
        print(f'\nin units of {against.commit}\n')
        print(layer.against_table(rows, against))
    print()
    print(told(result['goals']))
    for found in result.get('against', ()):
        figures = [found['worst'], *filter(None, [found['spread']])]
        print(
            f'{found["ratio"]}: at most '
            + ' ± '.join(f'{value:.3f}' for value in figures)
            + f', at {found["where"]}'
        )


if __name__ == '__main__':
    main()
