"""A training goes on from a checkpoint that anybody may have made.

mmengine takes a training state as it stands. It executes a text in it as
Python, deletes a file that it names, and a wrong number or shape in it ends in
a wait without end, in a crash, or in nothing that anybody sees.
"""

from __future__ import annotations

import math
import os
from inspect import signature
from numbers import Integral, Real

import numpy as np
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import Tensor, nn

from polynl_mm.layers import StateDictMismatch

from .cli import StartError


def resume(runner: Runner, path: str) -> None:
    """Train; the runner is one that resumes.

    Args:
        runner (Runner): As built from a config.
        path (str): Its checkpoint, for the messages.

    Raises:
        StartError: The checkpoint has no training state of this config; says
            what is wrong with it.
    """
    hook = _Gate()
    # Before any other has a look.
    runner.register_hook(hook, priority='HIGHEST')
    try:
        runner.train()
    except (StartError, StateDictMismatch):
        raise
    except Exception as error:  # mmengine meets all kinds while it resumes
        if not hook.resuming:
            raise
        text = str(error)
        if type(error) is not ValueError:
            text = f'{type(error).__name__}: {text}'
        raise StartError(
            f'checkpoint {path} can not be resumed from: {text}'
        ) from error


class _Gate(Hook):
    """Look at the state in the file, then at what became of it."""

    resuming = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.resuming = True
        # A config of mmcv 1, which mmengine would execute. Checkpoints of
        # mmengine, others can not be resumed from, keep theirs as 'cfg'.
        checkpoint['meta'].pop('config', None)
        _check_counts(checkpoint['meta'], runner.train_loop)
        _check_hub(checkpoint['message_hub'], _folder(runner))
        _check_schedulers(
            checkpoint.get('param_schedulers', []),
            runner.param_schedulers or [],
        )

    def before_train(self, runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        several = isinstance(wrapper, OptimWrapperDict)
        for each in wrapper.values() if several else [wrapper]:
            _check_optimizer(each.optimizer)
        self.resuming = False


def _check_counts(meta: dict, loop) -> None:
    most = dict(epoch=math.inf, iter=math.inf)
    # The other count follows from the data, which may have changed.
    if isinstance(loop, EpochBasedTrainLoop):
        most['epoch'] = loop.max_epochs
    elif isinstance(loop, IterBasedTrainLoop):
        most['iter'] = loop.max_iters
    for key, end in most.items():
        count = meta.get(key)
        if not isinstance(count, Integral) or not 0 <= count <= end:
            raise ValueError(
                f"meta['{key}']={count!r}, expected 0 to {end}, the end of "
                'this training'
            )


def _folder(runner: Runner) -> str:
    """Give the folder of the checkpoints, as CheckpointHook finds it."""
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.out_dir is not None:
            name = os.path.basename(runner.work_dir.rstrip(os.sep))
            return os.path.join(hook.out_dir, name)
    return runner.work_dir


def _check_hub(hub: dict, folder: str) -> None:
    for part in ('log_scalars', 'runtime_info', 'resumed_keys'):
        names = hub[part]
        if not isinstance(names, dict) or not all(
            isinstance(name, str) for name in names
        ):
            raise ValueError(f"message_hub['{part}'] is no dict by names")
    scalars = hub['log_scalars']
    for name, buffer in scalars.items():
        # mmengine itself leaves others out.
        if isinstance(buffer, HistoryBuffer):
            for each in buffer.data:
                if not isinstance(each, np.ndarray) or each.ndim != 1:
                    raise ValueError(f'the log history {name!r} is no list')
                # Of no numbers, numpy says so.
                each.astype(float)
            # Anything else that the file put into it stays behind.
            scalars[name] = HistoryBuffer(*buffer.data, buffer.max_length)
    info = hub['runtime_info']
    # That of this run is there, and this one would be saved with it.
    info.pop('cfg', None)
    steps = info.get('keep_ckpt_ids', [])
    if not isinstance(steps, list) or not all(
        isinstance(step, Integral) for step in steps
    ):
        raise ValueError(
            f"message_hub has 'keep_ckpt_ids' {steps!r}, expected integers"
        )
    for name, value in info.items():
        if name.startswith('best_score'):
            # Metrics may give arrays of one number.
            if isinstance(value, (Tensor, np.ndarray)) and (
                math.prod(value.shape) == 1
            ):
                value = info[name] = value.item()
            if not isinstance(value, Real):
                raise ValueError(
                    f'message_hub has {name!r} {value!r}, expected a number'
                )
        # CheckpointHook deletes it when there is a better one.
        if name.startswith('best_ckpt') and value is not None:
            info[name] = os.path.join(folder, os.path.basename(value))


def _check_schedulers(states, schedulers) -> None:
    if isinstance(schedulers, dict):
        for name, own in schedulers.items():
            _check_schedulers(states[name], own)
        return
    if not isinstance(states, list) or len(states) != len(schedulers):
        raise ValueError(
            f'param_schedulers holds {len(states)}, expected '
            f'{len(schedulers)}, those of the config'
        )
    for i, (state, scheduler) in enumerate(zip(states, schedulers)):
        own = scheduler.state_dict()
        kind = type(scheduler).__name__
        if not isinstance(state, dict) or state.keys() != own.keys():
            raise ValueError(
                f'param_schedulers[{i}] is no state of {kind}, which the '
                'config has there'
            )
        for key, value in state.items():
            if not _alike(value, own[key]):
                raise ValueError(
                    f'param_schedulers[{i}], {kind}, has {key}={value!r}, '
                    f'expected something like {own[key]!r}'
                )


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    # torch adds some to the defaults, and to groups of older versions.
    takes = signature(type(optimizer)).parameters
    defaults = {k: v for k, v in optimizer.defaults.items() if k in takes}
    for i, group in enumerate(optimizer.param_groups):
        for key, own in defaults.items():
            if key not in group or not _alike(group[key], own):
                raise ValueError(
                    f'optimizer, group {i}, has {key}={group.get(key)!r}, '
                    f'expected something like {own!r}'
                )
    # What kinds of others remember, only they know.
    torch_has_it = type(optimizer).__module__.startswith('torch.optim')
    if not torch_has_it or isinstance(optimizer, torch.optim.SparseAdam):
        return
    for i, group in enumerate(optimizer.param_groups):
        remembered = _remembered(type(optimizer), group)
        for j, parameter in enumerate(group['params']):
            state = optimizer.state.get(parameter)
            for key, whole in remembered.items() if state else ():
                shape = parameter.shape if whole else torch.Size()
                if key not in state or not _fits(state[key], shape):
                    value = state.get(key, 'nothing')
                    raise ValueError(
                        f'optimizer, group {i}, parameter {j}, has as {key} '
                        f'{getattr(value, "shape", value)}, expected {shape}'
                    )


def _remembered(kind: type, group: dict) -> dict[str, bool]:
    """Give what an optimiser remembers of every parameter, after a step.

    True for a tensor of the parameter's shape, False for one number. What is
    neither is left out. The optimiser looks at the group's values itself.
    """
    takes = signature(kind).parameters
    options = {k: v for k, v in group.items() if k in takes and k != 'params'}
    device = group['params'][0].device
    parameter = nn.Parameter(torch.ones(2, 3, device=device))
    parameter.grad = torch.ones_like(parameter)
    probe = kind([parameter], **options)
    probe.step()
    return {
        key: value.shape == parameter.shape
        for key, value in probe.state[parameter].items()
        if isinstance(value, Tensor) and value.numel() in (1, 6)
    }


def _fits(value, shape: torch.Size) -> bool:
    if not isinstance(value, Tensor):
        # SGD before its first gradient; numbers of older versions.
        return value is None or (not shape and isinstance(value, Real))
    return (
        value.layout is torch.strided
        and (value.shape == shape or value.numel() == 1 == shape.numel())
        # No number stands for several.
        and value.untyped_storage().nbytes() >= value.nbytes
    )


def _alike(value, own) -> bool:
    """Whether a value of a checkpoint can stand in the place of one's own."""
    if own is None or isinstance(own, bool):
        flag = value is None or isinstance(value, Real)
        return flag and (own is None or bool(value) == own)
    if isinstance(own, (Real, Tensor)):
        single = isinstance(value, Tensor) and value.numel() == 1
        return (single or isinstance(value, Real)) and math.isfinite(value)
    if isinstance(own, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(own)
            and all(map(_alike, value, own))
        )
    return value == own if isinstance(own, str) else type(value) is type(own)
