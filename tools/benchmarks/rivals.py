"""What a Poly-NL layer is compared with, in torch alone.

Each takes (B, c, H, W) to the same shape.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

try:
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:  # torch < 2.3
    not_written_out = contextlib.nullcontext
else:

    def not_written_out():
        """Refuse the N x N matrix, to which torch falls back in silence."""
        return sdpa_kernel(
            [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        )


class Formula(nn.Module):
    """Poly-NL as the paper writes it; parameters are named as the layer's.

    Under autocast alpha and beta are float32, and so is what they are
    multiplied with: what comes of writing just this.
    """

    def __init__(self, c: int) -> None:
        """Draw weights that keep the variance, beta != 0."""
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Conv2d(c, c, 1, bias=False) for _ in range(3)
        )
        for conv in (self.w1, self.w2, self.w3):
            nn.init.xavier_normal_(conv.weight)
        self.alpha = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x):
        """Three convolutions and elementwise products."""
        g = (self.w1(x) * self.w2(x)).mean((2, 3), keepdim=True)
        return self.alpha * x + self.beta * self.w3(g * x)


class NonLocal(nn.Module):
    """Non-local block (Wang et al., CVPR 2018), half the channels.

    Its N x N matrix is never written out: ``scaled_dot_product_attention`` of
    contiguous maps. For more than 256 channels there is a head for every 128
    of them: the flash kernels take no wider ones.
    """

    def __init__(self, c: int) -> None:
        """Four 1x1 convolutions."""
        super().__init__()
        d = c // 2
        self.heads = max(1, d // 128) if d > 256 else 1
        self.q, self.k, self.v = (nn.Conv2d(c, d, 1) for _ in range(3))
        self.out = nn.Conv2d(d, c, 1)

    def forward(self, x):
        """Attention of every position to every other, added to x."""
        q, k, v = (
            conv(x)
            .flatten(2)
            .unflatten(1, (self.heads, -1))
            .transpose(2, 3)
            .contiguous()
            for conv in (self.q, self.k, self.v)
        )
        with not_written_out():
            y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        return x + self.out(y)


class EfficientAttention(nn.Module):
    """Efficient attention (Shen et al., WACV 2021), half the channels.

    Linear in N: queries are normalised over channels, keys over positions,
    and keys meet values first.
    """

    def __init__(self, c: int) -> None:
        """Four 1x1 convolutions."""
        super().__init__()
        d = c // 2
        self.q, self.k, self.v = (nn.Conv2d(c, d, 1) for _ in range(3))
        self.out = nn.Conv2d(d, c, 1)

    def forward(self, x):
        """Attention to what the keys gather, added to x."""
        q, k, v = (conv(x).flatten(2) for conv in (self.q, self.k, self.v))
        gathered = v @ k.softmax(2).mT
        y = gathered @ q.softmax(1)
        return x + self.out(y.unflatten(2, x.shape[2:]))


class ContextBlock(nn.Module):
    """Global context block (Cao et al., 2019) as mmcv's, ratio 1/16."""

    def __init__(self, c: int) -> None:
        """Parameters are named as mmcv's."""
        super().__init__()
        narrow = max(1, c // 16)
        self.conv_mask = nn.Conv2d(c, 1, 1)
        self.channel_add_conv = nn.Sequential(
            nn.Conv2d(c, narrow, 1),
            nn.LayerNorm([narrow, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, c, 1),
        )

    def forward(self, x):
        """One pooled vector an image, transformed, added to x."""
        weights = self.conv_mask(x).flatten(2).softmax(2)
        context = x.flatten(2) @ weights.mT
        return x + self.channel_add_conv(context.unsqueeze(3))
