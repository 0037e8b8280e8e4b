"""Blocks of the hosts that Poly-NL is compared with, fit for ``plugins``."""

from __future__ import annotations

from mmcv.cnn import ContextBlock as _ContextBlock
from mmdet.models.layers import SELayer as _SELayer

from .registry import MODELS


@MODELS.register_module()
class ContextBlock(_ContextBlock):
    """mmcv's (Cao et al., ICCV workshops 2019), with its own initial values.

    In a network from scratch a host initialises all convolutions, those of
    its plug-ins, too, and asks only who has ``init_weights`` for its own:
    mmcv's block, made to begin as the identity, then begins as noise.

    The arguments are those of :class:`mmcv.cnn.ContextBlock`.
    """

    def init_weights(self) -> None:
        """Initial values; hosts call it after initialising their own."""
        for part in self.children():
            for each in part.modules():
                if hasattr(each, 'reset_parameters'):
                    each.reset_parameters()
        self.reset_parameters()


@MODELS.register_module()
class SELayer(_SELayer):
    """Squeeze and excitation (Hu et al., CVPR 2018), for ``plugins``.

    mmdet has it as a module that its registry does not know.

    Args:
        in_channels (int): Channels of input and output; hosts give it.
        **kwargs: See :class:`mmdet.models.layers.SELayer`: ``ratio=16``.
    """

    _abbr_ = 'se_layer'

    def __init__(self, in_channels: int, **kwargs) -> None:
        """Name the channels as blocks do."""
        super().__init__(in_channels, **kwargs)
        self.in_channels = in_channels
