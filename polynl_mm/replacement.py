"""Poly-SA in the place of the attention of any model, by config.

What stands there afterwards has the projections of the host for its own, as
children of the same names, so that parameters keep their keys and pretrained
ones load. It is called as the host calls its attention, with the residual,
the dropout and the drop path of the host. There is an adapter for each family
of attention that is known, see ``_KNOWN``.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from mmengine import registry as root
from mmengine.logging import print_log
from torch import Tensor, nn

from .attention import PolySA
from .hosting import (
    added_last,
    build_host,
    initialise_within,
    matching_paths,
    warn_of_frozen,
)
from .insertion import hand_on, inserted_after
from .ops.attention import SAParams, poly_sa_calling
from .padding import pictures_of, warn_of_padding
from .registry import MODELS
from .samples import tell_layers

__all__ = ['Replace', 'replace_attention']

_ENTRY_KEYS = ('at', 'cfg')


@MODELS.register_module()
def Replace(into: str | dict, attention: list[dict], **host) -> nn.Module:
    """Build a host with Poly-SA for its attention; the host is returned.

    Every key but ``into`` and ``attention`` is the host's own, so over a base
    of mmdet or mmseg a config states only the difference::

        _base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
        model = dict(backbone=dict(
            type='polynl_mm.Replace', into='SwinTransformer',
            attention=[dict(at='stages.*.blocks.*.attn',
                            cfg=dict(type='polynl_mm.PolySA'))]))

    Args:
        into: Type of the host, as it would stand in ``type``, or a config of
            what changes the host otherwise: ``dict(type='polynl_mm.Insert',
            into='SwinTransformer', blocks=[...])``.
        attention: What to replace by what, see :func:`replace_attention`.
        **host: All keys of the host.

    Raises:
        ValueError: As :func:`replace_attention`.
    """
    return replace_attention(build_host(into, host), attention)


def replace_attention(model: nn.Module, attention: list[dict]) -> nn.Module:
    """Put Poly-SA in the place of attention, in place.

    Each entry of ``attention`` is a dict of

    - ``at`` (str): Path of the attention, as in ``model.named_modules()``.
      ``*``, ``?`` and ``[...]`` match within one component.
    - ``cfg`` (dict): ``dict(type='polynl_mm.PolySA', ...)``. Channels, heads,
      biases and, where it is told, the number of tokens are the host's, and
      may be left out.

    Known are:

    - Swin, ``...attn``: over the whole map, without windows, shift and what
      windows are padded by. ``...attn.w_msa``: in windows, for blocks that do
      not shift, whose pairs of tokens would have to be masked; what windows
      are padded by then counts, as in the host.
    - MiT, PVT and Twins, ``...attn``: keys and values are those of all
      tokens, without spatial reduction; Twins' local attention is global.
    - mmseg's ViT, BEiT and MAE, ``...attn``: class tokens are tokens as
      others are.
    - mmcv's ``MultiheadAttention`` elsewhere (DETR), with positions that are
      added to queries and keys and with a ``key_padding_mask``. Attention to
      other tokens than the queries, and masks of pairs, are refused when they
      come.

    Gone are the softmax with its scale (``qk_scale``) and dropout, biases by
    relative position, and spatial reduction with its norm. Loading a
    checkpoint of the host is no error: it leaves these out, keeps what is new
    at its initial values, and says so in one line. Afterwards the model is
    another function, to be trained.

    Args:
        model: Changed in place, before it is trained or on its device.
        attention: The entries.

    Returns:
        ``model``.

    Raises:
        ValueError: For an entry or a path that can not be used, at once;
            nothing is replaced then. At a forward for what is refused.
    """
    if not isinstance(attention, (list, tuple)) or not all(
        isinstance(entry, dict) for entry in attention
    ):
        raise ValueError(
            'attention must be a list of dicts, such as dict(at=..., cfg='
            f"dict(type='polynl_mm.PolySA')), got {attention!r}"
        )
    if not attention:
        return model
    names = dict(model.named_modules(remove_duplicate=False))
    made = {}  # attention of the host -> its path, what comes there
    for index, entry in enumerate(attention):
        where = f'attention[{index}]={dict(entry)}'
        cfg = _checked(where, entry)
        # One module may have several paths.
        found = {}
        for path in matching_paths(where, entry['at'], names):
            found.setdefault(names[path], path)
        for host, path in found.items():
            if host in made:
                raise ValueError(f'{where}: an entry before is for {path!r}')
            made[host] = (path, _made(where, path, cfg, names))
    paths = {path for path, _ in made.values()}
    for path in paths:
        inside = [p for p in paths if p.startswith(f'{path}.')]
        if inside:
            raise ValueError(
                f'{inside[0]!r} is in {path!r}, which is replaced as well: '
                'name one of them'
            )
    for host, (path, new) in made.items():
        _take_over(host, path, new)
    for owner in list(model.modules()):
        for name, child in list(owner._modules.items()):
            if child in made:
                setattr(owner, name, made[child][1])
    _make_loadable(type(model).__name__, made)
    tell_layers(model)
    initialise_within(model, _around_init)
    warn_of_frozen(model, {p: f'the attention at {p!r}' for p in paths})
    dropping = [p for host, (p, _) in made.items() if _drops_pairs(host)]
    if dropping:
        warnings.warn(
            f'{type(model).__name__}: the dropout of attention (attn_drop) at '
            f'{dropping[0]!r} and {len(dropping) - 1} more places is gone: '
            'Poly-SA has no pairs of tokens to drop',
            stacklevel=2,
        )
    return model


# ------------------------------------------------------------ what, and where


def _checked(where: str, entry: dict) -> dict:
    """The arguments of the layer that an entry asks for."""
    if set(entry) != {'at', 'cfg'}:
        raise ValueError(
            f'{where} must have the keys at and cfg, has {sorted(entry)}'
        )
    at, cfg = entry['at'], entry['cfg']
    if not isinstance(at, str) or not at or not isinstance(cfg, dict):
        raise ValueError(
            f"{where}: at must be a path, such as 'layers.*.attn', and cfg a "
            'dict'
        )
    cfg = dict(cfg)
    kind = cfg.pop('type', None)
    with root.MODELS.switch_scope_and_registry(None) as registry:
        found = registry.get(kind) if isinstance(kind, str) else kind
    if found is not PolySA:
        raise ValueError(
            f"{where}: type of cfg must be 'polynl_mm.PolySA', got {kind!r}"
        )
    return cfg


def _made(where: str, path: str, cfg: dict, names: dict) -> nn.Module:
    """What comes in the place of an attention."""
    host = names[path]
    adapter = _adapter_of(host)
    if isinstance(host, _Placed):
        raise ValueError(f'{where}: {path!r} is Poly-SA already: leave it out')
    if adapter is None:
        kinds = sorted({name.rpartition('.')[2] for name in _KNOWN})
        within = [
            p
            for p in names
            if p.startswith(f'{path}.') and _adapter_of(names[p])
        ]
        raise ValueError(
            f'{where}: {path!r} is a {type(host).__name__}, which is no '
            f'attention that is known; known: {", ".join(kinds)}'
            + (f'; there is one at {within[0]!r}' if within else '')
        )
    parts = path.split('.')
    owners = [names['.'.join(parts[:k])] for k in range(len(parts))]
    try:
        told = adapter.told(host, owners)
        for key, value in told.items():
            given = cfg.get(key, value)
            if (tuple(given) if isinstance(given, list) else given) != value:
                raise ValueError(
                    f'{key}={given!r}, but the host has {value!r} there; '
                    'it may be left out'
                )
        if cfg.get('pooling') != 'learnt':
            for key in ('num_tokens', 'grid'):
                told.pop(key, None)
        made = adapter(host, **{**told, **cfg})
    except (TypeError, ValueError) as error:
        raise ValueError(f'{where}, for {path!r}: {error}') from error
    weight = next(host.parameters())
    return made.to(weight.device, weight.dtype).train(host.training)


def _adapter_of(module: nn.Module) -> type | None:
    """That of its class, or of the class whose forward it has."""
    for kind in type(module).__mro__:
        adapter = _KNOWN.get(_full_name(kind))
        if adapter and type(module).forward is kind.forward:
            return adapter
    return None


def _full_name(kind: type) -> str:
    return f'{kind.__module__}.{kind.__qualname__}'


def _take_over(host: nn.Module, path: str, new: nn.Module) -> None:
    """Hand on blocks that were inserted after the attention or its core."""
    pairs = [(host, new)]
    if isinstance(new, _Shell):
        pairs.append((getattr(host, new.core_name), new.core))
    kept = {*new.modules(), *(before for before, _ in pairs)}
    for name, module in host.named_modules():
        blocks = inserted_after(module)
        if blocks and module not in kept:
            raise ValueError(
                f'the block {blocks[0]!r} after {f"{path}.{name}"!r} would be '
                'lost with it: take it out, or insert it elsewhere'
            )
    for before, after in pairs:
        hand_on(before, after)


def _drops_pairs(host: nn.Module) -> bool:
    return any(
        each.dropout > 0
        if isinstance(each, nn.MultiheadAttention)
        else getattr(getattr(each, 'attn_drop', None), 'p', 0) > 0
        for each in host.modules()
    )


# ------------------------------------------------------------------ adapters


class _Placed:
    """What stands in the place of a host's attention.

    Attributes:
        gone: Key -> shape of what a state dict of the host has there, and one
            of this has not.
        new: Keys of what only this has.
        says: Said when a state dict of the host is loaded; by one in a model.
    """

    gone: dict[str, torch.Size] = {}
    new: tuple[str, ...] = ()
    says: str | None = None


class _Core(_Placed, PolySA):
    """Poly-SA with the projections of a host's attention, and its dropout."""

    def __init__(self, host: nn.Module, **cfg) -> None:
        super().__init__(**cfg)
        self.qkv, self.proj = host.qkv, host.proj
        self.proj_drop = host.proj_drop

    @staticmethod
    def told(host: nn.Module, owners: list[nn.Module]) -> dict:
        """Arguments of the layer that the host tells.

        Args:
            host: The attention.
            owners: The modules that it is in, the model first.
        """
        return dict(
            embed_dims=host.embed_dims,
            num_heads=host.num_heads,
            qkv_bias=host.qkv.bias is not None,
        )

    def init_weights(self) -> None:
        """The projections are the host's to initialise."""
        self.init_gate()

    def forward(
        self, x: Tensor, hw_shape: tuple[int, int] | None = None
    ) -> Tensor:
        return self.proj_drop(super().forward(x, hw_shape))


