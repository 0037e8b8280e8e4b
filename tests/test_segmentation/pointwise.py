"""Parts of segmentors in which no convolution sees beyond its position.

So windows of one context are the whole image, to rounding. A module of its
own, for configs that are read in another process.
"""

from mmengine.model import BaseModule
from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
from mmseg.registry import MODELS
from torch import nn

from polynl_mm.layers import PolyNL2d


@MODELS.register_module()
class Pointwise(BaseModule):
    """A backbone of three 1x1 convolutions, at stride 1."""

    def __init__(self, channels=6, **kwargs):
        super().__init__(**kwargs)
        self.stem = nn.Conv2d(3, channels, 1)
        self.first = nn.Conv2d(channels, channels, 1)
        self.second = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return (self.second(self.first(self.stem(x).relu()).relu()).relu(),)


@MODELS.register_module()
class PointwiseMap(Pointwise):
    """As an image encoder, which gives a map and not a tuple."""

    def forward(self, x):
        return super().forward(x)[0]


@MODELS.register_module()
class Words(BaseModule):
    """A text encoder: what is said of the classes, whatever the image."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.words = nn.Embedding(4, 6)

    def forward(self):
        return self.words.weight


@MODELS.register_module()
class Again(BaseCascadeDecodeHead):
    """The second stage of a cascade: looks at the logits of the first."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mix = nn.Conv2d(self.num_classes, self.channels, 1)
        self.poly_nl = PolyNL2d(self.channels, beta_init=0.9)

    def forward(self, inputs, prev_output):
        return self.cls_seg(self.poly_nl(self.mix(prev_output)))
