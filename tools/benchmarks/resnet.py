"""A ResNet-50 in torch alone, with blocks behind conv3 of its bottlenecks.

All norms are frozen, the stem's parameters, too.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from polynl_mm.layers import PolyNL2d
from polynl_mm.ops import Conv, Params, evaluated, poly_nl_behind, project

# Bottlenecks of c2 to c5.
DEPTHS = (3, 4, 6, 3)


def bottlenecks(*stages: int) -> set[tuple[int, int]]:
    """Places of all bottlenecks of some of c2 to c5: (stage, index)."""
    return {(c, i) for c in stages for i in range(DEPTHS[c - 2])}


class Before:
    """What the layer of a fused bottleneck computes: conv3 and its norm.

    For training, as :func:`polynl_mm.fuse_poly_nl` does it, which takes
    mmengine.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        """Keep both; they remain the model's."""
        self.conv, self.norm = conv, norm
        self.in_channels = conv.in_channels

    def as_conv(self) -> Conv:
        """A and b where the layer's input is A h + b."""
        norm = self.norm
        kept = (norm.running_mean, norm.running_var, norm.eps)
        a = self.conv.weight.flatten(1)
        return evaluated(a, None, *kept, norm.weight, norm.bias)

    def __call__(self, h):
        """Shape: (B, c, H, W) -> (B, C, H, W)."""
        return self.norm(self.conv(h))


class Constants(nn.Module):
    """A layer and the convolution before it, for inference.

    As :class:`polynl_mm.fusion.FusedPolyNL`, which takes mmengine.
    """

    @torch.no_grad()
    def __init__(self, layer: PolyNL2d, conv: nn.Conv2d) -> None:
        """Make the constants, of a convolution that has its norm in it."""
        super().__init__()
        pair = Conv(conv.weight.flatten(1).double(), conv.bias.double())
        p = Params(*(None if t is None else t.double() for t in layer.params))
        p = project(pair, p)
        for name, value in (*pair._asdict().items(), *p._asdict().items()):
            if value is not None:
                value = value.to(conv.weight.dtype, copy=True)
            self.register_buffer(name, value)

    def forward(self, h):
        """Shape: (B, c, H, W) -> (B, C, H, W)."""
        p = Params(*(getattr(self, name) for name in Params._fields))
        return poly_nl_behind(h, Conv(self.a, self.b), p)


class Tail(nn.Module):
    """The end of a bottleneck: conv3, its norm, the block.

    Args:
        c, out (int): Channels before and behind conv3.
        block (nn.Module, optional): What comes behind.
        fused (bool): The block is a Poly-NL layer, and computes all three.
    """

    def __init__(
        self,
        c: int,
        out: int,
        block: nn.Module | None = None,
        fused: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        self.conv = nn.Conv2d(c, out, 1, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.block = nn.Identity() if block is None else block
        self.fused = fused
        if fused:
            self.block.source = Before(self.conv, self.norm)

    def fold(self) -> None:
        """Make norm, and block if it is fused, constants of inference."""
        self.conv = fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()
        if self.fused:
            self.block.source = None
            self.block = Constants(self.block, self.conv)

    def forward(self, h):
        """Shape: (B, c, H, W) -> (B, out, H, W)."""
        return self.block(h if self.fused else self.norm(self.conv(h)))


class Bottleneck(nn.Module):
    """Bottleneck as PyTorch's, its stride in the 3x3 convolution."""

    def __init__(
        self, c: int, width: int, stride: int, block=None, fused=False
    ) -> None:
        """Of c channels, to 4 * width of them."""
        super().__init__()
        out = 4 * width
        self.head = nn.Sequential(
            nn.Conv2d(c, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.tail = Tail(width, out, block, fused)
        self.shortcut = nn.Identity()
        if stride > 1 or c != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        """Shape: (B, c, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        y = self.tail(self.head(x))
        y += self.shortcut(x)
        return torch.relu_(y)


class ResNet50(nn.Module):
    """The backbone, to c5, in evaluation.

    Args:
        block (callable, optional): Makes a block of a number of channels.
        places (set): Bottlenecks that have one, see :func:`bottlenecks`.
        fused (bool): The blocks are Poly-NL layers, fused with conv3.
        width (int): Channels of the stem.

    Shape:
        - input: (B, 3, H, W)
        - output: (B, 32 * width, H / 32, W / 32)
    """

    def __init__(
        self, block=None, places=frozenset(), fused=False, width: int = 64
    ) -> None:
        """See the class."""
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        body, c = [], width
        for stage, depth in enumerate(DEPTHS, 2):
            narrow = width * 2 ** (stage - 2)
            for i in range(depth):
                here = (stage, i) in places
                stride = 2 if i == 0 and stage > 2 else 1
                made = block(4 * narrow) if here else None
                body.append(
                    Bottleneck(c, narrow, stride, made, here and fused)
                )
                c = 4 * narrow
        self.body = nn.Sequential(*body)
        self.stem.requires_grad_(False)
        self.eval()

    def fold(self) -> ResNet50:
        """Make every norm part of its convolution, for inference alone."""
        for module in list(self.modules()):
            if isinstance(module, Bottleneck):
                module.tail.fold()
            elif isinstance(module, nn.Sequential):
                _fold_norms(module)
        return self.requires_grad_(False)

    def forward(self, x):
        """See the class."""
        return self.body(self.stem(x))


def _fold_norms(sequence: nn.Sequential) -> None:
    for i, norm in enumerate(sequence):
        if isinstance(norm, nn.BatchNorm2d):
            sequence[i - 1] = fuse_conv_bn_eval(sequence[i - 1], norm)
            sequence[i] = nn.Identity()
