"""What a training is watched for: its Poly-NL layers, and its loss."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import torch
from mmengine.dist import (
    all_gather_object,
    all_reduce,
    get_world_size,
    is_main_process,
)
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn

from polynl_mm.fusion import FusionReport, fuse_poly_nl
from polynl_mm.influence import gate_spread, share
from polynl_mm.layers import Call, InContext, PolyNL
from polynl_mm.registry import HOOKS

from .checkpoints import last_good
from .cli import StartError
from .resuming import random_state, set_random_state


@HOOKS.register_module()
class PolyNLHook(Hook):
    """Log what every Poly-NL layer does, and warn of mistakes.

    The values go to the visualizer (``vis_data/scalars.json``, TensorBoard,
    and so on; not to the text log) as ``poly_nl/<path of the layer>.<value>``:

    - ``alpha`` and ``beta``, as the step has left them;
    - ``share``, the length of the branch by that of the output, over all
      positions of the batch: a layer whose share stays near 0 adds nothing.
      Not of a layer with ``norm_cfg``, or whose convolutions are more than
      their weights;
    - ``gate_spread``, see :func:`polynl_mm.influence.gate_spread`. This of
      Poly-SA layers as well.

    The last two are of the forward before the step, in the first of several
    processes; of a layer that is called several times (levels of a pyramid)
    the mean over the calls. They cost a 1x1 convolution and two sums over the
    features, in the iterations that are logged, and nothing in the others. A
    training that is compiled logs the first two only.

    Before the training starts it warns of weight decay on alpha and beta, and
    of layers that are frozen at beta = 0.

    It does nothing to a model without such layers.

    It can also have the layers computed from the input of the 1x1 convolution
    before them, where there is one (:func:`polynl_mm.fuse_poly_nl`): the same
    function, faster. The log says which layers were fused, and why others
    were not.

    Args:
        interval (int): Iterations between two logs.
        fuse_train (bool): Fuse for the training, in which parameters and
            checkpoints stay what they are. Only for layers behind a BatchNorm
            that the training does not update (``norm_eval=True``).
        fuse_test (bool): Fuse a copy of the model for each test.
    """

    priority = 'VERY_LOW'

    def __init__(
        self,
        interval: int = 50,
        fuse_train: bool = False,
        fuse_test: bool = False,
    ) -> None:
        """Take the arguments; see the class."""
        self.interval = interval
        self.fuse_train = fuse_train
        self.fuse_test = fuse_test
        self._whole = None
        self._seen = {}
        self._handle = None

    def before_test_iter(
        self, runner: Runner, batch_idx: int, data_batch=None
    ) -> None:
        """Put a fused copy of the model in its place.

        Before the first iteration, not before the epoch: there other hooks
        put the weights of the test into the model (EMAHook).
        """
        if not self.fuse_test or batch_idx:
            return
        self._whole = runner.model
        # A copy: those hooks count on the model as it is.
        runner.model, report = fuse_poly_nl(deepcopy(_unwrapped(runner.model)))
        _tell(runner, 'fuse_test', report)

    def after_test_epoch(self, runner: Runner, metrics=None) -> None:
        """Put the model itself back."""
        if self._whole is not None:
            runner.model, self._whole = self._whole, None

    def before_train(self, runner: Runner) -> None:
        """Look at the optimiser and at what is frozen; fuse."""
        if self.fuse_train:
            # As the loop is about to: hosts freeze in it what they freeze.
            runner.model.train()
            report = fuse_poly_nl(_unwrapped(runner.model), trainable=True)[1]
            _tell(runner, 'fuse_train', report)
        layers = _layers(runner.model)
        decaying = _decaying(runner.optim_wrapper, layers)
        if decaying:
            runner.logger.warning(
                f'weight decay pulls {_some(decaying)} towards 0, and with '
                'them the Poly-NL layers: set optim_wrapper.paramwise_cfg.'
                "custom_keys={'poly_nl.alpha': dict(decay_mult=0), "
                "'poly_nl.beta': dict(decay_mult=0)}, or the keys that match "
                'these names'
            )
        idle = [
            name
            for name, layer in layers.items()
            if not layer.beta.requires_grad and layer.beta.item() == 0
        ]
        if idle:
            runner.logger.warning(
                f'{_some(idle)}: frozen at beta=0, these Poly-NL layers never '
                'learn and change nothing (see frozen_stages of their host)'
            )

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None
    ) -> None:
        """Watch the layers, if this iteration is to be logged."""
        if (
            self.every_n_train_iters(runner, self.interval)
            and is_main_process()
            and not runner.cfg.get('compile')
        ):
            for name, layer in _layers(runner.model, InContext).items():
                layer.watch = partial(self._see, name)
            # Other hooks may run the model before this one is asked again.
            # The layers stay watched, so that a checkpointed one is computed
            # again as it was.
            self._handle = _unwrapped(runner.model).register_forward_hook(
                lambda *args: self._end()
            )

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        """Log every ``interval`` iterations."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        values = {
            f'{name}.{key}': getattr(layer, key).detach()
            for name, layer in _layers(runner.model).items()
            for key in ('alpha', 'beta')
        }
        for layer in _layers(runner.model, InContext).values():
            layer.watch = None
        self._end()
        for name, seen in self._seen.items():
            values[name] = torch.stack(seen).mean().reshape(1)
        self._seen = {}
        if values:
            # One copy from the device for all of them.
            numbers = torch.cat([*values.values()])
            keys = [f'poly_nl/{name}' for name in values]
            runner.visualizer.add_scalars(
                dict(zip(keys, numbers.tolist())), step=runner.iter + 1
            )

    def _end(self) -> None:
        """End with the forward of the step."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _see(self, name: str, call: Call) -> None:
        """Keep what there is to tell of a call, on the device."""
        if self._handle is None:
            return
        values = dict(share=share(call), gate_spread=gate_spread(call.gate))
        for key, value in values.items():
            if value is not None:
                self._seen.setdefault(f'{name}.{key}', []).append(value)


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop at a loss that is not finite, before the weights learn from it.

    The error says the iteration and the layer whose output was the first that
    is not finite; a second forward of the same batch finds it. Nor is a
    checkpoint saved of weights that are not finite.

    What it costs an iteration: some operations on single numbers, a copy of
    the generators' states, and of several processes a reduction of a number.
    The answer is read before the optimiser's step, when a GPU is still busy
    with the backward pass; it is not waited for in between. With loss scaling
    the gradients may be infinite, only the loss counts.

    Args:
        stop (bool): Whether to do all this.

    Raises:
        StartError: See above. In every process, at the same iteration.
    """

    def __init__(self, stop: bool = True) -> None:
        """Take the argument; see the class."""
        self.stop = stop
        self._seen = []

    def before_train(self, runner: Runner) -> None:
        """Have the losses seen, and looked at before every step."""
        if self.stop and runner.cfg.get('compile'):
            runner.logger.warning(
                'finite_loss: a compiled training step does not stop at a '
                'loss that is not finite (leave compile out)'
            )
            self.stop = False
        if not self.stop:
            return
        model = _unwrapped(runner.model)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._see, with_kwargs=True),
            *(
                wrapper.optimizer.register_step_pre_hook(
                    lambda *args: self._look(runner)
                )
                for wrapper in _optim_wrappers(runner.optim_wrapper)
            ),
        ]

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        """Look, where there was no step: loss scaling, accumulation."""
        self._look(runner)

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        if self.stop:
            for handle in self._handles:
                handle.remove()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse weights that are not finite."""
        if not self.stop:
            return
        iteration = checkpoint['meta']['iter']
        weights = dict(_unwrapped(runner.model).named_parameters())
        for part in ('state_dict', 'ema_state_dict'):
            for name, value in checkpoint.get(part, {}).items():
                if name.removeprefix('module.') in weights and not (
                    value.isfinite().all()
                ):
                    raise StartError(
                        f'iteration {iteration}: {name} is not '
                        f'finite, it is not saved; {last_good(runner)}'
                    )

    def _before_forward(self, model: nn.Module, args) -> None:
        self._state = random_state()

    def _see(self, model: nn.Module, args, kwargs: dict, output) -> None:
        if not model.training or not isinstance(output, dict):
            return
        losses = [
            value.detach().float().sum()
            for key, values in output.items()
            if 'loss' in key
            for value in _tensors(values)
        ]
        if not losses:
            return
        # On the device, as all of it.
        bad = (~torch.stack(losses).isfinite()).any().int()
        all_reduce(bad, 'max')
        ready = None
        if bad.is_cuda:
            bad = bad.to('cpu', non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._seen.append((args, kwargs, output, self._state, bad, ready))

    def _look(self, runner: Runner) -> None:
        seen, self._seen = self._seen, []
        for *call, bad, ready in seen:
            if ready is not None:
                ready.synchronize()
            if bad:
                self._explain(runner, *call)

    def _explain(self, runner: Runner, args, kwargs, output, state) -> None:
        """Find the layer in a second forward, and stop."""
        for handle in self._handles:
            handle.remove()
        model = _unwrapped(runner.model)
        first = []

        def look(layer: nn.Module, args, output) -> None:
            if not first and not _finite(output):
                first.append(layer)

        for layer in model.modules():
            if layer is not model:
                layer.register_forward_hook(look)
        set_random_state(state)
        context = (
            nullcontext()
            if isinstance(runner.optim_wrapper, OptimWrapperDict)
            else runner.optim_wrapper.optim_context(runner.model)
        )
        with torch.no_grad(), context:
            model(*args, **kwargs)

        where = None
        losses = [
            key
            for key, value in output.items()
            if 'loss' in key and not _finite(value)
        ]
        if losses:
            where = f'{", ".join(losses)}: '
            if not _finite((args, kwargs)):
                where += 'the input of the model is not'
            elif first:
                names = {layer: name for name, layer in model.named_modules()}
                where += (
                    f'the first output that is not is that of '
                    f'{names[first[0]]} ({type(first[0]).__name__})'
                )
                if not _finite([*first[0].parameters()]):
                    where += ', whose weights are not either'
            else:
                where += 'the outputs of all layers are'
        told = all_gather_object(where)
        number, where = next(
            (each for each in enumerate(told) if each[1]), (0, '')
        )
        process = f' in process {number}' if get_world_size() > 1 else ''
        raise StartError(
            f'iteration {runner.iter + 1}: the loss is not finite{process} '
            f'({where}); {last_good(runner)}'
        )


def _optim_wrappers(optim_wrapper) -> list:
    # A dictionary of them where a model has several optimisers.
    if isinstance(optim_wrapper, OptimWrapperDict):
        return [*optim_wrapper.values()]
    return [optim_wrapper]


def _tensors(values) -> Iterator[Tensor]:
    """Give the tensors with fractions in lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, (list, tuple, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


def _finite(values) -> bool:
    return all(bool(value.isfinite().all()) for value in _tensors(values))


def _tell(runner: Runner, argument: str, report: FusionReport) -> None:
    """Log what was fused; as a warning if that is nothing."""
    level = logging.INFO if report.fused else logging.WARNING
    if not report.fused and not report.left:
        report = 'no Poly-NL layer in the model, nothing to fuse'
    runner.logger.log(level, f'{argument}: {report}')


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _layers(model: nn.Module, kind: type = PolyNL) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in _unwrapped(model).named_modules()
        if isinstance(module, kind)
    }


def _decaying(optim_wrapper, layers: dict[str, nn.Module]) -> list[str]:
    decayed = {
        id(parameter)
        for wrapper in _optim_wrappers(optim_wrapper)
        for group in wrapper.param_groups
        if group.get('weight_decay', 0) > 0
        for parameter in group['params']
    }
    return [
        f'{name}.{key}'
        for name, layer in layers.items()
        for key in ('alpha', 'beta')
        if id(getattr(layer, key)) in decayed
        # Of a frozen one nothing decays, though the optimiser has it.
        and getattr(layer, key).requires_grad
    ]


def _some(names: list[str]) -> str:
    more = f' and {len(names) - 2} more' if len(names) > 2 else ''
    return ', '.join(names[:2]) + more
