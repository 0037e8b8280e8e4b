"""A training that stops anywhere, and is gone on with, ends as the unbroken.

With real kills, tasks and several processes, it is
tests/reliability/test_kill_resume.py.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmcv')

from helpers import differing  # noqa: E402
from mmengine.evaluator import BaseMetric, Evaluator  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.runner import EpochBasedTrainLoop, Runner  # noqa: E402
from torch import nn  # noqa: E402

from polynl_mm.engine.checkpoints import newest, read_state  # noqa: E402
from polynl_mm.engine.resuming import (  # noqa: E402
    ResumeHook,
    _Apart,
    _derive,
)

EPOCHS = dict(type='EpochBasedTrainLoop', max_epochs=4, val_interval=2)
ITERATIONS = dict(type='IterBasedTrainLoop', max_iters=8, val_interval=4)


class Data(torch.utils.data.Dataset):
    """Each of the three generators has its part in a sample."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        drawn = random.random() + np.random.rand() + torch.rand(3)
        return dict(inputs=drawn + index)


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, inputs, mode='loss'):
        x = self.norm(self.layer(torch.stack(inputs)))
        if mode != 'loss':
            return [x.sum()]
        # What a model draws: dropout, the sampling of proposals.
        x = nn.functional.dropout(x, training=self.training)
        return {
            'loss': (x + random.random() * np.random.rand()).square().sum()
        }


class Count(BaseMetric):
    """A score that every validation betters: how far the training is."""

    default_prefix = 'own'

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(score=self.steps())


class Stop(Exception):
    pass


class StopHook(Hook):
    """Stop before one iteration, or inside one validation."""

    priority = 'VERY_HIGH'

    def __init__(self, at, inside):
        self.at, self.inside = at, inside

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.inside == 'train' and runner.iter == self.at:
            raise Stop

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.inside == 'val' and runner.iter == self.at:
            raise Stop


def train(folder, loop, workers=0, at=None, inside='train', **kwargs):
    """Train with that loop; give the state that it ends with."""
    by_epoch = loop is EPOCHS
    torch.manual_seed(0)  # of the first weights
    loader = dict(
        batch_size=2,
        num_workers=workers,
        persistent_workers=workers > 0,
        dataset=Data(),
    )
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    metric = Count()
    runner = Runner(
        Model(),
        str(folder),
        train_dataloader=dict(loader, sampler=dict(type=sampler)),
        train_cfg=loop,
        val_dataloader=dict(
            batch_size=2, dataset=Data(), sampler=dict(type='DefaultSampler')
        ),
        val_cfg=dict(),
        val_evaluator=Evaluator([metric]),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        default_hooks=dict(
            checkpoint=dict(
                type='polynl_mm.CheckpointHook',
                by_epoch=by_epoch,
                interval=1 if by_epoch else 2,
                max_keep_ckpts=1,
                save_best='own/score',
                rule='greater',
            ),
            resume=dict(type='polynl_mm.ResumeHook'),
        ),
        custom_hooks=[dict(type='EMAHook'), StopHook(at, inside)],
        randomness=dict(seed=3),
        experiment_name=f'{folder}{at}{inside}',
        load_from=newest(str(folder)),
        resume=newest(str(folder)) is not None,
        log_level='ERROR',
        **kwargs,
    )
    metric.steps = lambda: runner.iter
    runner.train()
    state = read_state(newest(str(folder)))
    (best,) = folder.glob('best_*.pth')
    state['best'] = torch.load(best)
    return {
        key: values
        for key, values in state.items()
        if key not in ('meta', 'message_hub')
    } | dict(
        best=state['best']['state_dict'],
        name=best.name,
        validated=len(
            state['message_hub']['log_scalars']['val/own/score'].data[0]
        ),
    )


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """Give how it ends, by the loop and the number of workers."""
    ends = {}

    def unbroken(loop, workers):
        key = loop['type'], workers
        if key not in ends:
            folder = tmp_path_factory.mktemp('unbroken')
            ends[key] = train(folder, loop, workers)
        return ends[key]

    return unbroken


@pytest.mark.parametrize(
    ('loop', 'workers', 'at', 'inside'),
    [
        (EPOCHS, 0, 3, 'train'),
        (EPOCHS, 2, 7, 'train'),
        (EPOCHS, 0, 4, 'val'),
        (EPOCHS, 0, 8, 'val'),
        (ITERATIONS, 0, 3, 'train'),
        (ITERATIONS, 2, 6, 'train'),
        (ITERATIONS, 0, 4, 'val'),
        (ITERATIONS, 0, 8, 'val'),
    ],
)
def test_gone_on_with_it_is_the_unbroken(
    tmp_path, unbroken, loop, workers, at, inside
):
    with pytest.raises(Stop):
        train(tmp_path, loop, workers, at, inside)
    state, whole = train(tmp_path, loop, workers), unbroken(loop, workers)
    assert [*differing(whole, state)] == []
    # Of the end, which is the best.
    assert state['name'].endswith('_4.pth' if loop is EPOCHS else '_8.pth')
    assert state['validated'] == 2


@pytest.mark.parametrize(
    ('iteration', 'counts', 'said'),
    [
        (5, 1, 'not from the end of an epoch of 2 iterations: epoch 3 begins'),
        (4, 3, 'has no gradients, and 3 iterations accumulate theirs'),
        (6, 3, None),
    ],
)
def test_what_can_not_be_exact_is_told(iteration, counts, said):
    loop = EpochBasedTrainLoop.__new__(EpochBasedTrainLoop)
    loop._iter, loop._epoch = iteration, iteration // 2
    loop.dataloader = type('Loader', (), dict(__len__=lambda self: 2))()
    loop.dataloader.worker_init_fn = None
    told = []
    runner = SimpleNamespace(
        train_loop=loop,
        train_dataloader=loop.dataloader,
        val_loop=None,
        optim_wrapper=SimpleNamespace(_accumulative_counts=counts),
        logger=SimpleNamespace(warning=told.append),
    )
    ResumeHook().before_train(runner)
    assert len(told) == (said is not None)
    assert said is None or said in told[0]


def test_seeds_of_runs_and_steps_differ():
    seeds = {_derive(seed, step) for seed in range(30) for step in range(30)}
    assert len(seeds) == 900
    # With numbers of workers added, they are seeds of numpy.
    assert 0 <= min(seeds) and max(seeds) < 2**31


def test_what_is_skipped_draws():
    """As a loop of mmengine's fork asks it to."""
    some, other = (_Apart(iter(random.random, 2), seed=3) for _ in range(2))
    some.skip_iter(2)
    assert [next(other) for _ in range(3)][2] == next(some)
