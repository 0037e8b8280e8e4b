"""A block after any sub-module of any model, by config.

The block becomes a child of the module it follows, and a forward hook calls
it. The hook does not hold the block, but finds it, by name, in the module it
is called for. So a copy of the model runs the copy's own block, and the keys
and the class of the host stay what they are.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from itertools import chain

import torch
from mmengine import registry as root
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from .hosting import (
    added_last,
    build_host,
    initialise_within,
    matching_paths,
    twin_of,
    warn_of_frozen,
)
from .registry import MODELS
from .samples import tell_layers

__all__ = ['Insert', 'insert_blocks']

_ENTRY_KEYS = ('after', 'cfg', 'item')


@MODELS.register_module()
def Insert(into: str | dict, blocks: list[dict], **host) -> nn.Module:
    """Build a host and insert blocks; the host itself is returned.

    Every key but ``into`` and ``blocks`` is the host's own, so over a base of
    mmdet or mmseg a config states only the difference::

        _base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
        model = dict(backbone=dict(
            type='polynl_mm.Insert', into='ResNet',
            blocks=[dict(after='layer3.5',
                         cfg=dict(type='polynl_mm.PolyNL2d'))]))

    Backbones, necks, heads, RoI extractors and whole models are hosts alike:
    ``model=dict(type='polynl_mm.Insert', into='MaskRCNN', blocks=[dict(
    after='neck.fpn_convs.*', cfg=...)])``.

    Args:
        into: Type of the host, as it would stand in ``type``: ``'ResNet'`` is
            that of the default scope, ``'mmdet.ResNet'`` mmdet's in any; or
            a config of what changes the host otherwise, see
            :func:`polynl_mm.Replace`.
        blocks: What to insert where, see :func:`insert_blocks`.
        **host: All keys of the host.

    Raises:
        ValueError: As :func:`insert_blocks`.
    """
    return insert_blocks(build_host(into, host), blocks)


def insert_blocks(model: nn.Module, blocks: list[dict]) -> nn.Module:
    r"""Insert blocks into a model, in place.

    Each entry of ``blocks`` is a dict of

    - ``after`` (str): Path of the sub-module whose output the block takes, as
      in ``model.named_modules()``; ``''`` is the model itself. ``*``, ``?``
      and ``[...]`` match within one component: ``'layer3.*'`` is every block
      of the stage, ``'fpn_convs.*'`` every level. A Sequential stands for its
      last item, whose output is its own. All paths are looked up before
      anything is inserted.
    - ``cfg`` (dict): Any registered block, as in ``plugins`` of a ResNet.
      ``in_channels`` may be left out where it can be told. A second block of
      one type in one place needs a ``postfix``.
    - ``item`` (int, optional): Which item of an output that is a tuple or
      list, if several could be meant.

    The block is a child of the module it follows, named as mmcv names
    plug-ins: ``layer3.5.poly_nl``. A module that the model calls several times
    (a head shared by all levels) calls its block each time. Blocks after one
    module run in the order of the list. A block frozen with its host's stage
    is warned of.

    Args:
        model: Changed in place: blocks, hooks, and an ``init_weights`` that
            lets the blocks have the last word on their initial values. Not
            yet on its device: the blocks are made on the CPU.
        blocks: The entries.

    Returns:
        ``model``.

    Shape:
        - maps (B, C, H, W), or tokens (B, N, C), (N, B, C) where the module
          says ``batch_first=False``; alone or in a tuple or list, whose other
          items pass unchanged.
        - A block with 1d convolutions gets (B, C, N), N = H W for a map; one
          with 2d convolutions (B, C, H, W), for which tokens need an (H, W)
          beside them, in the output or among the arguments of the module; one
          without convolutions what there is. It must keep the shape.

    Raises:
        ValueError: For an entry or a path that cannot be used, an output in
            which no or no single feature is found, and channels that do not
            fit or cannot be told. At once where a dry run of the model on an
            image reaches the place (backbones, and necks behind them),
            otherwise at the first forward.
    """
    if not isinstance(blocks, (list, tuple)) or not all(
        isinstance(entry, dict) for entry in blocks
    ):
        raise ValueError(
            'blocks must be a list of dicts, such as dict(after=..., cfg='
            f'dict(type=...)), got {blocks!r}'
        )
    if not blocks:
        return model
    names = dict(model.named_modules(remove_duplicate=False))
    plan = [
        (entry, path)
        for index, entry in enumerate(blocks)
        for path in _paths(index, entry, names)
    ]
    calls, idle = _dry_run(model, {path for _, path in plan})
    built, taken = [], set()
    for entry, path in plan:
        module = names[path]
        if path in idle:
            raise ValueError(
                f'{_type(model)} never calls {path!r}, or its forward only, '
                'past all hooks: a block after it would never run; insert '
                'after a module within'
            )
        owner = names[path.rpartition('.')[0]]
        name, block, hook = _build(module, owner, path, entry, calls[path])
        if (module, name) in taken or hasattr(module, name):
            raise ValueError(
                f'{path!r} has a {name!r} already: give the block another '
                "name, dict(after=..., cfg=dict(..., postfix='_2'))"
            )
        taken.add((module, name))
        built.append((module, block, hook))
    for module, block, hook in built:
        module.add_module(hook.name, block.train(module.training))
        module.register_forward_hook(hook, with_kwargs=True)
    tell_layers(model)
    warn_of_frozen(
        model,
        {
            f'{hook.path}.{hook.name}'.lstrip('.'): (
                f'the block {hook.name!r} after {hook.path!r}'
            )
            for *_, hook in built
        },
    )
    initialise_within(model, _around_init)
    return model


def inserted_after(module: nn.Module) -> list[str]:
    """Names of the blocks inserted after a module, in the order they run."""
    hooks = module._forward_hooks.values()
    return [hook.name for hook in hooks if isinstance(hook, _Hook)]


def hand_on(before: nn.Module, after: nn.Module) -> None:
    """Insert the blocks that stand after a module after another instead."""
    for name in inserted_after(before):
        after.add_module(name, before._modules[name])
    for hook in before._forward_hooks.values():
        if isinstance(hook, _Hook):
            after.register_forward_hook(hook, with_kwargs=True)


def moved_norm(module: nn.Module) -> str | None:
    """Name of the norm that was moved past the blocks after a convolution.

    mmcv's ``fuse_conv_bn`` does so and leaves an Identity in its place.
    """
    if not isinstance(module, nn.Conv2d):
        return None
    for hook in module._forward_hooks.values():
        if isinstance(hook, _Hook) and hook.norm is not None:
            owner, name = hook.norm
            if isinstance(owner._modules.get(name), nn.Identity):
                return name
    return None


def norms_of_convs(owner: nn.Module, without=()) -> dict[str, str]:
    """Name of a convolution -> name of the norm that mmcv takes for its own.

    mmcv's ``fuse_conv_bn`` goes by the order of the children.

    Args:
        owner: Their module.
        without: Names of children that are passed over.
    """
    pairs, last = {}, None
    for name, child in owner.named_children():
        if name in without:
            continue
        if isinstance(child, _BatchNorm):
            if last is not None:
                pairs[last] = name
            last = None
        elif isinstance(child, nn.Conv2d):
            last = name
    return pairs


def _type(module: nn.Module) -> str:
    return type(module).__name__


# ------------------------------------------------------------------- where


def _paths(index: int, entry: dict, names: dict) -> list[str]:
    """Paths of the modules that get the blocks of an entry, once each."""
    where = f'blocks[{index}]={dict(entry)}'
    unknown = [key for key in entry if key not in _ENTRY_KEYS]
    missing = [key for key in _ENTRY_KEYS[:2] if key not in entry]
    if unknown or missing:
        raise ValueError(
            f'{where} must have the keys after and cfg, and may have item; '
            f'unknown: {unknown}, missing: {missing}'
        )
    after, cfg, item = (entry.get(key) for key in _ENTRY_KEYS)
    if (
        not isinstance(after, str)
        or not isinstance(cfg, dict)
        or not (isinstance(cfg.get('type'), str) or callable(cfg.get('type')))
        or not (item is None or type(item) is int)
        or not isinstance(cfg.get('postfix', ''), (int, str))
        or '.' in str(cfg.get('postfix', ''))
    ):
        raise ValueError(
            f'{where}: after must be a path, cfg a dict with a type, which '
            'may have a postfix (a number, or text without a dot), and item '
            'a number'
        )
    matched = matching_paths(where, after, names)
    ends = {}
    for path in matched:
        end = _end(path, names)
        ends.setdefault(id(names[end]), end)
    return list(ends.values())


def _end(path: str, names: dict) -> str:
    """Path of the module whose output is that of the module at ``path``.

    A block may not become an item of a Sequential, which would run it.
    """
    module = names[path]
    forward = type(module).forward
    if isinstance(module, nn.Sequential) and forward is nn.Sequential.forward:
        if not len(module):
            raise ValueError(
                f'{path!r} is an empty {_type(module)}: insert elsewhere'
            )
        last = f'{path}.{list(module._modules)[-1]}'.lstrip('.')
        uses = [
            sum(module is names[p] for module in names.values())
            for p in (path, last)
        ]
        if uses[0] != uses[1]:
            raise ValueError(
                f'{path!r} is a {_type(module)} whose last item {last!r} is '
                'used elsewhere, too: a block after it would run there as '
                'well; insert after another module'
            )
        return _end(last, names)
    if forward is nn.Module.forward:
        raise ValueError(
            f'{path!r} is a {_type(module)}, which is never called; insert '
            f"after its items: '{path}.*'"
        )
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f'{path!r} is a {_type(module)}, which would run a block as one '
            f'more of its items; insert after one of them: '
            f'{[f"{path}.{name}" for name in module._modules]}'
        )
    # mmcv's own SyncBN is none of torch's.
    if isinstance(module, _BatchNorm) or _type(module) == 'SyncBatchNorm':
        raise ValueError(
            f'{path!r} is a {_type(module)}: converting it to or from SyncBN '
            'makes a new one and would drop the block; insert after the '
            f'module that holds it, {path.rpartition(".")[0]!r}'
        )
    return path


# -------------------------------------------------------------------- what


def _dry_run(model: nn.Module, paths: set) -> tuple[dict, set]:
    """What modules are given and return when the model sees an image.

    The forward of a detector ends where it needs more than an image, and that
    of a neck or a head tells nothing.

    Returns:
        Path -> list of (args, kwargs, output) on the meta device, and the
        paths that are certainly never called.
    """
    calls = {path: [] for path in paths}
    twin = twin_of(model)
    # Not chained: the train() of some hosts returns nothing.
    twin.eval()
    for path in paths:

        def record(module, *call, path=path):
            calls[path].append(call)

        twin.get_submodule(path).register_forward_hook(
            record, with_kwargs=True
        )
    ran = set()
    for module in twin.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, *_: ran.add(module))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            twin(torch.empty(1, 3, 256, 256, device='meta'))
    # Whatever stops it, what was seen until then holds,
    except Exception:
        idle = set()
    else:
        # Whole models run some parts in training only (auxiliary heads).
        idle = {
            path
            for path in paths
            if not calls[path]
            and not (
                isinstance(model, BaseModel)
                and ran.isdisjoint(twin.get_submodule(path).modules())
            )
        }
    # unless no convolution could take it: what the host wants is no image.
    if not ran:
        return {path: [] for path in paths}, set()
    return calls, idle


def _build(
    module: nn.Module,
    owner: nn.Module,
    path: str,
    entry: dict,
    calls: list,
) -> tuple:
    """Name, block and hook of an entry, checked against the calls seen."""
    cfg = dict(entry['cfg'])
    postfix = cfg.pop('postfix', '')
    with root.MODELS.switch_scope_and_registry(None) as registry:
        kind = cfg['type']
        kind = registry.get(kind) if isinstance(kind, str) else kind
    if kind is None:
        raise ValueError(f'no block {cfg["type"]!r} to insert after {path!r}')
    if (
        'in_channels' in inspect.signature(kind).parameters
        and 'in_channels' not in cfg
    ):
        cfg['in_channels'] = _channels(module, path, entry, calls)
    # What only blocks from a config need: mmcv.
    from mmcv.cnn import build_plugin_layer

    try:
        name, block = build_plugin_layer(cfg, postfix)
    except TypeError as error:
        raise ValueError(
            f'{cfg} can not be built after {path!r}: {error}'
        ) from error
    norm = norms_of_convs(owner).get(path.rpartition('.')[2])
    hook = _Hook(
        name,
        path,
        entry.get('item'),
        _axes(block),
        None if norm is None else (owner, norm),
    )
    if hook.axes == 3:
        raise ValueError(
            f'{cfg["type"]} after {path!r} has 3d convolutions; maps and '
            'tokens take blocks with 1d or 2d ones'
        )
    for args, kwargs, output in calls:
        hook.locate(module, block, args, kwargs, output)
    return name, block, hook


def _channels(module: nn.Module, path: str, entry: dict, calls: list) -> int:
    """Channels of a module's output: as seen, or as the module declares."""
    seen = set()
    for *_, output in calls:
        items = _items(output)
        x = items[_feature(path, entry.get('item'), output)]
        seen.add(x.shape[_channel_axis(x)])
    if not seen:
        shape = getattr(module, 'normalized_shape', [None])
        names = ('out_channels', 'out_features', 'num_channels', 'embed_dims')
        values = [getattr(module, n, None) for n in names] + [shape[-1]]
        seen = {v for v in values if isinstance(v, int)}
    if len(seen) != 1:
        raise ValueError(
            f'the channels after {path!r} ({_type(module)}) cannot be told'
            + (f', they could be any of {sorted(seen)}' if seen else '')
            + ': give in_channels in the cfg of the block, '
            f'{dict(entry["cfg"], in_channels="...")}'
        )
    return seen.pop()


