"""Poly-NL behind a 1x1 convolution, computed from the convolution's input.

The mathematics is in :mod:`polynl_mm.ops`. Here is where such pairs stand in a
model, and how the layer takes over what the convolution and its norm did:

- for inference, all three become one module in the place of the layer, with
  the constants made once, and the convolution and the norm become identities;
- for training, all stay what they are, under their names and with their
  parameters; convolution and norm pass their input through, and the layer
  reads their parameters.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import wrappers
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .insertion import inserted_after
from .layers import PolyNL
from .ops import (
    behind_pays,
    conv1x1,
    is_for_every_size,
    no_autocast,
    poly_nl,
    poly_nl_behind,
    project,
)

__all__ = ['FusedPolyNL', 'FusionReport', 'fuse_poly_nl']

_CONV_FORWARDS = {
    kind.forward
    for kind in (
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        wrappers.Conv2d,
        wrappers.Conv3d,
    )
}
_NORM_FORWARDS = {_BatchNorm.forward, nn.SyncBatchNorm.forward}


@dataclass
class FusionReport:
    """What :func:`fuse_poly_nl` did.

    Attributes:
        fused: Paths of the layers that are computed from the input of the
            convolution before them.
        left: Path of any other layer -> why it is left as it is.
    """

    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Give the counts in a line, and a line for each reason."""
        lines = [
            f'{len(self.fused)} of {len(self.fused) + len(self.left)} Poly-NL '
            'layers fused with the convolution before them'
        ]
        reasons = {}
        for path, reason in self.left.items():
            reasons.setdefault(reason, []).append(path)
        for reason, paths in reasons.items():
            lines.append(f'left: {", ".join(paths)}: {reason}')
        return '\n'.join(lines)


def fuse_poly_nl(
    model: nn.Module, trainable: bool = False
) -> tuple[nn.Module, FusionReport]:
    """Compute Poly-NL layers from the input of the 1x1 convolution before.

    Exact, see "behind a 1x1 convolution" in :mod:`polynl_mm.ops`. Found are
    layers that take the output of a 1x1 convolution with or without an
    evaluated BatchNorm: plug-ins ``after_conv3`` of the bottlenecks of mmdet
    and mmseg, blocks that ``polynl_mm.Insert`` put after such a convolution or
    ``ConvModule`` (laterals of an FPN), and items of a Sequential.

    For inference (default), call ``model.eval()`` and load the checkpoint
    first. The fused layers hold constants instead of parameters and can not
    be trained. A state dict of the fused model fits the fused model only.
    mmcv's ``fuse_conv_bn`` may be applied before or after; not at all where a
    block stands between a convolution and its norm. Where the convolution is
    wide and its output narrow (the upper laterals of an FPN), it is still the
    output that the layer is computed from.

    With ``trainable=True``, parameters, their names and their gradients are
    those of the model as it was, and so are its checkpoints. Call
    ``model.train()`` first: a BatchNorm that then uses the statistics of the
    batch (``norm_eval=False``) is left alone. Where the shapes are such that
    it would not pay (:func:`polynl_mm.ops.behind_pays`), or a BatchNorm is
    set to training later, the layer runs unfused. No SyncBN may be converted
    or reverted afterwards. A second call without ``trainable`` fuses such a
    model for inference.

    Args:
        model: Changed in place. What is fused already may be fused again.
        trainable: Whether it is to be trained.

    Returns:
        tuple: ``model`` and the report.

    Raises:
        TypeError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f'fuse_poly_nl: expected a module, got {type(model).__name__}'
            " (train() and eval() of the hosts' backbones return None: call "
            'them in a line of their own)'
        )
    report = FusionReport()
    modules = _Modules(model)
    for site in list(modules.sites()):
        path, layer = modules.path(site), site.get()
        linked = isinstance(layer.forward, _FromInput)
        if isinstance(layer, FusedPolyNL) or (linked and trainable):
            report.fused.append(path)
            continue
        if linked:
            layer.forward.unlink()
        try:
            conv, norm = modules.before(site)
            modules.check(site, conv, norm)
            if not trainable:
                _check_order(conv, norm)
        except _Left as reason:
            report.left[path] = str(reason)
            continue
        report.fused.append(path)
        (_link if trainable else _fold)(site, conv, norm)
    return model, report


class FusedPolyNL(nn.Module):
    """A Poly-NL layer and the 1x1 convolution before it, for inference.

    Made by :func:`fuse_poly_nl`. Its buffers are the arguments of
    :func:`polynl_mm.ops.poly_nl_behind` of the same names, or, where the
    convolution makes few channels of many, of its matrix and
    :func:`polynl_mm.ops.poly_nl`.

    Args:
        layer (PolyNL): The layer.
        a, b (Tensor): Weight (C, c) and shift (C,) of the convolution with
            its norm.

    Shape:
        - input: (B, c, \\*spatial), what the convolution was given.
        - output: (B, C, \\*spatial). It owns its memory.

    Raises:
        RuntimeError: When a state dict is loaded that holds the layer as it
            was before.
    """

    def __init__(self, layer: PolyNL, a: Tensor, b: Tensor) -> None:
        """Make the constants; see the class."""
        super().__init__()
        self.out_channels, self.in_channels = a.shape
        *weights, b1, b2, b3 = layer.matrices()
        # Made once: in double precision, so that rounding them adds nothing.
        w1, w2, w3 = (w.double() for w in weights)
        # The constants are for either way; what counts are large maps.
        self.behind = behind_pays(sys.maxsize, a.shape[1], len(a), False)
        if self.behind:
            w1, w2, b1, b2 = project(a, b, w1, w2, b1, b2)
        values = (a, b, w1, w2, w3, layer.alpha, layer.beta, b1, b2, b3)
        for name, value in zip(_ARGUMENTS, values):
            if value is not None:
                value = value.detach().to(layer.alpha.dtype, copy=True)
            self.register_buffer(name, value)

    def forward(self, h: Tensor) -> Tensor:
        """Shape: (B, in_channels, \\*spatial) -> (B, out_channels, ...)."""
        a, b, *params = (getattr(self, name) for name in _ARGUMENTS)
        if self.behind:
            return poly_nl_behind(h, a, b, *params)
        return poly_nl(conv1x1(h, a, b), *params)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Raised, not collected: mmengine only logs what is collected.
        if f'{prefix}w1.weight' in state_dict:
            raise RuntimeError(
                f'{prefix[:-1]!r} is fused with the convolution before it, '
                'and the state dict is of a model that is not: load it '
                'before fuse_poly_nl'
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the layer."""
        return (
            f'in_channels={self.in_channels}, out_channels={self.out_channels}'
        )


