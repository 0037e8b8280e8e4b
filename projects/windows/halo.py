"""Gradients of an image in bands, against those of the whole image.

    python projects/windows/halo.py --processes 2
    python projects/windows/halo.py --processes 4

A ResNet-18 of stride 8 with a Poly-NL head, its BatchNorm evaluated, and an
image of 512 rows, in float64. Every process has a band of the rows and, by
``--halo``, some of its neighbours'; their gradients are summed. The error of
all gradients, and the largest of a parameter, are relative to the size of what
they should be: with one gate, and with a gate for every band. Weights are
random: trained ones may look further, or less far.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from torch import Tensor, nn

from polynl_mm import shared_context
from polynl_mm.context import Processes, Window, bands

CLASSES, STRIDE = 19, 8


class Segmentor(nn.Module):
    """Image -> logits of its size."""

    def __init__(self) -> None:
        """Build both parts by mmseg."""
        super().__init__()
        norm = dict(type='BN')
        self.backbone = MODELS.build(
            dict(
                type='ResNetV1c',
                depth=18,
                strides=(1, 2, 1, 1),
                dilations=(1, 1, 2, 4),
                zero_init_residual=False,
                norm_cfg=norm,
            )
        )
        self.head = MODELS.build(
            dict(
                type='polynl_mm.PolyNLHead',
                in_channels=512,
                in_index=3,
                channels=128,
                num_classes=CLASSES,
                norm_cfg=norm,
                dropout_ratio=0,
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B, 3, H, W) -> (B, CLASSES, H, W)."""
        logits = self.head(self.backbone(x))
        return F.interpolate(logits, scale_factor=STRIDE, mode='bilinear')


def build(image: Tensor) -> Segmentor:
    """Draw weights; statistics and beta are such that both matter."""
    register_all_modules()
    torch.manual_seed(0)
    model = Segmentor().double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None

    def set_beta(layer, args):
        x = args[0]
        branch = type(layer).forward(layer, x) - layer.alpha * x
        layer.beta.mul_(0.4 * x.std() / branch.std())

    with torch.no_grad():
        model(image)
        model.eval()
        nn.init.ones_(model.head.poly_nl.beta)
        hook = model.head.poly_nl.register_forward_pre_hook(set_beta)
        model(image)
        hook.remove()
    return model


def picture(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(1, 3, rows, columns), smooth and noisy; labels that it tells."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(1, 3, rows // 32, columns // 32, generator=generator)
    smooth = F.interpolate(smooth.double(), (rows, columns), mode='bicubic')
    noise = torch.randn(smooth.shape, generator=generator)
    # As many pixels in each class.
    ranks = smooth[:, 0].flatten().argsort().argsort()
    labels = (ranks * CLASSES // len(ranks)).reshape(1, rows, columns)
    return smooth + 0.3 * noise, labels


def gradients(model, image, labels, part: Window) -> list[Tensor]:
    """Of the loss of the core of a part, as it counts in the image's."""
    model.zero_grad()
    (_, top, _, bottom), (_, begin, _, end) = part.box, part.core
    logits = model(image[..., top:bottom, :])[..., begin - top : end - top, :]
    loss = F.cross_entropy(logits, labels[:, begin:end], reduction='sum')
    (loss / labels.numel()).backward()
    return [each.grad for each in model.parameters()]


def process(rank: int, args: argparse.Namespace, file: str) -> None:
    """What each does; the first has the whole image, too, and tells."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo',
        init_method=f'file://{file}',
        rank=rank,
        world_size=args.processes,
    )
    image, labels = picture(args.rows, args.columns)
    shape = (args.rows, args.columns)
    model = build(image)
    if rank == 0:
        (whole,) = bands(shape, 1)
        wants = [g.clone() for g in gradients(model, image, labels, whole)]
        print('halo | one gate: all | worst | own gates: all | worst')
    for halo in args.halo:
        part = bands(shape, args.processes, halo, STRIDE)[rank]
        with shared_context(model, Processes(part)):
            shared = sums(gradients(model, image, labels, part))
        own = sums(gradients(model, image, labels, part))
        if rank == 0:
            row = [*errors(shared, wants), *errors(own, wants)]
            print(f'{halo} | ' + ' | '.join(f'{each:.2g}' for each in row))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    # Python's own end may meet a thread of gloo.
    os._exit(0)


def sums(tensors: list[Tensor]) -> list[Tensor]:
    """Sum them over the processes."""
    for each in tensors:
        torch.distributed.all_reduce(each)
    return [each.clone() for each in tensors]


def errors(gots: list[Tensor], wants: list[Tensor]) -> tuple[float, float]:
    """Of all parameters together, and the largest of one."""
    wrong = torch.stack([(a - b).norm() for a, b in zip(gots, wants)])
    right = torch.stack([each.norm() for each in wants])
    return (wrong.norm() / right.norm()).item(), (wrong / right).max().item()


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--rows', type=int, default=512)
    parser.add_argument('--columns', type=int, default=256)
    parser.add_argument(
        '--halo', type=int, nargs='+', default=[0, 32, 64, 128, 192]
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Forked, as it takes seconds to import mmseg.
        torch.multiprocessing.start_processes(
            process,
            (args, f'{folder}/group'),
            nprocs=args.processes,
            start_method='fork',
        )


if __name__ == '__main__':
    main()