def _axes(block: nn.Module) -> int | None:
    """Spatial axes that a block works on, None if it has no convolution."""
    for module in block.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            return len(module.kernel_size)
    return None


# --------------------------------------------------------------------- how


@dataclass(frozen=True, eq=False)
class _Hook:
    """Forward hook: the block ``name`` of a module, applied to its output.

    ``norm`` is the place, a module and the name of its child, of the norm
    that follows where the module is a convolution.
    """

    name: str
    path: str
    item: int | None
    axes: int | None
    norm: tuple[nn.Module, str] | None

    def __call__(self, module, args, kwargs, output):
        block = getattr(module, self.name)
        norm = moved_norm(module)
        if norm is not None:
            raise RuntimeError(
                f'after {self.path!r}, {self.name!r} stands between a '
                f'convolution and its norm {norm!r}, and fuse_conv_bn has '
                'moved the norm to the convolution, before the block: call '
                'fuse_conv_bn before the block is inserted, or not at all'
            )
        index, shape = self.locate(module, block, args, kwargs, output)
        x = _items(output)[index]
        y = self.run(block, x, shape, getattr(module, 'batch_first', True))
        if isinstance(output, Tensor):
            return y
        items = [y if item is x else item for item in output]
        if hasattr(output, '_fields'):
            return type(output)(*items)
        return type(output)(items)

    def locate(self, module, block, args, kwargs, output):
        """Index of the feature in the output, its shape for the block."""
        index = _feature(self.path, self.item, output)
        x = _items(output)[index]
        channels = x.shape[_channel_axis(x)]
        expected = getattr(block, 'in_channels', channels)
        if channels != expected:
            raise ValueError(
                f'after {self.path!r}, {self.name!r} was built with '
                f'in_channels={expected}, but what comes there has '
                f'{channels} channels, shape {tuple(x.shape)}'
            )
        if x.dim() == 4 or self.axes != 2:
            return index, x.shape[2:] if x.dim() == 4 else None
        count = x.shape[1 if getattr(module, 'batch_first', True) else 0]
        grids = []
        for value in chain(_items(output), args, kwargs.values()):
            if (
                _is_size(value)
                and value[0] * value[1] == count
                and tuple(value) not in grids
            ):
                grids.append(tuple(value))
        if len(grids) != 1:
            raise ValueError(
                f'after {self.path!r}, {self.name!r} needs a map, but there '
                f'come tokens of shape {tuple(x.shape)} and '
                f'{f"more than one (H, W): {grids}" if grids else "no (H, W)"}'
                ' beside them; take a 1d block, such as polynl_mm.PolyNL1d'
            )
        return index, grids[0]

    def run(self, block, x, shape, batch_first):
        """Show x to the block in the layout it works on."""
        if self.axes is None or (x.dim() == 4 and self.axes == 2):
            return block(x)
        if x.dim() == 4:
            return block(x.flatten(2)).unflatten(2, shape)
        if not batch_first:
            x = x.transpose(0, 1)
        # Contiguous: blocks and hosts take views of what they are given.
        x = x.transpose(1, 2).contiguous()
        if self.axes == 2:
            x = x.unflatten(2, shape)
        y = block(x).flatten(2)
        order = (0, 2, 1) if batch_first else (2, 0, 1)
        return y.permute(order).contiguous()


