"""Which module of a model it is that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Alone(nn.Module):
    """A module as it is called in a model, with tensors alone in and out.

    Args:
        module: It.
        spec: How the tensors stand in its arguments.
    """

    def __init__(self, module: nn.Module, spec: pytree.TreeSpec) -> None:
        """Take the arguments."""
        super().__init__()
        self.module, self.spec = module, spec
        self.training = module.training

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call it."""
        args = pytree.tree_unflatten(list(tensors), self.spec)
        return tuple(pytree.tree_flatten(self.module(*args))[0])


def culprit(
    model: nn.Module,
    inputs: Sequence[Tensor],
    why: Callable[[Alone, list[list[Tensor]]], str | None],
) -> tuple[str, nn.Module, str] | None:
    """Give the smallest module that fails by itself, where it is told.

    Modules that take or give other things than tensors are passed over, and
    what is in them is tried.

    Args:
        model: All of it.
        inputs: What the model is called with, one after the other.
        why: Says why a module fails, given what it is called with for each of
            the inputs; None if it does not.

    Returns:
        tuple: Its path, itself and why; None if no module fails alone.
    """
    calls = [_calls(model, x) for x in inputs]
    found, parent, prefix = None, model, ''
    while True:
        for name, child in _children(parent, calls):
            leaves, specs = zip(
                *(pytree.tree_flatten(each[child]) for each in calls)
            )
            reason = why(Alone(child, specs[0]), list(leaves))
            if reason is not None:
                prefix += f'.{name}'
                found, parent = (prefix[1:], child, reason), child
                break
        else:
            return found


def _children(
    module: nn.Module, calls: list[dict], prefix: str = ''
) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules in a module that can be called alone."""
    for name, child in module.named_children():
        if all(child in each for each in calls):
            yield prefix + name, child
        elif not isinstance(child, torch.jit.ScriptModule):
            # A list of modules is not called, what is in it is.
            yield from _children(child, calls, f'{prefix}{name}.')


@torch.no_grad()
def _calls(model: nn.Module, x: Tensor) -> dict[nn.Module, tuple[Any, ...]]:
    """What each module is called with first, if it knows tensors alone."""
    calls = {}

    def note(module, args, kwargs):
        leaves = pytree.tree_flatten((args, kwargs))[0]
        if not kwargs and leaves and all(map(torch.is_tensor, leaves)):
            calls.setdefault(module, pytree.tree_map(Tensor.clone, args))

    def drop(module, args, output):
        if not all(map(torch.is_tensor, pytree.tree_flatten(output)[0])):
            calls.pop(module, None)

    handles = [
        handle
        for module in model.modules()
        for handle in (
            module.register_forward_pre_hook(note, with_kwargs=True),
            module.register_forward_hook(drop),
        )
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return calls
