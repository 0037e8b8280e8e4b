"""Poly-NL as layers: the parameters, their initial values, one call to ops.

They need only torch; mmcv builds the norm of the branch where ``norm_cfg``
asks for one. :mod:`polynl_mm.registry` makes them known to configs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .ops import (
    FORMS,
    Conv,
    Params,
    poly_nl,
    poly_nl_behind,
    poly_nl_calling,
    project,
)
from .ops.choice import BEHIND, ON_X, choose_for
from .ops.precision import autocast_dtype, no_autocast
from .padding import pictures_of

__all__ = [
    'Around',
    'Call',
    'InContext',
    'PolyNL',
    'PolyNL1d',
    'PolyNL2d',
    'PolyNL3d',
    'Source',
    'StateDictMismatch',
    'is_more_than_weights',
]


class StateDictMismatch(RuntimeError):
    """A state dict holds a Poly-NL layer in another guise than the model."""


class Source(Protocol):
    """The 1x1 convolution before a layer, with its norm, that it computes.

    A layer that has one is given the input of the convolution, H
    (B, in_channels, \\*spatial), in place of its output X.
    """

    in_channels: int

    def as_conv(self) -> Conv | None:
        """Give A and b where X = A H + b, None where it is not."""

    def __call__(self, h: Tensor) -> Tensor:
        """Compute X."""


Around = Callable[
    [nn.Module, Tensor],
    'tuple[Callable[[Tensor], Tensor] | None, Tensor | None]',
]


class Call(NamedTuple):
    """What a call of a layer gave to the operation, for who watches it.

    Attributes:
        x (Tensor): (B, c, \\*spatial), what the gate was taken of; of tokens
            (B, N, C).
        p (Params, optional): Those of ``x``. None where they are not all of
            what the layer computes: the branch is normalised, convolutions
            are called, or it is no Poly-NL layer.
        conv (Conv, optional): The convolution that makes the features of
            ``x``; None where ``x`` is the features.
        weights (Tensor, optional): What each position counts in the gate.
        pooled (bool): Whether the gate is that of several calls.
        gate (Tensor): (B, C).
    """

    x: Tensor
    p: Params | None
    conv: Conv | None
    weights: Tensor | None
    pooled: bool
    gate: Tensor


def is_more_than_weights(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether what it computes is not what ``kind`` does with its weights."""
    return bool(
        type(module).forward is not kind.forward
        or 'forward' in vars(module)
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


class InContext:
    """What a layer and its fused form have in common: they have a gate.

    The mean of the gate is taken over the positions of a picture, and not
    over those by which it was padded, see :mod:`polynl_mm.padding`.

    Attributes:
        around (callable, optional): What lies around the positions of a call:
            given the layer and its input, returns ``pool`` and ``weights`` of
            :func:`polynl_mm.ops.poly_nl`, or None for either; padding is then
            its concern. It is what :func:`polynl_mm.shared_context` sets.
        watch (callable, optional): Told of every :class:`Call`, once its gate
            is known. For the time of few calls: whoever sets it puts back
            what was there.
    """

    around: Around | None = None
    watch: Callable[[Call], None] | None = None

    def __init__(self) -> None:
        """Have the models of mmengine tell layers the sizes of pictures."""
        super().__init__()
        if 'mmengine.model' in sys.modules:
            import_module('polynl_mm.samples')

    def why_alone(self) -> str | None:
        """Why its gate can not be shared by several calls; None if it can."""
        return None

    def _around(self, x: Tensor) -> dict:
        """Arguments of the operation."""
        around = self.around  # another thread may be about to take it away
        if around is None:
            pictures = pictures_of(self)
            return {} if not pictures else dict(weights=pictures.weights(x))
        pool, weights = around(self, x)
        return dict(pool=pool, weights=weights)

    def _watched(
        self,
        around: dict,
        x: Tensor,
        p: Params | None = None,
        conv: Conv | None = None,
    ) -> dict:
        """Arguments of the operation that tell who watches of its gate."""
        watch, pool = self.watch, around.get('pool')
        if watch is None:
            return around

        def tell(gate):
            gate = gate if pool is None else pool(gate)
            weights, pooled = around.get('weights'), pool is not None
            watch(Call(x, p, conv, weights, pooled, gate))
            return gate

        return {**around, 'pool': tell}


class PolyNL(InContext, nn.Module):
    r"""Poly-NL layer, a non-local block of linear complexity.

    The base of :class:`PolyNL1d`, :class:`PolyNL2d` and :class:`PolyNL3d`.

    .. math::
        Y = \alpha X + \beta (\Phi(X W_1 \odot X W_2) \odot X) W_3

    with :math:`\Phi` the mean over all positions of an image (Babiloni et
    al., ICCV 2021, arXiv 2107.02859). As a plug-in of an mmdet or mmseg
    backbone::

        plugins=[dict(cfg=dict(type='polynl_mm.PolyNL2d'),
                      stages=(False, False, True, False),
                      position='after_conv3')]

    With the default arguments the layer starts as the identity: it can be put
    into a pretrained network without disturbing it. Exclude ``alpha`` and
    ``beta`` from weight decay (``paramwise_cfg.custom_keys``, see README).

    Args:
        in_channels (int): Channels of input and output.
        alpha_init (float): Initial value of alpha, the weight of the input.
        beta_init (float): Initial value of beta, the weight of the branch.
            At 0 the layer is the identity and only beta learns in the first
            step.
        zero_init_w3 (bool): Start W3 at zero instead: the identity for any
            ``beta_init`` but 0, with which nothing would ever learn.
        bias (bool): Whether the three 1x1 convolutions have biases.
        norm_cfg (dict, optional): Normalise the branch,
            :math:`Y = \alpha X + \beta \, norm((\Phi(\cdot) \odot X) W_3)`.
            Runs in float32 and costs more passes over X. With a BatchNorm it
            warns, because hosts freeze the statistics (``norm_eval=True``).
        form (str): ``'auto'``, ``'direct'`` or ``'gram'``, see
            :func:`polynl_mm.ops.poly_nl`. Parameters, checkpoints and results
            are the same in each. Only the weights of the convolutions are
            looked at; those that have become more than their weights (hooks,
            as of pruning or an observer; another class, as an adapter) are
            called instead, whatever the form.

    Attributes:
        around (callable, optional): See :class:`InContext`.
        source (Source, optional): The convolution before, where the layer is
            to compute it as well; what comes in is then the input of that.

    Shape:
        - input: (B, in_channels, \*spatial) of float16, bfloat16, float32 or
          float64.
        - output: as the input; it owns its memory.

    Raises:
        ValueError: On arguments out of range, on a start that can never
            learn, and on input of another shape.
    """

    _abbr_ = 'poly_nl'
    source: Source | None = None
    _conv: type
    _spatial_dims: int

    def __init__(
        self,
        in_channels: int,
        alpha_init: float = 1.0,
        beta_init: float = 0.0,
        zero_init_w3: bool = False,
        bias: bool = False,
        norm_cfg: dict | None = None,
        form: str = 'auto',
    ) -> None:
        """Check the arguments, make the parameters; see the class."""
        super().__init__()
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(
                f'in_channels must be a positive int, got {in_channels!r}'
            )
        if form not in FORMS:
            raise ValueError(f'form must be one of {FORMS}, got {form!r}')
        if zero_init_w3 and beta_init == 0:
            raise ValueError(
                'beta_init=0 with zero_init_w3=True can never learn: every '
                'gradient of the branch is zero. Set one of them only'
            )
        if zero_init_w3 and norm_cfg is not None:
            raise ValueError(
                f'norm_cfg={norm_cfg} with zero_init_w3=True divides by the '
                'spread of a branch that is zero; start with beta_init=0'
            )
        self.alpha_init = alpha_init
        self.beta_init = beta_init
        self.zero_init_w3 = zero_init_w3
        self.form = form
        self.out_channels = in_channels
        self.w1 = self._conv(in_channels, in_channels, 1, bias=bias)
        self.w2 = self._conv(in_channels, in_channels, 1, bias=bias)
        self.w3 = self._conv(in_channels, in_channels, 1, bias=bias)
        self.alpha = nn.Parameter(torch.empty(1))
        self.beta = nn.Parameter(torch.empty(1))
        self.norm = None
        if norm_cfg is not None:
            self.norm = self._build_norm(norm_cfg)
        # Here too: a host that loads a checkpoint calls no init_weights.
        self.init_weights()

    def _build_norm(self, norm_cfg: dict) -> nn.Module:
        if norm_cfg.get('type') in ('BN', 'IN'):
            # To mmcv these names mean the two-dimensional ones.
            kind = f'{norm_cfg["type"]}{self._spatial_dims}d'
            norm_cfg = {**norm_cfg, 'type': kind}
        from mmcv.cnn import build_norm_layer

        norm = build_norm_layer(norm_cfg, self.in_channels)[1]
        if isinstance(norm, nn.LayerNorm):
            raise ValueError(
                f'norm_cfg={norm_cfg} normalises the last axis, not the '
                "channels; use dict(type='GN', num_groups=1)"
            )
        if isinstance(norm, _BatchNorm):
            warnings.warn(
                f'norm_cfg={norm_cfg} in {type(self).__name__}: hosts with '
                'norm_eval=True or frozen_stages keep this BatchNorm at its '
                'initial statistics for ever; GN does not depend on them',
                stacklevel=3,
            )
        return norm

    def init_weights(self) -> None:
        """Initial values; hosts call it after initialising their own."""
        for conv in (self.w1, self.w2, self.w3):
            nn.init.xavier_normal_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        if self.zero_init_w3:
            nn.init.zeros_(self.w3.weight)
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.constant_(self.beta, self.beta_init)

    @property
    def in_channels(self) -> int:
        """Channels of what :meth:`forward` takes."""
        if self.source is not None:
            return self.source.in_channels
        return self.out_channels

    @property
    def calls_convolutions(self) -> bool:
        """Whether what they compute is not in their weights alone."""
        convs = (self.w1, self.w2, self.w3)
        return any(is_more_than_weights(conv, self._conv) for conv in convs)

    def why_alone(self) -> str | None:
        """A norm of the branch takes statistics of the features at hand."""
        norm = self.norm
        if norm is None or (
            isinstance(norm, _BatchNorm) and not norm.training
        ):
            return None
        return (
            f'its branch is normalised by a {type(norm).__name__}'
            + (' in training' if isinstance(norm, _BatchNorm) else '')
            + ', that is by statistics of the features at hand: only an '
            'evaluated BatchNorm is the same for all parts'
        )

    @property
    def params(self) -> Params:
        """W1, W2, W3, alpha, beta, b1, b2, b3 as the operation takes them."""
        convs = (self.w1, self.w2, self.w3)
        return Params(
            *(conv.weight.flatten(1) for conv in convs),
            self.alpha,
            self.beta,
            *(conv.bias for conv in convs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B, in_channels, \\*spatial) -> (B, C, \\*spatial).

        C is ``in_channels`` but for a layer that has a source.
        """
        if x.dim() != 2 + self._spatial_dims or (
            x.shape[1] != self.in_channels
        ):
            raise ValueError(
                f'{type(self).__name__} was built with in_channels='
                f'{self.in_channels} for (B, {self.in_channels}, '
                f'{self._spatial_dims} spatial axes), got input of shape '
                f'{tuple(x.shape)}. If a host inserted it (plugins=[...]), '
                'the host announced another channel count for this position '
                "than it delivers; choose another, such as 'after_conv3'"
            )
        calls = self.calls_convolutions
        if self.source is not None and calls:
            x = self.source(x)
        elif self.source is not None:
            conv, out = self.source.as_conv(), self.out_channels
            forms = [f for f in BEHIND + ON_X if self.form in ('auto', f.name)]
            form = choose_for(x, forms, x.shape[1], out, backward=True)
            if conv is not None and form.behind:
                p = project(conv, self.params)
                around = self._watched(self._around(x), x, p, conv)
                return poly_nl_behind(x, conv, p, form.name, **around)
            x = self.source(x)
        around = self._around(x)
        if calls:
            return self._by_calls(x, self._watched(around, x))
        if self.norm is None:
            p = self.params
            return poly_nl(x, p, self.form, **self._watched(around, x, p))
        around = self._watched(around, x)
        # The branch is cubic in x: until it is normalised, it may exceed what
        # float16 holds, whatever the size of x and Y.
        dtype = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x):
            p = self.params._replace(alpha=0.0, beta=1.0)
            p = Params(
                *(t.to(dtype) if isinstance(t, Tensor) else t for t in p)
            )
            branch = poly_nl(x.to(dtype), p, self.form, **around)
            return self._normalised(x, branch)

    def _by_calls(self, x: Tensor, around: dict) -> Tensor:
        convs = (self.w1, self.w2, self.w3)
        if self.norm is None:
            scalars = (self.alpha, self.beta)
            return poly_nl_calling(x, convs, *scalars, **around)
        scalars = (torch.zeros_like(self.alpha), torch.ones_like(self.beta))
        branch = poly_nl_calling(x, convs, *scalars, **around)
        with no_autocast(x):
            return self._normalised(x, branch)

    def _normalised(self, x: Tensor, branch: Tensor) -> Tensor:
        like = next(self.norm.parameters(), branch)
        branch = self.norm(branch.to(like.dtype))
        y = self.alpha * x + self.beta * branch
        return y.to(autocast_dtype(x))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A member of Params in the place of a convolution. Raised, not
        # collected: mmengine only logs what is collected.
        if f'{prefix}w1' in state_dict:
            raise StateDictMismatch(
                f'{prefix[:-1]!r} is a Poly-NL layer; in the state dict it is '
                'fused with the convolution before it: that is for a model '
                'on which fuse_poly_nl was called; a training saves none such'
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the layer."""
        return f'in_channels={self.in_channels}, form={self.form!r}'


class PolyNL1d(PolyNL):
    """Poly-NL over sequences; arguments as :class:`PolyNL`."""

    _conv = nn.Conv1d
    _spatial_dims = 1


class PolyNL2d(PolyNL):
    """Poly-NL over feature maps; arguments as :class:`PolyNL`."""

    _conv = nn.Conv2d
    _spatial_dims = 2


class PolyNL3d(PolyNL):
    """Poly-NL over videos and volumes; arguments as :class:`PolyNL`."""

    _conv = nn.Conv3d
    _spatial_dims = 3