def _items(output) -> list:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _channel_axis(x: Tensor) -> int:
    return 1 if x.dim() == 4 else 2


def _is_feature(value) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() in (3, 4)
        and value.is_floating_point()
    )


def _is_size(value) -> bool:
    """Whether this could be an (H, W); traced, each is a tensor."""
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(
            isinstance(v, (int, torch.SymInt))
            or (isinstance(v, Tensor) and v.dim() == 0)
            for v in value
        )
    )


def _feature(path: str, item: int | None, output) -> int:
    """Index of the feature among the items of an output."""
    items = _items(output)
    if any(isinstance(value, Proxy) for value in items):
        raise ValueError(
            f'symbolic tracing by torch.fx shows no shapes, which the block '
            f'after {path!r} has to see: make that module a leaf of the '
            'tracer (is_leaf_module), or trace by torch.export.export'
        )
    if item is not None:
        if -len(items) <= item < len(items) and _is_feature(items[item]):
            return item
        raise ValueError(
            f'item={item} of the output of {path!r} is no map (B, C, H, W) '
            f'nor tokens (B, N, C); the output is {_describe(output)}'
        )
    found = []
    for index, value in enumerate(items):
        # Some hosts return one feature twice.
        if _is_feature(value) and all(items[i] is not value for i in found):
            found.append(index)
    if not found:
        raise ValueError(
            f'the output of {path!r} is no map (B, C, H, W) nor tokens '
            f'(B, N, C), but {_describe(output)}; insert elsewhere'
        )
    if len(found) > 1:
        raise ValueError(
            f'the output of {path!r} is {_describe(output)}: say which by '
            f'item=..., one of {found}, or insert after a module within'
        )
    return found[0]


def _describe(output) -> str:
    if isinstance(output, Tensor):
        return f'a tensor of shape {tuple(output.shape)}'
    if isinstance(output, (tuple, list)) and not _is_size(output):
        items = ', '.join(map(_describe, output))
        return f'a {type(output).__name__} of ({items})'
    return f'{output}' if _is_size(output) else f'a {type(output).__name__}'


# ------------------------------------------------------------ initial values


def _hooks(model: nn.Module):
    """(module, hook) of every block inserted into a model."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, _Hook):
                yield module, hook


def _around_init(model: nn.Module):
    """See :func:`polynl_mm.hosting.initialise_within`."""
    blocks = [getattr(module, hook.name) for module, hook in _hooks(model)]
    return added_last(model, {b: tuple(b.state_dict()) for b in blocks})
