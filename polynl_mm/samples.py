"""Poly-NL layers in models of mmengine are told the sizes of the pictures.

Data samples have them, models are called with data samples, and layers with a
tensor. So every model of mmengine that comes to contain a layer gets a hook
around its calls: the moment a part with layers becomes its child, by torch's
own hook for that, or when blocks are inserted into it. Nothing has to be set,
neither in a config nor for a tool; copies of a model (EMA, fused ones) have
the hook as well.
"""

from __future__ import annotations

from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_leaves

from .layers import InContext
from .ops.precision import is_recorded
from .padding import (
    Pictures,
    begin_call,
    end_call,
    pictures_of,
    warn_of_padding,
)

__all__ = ['pictures_of_samples', 'tell_layers']


def tell_layers(model: nn.Module, part: nn.Module | None = None) -> None:
    """Have the layers of a model know of the pictures it is called with.

    Does nothing to what is no model of mmengine, has no layers, or has the
    hook already.

    Args:
        model: Given hooks around its calls.
        part: Where to look for layers, if not in ``model``.
    """
    if (
        isinstance(model, BaseModel)
        and _begin not in model._forward_pre_hooks.values()
        and any(isinstance(m, InContext) for m in (part or model).modules())
    ):
        model.register_forward_pre_hook(_begin, with_kwargs=True)
        model.register_forward_hook(_end, always_call=True)


def pictures_of_samples(
    inputs: Tensor, samples: list[BaseDataElement] | None
) -> Pictures | None:
    """Give the sizes of the pictures in a batch, None if none is padded.

    Args:
        inputs (Tensor): (B, ..., H, W), as it comes from the preprocessor.
        samples: B of them; what is padded has its ``img_shape``.
    """
    metas = [
        each.metainfo
        for each in tree_leaves(samples)
        if isinstance(each, BaseDataElement)
    ]
    sizes = [tuple(m['img_shape'][:2]) for m in metas if m.get('img_shape')]
    if not isinstance(inputs, Tensor) or len(inputs) != len(sizes):
        if len(set(sizes)) > 1:
            warn_of_padding('a model is given more than a batch of pictures')
        return None
    shape = inputs.shape[-2:]
    sizes = [(min(h, shape[0]), min(w, shape[1])) for h, w in sizes]
    return None if set(sizes) == {tuple(shape)} else Pictures(shape, sizes)


def _registered(model, name, child):
    if child is not None:
        # It is not yet among the modules of the model.
        tell_layers(model, child)


register_module_module_registration_hook(_registered)


def _begin(model, args, kwargs):
    if not is_recorded():
        given = {**dict(zip(('inputs', 'data_samples'), args)), **kwargs}
        inputs, samples = given.get('inputs'), given.get('data_samples')
        begin_call(model, pictures_of_samples(inputs, samples))


def _end(model, args, output):
    if is_recorded():
        return
    pictures = pictures_of()
    if pictures and not pictures.were_seen and _is_compiled(model):
        warn_of_padding('compiled layers know nothing of sizes')
    end_call(model)


def _is_compiled(model):
    return any(
        'forward' in vars(each)
        or hasattr(each, '_orig_mod')
        or each._compiled_call_impl is not None
        for each in model.modules()
    )
