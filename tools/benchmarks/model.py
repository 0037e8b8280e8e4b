"""Cost of whole models of mmdet and mmseg, side by side.

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
import random
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from polynl_mm import fuse_poly_nl
from polynl_mm.engine import launch
from polynl_mm.engine.launch import StartError
from polynl_mm.layers import PolyNL
from polynl_mm.ops import FORMS

from . import layer as bench

MODES = ('forward', 'training')
OBJECTS = 16


def parse_args():
    """Parse the command line."""
    parser = launch.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'configs',
        nargs='+',
        metavar='CONFIG',
        help='config files of mmdet or mmseg; the first is the unit',
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
        default=MODES,
        choices=MODES,
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
        args.modes = MODES[:1]
    if min(args.shape) < 1:
        raise StartError(f'--shape {args.shape}: expected two sizes >= 1')
    if args.turns < 2:
        raise StartError(f'--turns {args.turns}: a spread takes at least 2')
    if len(set(args.configs)) < len(args.configs):
        raise StartError('a config is given twice')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise StartError('--device cuda, but this machine has no such GPU')
    if args.json and not args.json.absolute().parent.is_dir():
        raise StartError(f'--json {args.json}: its folder does not exist')
    return args


@dataclass(frozen=True)
class Variant:
    """A config, and what is done to its model; read as its name."""

    config: str
    form: str | None = None
    fuse: bool = False
    conv_bn: bool = False

    def __str__(self) -> str:
        """Give the name in the table."""
        steps = [self.form] if self.form else []
        steps += ['fused'] * self.fuse + ['conv-bn'] * self.conv_bn
        return self.config + (f' ({", ".join(steps)})' if steps else '')


class Contender:
    """A model with its picture and its annotations.

    Attributes:
        whole (nn.Module): The model, with weights drawn at random.
        model (nn.Module): It or a changed copy of it, see :meth:`call`.
        picture (Tensor): (1, 3, H, W), standard normal.
        sample (DetDataSample | SegDataSample): As its pipeline packs it.

    Raises:
        StartError: The config can not be read, or has no model of mmdet or
            mmseg.
    """

    def __init__(
        self,
        variant: str | Variant,
        shape: list[int],
        device: str,
        backbone: bool = False,
    ) -> None:
        """Build the model; nothing is run."""
        if isinstance(variant, str):
            variant = Variant(variant)
        self.variant, config = variant, variant.config
        self.backbone = backbone
        cfg = launch.read_config(config)
        launch.require(cfg, 'model')
        samples = dict(mmdet=detection_sample, mmseg=segmentation_sample)
        host = cfg.get('default_scope')
        if host not in samples:
            raise StartError(
                f'config {config} has default_scope={host!r}, expected mmdet '
                'or mmseg'
            )
        torch.manual_seed(0)
        self.whole = self.model = build(cfg, host).to(device)
        if backbone:
            self.whole = self.model = self.whole.backbone
        for module in self.whole.modules():
            if variant.form and isinstance(module, PolyNL):
                module.form = variant.form
        self.picture = torch.randn(1, 3, *shape).to(device)
        self.sample = samples[host](*shape).to(device)

    def forward(self):
        """Run the network, see the top of this file."""
        from_rpn = getattr(self.model, 'with_rpn', False)
        with torch.no_grad():
            if self.backbone:
                return self.model(self.picture)
            if from_rpn and not overrides_forward(self.model):
                return self._two_stages()
            return self.model(self.picture, self._samples(), mode='tensor')

    def _two_stages(self):
        model = self.model
        n = model.test_cfg.rpn.max_per_img
        boxes = random_boxes(n, *self.picture.shape[2:])
        proposals = InstanceData(bboxes=boxes.to(self.picture.device))
        x = model.extract_feat(self.picture)
        return model.rpn_head(x), model.roi_head.forward(
            x, [proposals], self._samples()
        )

    def training(self):
        """Forward, losses and backward; no gradient is left."""
        losses = self.model(self.picture, self._samples(), mode='loss')
        self.model.parse_losses(losses)[0].backward()
        self.model.zero_grad(set_to_none=True)

    def _samples(self):
        # Some heads put other things in the place of what is in a sample.
        parts = {k: v.new() for k, v in self.sample.items()}
        return [self.sample.new(**parts)]

    def call(self, mode: str):
        """Give a function that runs once in a mode, evaluation or training.

        It stands until the next one is asked for.
        """
        self.whole.train(mode == 'training')
        self.model = self.whole
        if self.variant.fuse:
            self.model, _ = fuse_poly_nl(
                deepcopy(self.whole), trainable=mode == 'training'
            )
        if self.variant.conv_bn:
            self.model = fuse_conv_bn(deepcopy(self.model))
        return getattr(self, mode)


def build(cfg, host: str) -> nn.Module:
    """Build the model of a config, with random weights instead of trained."""
    with DefaultScope.overwrite_default_scope(host):
        model_cfg = cfg.model.copy()
        if cfg.get('data_preprocessor') is not None:
            model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
        model = revert_sync_batchnorm(MODELS.build(model_cfg))
        for module in model.modules():
            if 'Pretrained' in str(getattr(module, 'init_cfg', None)):
                module.init_cfg = None
        model.init_weights()
    return model


def overrides_forward(model) -> bool:
    """Whether a model runs otherwise than mmdet's two-stage detectors."""
    from mmdet.models import TwoStageDetector

    return (
        getattr(type(model), '_forward', None) is not TwoStageDetector._forward
    )


