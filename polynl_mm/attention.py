"""Poly-SA as a layer: a transformer's attention, of linear complexity.

It needs only torch. :mod:`polynl_mm.registry` makes it known to configs; the
formula and its sources are in :mod:`polynl_mm.ops.attention`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import InContext, StateDictMismatch, is_more_than_weights
from .ops import FORMS
from .ops.attention import HeadNorm, SAParams, poly_sa, poly_sa_calling

__all__ = ['PolySA']

POOLINGS = ('mean', 'learnt')


class PolySA(InContext, nn.Module):
    r"""Poly-SA: multi-head self-attention by a polynomial of third order.

    .. math::
        Y = W_o (\nu(g) \odot Q), \quad g = \Phi(K \odot V)

    with :math:`\Phi` over the tokens of an image and :math:`\nu` a LayerNorm
    over the channels of each head (Babiloni et al., TPAMI 2023); see
    :mod:`polynl_mm.ops.attention`, also for what is uncertain. The children
    are named as in timm, Swin and BEiT, so that the weights of their ``qkv``
    and ``proj`` load.

    Args:
        embed_dims (int): Channels of the tokens, C.
        num_heads (int): A divisor of C.
        qkv_bias (bool): Whether ``qkv`` has a bias; ``proj`` always has.
        norm (bool): Normalise the gate, head by head.
        pooling (str): ``'mean'``, for any number of tokens, or ``'learnt'``,
            by vectors ``p1`` and ``p2`` over the positions of one number.
        num_tokens (int, optional): That number, N, for ``'learnt'``.
        num_extra_tokens (int): How many of the tokens, the first, are none of
            a map, such as a class token.
        grid (tuple, optional): Rows and columns of the map of ``'learnt'``;
            by default it is taken for a square where that matters.
        resize_on_load (bool or tuple): Resize the vectors of a state dict of
            another N, the class tokens' apart: bicubically, as maps of the
            given rows and columns, or square for True. Those of p2 are not
            rescaled: without ``norm`` the gate grows with N.
        form (str): ``'auto'``, ``'direct'`` or ``'gram'``, see
            :func:`polynl_mm.ops.attention.poly_sa`. Where ``qkv`` or ``proj``
            are more than their weights (adapters, hooks), they are called,
            whatever the form; the norm of the gate never is.

    Attributes:
        around (callable, optional): See :class:`InContext`.

    Shape:
        - input: (B, N, C) of float16, bfloat16, float32 or float64.
        - output: as the input, contiguous if that is. It may be changed in
          place.

    Raises:
        ValueError: On arguments out of range and input of another shape.
        StateDictMismatch: On a state dict of another N.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        qkv_bias: bool = True,
        norm: bool = True,
        pooling: str = 'mean',
        num_tokens: int | None = None,
        num_extra_tokens: int = 0,
        grid: tuple[int, int] | None = None,
        resize_on_load: bool | tuple[int, int] = False,
        form: str = 'auto',
    ) -> None:
        """Check the arguments, make the parameters; see the class."""
        super().__init__()
        for name, value, least in (
            ('embed_dims', embed_dims, 1),
            ('num_heads', num_heads, 1),
            ('num_extra_tokens', num_extra_tokens, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f'{name} must be an int of at least {least}, got {value!r}'
                )
        if embed_dims % num_heads:
            raise ValueError(
                f'embed_dims={embed_dims} can not be divided among num_heads='
                f'{num_heads}'
            )
        if norm and embed_dims == num_heads:
            raise ValueError(
                f'norm=True with num_heads={num_heads}={embed_dims} channels '
                'normalises single numbers, of which nothing is left; take '
                'fewer heads or norm=False'
            )
        if form not in FORMS:
            raise ValueError(f'form must be one of {FORMS}, got {form!r}')
        if pooling not in POOLINGS:
            raise ValueError(
                f'pooling must be one of {POOLINGS}, got {pooling!r}'
            )
        self.embed_dims, self.num_heads = embed_dims, num_heads
        self.num_extra_tokens, self.form = num_extra_tokens, form
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.norm = None
        if norm:
            self.norm = nn.LayerNorm(embed_dims // num_heads, eps=1e-6)
        self.p1 = self.p2 = None
        self.grid, self.resize_on_load = grid, resize_on_load
        if pooling == 'learnt':
            self._make_vectors(num_tokens)
        elif (num_tokens, grid, resize_on_load) != (None, None, False):
            raise ValueError(
                'num_tokens, grid and resize_on_load are those of '
                "pooling='learnt'; the mean is for any number of tokens"
            )
        # Here too: a host that loads a checkpoint calls no init_weights.
        self.init_weights()

    def _make_vectors(self, num_tokens):
        extra, grid = self.num_extra_tokens, self.grid
        if not isinstance(num_tokens, int) or num_tokens <= extra:
            raise ValueError(
                "pooling='learnt' wants num_tokens, an int of more than "
                f'num_extra_tokens={extra}, got {num_tokens!r}; where it is '
                "not known, or changes, take pooling='mean'"
            )
        if grid is not None and math.prod(grid) + extra != num_tokens:
            raise ValueError(
                f'grid={grid} and num_extra_tokens={extra} are '
                f'{math.prod(grid) + extra} tokens, but num_tokens='
                f'{num_tokens}'
            )
        if self.form == 'gram':
            raise ValueError(
                "form='gram' is for pooling='mean': with learnt vectors there "
                'is the direct form only'
            )
        old = self.resize_on_load
        if not isinstance(old, bool) and math.prod(old) + extra == num_tokens:
            raise ValueError(
                f'resize_on_load={tuple(old)} has as many positions as '
                f'num_tokens={num_tokens}: a state dict would not tell which '
                'of the two it is for'
            )
        shape = self.num_heads, num_tokens
        self.p1, self.p2 = (nn.Parameter(torch.empty(shape)) for _ in '12')

    def init_weights(self) -> None:
        """Initial values, as transformers have them."""
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.init_gate()

    def init_gate(self) -> None:
        """Initial values of all but the projections."""
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.p1 is not None:
            nn.init.trunc_normal_(self.p1, std=0.02)
            nn.init.trunc_normal_(self.p2, std=0.02)

    @property
    def calls_linears(self) -> bool:
        """Whether what they compute is not in their weights alone."""
        linears = (self.qkv, self.proj)
        return any(is_more_than_weights(each, nn.Linear) for each in linears)

    @property
    def params(self) -> SAParams:
        """Weights and biases as the operation takes them."""
        qkv, biases = self.qkv, (None,) * 3
        if qkv.bias is not None:
            biases = qkv.bias.chunk(3)
        weights = (*qkv.weight.chunk(3), self.proj.weight)
        return SAParams(*weights, *biases, self.proj.bias)

    def why_alone(self) -> str | None:
        """What there is one of in an image, and would be in each part."""
        if self.p1 is not None:
            return (
                "with pooling='learnt' its vectors are over the positions of "
                "one whole image; pooling='mean' has none"
            )
        if self.num_extra_tokens:
            return (
                f'num_extra_tokens={self.num_extra_tokens} of its tokens are '
                'of a whole image, and would count in each part'
            )
        return None

    def forward(
        self,
        x: Tensor,
        hw_shape: tuple[int, int] | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x (Tensor): (B, N, C).
            hw_shape (tuple, optional): Rows and columns of the map that the
                tokens are, row by row, behind ``num_extra_tokens``. With it
                the padding of pictures does not count, and
                :func:`polynl_mm.shared_context` may cut windows that overlap.
            key_padding_mask (Tensor, optional): (B, N) of bool, True for
                tokens that are padding: they do not count in the gate.
            attn_mask: None: there are no pairs of tokens to be masked.
        """
        arguments = self.arguments(x, hw_shape, key_padding_mask, attn_mask)
        if self.calls_linears:
            return poly_sa_calling(x, self.project, self.proj, **arguments)
        return poly_sa(x, self.params, form=self.form, **arguments)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values, (B, N, C) -> (B, N, 3C), by calling."""
        return self.qkv(x)

    def arguments(
        self,
        x: Tensor,
        hw_shape: tuple[int, int] | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> dict:
        """Check those of :meth:`forward`; give what the operation takes.

        All but tokens, projections and form.
        """
        if x.dim() != 3 or x.shape[2] != self.embed_dims:
            raise ValueError(
                f'x must have shape (B, N, {self.embed_dims}), as PolySA has '
                f'embed_dims={self.embed_dims}, got {tuple(x.shape)}'
            )
        if attn_mask is not None:
            raise ValueError(
                'PolySA has no pairs of tokens, and so nothing for attn_mask '
                'to mask; tokens that are padding are named by '
                'key_padding_mask'
            )
        if self.p1 is not None and x.shape[1] != self.p1.shape[1]:
            raise ValueError(
                f'PolySA has learnt vectors for num_tokens={self.p1.shape[1]},'
                f" got {x.shape[1]} tokens; pooling='mean' is for any number"
            )
        around = self._around_tokens(x, hw_shape, key_padding_mask)
        return dict(
            num_heads=self.num_heads,
            norm=self.norm
            and HeadNorm(self.norm.weight, self.norm.bias, self.norm.eps),
            positions=None if self.p1 is None else (self.p1, self.p2),
            **self._watched(around, x),
        )

    def _around_tokens(self, x, hw_shape, mask) -> dict:
        """:meth:`_around` of the map, its weights those of the tokens."""
        features, extra = x.transpose(1, 2), self.num_extra_tokens
        if hw_shape is not None:
            if math.prod(hw_shape) + extra != x.shape[1]:
                raise ValueError(
                    f'PolySA got {x.shape[1]} tokens, but hw_shape='
                    f'{tuple(hw_shape)} and num_extra_tokens={extra} are '
                    f'{math.prod(hw_shape) + extra}'
                )
            features = features[..., extra:].unflatten(2, tuple(hw_shape))
        around = {'pool': None, 'weights': None}
        # Where a mask says what is padding, sizes of pictures need not.
        if mask is None or hw_shape is not None or self.around is not None:
            around.update(self._around(features))
        weights = around['weights']
        if weights is not None and hw_shape is not None:
            weights = F.pad(weights.flatten(1).float(), (extra, 0), value=1.0)
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
                raise ValueError(
                    'key_padding_mask must be of torch.bool and shape '
                    f'{tuple(x.shape[:2])}, True for padding, got '
                    f'{mask.dtype} of shape {tuple(mask.shape)}'
                )
            if around['pool'] is not None:
                raise ValueError(
                    'key_padding_mask within shared_context: what a part '
                    'counts would not be known; leave one of them out'
                )
            weights = ~mask if weights is None else weights * ~mask
        return {**around, 'weights': weights}

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in ('p1', 'p2') if self.p1 is not None else ():
            key = prefix + name
            if key in state_dict:
                state_dict[key] = self._fitted(key, state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _fitted(self, key: str, vectors: Tensor) -> Tensor:
        """Give (H, N) vectors of any N as those of this layer."""
        n, extra = self.p1.shape[1], self.num_extra_tokens
        found = vectors.shape[-1]
        if vectors.dim() != 2 or found == n:
            return vectors  # what else is wrong is torch's to tell
        # Raised, not collected: mmengine only logs what is collected.
        if not self.resize_on_load:
            raise StateDictMismatch(
                f'{key!r} is for {found} tokens in the state dict, for {n} in '
                'the model: resize_on_load=True resizes it'
            )
        old = self.resize_on_load
        old = _square(found - extra) if old is True else tuple(old)
        new = self.grid or _square(n - extra)
        for name, grid, tokens in (
            ('resize_on_load', old, found),
            ('grid', new, n),
        ):
            if grid is None or math.prod(grid) + extra != tokens:
                raise StateDictMismatch(
                    f'{key!r} can not be resized: {tokens} tokens without '
                    f'num_extra_tokens={extra} are no '
                    + ('square' if grid is None else f'map of {grid}')
                    + f'; give its rows and columns by {name}'
                )
        apart, maps = vectors[:, :extra], vectors[:, extra:]
        maps = F.interpolate(
            maps.unflatten(1, old).unsqueeze(0).float(),
            size=new,
            mode='bicubic',
            align_corners=False,
        )
        maps = maps[0].flatten(1).to(vectors.dtype)
        return torch.cat((apart, maps), 1)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the layer."""
        shown = f'{self.embed_dims}, num_heads={self.num_heads}'
        if self.p1 is not None:
            shown += f", pooling='learnt', num_tokens={self.p1.shape[1]}"
        return f'{shown}, form={self.form!r}'


def _square(count: int) -> tuple[int, int] | None:
    side = math.isqrt(max(count, 0))
    return (side, side) if side and side * side == count else None
