#!/usr/bin/env python
"""Cost of whole models, side by side.

    python tools/benchmark_model.py CONFIG ... --shape H W --json out.json

The first config is the unit of the others. One picture (1, 3, H, W), float32,
weights drawn at random: nothing is downloaded and no data is read. The
picture goes to the network as it is, without the preprocessor and its padding.

Forward: evaluation mode, no gradients; what mmdet and mmseg call
``mode='tensor'``: backbone, neck and heads, without decoding and NMS. A
two-stage detector of mmdet gets as many random proposals as its RPN keeps at
most (``test_cfg.rpn.max_per_img``) in the place of the RPN's own, whose number
would depend on random weights; its box heads see all of them, its mask head as
many as mmdet gives it in this mode: 100, but a cascade's all of them, ten
times what it sees of real detections.

Training step: ``mode='loss'`` on 16 boxes with masks and five points each, or
on a label map, and backward, the optimiser left out. SyncBN is BN; frozen
stages and ``norm_eval`` are as the config says.

With --fuse, every model that has Poly-NL layers behind a 1x1 convolution
stands there once more, computing them from the convolution's input
(polynl_mm.fuse_poly_nl); with --forms, once more in that form, while "auto"
is what it has otherwise; with --fuse-conv-bn, all but those once more with
their convolutions and BatchNorms made one by mmcv, for the forward only.

FLOPs are those of the forward's products: convolutions, linear layers,
attention. Each multiply-add is two, while the tables of mmdet and mmseg count
it as one, so both are given. Normalisation, activations, sampling (RoIAlign)
and mmcv's own operators (deformable convolution) are not counted.

Time: all models take turns in one process, in random order. A ratio is the
median of the ratios within a turn, +- half the distance between the quartiles.
Memory is what a forward and a training step add at their peak after a first
one; each model in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
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
from benchmarks import model, timing

from polynl_mm.engine import cli
from polynl_mm.engine.cli import StartError
from polynl_mm.ops import FORMS


def parse_args():
    """Parse the command line."""
    parser = cli.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'configs',
        nargs='+',
        metavar='CONFIG',
        help='config files; the first is the unit',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        required=True,
        metavar=('H', 'W'),
        help='height and width of the picture, pixels',
    )
    parser.add_argument(
        '--turns', type=int, default=10, help='times that each is timed'
    )
    parser.add_argument(
        '--modes',
        nargs='+',
        default=timing.MODES,
        choices=timing.MODES,
        help='what is timed; all if not given',
    )
    parser.add_argument(
        '--fuse',
        action='store_true',
        help='Poly-NL layers behind a 1x1 convolution fused with it, too',
    )
    parser.add_argument(
        '--forms',
        nargs='+',
        default=[],
        choices=FORMS[1:],
        help='Poly-NL layers in these forms, too',
    )
    parser.add_argument(
        '--fuse-conv-bn',
        action='store_true',
        help='convolutions fused with the BatchNorm behind them, too',
    )
    parser.add_argument(
        '--backbone',
        action='store_true',
        help='the backbone alone, in place of the whole model; forward only',
    )
    parser.add_argument(
        '--no-time',
        action='store_true',
        help='only parameters and FLOPs: quick',
    )
    parser.add_argument(
        '--json', type=Path, metavar='FILE', help='write all figures to a file'
    )
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    args = parser.parse_args()
    if args.backbone:
        args.modes = timing.MODES[:1]
    if min(args.shape) < 1:
        raise StartError(f'--shape {args.shape}: expected two sizes >= 1')
    if args.turns < 2:
        raise StartError(f'--turns {args.turns}: a spread takes at least 2')
    twice = [each for each in args.configs if args.configs.count(each) > 1]
    if twice:
        raise StartError(f'config {twice[0]} is given twice, expected once')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise StartError('--device cuda, but this machine has no such GPU')
    if args.json and not args.json.absolute().parent.is_dir():
        raise StartError(f'--json {args.json}: its folder does not exist')
    return args


def main():
    """Measure, print the table, write the JSON."""
    args = parse_args()
    timing.allow_tf32(False)
    # A line for every parameter that is initialised.
    logging.disable(logging.INFO)
    variants = model.variants(
        args.configs,
        args.shape,
        args.backbone,
        args.forms,
        args.fuse,
        args.fuse_conv_bn,
    )
    row = model.measure(
        variants,
        args.shape,
        [] if args.no_time else args.modes,
        args.turns,
        args.device,
        args.backbone,
    )
    print(f'{row["machine"]}, picture {args.shape[0]} x {args.shape[1]}\n')
    print(model.table(row))
    if args.json:
        args.json.write_text(json.dumps(row, indent=1))


if __name__ == '__main__':
    cli.run(main)
