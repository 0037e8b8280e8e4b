"""Poly-NL in mmseg's fully convolutional head."""

from __future__ import annotations

import torch
from mmseg.models.decode_heads import FCNHead
from torch import Tensor

from polynl_mm.layers import PolyNL2d
from polynl_mm.registry import MODELS

__all__ = ['PolyNLHead']


@MODELS.register_module()
class PolyNLHead(FCNHead):
    """mmseg's FCNHead with a Poly-NL layer behind its first convolution.

    With the default two convolutions it is built as mmseg's ``NLHead`` and
    ``GCHead`` are: convolution, block, convolution, concatenation with the
    input, classifier. All keys of an ``FCNHead`` hold, ``num_convs`` among
    them, so that over a config with an ``FCNHead`` the difference is the
    type::

        _base_ = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
        model = dict(decode_head=dict(type='polynl_mm.PolyNLHead'))

    A checkpoint of that ``FCNHead`` fits, too: only ``poly_nl.*`` is new, and
    at the start it changes nothing. Exclude ``poly_nl.alpha`` and
    ``poly_nl.beta`` from weight decay, as with every Poly-NL layer.

    Args:
        alpha_init, beta_init, zero_init_w3, bias, form: Of the layer, see
            :class:`polynl_mm.layers.PolyNL2d`; it has ``channels`` channels.
        branch_norm_cfg (dict, optional): The layer's ``norm_cfg``. The head's
            own ``norm_cfg`` is that of the convolutions.
        **kwargs: Of ``FCNHead`` and ``BaseDecodeHead``.

    Shape:
        - input: list of feature maps, of which ``in_index`` is taken,
          (B, in_channels, H, W).
        - output: logits (B, num_classes, H, W).

    Raises:
        ValueError: With ``num_convs=0``, and as the layer.
    """

    def __init__(
        self,
        alpha_init: float = 1.0,
        beta_init: float = 0.0,
        zero_init_w3: bool = False,
        bias: bool = False,
        branch_norm_cfg: dict | None = None,
        form: str = 'auto',
        **kwargs,
    ) -> None:
        """Build the head of mmseg, and the layer."""
        if kwargs.get('num_convs') == 0:
            raise ValueError(
                'num_convs=0: the layer follows the first convolution, there '
                'must be one'
            )
        super().__init__(**kwargs)
        self.poly_nl = PolyNL2d(
            self.channels,
            alpha_init=alpha_init,
            beta_init=beta_init,
            zero_init_w3=zero_init_w3,
            bias=bias,
            norm_cfg=branch_norm_cfg,
            form=form,
        )

    def _forward_feature(self, inputs: list[Tensor]) -> Tensor:
        """Shape: -> (B, channels, H, W), what the classifier takes."""
        x = self._transform_inputs(inputs)
        feats = self.convs[1:](self.poly_nl(self.convs[0](x)))
        if self.concat_input:
            feats = self.conv_cat(torch.cat([x, feats], dim=1))
        return feats