class _InWindows(_Core):
    """Swin's, of windows."""

    @staticmethod
    def told(host, owners):
        if getattr(owners[-1], 'shift_size', 0):
            raise ValueError(_NO_SHIFT)
        rows, columns = host.window_size
        told = _Core.told(host, owners)
        return {**told, 'grid': (rows, columns), 'num_tokens': rows * columns}

    def why_alone(self):
        return 'it has a gate for each window of attention'

    def _around(self, x):
        if self.around is None:
            if pictures_of(self):
                warn_of_padding('attention in windows is told no sizes')
            return {}
        return super()._around(x)

    def forward(self, x, mask=None):
        if mask is not None:
            raise ValueError(_NO_SHIFT)
        return super().forward(x)


_NO_SHIFT = (
    'where windows are shifted, pairs of tokens are masked, and Poly-SA has '
    "none: replace the whole of the attention, '...attn', which then has no "
    "windows, or '...attn.w_msa' only where they are not shifted "
    "('stages.*.blocks.[02468].attn.w_msa')"
)


class _OfBEiT(_Core):
    """BEiT's, which may have biases of queries and values alone."""

    def __init__(self, host, **cfg):
        super().__init__(host, **cfg)
        if host.bias == 'qv_bias':
            self.q_bias, self.v_bias = host.q_bias, host.v_bias

    @staticmethod
    def told(host, owners):
        rows, columns = host.window_size
        return dict(
            _Core.told(host, owners),
            grid=(rows, columns),
            num_tokens=rows * columns + 1,
            num_extra_tokens=1,
        )

    @property
    def params(self):
        params = super().params
        if not hasattr(self, 'q_bias'):
            return params
        return params._replace(bq=self.q_bias, bv=self.v_bias)

    def project(self, x):
        qkv = super().project(x)
        if not hasattr(self, 'q_bias'):
            return qkv
        none = torch.zeros_like(self.q_bias)
        return qkv + torch.cat((self.q_bias, none, self.v_bias)).to(qkv.dtype)


