"""mmdet's SELayer among the blocks that configs can name."""

from __future__ import annotations

from mmdet.models.layers import SELayer as _SELayer

from .registry import MODELS


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