def random_boxes(n: int, h: int, w: int) -> torch.Tensor:
    """Boxes (n, 4), x1 y1 x2 y2 in pixels, of 1/32 to 1/2 of the sides."""
    gen = torch.Generator().manual_seed(0)
    sides = torch.tensor([w, h])
    size = sides * 2 ** -(1 + 4 * torch.rand(n, 1, generator=gen))
    corner = (sides - size) * torch.rand(n, 2, generator=gen)
    return torch.cat([corner, corner + size], 1)


def meta(h: int, w: int) -> dict:
    """What heads want to know of a picture that was neither scaled nor cut."""
    shapes = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    return dict(
        dict.fromkeys(shapes, (h, w)),
        scale_factor=(1.0, 1.0),
        flip=False,
        flip_direction=None,
    )


def detection_sample(h: int, w: int):
    """Boxes of the first class, filled masks and five points in each."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = random_boxes(OBJECTS, h, w)
    masks = np.zeros((OBJECTS, h, w), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist()):
        mask[y1 : y2 + 1, x1 : x2 + 1] = 1
    gen = torch.Generator().manual_seed(0)
    inside = torch.rand(OBJECTS, 5, 2, generator=gen)
    sizes = boxes[:, None, 2:] - boxes[:, None, :2]
    return DetDataSample(
        metainfo=meta(h, w),
        gt_instances=InstanceData(
            bboxes=boxes,
            labels=torch.zeros(OBJECTS, dtype=torch.long),
            masks=BitmapMasks(masks, h, w),
            keypoints=boxes[:, None, :2] + inside * sizes,
            keypoints_visible=torch.ones(OBJECTS, 5),
        ),
        ignored_instances=InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        ),
    )


def segmentation_sample(h: int, w: int):
    """Two classes by chance."""
    from mmseg.structures import SegDataSample

    gen = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (1, h, w), generator=gen)
    return SegDataSample(
        metainfo=meta(h, w), gt_sem_seg=PixelData(data=labels)
    )


def flops(f) -> int:
    """Floating point operations of the products, two per multiply-add."""
    # The counter does not know the fused attention of a CPU.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return bench.flops(f)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def peak_memory(variant: Variant, args) -> dict:
    """Bytes that a call in each mode adds at its peak. Run in a child."""
    logging.disable(logging.INFO)
    contender = Contender(variant, args.shape, args.device, args.backbone)
    peak = {}
    for mode in modes_of(variant, args):
        f = contender.call(mode)
        f()
        peak[mode] = bench.added_at_peak(f, args.device)
    return peak


def take_turns(contenders: dict, mode: str, turns: int, device: str) -> dict:
    """Seconds of each contender by turn, after one that is not timed."""
    calls = {name: c.call(mode) for name, c in contenders.items()}
    for f in calls.values():
        f()
    times = {name: [] for name in calls}
    for _ in range(turns):
        # Nobody always follows the same one, which leaves the caches.
        for name in random.sample(list(calls), len(calls)):
            times[name].append(bench.seconds_of(calls[name], device))
    return times


def measure(args) -> dict:
    """All figures: seconds by turn, bytes, and what the table says of them."""
    row = dict(
        machine=bench.machine(args.device),
        shape=args.shape,
        unit=args.configs[0],
        modes=[] if args.no_time else args.modes,
        contenders={},
    )
    contenders = {}
    for variant in variants(args):
        name = str(variant)
        contender = Contender(variant, args.shape, args.device, args.backbone)
        count = flops(contender.call('forward'))
        row['contenders'][name] = dict(
            parameters=sum(p.numel() for p in contender.whole.parameters()),
            multiply_adds=count // 2,
            flops=count,
        )
        if not args.no_time:
            contenders[name] = contender
    if args.no_time:
        return row
    for mode in args.modes:
        able = {
            name: contender
            for name, contender in contenders.items()
            if mode in modes_of(contender.variant, args)
        }
        times = take_turns(able, mode, args.turns, args.device)
        for name, seconds in times.items():
            case = row['contenders'][name]
            case[mode] = seconds
            case.setdefault('relative', {})
            case['relative'][mode] = bench.relative(
                row, name, mode, row['unit']
            )
    with bench.one_process_each('mmdet.models', 'mmseg.models') as pool:
        for name, contender in contenders.items():
            row['contenders'][name]['peak_bytes'] = pool.apply(
                peak_memory, (contender.variant, args)
            )
    return row


def variants(args) -> list[Variant]:
    """All that are compared: a layer is changed only where there is one."""
    found = []
    for config in args.configs:
        found.append(Variant(config))
        model = Contender(config, args.shape, 'cpu', args.backbone).whole
        if any(isinstance(module, PolyNL) for module in model.modules()):
            found += [Variant(config, form=form) for form in args.forms]
        model.eval()
        if args.fuse and fuse_poly_nl(model)[1].fused:
            found.append(Variant(config, fuse=True))
    if args.fuse_conv_bn:
        found += [replace(v, conv_bn=True) for v in found if not v.form]
    return found


def modes_of(variant: Variant, args) -> list[str]:
    """Without its BatchNorms a model can not be trained."""
    return [m for m in args.modes if m == 'forward' or not variant.conv_bn]


def table(row: dict) -> str:
    """Markdown: a line for each model."""
    head = ['model', 'parameters, M', 'multiply-adds, G', 'FLOPs, G']
    for mode in row['modes']:
        head += [f'{mode}, ms', f'{mode}, ratio', f'{mode}, peak MiB']
    lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
    for name, case in row['contenders'].items():
        cells = [
            Path(name).name.replace('.py', ''),
            f'{case["parameters"] / 1e6:.2f}',
            f'{case["multiply_adds"] / 1e9:.2f}',
            f'{case["flops"] / 1e9:.2f}',
        ]
        for mode in row['modes']:
            if mode not in case:
                cells += [''] * 3
                continue
            value, half = bench.seconds(row, name, mode)
            cells.append(f'{value * 1e3:.4g} ± {half * 1e3:.2g}')
            value, half = case['relative'][mode]
            cells.append(f'{value:.3f} ± {half:.3f}')
            cells.append(f'{case["peak_bytes"][mode] / 2**20:.0f}')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main():
    """Measure, print the table, write the JSON."""
    args = parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # A line for every parameter that is initialised.
    logging.disable(logging.INFO)
    row = measure(args)
    print(f'{row["machine"]}, picture {args.shape[0]} x {args.shape[1]}\n')
    print(table(row))
    if args.json:
        args.json.write_text(json.dumps(row, indent=1))
