"""One context for all windows of mmseg's sliding-window inference.

mmseg's windows know nothing of each other, so that the gate of a Poly-NL
layer is a mean over one window only. With one more key it is that of the
whole image, see :class:`polynl_mm.context.Windows`::

    model = dict(
        test_cfg=dict(
            mode='slide',
            crop_size=(512, 1024),
            stride=(341, 683),
            context='image',
        )
    )

``context`` is ``'image'``, or a dict of arguments of ``Windows``:
``dict(budget=512, wait_on='cpu')`` keeps 512 MiB of features in the memory of
the host; None, the default, is mmseg's own inference. It holds for every
segmentor with Poly-NL layers, or mmcv's ``ContextBlock``, in backbone, neck
or head, by whatever calls it: each call has a context of its own, with
test-time augmentation each view. The images of a batch do not mix.

**This is the one place where this package replaces functions of a host**, the
moment it is imported: mmseg has no hook around its windows, and segmentors of
our own would take another ``type`` in every config, and a twin of each of its
classes, where one key should do. Replaced are

- ``slide_inference`` of ``EncoderDecoder``, which nearly all segmentors
  inherit, and of ``MultimodalEncoderDecoder``;
- ``slide_flip_inference`` of ``DepthEstimator``, where padding is not told;
- ``forward`` of ``BaseSegmentor``, which sees that the key is heeded.

Without the key they do what mmseg's own do, but that layers are told what of
a padded picture is in a window. A config that
names any ``polynl_mm`` type has this module imported; one that does not, such
as a ``GCHead``'s, needs ``custom_imports=dict(imports=[
'polynl_mm.segmentation.windows'])``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from copy import deepcopy
from functools import wraps

import torch
from mmseg.models.segmentors import (
    BaseSegmentor,
    DepthEstimator,
    EncoderDecoder,
    MultimodalEncoderDecoder,
)
from torch import Tensor

from polynl_mm.context import Window, Windows, grid, shared_context
from polynl_mm.padding import pictures_in, pictures_of, warn_of_padding

# What tests do not call, or what does not look at the image.
_EXCLUDED = ('auxiliary_head.*', 'text_encoder.*')
# The segmentors that have gone through windows of one context, in this call.
_heeded: ContextVar[list | None] = ContextVar('heeded', default=None)


def _in_place_of(kind: type, name: str) -> Callable:
    """Have a function stand around a host's, which it is given first."""
    present = vars(kind)[name]
    # That of the host also where this module is imported once more.
    host = getattr(present, 'host', present)

    def decorate(function):
        @wraps(host)
        def method(self, *args, **kwargs):
            return function(host, self, *args, **kwargs)

        method.host = host
        setattr(kind, name, method)
        return function

    return decorate


@_in_place_of(EncoderDecoder, 'slide_inference')
@_in_place_of(MultimodalEncoderDecoder, 'slide_inference')
def _slide_inference(
    host: Callable,
    self: BaseSegmentor,
    inputs: Tensor,
    batch_img_metas: list[dict],
) -> Tensor:
    """Do what mmseg's does, with one context for all windows.

    Args:
        inputs (Tensor): (B, 3, H, W).
        batch_img_metas: Left as they are: each window has a copy, with its
            own ``img_shape``. mmseg leaves that of the last window there.

    Returns:
        Tensor: (B, out_channels, H, W), the mean of the logits of all windows
        over a position.

    Raises:
        ValueError: On a ``context`` that is none, on gaps between windows, if
            no layer takes part or one is normalised by its window.
        WindowError: The model failed in a window, which is named.
    """
    cfg = self.test_cfg
    context, pictures = cfg.get('context'), pictures_of()
    if context is None and pictures is None:
        return host(self, inputs, batch_img_metas)
    windows = None
    if context is not None:
        windows = _windows(context, len(inputs))
    size = inputs.shape[2:]
    logits = inputs.new_zeros((len(inputs), self.out_channels, *size))
    count = inputs.new_zeros((len(inputs), 1, *size))

    def step(window: Window) -> None:
        x1, y1, x2, y2 = window.box
        part = (..., slice(y1, y2), slice(x1, x2))
        metas = deepcopy(batch_img_metas)
        metas[0]['img_shape'] = inputs[part].shape[2:]
        result = self.encode_decode(inputs[part], metas)
        # Windows end one after the other, in their order, which is mmseg's.
        logits[part] += result
        count[part] += 1

    try:
        parts = grid(size, cfg.crop_size, cfg.stride)
    except ValueError as error:
        raise ValueError(
            f'model.test_cfg.crop_size={tuple(cfg.crop_size)}, stride='
            f'{tuple(cfg.stride)}: {error}'
        ) from error
    if windows is None:
        # mmseg's own, but that layers are told what of pictures is in each.
        for window in parts:
            with pictures_in(pictures.within(window.box)):
                step(window)
        return logits / count
    with shared_context(self, windows, exclude=_EXCLUDED):
        windows(step, parts)
    if _heeded.get() is not None:
        _heeded.get().append(self)
    return logits / count


@_in_place_of(DepthEstimator, 'slide_flip_inference')
def _slide_flip_inference(
    host: Callable, self: DepthEstimator, inputs: Tensor, metas: list[dict]
) -> Tensor:
    """Do what mmseg's does; its windows are flipped, padding counts there."""
    if pictures_of() is not None:
        warn_of_padding('windows of slide_flip are of unknown places')
    with pictures_in(None):
        return host(self, inputs, metas)


def _windows(context: str | dict, images: int) -> Windows:
    try:
        options = {} if context == 'image' else dict(**context)
        torch.device(options.get('wait_on') or 'cpu')
        return Windows(images=images, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"model.test_cfg.context={context!r}, expected 'image' or "
            f'dict(budget=MiB or None, wait_on=device): {error}'
        ) from error


def check_test_cfg(test_cfg: dict | None) -> None:
    """Check the ``context`` of a segmentor's ``test_cfg``, if it has one.

    Raises:
        ValueError: It is none, or there are no windows.
    """
    context = (test_cfg or {}).get('context')
    if context is None:
        return
    _windows(context, images=1)
    if test_cfg.get('mode') != 'slide':
        raise ValueError(
            f'model.test_cfg.context={context!r} is for '
            f"model.test_cfg.mode='slide', got {test_cfg.get('mode')!r}"
        )


@_in_place_of(BaseSegmentor, 'forward')
def _forward(
    host: Callable,
    self: BaseSegmentor,
    inputs: Tensor,
    data_samples: list | None = None,
    mode: str = 'tensor',
):
    """Do what mmseg's does, and see that a ``context`` is heeded.

    Raises:
        ValueError: It is not, as there are no windows.
        TypeError: It is not, as the segmentor has its own way to make them.
    """
    cfg = getattr(self, 'test_cfg', None) or {}
    if mode != 'predict' or cfg.get('context') is None:
        return host(self, inputs, data_samples, mode)
    check_test_cfg(cfg)
    heeded = []
    token = _heeded.set(heeded)
    try:
        result = host(self, inputs, data_samples, mode)
    finally:
        _heeded.reset(token)
    # mmseg 1.2.2 has a DepthEstimator do both, and takes the whole image's.
    if self not in heeded or isinstance(self, DepthEstimator):
        raise TypeError(
            f'model.test_cfg.context={cfg["context"]!r}: '
            f"{type(self).__name__} does not take what mmseg's "
            'slide_inference makes of the windows'
        )
    return result
