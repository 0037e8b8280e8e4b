"""What a training with Poly-NL layers is watched for."""

from __future__ import annotations

import logging
from copy import deepcopy

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

from polynl_mm.fusion import FusionReport, fuse_poly_nl
from polynl_mm.layers import PolyNL
from polynl_mm.registry import HOOKS


@HOOKS.register_module()
class PolyNLHook(Hook):
    """Log alpha and beta of every Poly-NL layer, and warn of mistakes.

    The values go to the visualizer (``vis_data/scalars.json``, TensorBoard,
    and so on; not to the text log) as ``poly_nl/<path of the layer>.alpha``
    and ``.beta``: a layer whose beta stays near 0 adds nothing. Before the
    training starts it warns of weight decay on them, and of layers that are
    frozen at beta = 0.

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
                'learn and change nothing (frozen_stages of their host?)'
            )

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        """Log every ``interval`` iterations."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        values = {
            f'poly_nl/{name}.{key}': getattr(layer, key)
            for name, layer in _layers(runner.model).items()
            for key in ('alpha', 'beta')
        }
        if values:
            # One copy from the device for all of them.
            numbers = torch.cat([*values.values()]).tolist()
            runner.visualizer.add_scalars(
                dict(zip(values, numbers)), step=runner.iter + 1
            )


def _tell(runner: Runner, argument: str, report: FusionReport) -> None:
    """Log what was fused; as a warning if that is nothing."""
    level = logging.INFO if report.fused else logging.WARNING
    if not report.fused and not report.left:
        report = 'no Poly-NL layer in the model, nothing to fuse'
    runner.logger.log(level, f'{argument}: {report}')


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in _unwrapped(model).named_modules()
        if isinstance(module, PolyNL)
    }


def _decaying(optim_wrapper, layers: dict[str, nn.Module]) -> list[str]:
    # A dictionary of them where a model has several optimisers.
    wrappers = (
        optim_wrapper.values()
        if isinstance(optim_wrapper, OptimWrapperDict)
        else [optim_wrapper]
    )
    decayed = {
        id(parameter)
        for wrapper in wrappers
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