class _InProjection(_Core):
    """With the parameters of a ``torch.nn.MultiheadAttention``."""

    def __init__(self, host: nn.MultiheadAttention, **cfg) -> None:
        PolySA.__init__(self, **cfg)
        del self.qkv, self.proj
        self.in_proj_weight = host.in_proj_weight
        self.in_proj_bias = host.in_proj_bias
        self.out_proj = host.out_proj

    @property
    def calls_linears(self):
        return False

    @property
    def params(self):
        biases = (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
        out = self.out_proj
        weights = (*self.in_proj_weight.chunk(3), out.weight)
        return SAParams(*weights, *biases, out.bias)

    def forward(
        self,
        x,
        hw_shape=None,
        query_pos=None,
        key_pos=None,
        **masks,
    ):
        if query_pos is None and key_pos is None:
            return PolySA.forward(self, x, hw_shape, **masks)
        p = self.params
        arguments = self.arguments(x, hw_shape, **masks)

        def project(x):
            q = x if query_pos is None else x + query_pos
            k = x if key_pos is None else x + key_pos
            of = ((q, p.wq, p.bq), (k, p.wk, p.bk), (x, p.wv, p.bv))
            return torch.cat([F.linear(*each) for each in of], -1)

        return poly_sa_calling(x, project, self.out_proj, **arguments)


class _Shell(_Placed, nn.Module):
    """What a host has around the attention itself, which is the core."""

    core_name: str

    @property
    def core(self) -> _Core:
        return getattr(self, self.core_name)

    def init_weights(self) -> None:
        self.core.init_gate()


class _Unwindowed(_Shell):
    """Swin's, over the whole map."""

    core_name = 'w_msa'

    def __init__(self, host, **cfg):
        super().__init__()
        self.w_msa = _Core(host.w_msa, **cfg)
        self.drop = host.drop

    @staticmethod
    def told(host, owners):
        return _Core.told(host.w_msa, owners)

    def forward(self, query, hw_shape):
        return self.drop(self.w_msa(query, hw_shape))


class _Multihead(_Shell):
    """mmcv's, to which what comes in is added."""

    core_name = 'attn'

    def __init__(self, host, **cfg):
        super().__init__()
        self.attn = _InProjection(host.attn, **cfg)
        self.proj_drop, self.dropout_layer = host.proj_drop, host.dropout_layer
        self.batch_first = host.batch_first

    @staticmethod
    def told(host, owners):
        attn = host.attn
        if (
            attn.in_proj_weight is None
            or attn.bias_k is not None
            or attn.add_zero_attn
        ):
            raise ValueError(
                'keys or values of other widths than the queries (kdim, vdim)'
                ', or added ones (add_bias_kv, add_zero_attn) are not of '
                'Poly-SA'
            )
        told = dict(
            embed_dims=host.embed_dims,
            num_heads=host.num_heads,
            qkv_bias=attn.in_proj_bias is not None,
        )
        for owner in owners:
            if any(_full_name(k) == _VIT for k in type(owner).__mro__):
                size = owner.patch_size
                grid = tuple(each // size for each in owner.img_size)
                extra = int(owner.with_cls_token)
                told.update(
                    grid=grid,
                    num_tokens=math.prod(grid) + extra,
                    num_extra_tokens=extra,
                )
        return told

    def forward(
        self,
        query,
        key=None,
        value=None,
        identity=None,
        query_pos=None,
        key_pos=None,
        attn_mask=None,
        key_padding_mask=None,
        **kwargs,
    ):
        for name, given in (('key', key), ('value', value)):
            if given is not None and given is not query:
                raise ValueError(
                    f'{name} is not query: this is attention to other tokens '
                    '(cross-attention), which Poly-SA is not; leave it out '
                    'of at'
                )
        # Hosts hand on much that is for other attention. No mask is ignored.
        for name, given in kwargs.items():
            if ('mask' in name or 'causal' in name) and (
                given is not None and given is not False
            ):
                raise ValueError(f'{name} is no mask that Poly-SA knows')
        if key_pos is None:
            key_pos = query_pos
        return self.added(
            query,
            identity,
            query_pos=query_pos,
            key_pos=key_pos,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
        )

    def added(self, x, identity, hw_shape=None, **kwargs):
        """Attend, and add."""
        identity = x if identity is None else identity
        if not self.batch_first:
            x = x.transpose(0, 1)
            for key in ('query_pos', 'key_pos'):
                if kwargs.get(key) is not None:
                    kwargs[key] = kwargs[key].transpose(0, 1)
        out = self.attn(x, hw_shape, **kwargs)
        if not self.batch_first:
            out = out.transpose(0, 1)
        return identity + self.dropout_layer(self.proj_drop(out))


class _Unreduced(_Multihead):
    """Of MiT, PVT and Twins, without spatial reduction."""

    def forward(self, x, hw_shape, identity=None):
        return self.added(x, identity, hw_shape)


_VIT = 'mmseg.models.backbones.vit.VisionTransformer'
# By name: a host is imported by whoever uses it.
_KNOWN = {
    'mmcv.cnn.bricks.transformer.MultiheadAttention': _Multihead,
    'mmdet.models.backbones.pvt.SpatialReductionAttention': _Unreduced,
    'mmdet.models.backbones.swin.ShiftWindowMSA': _Unwindowed,
    'mmdet.models.backbones.swin.WindowMSA': _InWindows,
    'mmseg.models.backbones.beit.BEiTAttention': _OfBEiT,
    'mmseg.models.backbones.mit.EfficientMultiheadAttention': _Unreduced,
    'mmseg.models.backbones.swin.ShiftWindowMSA': _Unwindowed,
    'mmseg.models.backbones.swin.WindowMSA': _InWindows,
    'mmseg.models.backbones.twins.LocallyGroupedSelfAttention': _Core,
}


# ------------------------------------------------------------ state dicts


def _make_loadable(name: str, made: dict) -> None:
    """Have state dicts of the host load, and one line say what they lack."""
    for host, (_, new) in made.items():
        before, after = host.state_dict(), new.state_dict()
        new.gone = {k: v.shape for k, v in before.items() if k not in after}
        new.new = tuple(k for k in after if k not in before)
        # Public in newer torch only.
        new._register_load_state_dict_pre_hook(_reconcile, with_module=True)
    changed = [(p, new) for p, new in made.values() if new.gone or new.new]
    if not changed:
        return
    path, first = changed[0]
    gone, new = (
        ', '.join(dict.fromkeys(k for _, each in changed for k in of(each)))
        for of in (lambda each: each.gone, lambda each: each.new)
    )
    first.says = (
        f'{name}: Poly-SA at {path!r} and {len(changed) - 1} more places is '
        f'given a state dict of other attention: not taken: {gone or "none"}; '
        f'left at their initial values: {new or "none"}'
    )


def _reconcile(module, state_dict, prefix, *_) -> None:
    """Before a state dict is loaded: take out what is gone, add what is new.

    One that has none of what is new is of the host. One that lacks a part of
    it is damaged, which is told as ever.
    """
    if not any(key.startswith(prefix) for key in state_dict):
        return
    gone = [prefix + key for key in module.gone if prefix + key in state_dict]
    for key in gone:
        del state_dict[key]
    lacking = [key for key in module.new if prefix + key not in state_dict]
    is_of_host = bool(lacking) and len(lacking) == len(module.new)
    if is_of_host:
        own = module.state_dict()
        state_dict.update({prefix + key: own[key] for key in lacking})
    if module.says and (gone or is_of_host):
        print_log(module.says, 'current', logging.WARNING)


def _show_gone(module, state_dict, prefix, _) -> None:
    """Add what is gone to a state dict, of the shape it had."""
    for key, shape in module.gone.items():
        state_dict[prefix + key] = torch.zeros(shape)


@contextmanager
def _around_init(model: nn.Module) -> Iterator[None]:
    """See :func:`polynl_mm.hosting.initialise_within`.

    Hosts that load a checkpoint then ask themselves for the shape of each
    table of relative positions in it.
    """
    placed = [m for m in model.modules() if isinstance(m, _Placed)]
    handles = [m._register_state_dict_hook(_show_gone) for m in placed]
    try:
        with added_last(model, {m: m.new for m in placed if m.new}):
            yield
    finally:
        for handle in handles:
            handle.remove()
