"""Layers among the plug-ins of a bottleneck whose host loses some.

mmseg 1.2.2 gives each of several plug-ins in one position the input of the
first, and keeps what the last returns: the others compute for nothing and
never learn. Blocks with a layer among such plug-ins are refused as they are
made; by torch's own hook, as a plug-in does not know what it becomes part of.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .layers import InContext

__all__ = ['loses_plugins']

_POSITIONS = ('after_conv1', 'after_conv2', 'after_conv3')


@cache
def loses_plugins(kind: type[nn.Module]) -> bool:
    """Whether bottlenecks of this class keep but the last of two plug-ins.

    Of those that can not be asked, nothing is known, and they count as no.
    """
    plugin = SimpleNamespace(a=lambda x: x + 1, b=lambda x: x + 1)
    try:
        return bool(kind.forward_plugin(plugin, 0, ['a', 'b']) != 2)
    except Exception:  # a block of a user's own may ask anything of itself
        return False


def _registered(block, name, child):
    if not isinstance(child, InContext):
        return
    if not hasattr(type(block), 'forward_plugin'):
        return
    for position in _POSITIONS:
        plugins = getattr(block, f'{position}_plugins', ())
        if len(plugins) > 1 and loses_plugins(type(block)):
            kind = type(block)
            raise ValueError(
                f'plugins: {kind.__module__.partition(".")[0]} keeps only the '
                f'last of {len(plugins)} plug-ins {position} of a '
                f'{kind.__name__}, {[p["type"] for p in plugins]}: leave one '
                "there, and put others in with type='polynl_mm.Insert'"
            )


register_module_module_registration_hook(_registered)
