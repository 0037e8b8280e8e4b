"""Poly-NL layers in models of mmengine are told the sizes of the pictures.

Data samples have them, models are called with data samples, and layers with a
tensor. So every model of mmengine gets a hook around its calls, whether it has
layers or will be given some: when it gets its first child, which is its
preprocessor, by torch's own hook for that; and those that there are when this
module is imported. A registry imports it, and the first layer that is made.
Nothing has to be set, neither in a config nor for a tool; copies of a model
(EMA, fused ones) have the hook as well.
"""

from __future__ import annotations

import gc
import sys
from functools import partial

import numpy as np
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_flatten

from .layers import InContext
from .ops.precision import is_recorded
from .padding import (
    Pictures,
    begin_call,
    calls_in_progress,
    end_call,
    warn_of_padding,
)

__all__ = ['pictures_of_samples', 'tell_layers']


def tell_layers(model: nn.Module) -> None:
    """Have the layers of a model know of the pictures it is called with.

    Does nothing to what is no model of mmengine, or has the hook already.
    """
    if (
        isinstance(model, BaseModel)
        and _begin not in model._forward_pre_hooks.values()
    ):
        model.register_forward_pre_hook(_begin, with_kwargs=True)
        model.register_forward_hook(_end, always_call=True)


def pictures_of_samples(
    inputs: Tensor, samples: list[BaseDataElement] | None
) -> Pictures | None:
    """Give the sizes of the pictures in a batch, None if none is padded.

    Padding is what a preprocessor has recorded as such: mmdet's with a
    ``batch_input_shape``, mmseg's with a ``padding_size``. The ``img_shape``
    alone may be that of the picture before it was changed.

    Args:
        inputs (Tensor): (B, ..., H, W), as it comes from the preprocessor.
        samples: B of them.
    """
    metas = [
        each.metainfo
        for each in tree_flatten(samples)[0]
        if isinstance(each, BaseDataElement)
    ]
    claimed = {_ints(meta.get('img_shape'), 2) for meta in metas} - {None}
    if (
        not isinstance(inputs, Tensor)
        or inputs.dim() < 4
        or len(inputs) != len(metas)
    ):
        if len(claimed) > 1:
            warn_of_padding('a model is given more than a batch of pictures')
        return None
    shape = tuple(inputs.shape[-2:])
    sizes = [_size(meta, shape) for meta in metas]
    if None in sizes:
        if len(claimed) > 1:
            warn_of_padding('no preprocessor has recorded what it padded')
        return None
    return None if set(sizes) == {shape} else Pictures(shape, sizes)


def _size(meta, shape):
    """Of a picture in a batch of that shape, None where nothing says it."""
    size = _ints(meta.get('img_shape'), 2)
    pad = _ints(meta.get('pad_shape'), 2)
    # mmseg's of a test, and of a training.
    padding = _ints(meta.get('img_padding_size'), 4)
    padding = padding or _ints(meta.get('padding_size'), 4)
    if padding:
        left, right, top, bottom = padding
        given = (shape[0] - bottom, shape[1] - right)
        is_of_batch = pad == shape or size == given
        return given if is_of_batch and left == top == 0 else None
    if not size or _ints(meta.get('batch_input_shape'), 2) != shape:
        return None
    return tuple(map(min, size, pad or shape, shape))


def _ints(value, count):
    """The first of them, None of what is no row of so many."""
    try:
        row = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    if row.ndim != 1 or len(row) < count or row.dtype.kind not in 'iu':
        return None
    return tuple(row[:count].tolist())


def _registered(model, name, child):
    tell_layers(model)


def _begin(model, args, kwargs):
    if is_recorded():
        return
    given = {**dict(zip(('inputs', 'data_samples'), args)), **kwargs}
    inputs, samples = given.get('inputs'), given.get('data_samples')
    if samples is None:
        find = partial(_same, inputs, calls_in_progress())
    else:
        find = partial(pictures_of_samples, inputs, samples)
    begin_call(model, find, sys._getframe(1))


def _same(inputs, outer):
    """Those of the call around, if it is these that a part is given."""
    pictures = outer[-1].pictures if outer else None
    if (
        pictures
        and isinstance(inputs, Tensor)
        and (
            (len(pictures.sizes), pictures.shape)
            == (len(inputs), tuple(inputs.shape[-2:]))
        )
    ):
        return pictures
    return None


def _end(model, args, output):
    if is_recorded():
        return
    call = end_call(model)
    if call and not call.was_asked and _is_compiled(model) and call.pictures:
        warn_of_padding('compiled layers know nothing of sizes')


def _is_compiled(model):
    """Whether it has layers, and compiled parts."""
    parts = list(model.modules())
    return any(isinstance(each, InContext) for each in parts) and any(
        'forward' in vars(each)
        or hasattr(each, '_orig_mod')
        or each._compiled_call_impl is not None
        for each in parts
    )


register_module_module_registration_hook(_registered)
for _each in gc.get_objects():
    # Not isinstance, which asks proxies of whatever kind for their class.
    if issubclass(type(_each), BaseModel) and '_modules' in vars(_each):
        tell_layers(_each)
