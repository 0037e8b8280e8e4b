r"""Time and memory of a head by windows, against the size of the image.

    python projects/windows/cost.py --sizes 512 1024 2048
    python projects/windows/cost.py --sizes 8192 \
        --ways 'windows, 2048 MiB held'
    python projects/windows/cost.py --turns 10

The head of configs/cityscapes/polynl_r50-d8_4xb2-40k_cityscapes-512x1024.py
over features of 2048 channels at an eighth of the image. They are made where
they are needed, from their coordinates, so that the image itself needs no
memory and every window has its part of the same one.

With ``--sizes`` each size runs once, in a process of its own, and its peak
memory is that of the process above what it had before. With ``--turns`` an
image of 1024 x 2048 takes turns: windows each with its own context, with one
that are all held, and with one that are all computed again.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import torch
from benchmarks import timing
from mmengine.config import Config
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules

from polynl_mm import shared_context
from polynl_mm.context import Windows, grid

CONFIG = 'configs/cityscapes/polynl_r50-d8_4xb2-40k_cityscapes-512x1024.py'
STRIDE = 8
WAYS = {
    'whole': None,
    'windows, own context': None,
    'windows, held': Windows(None),
    'windows, 2048 MiB held': Windows(2048),
    'windows, none held': Windows(0),
}


def build_head() -> torch.nn.Module:
    """The head as if it were trained: with a branch that matters."""
    torch.manual_seed(0)
    register_all_modules()
    head = MODELS.build(Config.fromfile(ROOT / CONFIG).model.decode_head)
    # SyncBN is of GPUs; evaluated it is BN.
    head = torch.nn.SyncBatchNorm.convert_sync_batchnorm(head)
    torch.nn.init.ones_(head.poly_nl.beta)
    return head.eval()


def features(box: tuple, channels: int) -> torch.Tensor:
    """Those of a window (1, channels, h, w), any two alike where they meet."""
    x1, y1, x2, y2 = (v // STRIDE for v in box)
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, channels, 1, 1, generator=generator)
    x, y = torch.arange(x1, x2), torch.arange(y1, y2)[:, None]
    return (a * x + b * y).add_(c).sin_().relu_()[None]


def compute(head, shape: tuple, size: int, overlap: int, way: str):
    """Logits of an image, at the resolution of its features."""
    height, width = (v // STRIDE for v in shape)
    logits = torch.zeros(1, head.num_classes, height, width)

    def step(window):
        y = head([None, None, None, features(window.box, head.in_channels)])
        x1, y1, x2, y2 = (v // STRIDE for v in window.box)
        logits[..., y1:y2, x1:x2] = y

    windows = grid(shape, (size, size), (size - overlap, size - overlap))
    if way == 'whole':
        windows = grid(shape, shape, shape)
    if WAYS[way] is None:
        for window in windows:
            step(window)
    else:
        with shared_context(head, WAYS[way]) as over:
            over(step, windows)
    return logits


@torch.no_grad()
def once(shape: tuple, size: int, overlap: int, way: str) -> tuple:
    """Seconds, and bytes at the peak above what was there before."""
    head, seconds = build_head(), []

    all_of_it = partial(compute, head, shape, size, overlap, way)
    peak = timing.added_at_peak(
        lambda: seconds.append(timing.seconds_of(all_of_it, 'cpu')),
        'cpu',
        warm_up=partial(compute, head, (size, size), size, 0, 'whole'),
    )
    return seconds[0], peak


def sizes(args) -> str:
    """One row for each size and way."""
    rows = []
    for edge in args.sizes:
        for way in args.ways:
            with timing.one_process_each('cpu') as pool:
                call = partial(once, (edge, edge), args.window, args.overlap)
                seconds, peak = pool.apply(call, (way,))
            rows.append(
                [
                    f'{edge}×{edge}',
                    way,
                    f'{seconds:.1f}',
                    f'{peak / 2**20:.0f}',
                ]
            )
            print(*rows[-1], sep=', ', file=sys.stderr, flush=True)
    return timing.table(['image', '', 's', 'peak, MiB'], rows)


@torch.no_grad()
def turns(args) -> str:
    """Ratios to windows that each have their own context."""
    head, shape = build_head(), (1024, 2048)
    ways = [way for way in WAYS if way != 'whole']
    calls = {
        way: partial(compute, head, shape, args.window, args.overlap, way)
        for way in ways
    }
    times = timing.take_turns(lambda _: calls, 'cpu', ways[0], args.turns)
    rows = []
    for way in ways:
        middle, spread = timing.ratio(times[way], times[ways[0]])
        seconds = timing.seconds(times[way])[0]
        rows.append([way, f'{seconds:.2f}', f'{middle:.2f} ± {spread:.2f}'])
    return timing.table(['', 's', 'ratio'], rows)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--sizes', type=int, nargs='+', default=[])
    parser.add_argument('--ways', nargs='+', default=list(WAYS), choices=WAYS)
    parser.add_argument('--turns', type=int)
    parser.add_argument('--window', type=int, default=512, help='pixels')
    parser.add_argument('--overlap', type=int, default=0, help='pixels')
    args = parser.parse_args()
    print(timing.machine('cpu'))
    if args.sizes:
        print(sizes(args))
    if args.turns:
        print(turns(args))


if __name__ == '__main__':
    main()
