#!/usr/bin/env python
"""Time and memory of Poly-NL and its rivals against N, C and placement.

A contender is the end of a bottleneck: a 1x1 convolution C/4 -> C, BatchNorm
with its running statistics, and a block; "no block" is what it costs without.
All take turns in one run (see tools/benchmark_layer.py for what that guards
against). Then whole models, by tools/benchmark_model.py. Writes the tables,
the figures as JSON, and the pictures:

    python projects/scaling/scaling.py --out work_dirs/scaling

GFLOP/s are the operations of the block's products over its time, as torch
counts them, attention as if its matrices were written out. GB/s are the bytes
that no contender can avoid (the map read, the result written, and in training
their gradients and the map again) over the time. With --device cuda, --dtype
chooses float32, tf32, or autocast to bfloat16 or float16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import matplotlib
import torch
from benchmarks import layer, timing
from benchmarks.core import HERE
from matplotlib.figure import Figure
from mmcv.cnn.bricks import ContextBlock, NonLocal2d
from torch import nn
from torch.nn import functional as F

from polynl_mm import fuse_poly_nl
from polynl_mm.layers import PolyNL2d
from polynl_mm.ops import FORMS

UNIT = 'no block'
FUSED = 'Poly-NL, fused'
COCO = 'configs/coco/mask-rcnn_r50-{}_fpn_1x_coco.py'
PLACEMENTS = {
    'c3-c5': 'every block of c3 to c5',
    'c4': 'every block of c4',
    'res4': 'end of res4',
}
PLAIN = COCO.format('plain')
BACKBONES = ['plain'] + [
    f'{block}-{place}' for place in PLACEMENTS for block in ('polynl', 'gc')
]
# At 800 x 1344, c3 has 16,800 positions: NonLocal2d's matrices take gigabytes.
BACKBONES_AT = {
    (512, 512): BACKBONES + ['nl-c3-c5', 'nl-c4', 'nl-res4'],
    (800, 1344): BACKBONES + ['nl-c4', 'nl-res4'],
}
HALF = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


class NonLocalSDPA(NonLocal2d):
    """NonLocal2d by torch's attention, which keeps no N x N matrix."""

    def forward(self, x):
        """Shape: (B, C, H, W) -> the same."""
        q, k, v = (
            # Where the channels do not lie together, torch takes a slow way.
            conv(x).flatten(2).mT.unsqueeze(1).contiguous()
            for conv in (self.theta, self.phi, self.g)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.squeeze(1).mT.unflatten(2, x.shape[2:])
        return x + self.conv_out(y)


class EfficientAttention(NonLocal2d):
    """Shen et al., "Efficient Attention", WACV 2021: k^T v first, O(N)."""

    def forward(self, x):
        """Shape: (B, C, H, W) -> the same."""
        q = self.theta(x).flatten(2).softmax(1)
        k = self.phi(x).flatten(2).softmax(2)
        context = torch.matmul(self.g(x).flatten(2), k.mT)
        y = torch.matmul(context, q).unflatten(2, x.shape[2:])
        return x + self.conv_out(y)


BLOCKS = {
    UNIT: lambda c: nn.Identity(),
    'Poly-NL, direct': partial(PolyNL2d, form='direct', beta_init=0.5),
    'Poly-NL, gram': partial(PolyNL2d, form='gram', beta_init=0.5),
    FUSED: partial(PolyNL2d, beta_init=0.5),
    'ContextBlock': partial(ContextBlock, ratio=1 / 16),
    'efficient attention': partial(EfficientAttention, zeros_init=False),
    'NonLocal2d': partial(NonLocal2d, zeros_init=False),
    'NonLocal2d, SDPA': partial(NonLocalSDPA, zeros_init=False),
}


def build(name: str, c: int, mode: str, device: str) -> nn.Module:
    """The end of a bottleneck; all start alike."""
    torch.manual_seed(0)
    block = BLOCKS[name](c)
    norm = nn.BatchNorm2d(c)
    end = nn.Sequential(nn.Conv2d(c // 4, c, 1, bias=False), norm, block)
    end.train(mode == 'training')
    norm.eval()
    if name == FUSED:
        end, report = fuse_poly_nl(end, trainable=mode == 'training')
        assert not report.left, report
    return end.to(device)


def fits(name: str, c: int, n: int, device: str) -> bool:
    """Whether a rival's matrices fit, and its operations are few enough."""
    gpu = device == 'cuda'
    if gpu:
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if name == 'NonLocal2d' and 3 * 4 * n**2 > memory / 2:
        return False
    return 'NonLocal2d' not in name or n**2 * c <= 2 ** (46 if gpu else 37)


def make_call(name: str, c: int, n: int, mode: str, args, offset: int = 0):
    """A forward or a step of training of a contender."""
    module = build(name, c, mode, args.device)
    x, _ = layer.make_input(c // 4, n, args.device, offset)
    _, dy = layer.make_input(c, n, args.device, offset)
    if args.dtype in HALF:
        x, dy = (z.detach().to(HALF[args.dtype]) for z in (x, dy))
        x.requires_grad_()
    autocast = torch.autocast(
        args.device,
        HALF.get(args.dtype, torch.bfloat16),
        enabled=args.dtype in HALF,
    )
    return layer.call_of(module, x, dy, mode, autocast)


def peak_memory(name: str, c: int, n: int, mode: str, args) -> int:
    """Bytes that a call adds at its peak. Run in a child."""
    timing.allow_tf32(args.dtype == 'tf32')
    call = make_call(name, c, n, mode, args)
    return timing.added_at_peak(call, args.device)


def count(name: str, c: int, n: int, mode: str, args) -> int:
    """FLOPs of a call; of attention as its matrices were written out."""
    few = max(c, 256)
    if 'NonLocal2d' not in name or n <= few:
        return timing.flops(make_call(name, c, n, mode, args))
    # Exactly a N + b N^2, from two sizes that fit anywhere.
    one, two = (count(name, c, k, mode, args) for k in (few // 2, few))
    b = (two - 2 * one) / (few**2 / 2)
    return round((one / (few // 2) - b * few / 2) * n + b * n**2)


def run_case(c: int, n: int, mode: str, args, pool) -> dict:
    """Figures of every contender that fits."""
    names = [name for name in BLOCKS if fits(name, c, n, args.device)]

    def make_calls(i):
        offset = layer.offset_in(i)
        return {k: make_call(k, c, n, mode, args, offset) for k in names}

    times = timing.take_turns(
        make_calls,
        args.device,
        UNIT,
        seconds=args.seconds,
        rounds=timing.ROUNDS,
    )
    # The input read, the output written; their gradients, the input again.
    maps = 1.25 if mode == 'forward' else 1.25 * 2 + 0.25
    itemsize = 2 if args.dtype in HALF else 4
    case = dict(c=c, n=n, mode=mode, contenders={})
    for name in names:
        case['contenders'][name] = dict(
            seconds=timing.seconds(times[name]),
            relative=timing.ratio(times[name], times[UNIT]),
            flops=count(name, c, n, mode, args),
            least_bytes=maps * c * n * itemsize,
            peak_bytes=pool.apply(peak_memory, (name, c, n, mode, args)),
        )
    return case


def measure_layers(args) -> None:
    """All cases, into layers.json after each."""
    sizes = [(args.channels[0], n) for n in args.positions]
    sizes += [(c, args.positions[0]) for c in args.channels[1:]]
    cases = []
    preload = ('mmcv.cnn', 'matplotlib.figure')
    with timing.one_process_each(args.device, *preload) as pool:
        for c, n in sizes:
            for mode in timing.MODES:
                cases.append(run_case(c, n, mode, args, pool))
                print(
                    f'C={c} N={n} {mode}: measured, {len(cases)} of '
                    f'{len(sizes) * len(timing.MODES)}',
                    flush=True,
                )
            result = dict(
                machine=timing.machine(args.device, args.dtype),
                cases=cases,
            )
            (args.out / 'layers.json').write_text(json.dumps(result, indent=1))


def choice_calls(c: int, n: int, device: str, round_: int) -> dict:
    """The fused layer in both forms, and in the one that it chooses."""
    h, _ = layer.make_input(c // 4, n, device, layer.offset_in(round_))
    calls = {}
    for form in FORMS:
        torch.manual_seed(0)
        fused = layer.Behind(c, HERE, form).to(device).eval()
        calls[form] = layer.call_of(fused, h, None, 'forward')
    return calls


def measure_choice(args) -> None:
    """Where N is small, into choice.json."""
    cases = []
    channels, shares = (512, 1024, 2048), (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2)
    for c in channels:
        for n in (int(c * share) for share in shares):
            times = timing.take_turns(
                partial(choice_calls, c, n, args.device),
                args.device,
                'auto',
                seconds=args.seconds,
                rounds=timing.ROUNDS,
            )
            case = dict(c=c, n=n)
            for name in times:
                case[name] = timing.seconds(times[name])
            better = min('direct', 'gram', key=case.get)
            case['ratio'] = timing.ratio(times['auto'], times[better])
            cases.append(case)
            print(
                f'choice: C={c} N={n} measured, {len(cases)} of '
                f'{len(channels) * len(shares)}',
                flush=True,
            )
    (args.out / 'choice.json').write_text(json.dumps(cases, indent=1))


def measure_models(args) -> None:
    """The backbones at each shape, and a step of training of Mask R-CNN."""

    def run(name, shape, configs, *options):
        print(f'{name}: started', flush=True)
        done = subprocess.run(
            [sys.executable, 'tools/benchmark_model.py']
            + [COCO.format(config) for config in configs]
            + ['--shape', *map(str, shape), '--device', args.device]
            + ['--json', str((args.out / name).resolve()), '--fuse']
            + [*options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(done.stdout, flush=True)
        done.check_returncode()

    for shape, configs in BACKBONES_AT.items():
        run(
            'backbone_{}x{}.json'.format(*shape),
            shape,
            configs,
            *('--backbone', '--fuse-conv-bn', '--turns', '5'),
            *('--forms', 'direct', 'gram'),
        )
    run(
        'training_800x1344.json',
        (800, 1344),
        ['plain', 'polynl-c3-c5', 'gc-c3-c5'],
        *('--modes', 'training', '--turns', '5', '--forms', 'direct'),
    )


# ------------------------------------------------------------ what is shown


def table(cases: list, mode: str, cell) -> str:
    """Markdown: a line for each size, a column for each contender."""
    lines = []
    for case in cases:
        if case['mode'] != mode:
            continue
        cells = [case['c'], case['n']]
        for name in BLOCKS:
            found = case['contenders'].get(name)
            cells.append(cell(found) if found else 'left out')
        lines.append(cells)
    return timing.table(['C', 'N', *BLOCKS], lines)


def choice_table(cases: list) -> str:
    """Markdown: a line for each size."""
    names = ('direct', 'gram', 'auto')
    head = ['C', 'N', *(f'{name}, ms' for name in names), 'auto / better']
    lines = []
    for case in cases:
        cells = [case['c'], case['n']]
        cells += [f'{case[name][0] * 1e3:.3g}' for name in names]
        cells.append('{:.2f} ± {:.2f}'.format(*case['ratio']))
        lines.append(cells)
    return timing.table(head, lines)


def number(value: float) -> str:
    """Three digits."""
    return f'{value:.0f}' if value >= 1000 else f'{value:.3g}'


def with_spread(value: float, half: float) -> str:
    """The spread to its first digit."""
    return f'{number(value)} ± ' + (
        f'{half:.0f}' if half >= 9.5 else f'{half:.1g}'
    )


CELLS = {
    'time, ms': lambda x: with_spread(*(1e3 * t for t in x['seconds'])),
    'peak, MiB': lambda x: number(x['peak_bytes'] / 2**20),
    'GB/s': lambda x: f'{x["least_bytes"] / x["seconds"][0] / 1e9:.3g}',
    'GFLOP/s': lambda x: f'{x["flops"] / x["seconds"][0] / 1e9:.0f}',
}


def backbones_table(rows: list) -> str:
    """Markdown: a line for each block and place, columns for each shape."""
    head = ['ResNet-50']
    for shape in BACKBONES_AT:
        head += ['{} × {}: multiply-adds, G'.format(*shape), 'time']
        head.append('both after `fuse_conv_bn`')
    lines = []
    found = {
        f'{block}, {PLACEMENTS[place]}': key
        for place in PLACEMENTS
        for row in rows
        for key in row['contenders']
        for block in [block_of(key, place)]
        if block
    }
    for label, key in {'plain': PLAIN, **found}.items():
        cells = [label]
        for row in rows:
            if key not in row['contenders']:
                cells += ['left out', '', '']
                continue
            cells.append(
                f'{row["contenders"][key]["multiply_adds"] / 1e9:.1f}'
            )
            for name, unit in (
                (key, PLAIN),
                (after_conv_bn(key), after_conv_bn(PLAIN)),
            ):
                cells.append(
                    '{:.2f} ± {:.2f}'.format(
                        *layer.relative(row, name, 'forward', unit)
                    )
                    if name in row['contenders']
                    else ''
                )
        lines.append(cells)
    text = [timing.table(head, lines)]
    for row in rows:
        text.append('')
        for key in (PLAIN, after_conv_bn(PLAIN)):
            seconds = timing.seconds(row['contenders'][key]['forward'])
            text.append(
                f'{key}: {with_spread(*(1e3 * t for t in seconds))} ms'
            )
    return '\n'.join(text)


def after_conv_bn(key: str) -> str:
    """The name of the same model with norms folded."""
    if key.endswith(')'):
        return key[:-1] + ', conv-bn)'
    return key + ' (conv-bn)'


def draw_layers(cases: list, axis: str, path: Path) -> None:
    """Time and memory, forward and training, against 'n' or 'c'."""
    other = 'c' if axis == 'n' else 'n'
    held = cases[0][other]
    figure = Figure(figsize=(10, 7.5), layout='constrained')
    panels = figure.subplots(2, 2, sharex=True)
    for axes, mode in zip(panels, timing.MODES):
        for ax, what in zip(axes, ('time, ms', 'peak memory, MiB')):
            chosen = [
                case
                for case in cases
                if case['mode'] == mode and case[other] == held
            ]
            for name in BLOCKS:
                points = sorted(
                    (case[axis], figure_of(case['contenders'][name], what))
                    for case in chosen
                    if name in case['contenders']
                )
                style = dict(color='0.5', ls='--') if name == UNIT else {}
                wide = 2.5 if name == FUSED else 1.3
                ax.loglog(
                    *zip(*points),
                    marker='o',
                    ms=3,
                    lw=wide,
                    label=name,
                    **style,
                )
            ax.set_title(f'{mode}: {what}')
            ax.grid(alpha=0.3)
    for ax in panels[1]:
        ax.set_xlabel({'n': 'positions N', 'c': 'channels C'}[axis])
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc='outside right'
    )
    figure.suptitle(f'Convolution, norm and block, {other.upper()} = {held}')
    save(figure, path)


def figure_of(contender: dict, what: str) -> float:
    """A point of a curve."""
    if what == 'time, ms':
        return contender['seconds'][0] * 1e3
    return contender['peak_bytes'] / 2**20


def draw_models(rows: list, path: Path) -> None:
    """Bars: time of a backbone in units of the plain one, by placement."""
    figure = Figure(figsize=(10, 7), layout='constrained')
    panels = figure.subplots(1, len(BACKBONES_AT), sharey=True)
    labels = []
    for ax, shape, row in zip(panels, BACKBONES_AT, rows):
        bars = [
            (place, block, value['relative']['forward'])
            for place in PLACEMENTS
            for key, value in row['contenders'].items()
            for block in [block_of(key, place)]
            if block
        ]
        for place, block, (value, half) in bars:
            label = f'{PLACEMENTS[place]}: {block}'
            if label not in labels:
                labels.append(label)
            color = 'C0' if block.startswith('Poly-NL') else '0.6'
            color = 'C2' if block == FUSED else color
            ax.barh(labels.index(label), value, xerr=half, color=color)
            ax.text(
                value + half,
                labels.index(label),
                f' {value:.2f}',
                va='center',
                fontsize=8,
            )
        ax.axvline(1, color='0.3', lw=1)
        ax.set_title('{} × {}'.format(*shape))
        ax.margins(x=0.15)
        ax.set_xlabel('forward, in units of the plain backbone')
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle('ResNet-50')
    save(figure, path)


def block_of(key: str, place: str) -> str | None:
    """What stands in a model of benchmark_model.py, if in this place."""
    config, _, variant = key.partition(' ')
    names = dict(polynl='Poly-NL', gc='ContextBlock', nl='NonLocal2d')
    for short, name in names.items():
        if config == COCO.format(f'{short}-{place}') and 'conv-bn' not in key:
            return f'{name}, {variant.strip("()")}' if variant else name
    return None


def save(figure: Figure, path: Path) -> None:
    """As SVG, the same for the same figures."""
    fixed = {'svg.hashsalt': path.name, 'svg.fonttype': 'none'}
    with matplotlib.rc_context(fixed):
        figure.savefig(path, metadata={'Date': None})
    print(path)


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        '--out',
        type=Path,
        required=True,
        help='folder for all that is written',
    )
    parser.add_argument(
        '--positions',
        type=int,
        nargs='+',
        default=[k**2 for k in (64, 96, 128, 192, 256, 384, 512)],
        metavar='N',
        help='with the first C',
    )
    parser.add_argument(
        '--channels',
        type=int,
        nargs='+',
        default=[256, 64, 128, 512, 1024, 2048],
        metavar='C',
        help='with the first N',
    )
    parser.add_argument(
        '--seconds',
        type=float,
        default=1.0,
        help='time for each contender and case, four runs at least',
    )
    parser.add_argument(
        '--parts',
        nargs='+',
        default=['layers', 'choice', 'models'],
        choices=['layers', 'choice', 'models', 'none'],
        help='what is measured; what was measured before is drawn again',
    )
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument(
        '--dtype',
        default='float32',
        choices=['float32', 'tf32', 'bfloat16', 'float16'],
        help='of the layers; the models run in float32',
    )
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables, draw."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    timing.allow_tf32(args.dtype == 'tf32')
    if 'layers' in args.parts:
        measure_layers(args)
    if 'choice' in args.parts:
        measure_choice(args)
    if 'models' in args.parts:
        measure_models(args)
    if (args.out / 'layers.json').exists():
        result = json.loads((args.out / 'layers.json').read_text())
        print(result['machine'])
        for mode in timing.MODES:
            for what, cell in CELLS.items():
                print(f'\n{mode}: {what}\n')
                print(table(result['cases'], mode, cell))
        for axis in 'nc':
            draw_layers(
                result['cases'], axis, args.out / f'against_{axis}.svg'
            )
    if (args.out / 'choice.json').exists():
        cases = json.loads((args.out / 'choice.json').read_text())
        print(
            '\nfused, forward: both forms and the choice, where N is small\n'
        )
        print(choice_table(cases))
    paths = [args.out / 'backbone_{}x{}.json'.format(*s) for s in BACKBONES_AT]
    if all(path.exists() for path in paths):
        rows = [json.loads(path.read_text()) for path in paths]
        print('\nbackbones, forward, in units of the plain one\n')
        print(backbones_table(rows))
        draw_models(rows, args.out / 'placement.svg')


if __name__ == '__main__':
    main()
