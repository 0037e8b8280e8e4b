"""A resumed training is the unbroken one, bit for bit.

What is random is drawn anew at points that a resumed training passes, too, so
nothing of it needs to be stored:

- in a training by epochs, everything from (seed, epoch) as the epoch begins.
  Its workers begin anew with it, also ``persistent_workers``, whose memory
  (of transforms that keep samples, say) would not be that of new ones;
- in a training by iterations, the model draws from (seed, iteration). What
  loads the data has randomness of its own, which nothing else draws from.
  There mmengine loads again, to pass it over, all data up to the checkpoint.

mmengine saves a checkpoint, and then validates. A training that was killed in
between validates as it goes on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from mmengine.dataset import worker_init_fn
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    Runner,
    set_random_seed,
)

from polynl_mm.registry import HOOKS

# In the message hub, which checkpoints have with them. (What begins with 'val'
# is logged.)
_VALIDATED = 'last_validated'


@HOOKS.register_module()
class ResumeHook(Hook):
    """Make a resumed training the unbroken one.

    Not for checkpoints from inside an epoch of a training by epochs, nor from
    inside accumulated gradients: it warns of both.
    """

    # The model is to draw from its seed, whatever other hooks have drawn.
    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        """Separate what is random; validate, if a kill prevented that."""
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _Apart(
                loop.dataloader_iterator, runner.seed
            )
        elif isinstance(loop, EpochBasedTrainLoop):
            self._first = _loader(runner).worker_init_fn
        else:
            runner.logger.warning(
                f'{type(loop).__name__} is no loop of mmengine: resumed, it '
                'will not be what it had been unbroken'
            )
            return
        if loop.iter == 0:
            return
        wrapper = runner.optim_wrapper
        counts = getattr(wrapper, '_accumulative_counts', 1)
        if loop.iter % counts:
            runner.logger.warning(
                f'the checkpoint of iteration {loop.iter} has no gradients, '
                f'and {counts} iterations accumulate theirs: some are lost. '
                'Save at multiples of it'
            )
        inside = isinstance(loop, EpochBasedTrainLoop) and (
            loop.iter != loop.epoch * len(loop.dataloader)
        )
        if inside:
            runner.logger.warning(
                f'the checkpoint of iteration {loop.iter} is not from the end '
                f'of an epoch of {len(loop.dataloader)} iterations: epoch '
                f'{loop.epoch + 1} begins anew. Save with by_epoch=True'
            )
        elif _validates(runner):
            validated = runner.message_hub.runtime_info.get(_VALIDATED)
            if validated != loop.iter:
                runner.logger.info('Validating what the checkpoint holds.')
                runner.val_loop.run()

    def before_train_epoch(self, runner: Runner) -> None:
        """Begin with the randomness of this epoch."""
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return
        seed = _derive(runner.seed, runner.epoch)
        set_random_seed(seed)
        loader = _loader(runner)
        if loader.num_workers:
            loader.worker_init_fn = partial(
                _init_worker,
                first=self._first,
                num_workers=loader.num_workers,
                rank=get_rank(),
                seed=seed,
            )
            # Ends persistent workers, as mmdet does it.
            loader._iterator = None

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None
    ) -> None:
        """Begin with the randomness of this iteration."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            set_random_seed(_derive(runner.seed, runner.iter))

    def before_val_epoch(self, runner: Runner) -> None:
        """Have it known, if a checkpoint is saved after this validation."""
        runner.message_hub.update_info(_VALIDATED, runner.iter)


class _Apart:
    """An iterator that draws from a state of its own."""

    def __init__(self, iterator: Iterator, seed: int) -> None:
        self.iterator = iterator
        outside = random_state()
        set_random_seed(seed)
        self.state = random_state()
        set_random_state(outside)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        outside = random_state()
        set_random_state(self.state)
        try:
            return next(self.iterator)
        finally:
            self.state = random_state()
            set_random_state(outside)

    def skip_iter(self, count: int) -> None:
        """Skip batches, as the fork of mmengine asks; they draw, too."""
        for _ in range(count):
            next(self)


def random_state() -> tuple:
    """Give the states of Python's, numpy's and torch's generators."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if cuda else None,
    )


def set_random_state(state: tuple) -> None:
    """Go back to what :func:`random_state` gave."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state(state[3])


def _derive(seed: int, step: int) -> int:
    """Give a seed for a step; those of workers are little above it."""
    (number,) = np.random.SeedSequence((seed, step)).generate_state(1)
    return int(number) % 2**31


def _init_worker(worker_id: int, first: Callable | None, **kwargs) -> None:
    if first is not None:
        first(worker_id)
    worker_init_fn(worker_id, **kwargs)


def _loader(runner: Runner):
    """Give the DataLoader, where the loop has something around it."""
    loader = runner.train_dataloader
    return getattr(loader, 'loader', loader)


def _validates(runner: Runner) -> bool:
    """Whether a validation belongs to the end of what is resumed."""
    loop = runner.train_loop
    if runner.val_loop is None:
        return False
    loop._decide_current_val_interval()
    if isinstance(loop, IterBasedTrainLoop):
        now, end = loop.iter, loop.max_iters
    else:
        now, end = loop.epoch, loop.max_epochs
    return now >= loop.val_begin and (
        now % loop.val_interval == 0 or now == end
    )
