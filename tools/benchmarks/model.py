"""Whole models as contenders, and what each costs."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import nn
from tqdm import tqdm

from polynl_mm import fuse_poly_nl
from polynl_mm.engine import checks, hosts, start
from polynl_mm.layers import PolyNL

from . import timing

OBJECTS = 16
# A bar with an estimate on a terminal; quiet where stderr is none.
shown = partial(tqdm, leave=False, disable=None)


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

    def able(self, modes: list[str]) -> list[str]:
        """Give what it can do: without BatchNorms none can be trained."""
        return [m for m in modes if m == 'forward' or not self.conv_bn]


class Contender:
    """A model with its picture and its annotations.

    Attributes:
        whole (nn.Module): The model, with weights drawn at random.
        model (nn.Module): It or a changed copy of it, see :meth:`call`.
        picture (Tensor): (1, 3, H, W), standard normal.
        sample (BaseDataElement): As its pipeline packs it.

    Raises:
        StartError: The config can not be read, or has no model of mmdet,
            mmseg or recognition.
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
        cfg = start.read_config(config)
        checks.require(cfg, 'model')
        hosts.host_of(cfg)
        torch.manual_seed(0)
        self.whole = self.model = build(cfg).to(device)
        if backbone:
            self.whole = self.model = self.whole.backbone
        for module in self.whole.modules():
            if variant.form and isinstance(module, PolyNL):
                module.form = variant.form
        self.picture = torch.randn(1, 3, *shape).to(device)
        self.sample = SAMPLES[cfg.default_scope](*shape).to(device)

    def forward(self):
        """Run the network, see tools/benchmark_model.py."""
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
        parts = {
            k: v.new() if isinstance(v, BaseDataElement) else v
            for k, v in self.sample.items()
        }
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


def build(cfg) -> nn.Module:
    """Build the model of a config, with random weights instead of trained."""
    model = revert_sync_batchnorm(checks.build_model(cfg))
    for module in model.modules():
        if 'checkpoint' in str(getattr(module, 'init_cfg', None)):
            module.init_cfg = None
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
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


def classification_sample(h: int, w: int):
    """The first class."""
    return BaseDataElement(metainfo=meta(h, w), gt_label=0)


SAMPLES = dict(
    mmdet=detection_sample,
    mmseg=segmentation_sample,
    polynl_mm=classification_sample,
)


def peak_memory(
    variant: Variant,
    shape: list[int],
    modes: list[str],
    device: str,
    backbone: bool,
) -> dict:
    """Bytes that a call in each mode adds at its peak. Run in a child."""
    logging.disable(logging.INFO)
    contender = Contender(variant, shape, device, backbone)
    return {
        mode: timing.added_at_peak(contender.call(mode), device)
        for mode in modes
    }


def measure(
    variants: list[Variant],
    shape: list[int],
    modes: list[str],
    turns: int,
    device: str,
    backbone: bool = False,
) -> dict:
    """All figures: seconds by turn, bytes, and what the table says of them.

    Args:
        variants (list[Variant]): What is compared; the first is the unit.
        shape (list[int]): Height and width of the picture.
        modes (list[str]): Those of ``timing.MODES`` that are timed.
        turns (int): How often.
        device (str): 'cpu' or 'cuda'.
        backbone (bool): The backbones alone.
    """
    unit = str(variants[0])
    row = dict(
        machine=timing.machine(device),
        shape=shape,
        unit=unit,
        modes=modes,
        contenders={},
    )
    contenders = {}
    for variant in shown(variants, desc='building', unit='model'):
        name = str(variant)
        contender = Contender(variant, shape, device, backbone)
        count = timing.flops(contender.call('forward'))
        row['contenders'][name] = dict(
            parameters=sum(p.numel() for p in contender.whole.parameters()),
            multiply_adds=count // 2,
            flops=count,
        )
        if modes:
            contenders[name] = contender

    def make_calls(mode, _):
        return {
            name: contender.call(mode)
            for name, contender in contenders.items()
            if mode in contender.variant.able(modes)
        }

    for mode in modes:
        times = timing.take_turns(
            *(partial(make_calls, mode), device, unit, turns),
            track=partial(shown, desc=mode, unit='turn'),
        )
        for name, seconds in times.items():
            case = row['contenders'][name]
            case[mode] = seconds
            case.setdefault('relative', {})
            case['relative'][mode] = timing.ratio(seconds, times[unit])
    if not modes:
        return row
    preload = ('mmdet.models', 'mmseg.models')
    with timing.one_process_each(device, *preload) as pool:
        for name in shown(contenders, desc='peak of memory', unit='model'):
            variant = contenders[name].variant
            row['contenders'][name]['peak_bytes'] = pool.apply(
                peak_memory,
                (variant, shape, variant.able(modes), device, backbone),
            )
    return row


def variants(
    configs: list[str],
    shape: list[int],
    backbone: bool = False,
    forms: list[str] = (),
    fuse: bool = False,
    conv_bn: bool = False,
) -> list[Variant]:
    """All that are compared: a layer is changed only where there is one."""
    found = []
    for config in configs:
        found.append(Variant(config))
        model = Contender(config, shape, 'cpu', backbone).whole
        if any(isinstance(module, PolyNL) for module in model.modules()):
            found += [Variant(config, form=form) for form in forms]
        model.eval()
        if fuse and fuse_poly_nl(model)[1].fused:
            found.append(Variant(config, fuse=True))
    if conv_bn:
        found += [replace(v, conv_bn=True) for v in found if not v.form]
    return found


def table(row: dict) -> str:
    """Markdown: a line for each model."""
    head = ['model', 'parameters, M', 'multiply-adds, G', 'FLOPs, G']
    for mode in row['modes']:
        head += [f'{mode}, ms', f'{mode}, ratio', f'{mode}, peak MiB']
    lines = []
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
            value, half = timing.seconds(case[mode])
            cells.append(f'{value * 1e3:.4g} ± {half * 1e3:.2g}')
            value, half = case['relative'][mode]
            cells.append(f'{value:.3f} ± {half:.3f}')
            cells.append(f'{case["peak_bytes"][mode] / 2**20:.0f}')
        lines.append(cells)
    return timing.table(head, lines)
