"""Poly-NL behind a 1x1 convolution, computed from the convolution's input.

The mathematics is in :mod:`polynl_mm.ops`. Here is where such pairs stand in a
model, and how the layer takes over what the convolution and its norm did:

- for inference, all three become one module in the place of the layer, with
  the constants made once, and the convolution and the norm become identities;
- for training, all stay where they are, under their names and with their
  parameters; convolution and norm become modules that pass their input
  through, and the layer has them for its ``source``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from .insertion import hand_on, inserted_after, moved_norm, norms_of_convs
from .layers import InContext, PolyNL, StateDictMismatch
from .ops import (
    Conv,
    Params,
    evaluated,
    poly_nl,
    poly_nl_behind,
    project,
)
from .ops.choice import BEHIND, ON_X, choose
from .ops.precision import HALF, convolution
from .plugins import loses_plugins

try:
    from mmcv.cnn import ConvModule
    from mmcv.cnn.bricks import wrappers
except ImportError:  # then no model has such modules
    ConvModule, _MMCV_CONVS = None, ()
else:
    _MMCV_CONVS = (wrappers.Conv2d, wrappers.Conv3d)

__all__ = ['FusedPolyNL', 'FusionReport', 'fuse_poly_nl']

_CONV_FORWARDS = {
    kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_MMCV_CONVS)
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
    first; a layer in training mode is left alone. The fused layers hold
    constants instead of parameters and can not be trained. A state dict of
    the fused model fits the fused model only. mmcv's ``fuse_conv_bn`` may be
    applied before or after. Where the convolution is wide and its output
    narrow (the upper laterals of an FPN), it is still the output that the
    layer is computed from.

    With ``trainable=True``, parameters, their names and their gradients are
    those of the model as it was, and so are its checkpoints. Call
    ``model.train()`` first: a BatchNorm that then uses the statistics of the
    batch (``norm_eval=False``) is left alone. Where the shapes are such that
    it would not pay (:func:`polynl_mm.ops.choice.choose`), or a BatchNorm is
    set to training later, the layer runs unfused. Where a SyncBN is converted
    or reverted afterwards, the next forward is refused. A second call without
    ``trainable`` fuses such a model for inference.

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
        linked = getattr(layer, 'source', None)
        if linked and not isinstance(linked, _Source):
            report.left[path] = 'it has a source of its own'
            continue
        if isinstance(layer, FusedPolyNL) or (linked and trainable):
            report.fused.append(path)
            continue
        if linked:
            linked.unlink()
        try:
            conv, norm = modules.before(site)
            modules.check(site, conv, norm)
            if not trainable:
                _check_order(conv, norm)
                if layer.training:
                    raise _Left(
                        'it is in training mode: call model.eval() first, or '
                        'fuse it with trainable=True'
                    )
        except _Left as reason:
            report.left[path] = str(reason)
            continue
        report.fused.append(path)
        if trainable:
            _Source(layer, conv, norm)
        else:
            _fold(site, conv, norm)
    return model, report


class FusedPolyNL(InContext, nn.Module):
    """A Poly-NL layer and the 1x1 convolution before it, for inference.

    Made by :func:`fuse_poly_nl`. Its buffers are a and b of the convolution
    and the members of :class:`polynl_mm.ops.Params` by their names; w1, w2,
    b1 and b2 those of the convolution's input, but where it makes few channels
    of many.

    Args:
        layer (PolyNL): The layer.
        conv (Conv): The convolution with its norm.

    Shape:
        - input: (B, c, \\*spatial), what the convolution was given.
        - output: (B, C, \\*spatial). It owns its memory.

    Raises:
        StateDictMismatch: When a state dict is loaded that holds the layer as
            it was before.
    """

    def __init__(self, layer: PolyNL, conv: Conv) -> None:
        """Make the constants; see the class."""
        super().__init__()
        self.around = layer.around
        self.out_channels, self.in_channels = conv.a.shape
        # Made once: in double precision, so that rounding them adds nothing.
        p = Params(*(None if t is None else t.double() for t in layer.params))
        # The constants are for either way; what counts are large maps.
        self.behind = choose(
            BEHIND + ON_X, None, *conv.a.shape[::-1], backward=False
        ).behind
        if self.behind:
            p = project(conv, p)
        for name, value in (*conv._asdict().items(), *p._asdict().items()):
            if value is not None:
                value = value.detach().to(layer.alpha.dtype, copy=True)
            self.register_buffer(name, value)

    def forward(self, h: Tensor) -> Tensor:
        """Shape: (B, in_channels, \\*spatial) -> (B, out_channels, ...)."""
        conv = Conv(self.a, self.b)
        p = Params(*(getattr(self, name) for name in Params._fields))
        if self.behind:
            around = self._watched(self._around(h), h, p, conv)
            return poly_nl_behind(h, conv, p, **around)
        x = convolution(h, *conv)
        return poly_nl(x, p, **self._watched(self._around(x), x, p))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Raised, not collected: mmengine only logs what is collected.
        if f'{prefix}w1.weight' in state_dict:
            raise StateDictMismatch(
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


class _Source:
    """The convolution and the norm before a layer, in training."""

    def __init__(self, layer: PolyNL, conv: _Site, norm: _Site | None):
        # Places: fuse_conv_bn exchanges a norm.
        self.layer, self.conv, self.norm = layer, conv, norm
        self.in_channels = conv.get().in_channels
        layer.source = self
        for place in filter(None, (conv, norm)):
            module = place.get()
            module.__class__ = _passing(type(module))
            module.source = self

    def unlink(self) -> None:
        """Make all three what they were."""
        self.layer.source = None
        for place in filter(None, (self.conv, self.norm)):
            module = place.get()
            if not isinstance(module, _Passing):
                continue
            if type(module) is not _passing(module.kind):
                raise RuntimeError(
                    f'a {module.kind.__name__} was parametrized after '
                    'fuse_poly_nl(trainable=True): remove the parametrization '
                    'before fuse_poly_nl is called again'
                )
            del module.source
            module.__class__ = module.kind

    def check(self) -> tuple[nn.Module, nn.Module | None]:
        """Give convolution and norm.

        Raises:
            RuntimeError: Another module stands in the place of one of them.
        """
        conv, norm = self.conv.get(), self.norm and self.norm.get()
        # An Identity is what fuse_conv_bn leaves of a norm.
        for module, left in ((conv, ()), (norm, (nn.Identity, type(None)))):
            if not isinstance(module, (_Passing, *left)):
                raise RuntimeError(
                    f'a {type(module).__name__} has taken the place of a '
                    'convolution or norm that fuse_poly_nl(trainable=True) '
                    'had fused with a Poly-NL layer: convert to or from '
                    'SyncBN before it is called'
                )
        return conv, norm

    def as_conv(self) -> Conv | None:
        """A and b, unless the norm uses the statistics of the batch."""
        conv, norm = self.check()
        if getattr(norm, 'training', False) or conv.weight.dtype in HALF:
            return None
        return _as_conv(conv, norm)

    def __call__(self, h: Tensor) -> Tensor:
        """Shape: (B, c, \\*spatial) -> (B, C, \\*spatial)."""
        conv, norm = self.check()
        # A 1d layer after a 2d convolution is given (B, c, N).
        ones = (1,) * (len(conv.kernel_size) + 2 - h.dim())
        x = conv.own_forward(h.reshape(*h.shape, *ones))
        if isinstance(norm, _Passing):
            x = norm.own_forward(x)
        return x.reshape(*x.shape[:2], *h.shape[2:])


class _Passing:
    """Comes before the class of a module that a layer computes."""

    kind: type
    source: _Source

    def forward(self, x: Tensor) -> Tensor:
        self.source.check()
        return x

    def own_forward(self, x: Tensor) -> Tensor:
        return self.kind.forward(self, x)

    def __reduce_ex__(self, protocol):
        return _new_passing, (self.kind,), self.__dict__


@cache
def _passing(kind: type) -> type:
    # mmengine initialises by the names of a class and of its bases.
    bases = (_Passing, kind, *kind.__bases__)
    return type(f'Passing{kind.__name__}', bases, dict(kind=kind))


def _new_passing(kind: type) -> nn.Module:
    return nn.Module.__new__(_passing(kind))


@torch.no_grad()
def _fold(site: _Site, conv: _Site, norm: _Site | None) -> None:
    layer, old = site.get(), conv.get()
    made = _as_conv(old, norm and norm.get(), torch.float64)
    fused = FusedPolyNL(layer, made).train(layer.training)
    site.set(fused)
    if norm:
        norm.set(nn.Identity())
    identity = nn.Identity()
    conv.set(identity)
    for before, after in ((layer, fused), (old, identity)):
        hand_on(before, after)


def _as_conv(
    conv: _ConvNd, norm: nn.Module | None, dtype: torch.dtype | None = None
) -> Conv:
    """A and b of a 1x1 convolution and an evaluated BatchNorm."""
    a, b = conv.weight.flatten(1).to(dtype), conv.bias
    if isinstance(norm, _BatchNorm):
        mean, variance = norm.running_mean, norm.running_var
        args = (b, mean, variance, norm.eps, norm.weight, norm.bias)
        return evaluated(a, *args)
    # None, or fuse_conv_bn was here.
    return Conv(a, a.new_zeros(len(a)) if b is None else b.to(dtype))


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
            if len(plugins) > 1 and loses_plugins(type(owner)):
                raise _Left(f'the host keeps only {plugins[-1]!r}')
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
        if not _is_conv_module(module):
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
        if layer.calls_convolutions:
            raise _Left('its convolutions have hooks, or are of other classes')
        _check_conv(conv.get())
        if norm:
            _check_norm(norm.get())
        parts = [place.get() for place in (site, conv, norm) if place]
        if ConvModule and isinstance(conv.owner, ConvModule):
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
            if is_parametrized(module):
                raise _Left(f'{what} is parametrized')
            if len(places) > 1 and not follows:
                raise _Left(f'{what} is used elsewhere, too')
            moved = moved_norm(module)
            if moved is not None:
                raise _Left(f'fuse_conv_bn has moved {moved!r} past it')
            blocks = inserted_after(module)
            if blocks and module not in (site.owner, layer):
                raise _Left(f'{blocks[0]!r} comes between')
            if len(module._forward_hooks) > len(blocks) or (
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


def _is_conv_module(module: nn.Module) -> bool:
    return ConvModule and type(module).forward is ConvModule.forward


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
    if norm is not None and not isinstance(norm.get(), _BatchNorm):
        return  # it was called already
    gone = (conv.name, norm and norm.name)
    rest = norms_of_convs(conv.owner, gone)
    if not rest.items() <= norms_of_convs(conv.owner).items():
        raise _Left(
            'without it, fuse_conv_bn would take the norm behind for that of '
            'another convolution: call fuse_conv_bn first'
        )
