"""What all that changes a host has in common.

How a config names the host, how an entry names modules in it by path, and who
has the last word on the initial values of what was added.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial

from mmengine import registry as root
from torch import nn

__all__ = [
    'added_last',
    'build_host',
    'initialise_within',
    'matching_paths',
    'twin_of',
    'warn_of_frozen',
]


def build_host(into: str | dict, host: dict) -> nn.Module:
    """Build the host of a config.

    Args:
        into: Its type, as it would stand in ``type``, or, where it is to be
            changed in another way first, a config of that
            (``dict(type='polynl_mm.Replace', into='SwinTransformer', ...)``).
        host: All of its keys.
    """
    inner = into if isinstance(into, dict) else dict(type=into)
    return root.MODELS.build({**host, **inner})


def matching_paths(
    where: str, pattern: str, names: Mapping[str, nn.Module]
) -> list[str]:
    """Give the paths that a pattern matches, component by component.

    Args:
        where: The entry, as messages name it.
        pattern: A path with ``*``, ``?`` and ``[...]``; ``''`` is the model.
        names: Path -> module, of all in the model.

    Raises:
        ValueError: If there is none.
    """
    parts = pattern.split('.')
    matched = [
        path
        for path in names
        # '*' is no pattern for the model itself, whose path is ''.
        if bool(path) == bool(pattern)
        and path.count('.') == len(parts) - 1
        and all(map(fnmatchcase, path.split('.'), parts))
    ]
    if not matched:
        near = get_close_matches(pattern, names, n=5, cutoff=0.3)
        raise ValueError(
            f'{where}: no module {pattern!r} in {type(names[""]).__name__}; '
            f'nearest: {near}'
        )
    return matched


def twin_of(model: nn.Module) -> nn.Module:
    """A copy on the meta device, of which nothing reaches the model."""
    memo = {id(b): b.detach().to('meta') for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to('meta'), p.requires_grad)
    return copy.deepcopy(model, memo)


def warn_of_frozen(model: nn.Module, added: Mapping[str, str]) -> None:
    """Warn of what will never learn: hosts freeze in ``train``, long after.

    Args:
        model: With what was added.
        added: Path -> what is there, as messages name it.
    """
    twin = twin_of(model)
    twin.train()
    for path, what in added.items():
        parameters = list(twin.get_submodule(path).parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            warnings.warn(
                f'{what} will never learn: {type(model).__name__} freezes '
                'that part (see its frozen_stages)',
                stacklevel=4,
            )


# ------------------------------------------------------------ initial values


def initialise_within(model: nn.Module, around: Callable) -> None:
    """Have a model initialise itself within a context.

    Args:
        model: Its ``init_weights`` is replaced, and finds all by the model,
            so that that of a copy works on the copy.
        around: Given the model, returns the context manager. Each is entered
            once, however often it was asked for.
    """
    before = vars(model).get('init_weights')
    if isinstance(before, partial) and before.func is _init_weights:
        arounds = dict.fromkeys((*before.args[1:], around))
    else:
        arounds = (around,)
    model.init_weights = partial(_init_weights, model, *arounds)


def _init_weights(model: nn.Module, *arounds: Callable) -> None:
    with ExitStack() as stack:
        for around in arounds:
            stack.enter_context(around(model))
        if hasattr(type(model), 'init_weights'):
            type(model).init_weights(model)


@contextmanager
def added_last(
    model: nn.Module, added: Mapping[nn.Module, Sequence[str]]
) -> Iterator[None]:
    """Let the host initialise itself within, then what was added to it.

    Hosts initialise by kind of layer, whatever the layer is part of, and call
    the ``init_weights`` of their children only; what was added may sit
    deeper. But where a host's checkpoint has its parameters, they stay.

    Args:
        model: The host.
        added: Module -> the keys by which a checkpoint has it.
    """
    first = not getattr(model, 'is_init', False)
    loaded, handles = set(), []
    for module, keys in added.items():

        def note(module, state_dict, prefix, *_, keys=keys):
            if any(f'{prefix}{key}' in state_dict for key in keys):
                loaded.add(module)

        # Public in newer torch only.
        register = module._register_load_state_dict_pre_hook
        handles.append(register(note, with_module=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for module in added:
        if first and module not in loaded:
            _initialise(module)


def _initialise(added: nn.Module) -> None:
    for module in added.modules():
        # mmengine's modules initialise themselves once only.
        if hasattr(module, '_is_init'):
            module._is_init = False
    for name in ('init_weights', 'reset_parameters'):
        if hasattr(added, name):
            getattr(added, name)()
            return
