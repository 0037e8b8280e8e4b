"""Running in several processes, also on a machine without an accelerator."""

from __future__ import annotations

import os
from datetime import timedelta
from itertools import zip_longest

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast, is_distributed, master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from polynl_mm.registry import HOOKS, RUNNERS

from .cli import StartError


@HOOKS.register_module()
class BroadcastBuffersHook(Hook):
    """Evaluate every process's share with the buffers of process 0.

    BatchNorm statistics differ from process to process, and checkpoints hold
    those of process 0: without this, the metrics logged in training would
    depend on which process evaluates which image, and differ from those of
    the saved checkpoint. (mmengine's SyncBuffersHook takes their mean, in
    training by iterations only after the checkpoint is saved.)
    """

    # After an EMAHook has swapped in its own buffers.
    priority = 'LOW'

    def before_val_epoch(self, runner: Runner) -> None:
        """Broadcast the model's buffers from process 0."""
        for buffer in runner.model.buffers():
            broadcast(buffer)


class Evaluating:
    """What a runner of any kind does otherwise where it only evaluates."""

    @master_only
    def dump_config(self) -> None:
        """Save the config beside the results.

        mmengine would save it over that of the training in the same work
        directory, with what a test sets in it: ``load_from``, the model of
        ``--tta`` or ``--tile``.
        """
        name = self.cfg.filename or f'{self.timestamp}.py'
        self.cfg.dump(os.path.join(self.log_dir, os.path.basename(name)))


class ClassesHook(Hook):
    """Compare the classes of a checkpoint with those of its test.

    As many classes in another order are no error to any host, and give a
    number that means nothing.

    Raises:
        StartError: They are the same in another order.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look; names that differ otherwise may mean the same."""
        meta = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
        learnt = [str(each) for each in meta.get('classes') or ()]
        dataset = runner.test_dataloader.dataset
        metainfo = getattr(dataset, 'metainfo', {})
        asked = [str(each) for each in metainfo.get('classes') or ()]
        if not learnt or not asked or learnt == asked:
            return
        first, (old, new) = next(
            (number, pair)
            for number, pair in enumerate(zip_longest(learnt, asked))
            if pair[0] != pair[1]
        )
        differ = (
            f'class {first} is {old!r} in {runner._load_from}, but {new!r} in '
            'the data set of test_dataloader'
        )
        if sorted(learnt) == sorted(asked):
            raise StartError(
                f'{differ}: expected the classes in the order of training'
            )
        runner.logger.warning(f'{differ}: expected names that mean the same')


class CollectHook(Hook):
    """Have the processes of an evaluation meet in the folder of this run.

    mmengine has them write their parts below the current directory, to
    ``.dist_test``, which a kill leaves there.
    """

    def before_val_epoch(self, runner: Runner) -> None:
        """Name the folder."""
        self._name(runner, runner.val_evaluator)

    def before_test_epoch(self, runner: Runner) -> None:
        """Name the folder."""
        self._name(runner, runner.test_evaluator)

    def _name(self, runner: Runner, evaluator) -> None:
        for metric in evaluator.metrics:
            # One that is none of mmengine collects for itself.
            device = getattr(metric, 'collect_device', None)
            if device == 'cpu' and metric.collect_dir is None:
                metric.collect_dir = os.path.join(runner.log_dir, 'parts')


@RUNNERS.register_module()
class GlooRunner(Runner):
    """mmengine's Runner, started by torchrun on CPUs.

    mmengine assumes a GPU per process. This runner does three things
    differently and logs each of them once: the process group communicates
    over gloo; DistributedDataParallel gets no device ids; SyncBN, which has
    no CPU version, becomes BatchNorm. It evaluates with the statistics that
    are saved (:class:`BroadcastBuffersHook`). All else, such as
    ``model_wrapper_cfg``, ``find_unused_parameters`` and
    ``env_cfg.dist_cfg.timeout`` (seconds), is taken from the config as
    mmengine takes it. Without a launcher it is the plain Runner.

    Raises:
        ValueError: For a launcher other than 'none' and 'pytorch', and for
            several processes where there is an accelerator.
    """

    def setup_env(self, env_cfg: dict) -> None:
        """Join the process group before mmengine would ask for a GPU."""
        if self.launcher not in ('none', 'pytorch'):
            raise ValueError(
                f'launcher={self.launcher!r}: without an accelerator, only '
                "'pytorch' (torchrun) can start several processes"
            )
        if self.distributed and get_device() != 'cpu':
            raise ValueError(
                'GlooRunner is for several processes without an accelerator, '
                f'but there is one ({get_device()}): leave runner_type out'
            )
        if self.distributed and not is_distributed():
            seconds = env_cfg.get('dist_cfg', {}).get('timeout')
            options = (
                {}
                if seconds is None
                else dict(timeout=timedelta(seconds=seconds))
            )
            torch.distributed.init_process_group('gloo', **options)
        super().setup_env(env_cfg)

    def wrap_model(
        self, model_wrapper_cfg: dict | None, model: nn.Module
    ) -> nn.Module:
        """Revert SyncBN and wrap the model without device ids."""
        if not self.distributed or is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)
        self.logger.info(
            f'No accelerator: process group of {self.world_size} over gloo.'
        )
        model = self._without_sync_bn(model)

        # The default as in Runner.wrap_model.
        wrapper = dict(
            model_wrapper_cfg
            if model_wrapper_cfg is not None
            else dict(
                broadcast_buffers=False,
                find_unused_parameters=self.cfg.get(
                    'find_unused_parameters', False
                ),
            )
        )
        wrapper.setdefault('type', 'MMDistributedDataParallel')
        if issubclass(
            MODEL_WRAPPERS.get(wrapper['type']), DistributedDataParallel
        ):
            wrapper['device_ids'] = None
            self.logger.info(
                f'No accelerator: {wrapper["type"]} without device ids.'
            )
        return MODEL_WRAPPERS.build(wrapper, default_args=dict(module=model))

    def _without_sync_bn(self, model: nn.Module) -> nn.Module:
        # By name, as both torch and mmcv have one.
        count = sum(
            type(module).__name__ == 'SyncBatchNorm'
            for module in model.modules()
        )
        if count or self.cfg.get('sync_bn'):
            self.logger.warning(
                f'No accelerator: {count} SyncBN layers became BatchNorm '
                f'(sync_bn={self.cfg.get("sync_bn")}), whose statistics are '
                "over each process's own samples, not the whole batch."
            )
        return revert_sync_batchnorm(model)

    def register_hooks(self, default_hooks=None, custom_hooks=None) -> None:
        """Add :class:`BroadcastBuffersHook`."""
        super().register_hooks(default_hooks, custom_hooks)
        if self.distributed:
            self.register_hook(BroadcastBuffersHook())