_ARGUMENTS = ('a', 'b', 'w1', 'w2', 'w3', 'alpha', 'beta', 'b1', 'b2', 'b3')


class _FromInput:
    """Forward of a layer in training: reads its convolution and its norm."""

    def __init__(self, layer: PolyNL, conv: _Site, norm: _Site | None):
        # Places: fuse_conv_bn exchanges a norm.
        self.layer, self.places = layer, (conv, norm)
        self.in_channels = conv.get().in_channels

    def parts(self) -> tuple[_ConvNd, nn.Module | None]:
        conv, norm = self.places
        return conv.get(), norm and norm.get()

    def __call__(self, h: Tensor) -> Tensor:
        layer, (conv, norm) = self.layer, self.parts()
        n = sys.maxsize if is_for_every_size() else math.prod(h.shape[2:])
        if (
            not behind_pays(n, conv.in_channels, conv.out_channels, True)
            or getattr(norm, 'training', False)
            or conv.weight.dtype in (torch.float16, torch.bfloat16)
        ):
            # A 1d layer after a 2d convolution is given (B, c, N).
            ones = (1,) * (len(conv.kernel_size) + 2 - h.dim())
            x = type(conv).forward(conv, h.reshape(*h.shape, *ones))
            x = x if norm is None else type(norm).forward(norm, x)
            x = x.reshape(*x.shape[:2], *h.shape[2:])
            return type(layer).forward(layer, x)
        w1, w2, w3, b1, b2, b3 = layer.matrices()
        with no_autocast(h):
            a, b = _as_affine(conv, norm)
            w1, w2, b1, b2 = project(a, b, w1, w2, b1, b2)
        return poly_nl_behind(
            h, a, b, w1, w2, w3, layer.alpha, layer.beta, b1, b2, b3
        )

    def unlink(self) -> None:
        """Give all three their own forward back."""
        for module in (self.layer, *self.parts()):
            if module is not None:
                vars(module).pop('forward', None)


def _pass(x: Tensor) -> Tensor:
    """Forward of a convolution and a norm that a layer computes."""
    return x


def _link(site: _Site, conv: _Site, norm: _Site | None) -> None:
    layer = site.get()
    layer.forward = _FromInput(layer, conv, norm)
    for place in filter(None, (conv, norm)):
        place.get().forward = _pass


@torch.no_grad()
def _fold(site: _Site, conv: _Site, norm: _Site | None) -> None:
    layer, old = site.get(), conv.get()
    a, b = _as_affine(old, norm and norm.get(), torch.float64)
    fused = FusedPolyNL(layer, a, b).train(layer.training)
    site.set(fused)
    if norm:
        norm.set(nn.Identity())
    identity = nn.Identity()
    # A convolution that blocks were inserted after carries them along.
    for name, block in old.named_children():
        identity.add_module(name, block)
    for hook in old._forward_hooks.values():
        identity.register_forward_hook(hook, with_kwargs=True)
    conv.set(identity)


def _as_affine(
    conv: _ConvNd, norm: nn.Module | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """A and b of a 1x1 convolution and an evaluated BatchNorm."""
    a = conv.weight.flatten(1).to(dtype)
    b = conv.bias
    b = a.new_zeros(len(a)) if b is None else b.to(dtype)
    if not isinstance(norm, _BatchNorm):  # none, or fuse_conv_bn was here
        return a, b
    scale = torch.rsqrt(norm.running_var.to(a.dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    b = (b - norm.running_mean) * scale
    b = b if norm.bias is None else b + norm.bias
    return a * scale.unsqueeze(1), b


# ------------------------------------------------------------ where and why


class _Left(Exception):
    """Why a layer is left as it is."""


@dataclass(frozen=True)
class _Site:
    """A place in a model: a module and the name of its child."""

    owner: nn.Module
    name: str

    def get(self) -> nn.Module:
        return self.owner._modules[self.name]

    def set(self, module: nn.Module) -> None:
        self.owner._modules[self.name] = module


class _Modules:
    """The modules of a model, and what comes before a layer."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self.places = {}
        for owner in self.paths:
            for name, child in owner._modules.items():
                self.places.setdefault(child, []).append(_Site(owner, name))

    def path(self, site: _Site) -> str:
        return f'{self.paths[site.owner]}.{site.name}'.lstrip('.')

    def sites(self) -> Iterator[_Site]:
        for module, places in self.places.items():
            if isinstance(module, (PolyNL, FusedPolyNL)):
                yield from places

    def before(self, site: _Site) -> tuple[_Site, _Site | None]:
        """Where the convolution and the norm stand that feed a layer."""
        owner, name = site.owner, site.name
        inserted = inserted_after(owner)
        plugins = getattr(owner, 'after_conv3_plugin_names', ())
        if name in inserted:
            if name != inserted[0]:
                raise _Left(f'{inserted[0]!r} comes between')
            return self.end(owner)
        if name in plugins and _of_a_host(owner):
            if name != plugins[0]:
                raise _Left(f'{plugins[0]!r} comes between')
            return _Site(owner, 'conv3'), _Site(owner, owner.norm3_name)
        if type(owner).forward is nn.Sequential.forward:
            items = list(owner._modules)
            before = items[: items.index(name)]
            if len(before) > 1 and _is_norm(owner._modules[before[-1]]):
                return _Site(owner, before[-2]), _Site(owner, before[-1])
            if before:
                return self.end(owner._modules[before[-1]])
        raise _Left('no 1x1 convolution is known to come before it')

    def end(self, module: nn.Module) -> tuple[_Site, _Site | None]:
        """Where the convolution and the norm stand that end a module."""
        if isinstance(module, _ConvNd):
            if module not in self.places:
                raise _Left('the convolution is the model itself')
            return self.places[module][0], None
        if type(module).forward is not ConvModule.forward:
            raise _Left(
                f'it follows a {type(module).__name__}, not a 1x1 convolution'
            )
        order = [
            step
            for step in module.order
            if step == 'conv' or getattr(module, _WITH[step])
        ]
        if order not in (['conv'], ['conv', 'norm']):
            raise _Left(f'it follows {" -> ".join(order)}')
        if len(order) == 1:
            return _Site(module, 'conv'), None
        return _Site(module, 'conv'), _Site(module, module.norm_name)

    def check(self, site: _Site, conv: _Site, norm: _Site | None) -> None:
        """Raise if these three can not be one."""
        layer = site.get()
        if type(layer).forward is not PolyNL.forward:
            raise _Left(f'{type(layer).__name__} has a forward of its own')
        if layer.norm is not None:
            raise _Left('its branch is normalised')
        _check_conv(conv.get())
        if norm:
            _check_norm(norm.get())
        parts = [place.get() for place in (site, conv, norm) if place]
        if isinstance(conv.owner, ConvModule):
            if conv.owner.efficient_conv_bn_eval_forward is not None:
                raise _Left('efficient_conv_bn_eval computes the convolution')
            if conv.get() is not site.owner:  # it is between, too
                parts.append(conv.owner)
        for module in parts:
            path = self.paths[module]
            what = f'{path!r} ({type(module).__name__})'
            places = self.places.get(module, ())
            # A layer in a module that is shared runs wherever that does.
            follows = module is site.owner and module is conv.owner
            if len(places) > 1 and not follows:
                raise _Left(f'{what} is used elsewhere, too')
            own_hooks = len(inserted_after(module))
            if len(module._forward_hooks) > own_hooks or (
                module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                raise _Left(f'{what} has hooks')
            if 'forward' in module.__dict__:
                raise _Left(f'{what} has a forward of its own')


_WITH = dict(norm='with_norm', act='with_activation')


def _of_a_host(module: nn.Module) -> bool:
    """Whether the forward is one of those we know: conv3, norm3, plugins."""
    home = type(module).forward.__module__.split('.')[0]
    return home in ('mmdet', 'mmseg') and hasattr(module, 'norm3_name')


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (_BatchNorm, nn.Identity))


def _check_conv(conv: nn.Module) -> None:
    if type(conv).forward not in _CONV_FORWARDS:
        raise _Left(f'it follows a {type(conv).__name__}')
    stride, padding = conv.stride, conv.padding
    if set(conv.kernel_size) != {1} or set(stride) != {1}:
        raise _Left(
            f'the convolution has kernel_size={conv.kernel_size}, '
            f'stride={stride}'
        )
    if conv.groups != 1:
        raise _Left(f'the convolution has groups={conv.groups}')
    if not isinstance(padding, str) and set(padding) != {0}:
        raise _Left(f'the convolution has padding={padding}')


def _check_norm(norm: nn.Module) -> None:
    if isinstance(norm, nn.Identity):
        return
    if not isinstance(norm, _BatchNorm):
        raise _Left(
            f'the norm is a {type(norm).__name__}, which is no BatchNorm'
        )
    if type(norm).forward not in _NORM_FORWARDS:
        raise _Left(f'{type(norm).__name__} has a forward of its own')
    if norm.training or norm.running_mean is None:
        raise _Left(
            f'the {type(norm).__name__} uses the statistics of the batch '
            '(model.eval() before inference, norm_eval=True in training)'
        )


def _check_order(conv: _Site, norm: _Site | None) -> None:
    """Raise if ``fuse_conv_bn`` would go wrong without these two."""
    if norm is None or not isinstance(norm.get(), _BatchNorm):
        return
    rest = _norms_of_convs(conv.owner, (conv.name, norm.name))
    if not rest <= _norms_of_convs(conv.owner):
        raise _Left(
            'without it, fuse_conv_bn would take the norm behind for that of '
            'another convolution: call fuse_conv_bn first'
        )


def _norms_of_convs(owner: nn.Module, without=()) -> set[tuple[str, str]]:
    """What mmcv's ``fuse_conv_bn`` takes for pairs, by names."""
    pairs, last = set(), None
    for name, child in owner.named_children():
        if name in without:
            continue
        if isinstance(child, _BatchNorm):
            pairs.add((last, name))
            last = None
        elif isinstance(child, nn.Conv2d):
            last = name
    return {pair for pair in pairs if pair[0]}
