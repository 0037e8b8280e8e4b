"""What a checkpoint can do to the training that goes on from it: nothing."""

import copy
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmengine')

from mmengine.logging import HistoryBuffer  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.registry import (  # noqa: E402
    DATASETS,
    METRICS,
    MODELS,
    DefaultScope,
)
from mmengine.runner import EpochBasedTrainLoop  # noqa: E402
from torch import nn  # noqa: E402

from polynl_mm.engine import safe_load, training_state  # noqa: E402
from polynl_mm.engine.cli import StartError  # noqa: E402

TOOL = Path(__file__).parents[2] / 'tools' / 'train.py'


@MODELS.register_module()
class StateModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, mode='tensor'):
        error = self.linear(x) ** 2
        return dict(loss=error.mean()) if mode == 'loss' else error


@DATASETS.register_module()
class StateData(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return dict(x=torch.full((3,), float(i)))


@METRICS.register_module()
class StateMetric:
    """One that is better each time."""

    count = 0
    dataset_meta = None

    def process(self, data_batch, data_samples):
        pass

    def evaluate(self, size):
        StateMetric.count += 1
        return dict(up=float(StateMetric.count))


CONFIG = """
model = dict(type='StateModel')
train_dataloader = dict(
    batch_size=2, num_workers=0, dataset=dict(type='StateData'),
    sampler=dict(type='InfiniteSampler'),
    collate_fn=dict(type='default_collate'))
val_dataloader = dict(
    batch_size=2, num_workers=0, dataset=dict(type='StateData'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'))
val_evaluator = dict(type='StateMetric')
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4, val_interval=2)
val_cfg = dict(type='ValLoop')
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.1, fused=True))
param_scheduler = [dict(type='MultiStepLR', milestones=[3], by_epoch=False)]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=2, save_best='up',
        rule='greater', max_keep_ckpts=1))
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Train in this process by the tool, in a folder of the tests."""
    folder = tmp_path_factory.mktemp('states')
    (folder / 'toy.py').write_text(CONFIG)

    def run(work_dir, *args, config='toy.py'):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, 'path', sys.path[:])
            argv = [str(TOOL), config, '--work-dir', work_dir, *args]
            patch.setattr(sys, 'argv', argv)
            with DefaultScope.overwrite_default_scope('mmengine'):
                runpy.run_path(str(TOOL))['main']()
        return folder / work_dir

    return run


@pytest.fixture(scope='module')
def trained(run):
    """A checkpoint after two of four iterations."""
    folder = run('first', '--cfg-options', 'train_cfg.max_iters=2')
    return safe_load.read_checkpoint(str(folder / 'iter_2.pth'))


@pytest.fixture
def resume(run, trained, tmp_path):
    """Change the checkpoint, and go on from it."""

    def resume(change):
        state = copy.deepcopy(trained)
        change(state)
        torch.save(state, tmp_path / 'changed.pth')
        path = str(tmp_path / 'changed.pth')
        return run(f'on_{tmp_path.name}', '--resume', path)

    return resume


@pytest.fixture
def refused(resume, monkeypatch):
    """Say why, and see that no iteration was run."""

    def refused(change):
        with monkeypatch.context() as patch:
            patch.setattr(StateModel, 'train_step', None)
            with pytest.raises(StartError) as caught:
                resume(change)
        return str(caught.value).split('changed.pth', 1)[1]

    return refused


def test_a_text_is_never_executed(resume, tmp_path, trained):
    mark = tmp_path / 'mark'
    command = f"__import__('os').system('touch {mark}')\n"

    def change(state):
        state['meta']['config'] = state['meta']['cfg'] = command
        state['message_hub']['runtime_info']['cfg'] = command

    folder = resume(change)
    assert not mark.exists()
    # Nor handed on, to one who takes the config out of a checkpoint.
    saved = safe_load.read_checkpoint(str(folder / 'iter_4.pth'))
    assert 'config' not in saved['meta']
    info = saved['message_hub']['runtime_info']
    assert 'max_iters=4' in info['cfg'] and 'max_iters=4' in str(saved['meta'])
    assert 'touch' not in info['cfg'] + saved['meta']['cfg']
    steps = {s['step'].item() for s in saved['optimizer']['state'].values()}
    assert steps == {4.0}
    log = saved['message_hub']['log_scalars']['train/loss'].data[0]
    assert len(log) == 4
    before = trained['message_hub']['log_scalars']['train/loss'].data[0]
    assert log[:2].tolist() == before.tolist()


def test_a_file_elsewhere_is_not_deleted(resume, tmp_path):
    """The best checkpoint so far is deleted when there is a better one."""
    precious = tmp_path / 'precious.txt'
    precious.write_text('x')
    folder = resume(
        lambda state: state['message_hub']['runtime_info'].update(
            best_ckpt=str(precious), best_score=-1.0
        )
    )
    assert precious.exists()
    assert (folder / 'best_up_iter_4.pth').exists()


@pytest.mark.parametrize(
    'score', [torch.tensor([99.0]), np.float32(99), np.array(99.0)], ids=str
)
def test_a_score_as_a_metric_gives_it(resume, score):
    """A one-element tensor or a number of numpy; none is better than it."""
    folder = resume(hub('runtime_info', best_score=score))
    saved = torch.load(folder / 'iter_4.pth')
    assert saved['message_hub']['runtime_info']['best_score'] == 99
    assert not (folder / 'best_up_iter_4.pth').exists()


def hub(part, **values):
    return lambda state: state['message_hub'][part].update(values)


def meta(**values):
    return lambda state: state['meta'].update(values)


def memory(key, value):
    """Change what the optimiser remembers of the second parameter."""
    return lambda state: state['optimizer']['state'][1].update({key: value})


def group(**values):
    return lambda state: state['optimizer']['param_groups'][0].update(values)


def schedule(**values):
    return lambda state: state['param_schedulers'][0].update(values)


def history(value):
    buffer = HistoryBuffer([1.0], [1])
    buffer._log_history = value
    return buffer


CASES = {
    'far': (meta(iter=10**9), "meta['iter']=1000000000, expected 0 to 4"),
    'before': (meta(epoch=-1), "meta['epoch']=-1, expected 0 to"),
    'text as count': (meta(iter='2'), "meta['iter']='2'"),
    'no count': (lambda state: state['meta'].clear(), "meta['epoch']=None"),
    'no meta': (
        lambda state: state.update(meta=[1]),
        ' is not one of a training',
    ),
    'seed': (meta(seed='x'), "its seed is 'x', expected a whole number"),
    'weights as list': (
        lambda state: state.update(state_dict=[1]),
        'its state_dict, a list, is no dict by names',
    ),
    'numbered weights': (
        lambda state: state.update(state_dict={1: torch.zeros(1)}),
        'its state_dict, a dict, is no dict by names',
    ),
    'weights as text': (
        lambda state: state['state_dict'].update({'linear.bias': 'x'}),
        'linear.bias',
    ),
    'weights of no tensors': (
        lambda state: setattr(state['state_dict'], '_metadata', [1]),
        "'list' object has no attribute 'get'",
    ),
    'no hub': (lambda state: state.update(message_hub=[]), 'TypeError'),
    'empty hub': (
        lambda state: state.update(message_hub={}),
        "KeyError: 'log_scalars'",
    ),
    'numbered hub': (
        lambda state: state['message_hub'].update(runtime_info={1: 2}),
        "message_hub['runtime_info'] is no dict by names",
    ),
    'history of text': (
        hub('log_scalars', loss=history('text')),
        "the log history 'loss' is no list",
    ),
    'history of words': (
        hub('log_scalars', loss=history(np.array(['a']))),
        'could not convert',
    ),
    'kept': (
        hub('runtime_info', keep_ckpt_ids=['../../x']),
        "'keep_ckpt_ids' ['../../x']",
    ),
    'best': (hub('runtime_info', best_score='x'), "'best_score' 'x'"),
    'best file': (hub('runtime_info', best_ckpt=7), 'TypeError'),
    'short memory': (
        memory('exp_avg', torch.zeros(1)),
        'has as exp_avg torch.Size([1]), expected torch.Size([2])',
    ),
    'one for all': (
        memory('exp_avg', torch.zeros(1).expand(2)),
        'has as exp_avg',
    ),
    'memory as number': (memory('exp_avg', 1.0), 'has as exp_avg 1.0'),
    'sparse memory': (
        memory('exp_avg', torch.ones(2).to_sparse()),
        'has as exp_avg',
    ),
    'long step': (
        memory('step', torch.zeros(7)),
        'has as step torch.Size([7]), expected torch.Size([])',
    ),
    'lost memory': (
        lambda state: state['optimizer']['state'][1].pop('exp_avg_sq'),
        'has as exp_avg_sq nothing',
    ),
    'two groups': (
        lambda state: state['optimizer']['param_groups'].append({}),
        'different number of parameter groups',
    ),
    'group of one': (group(params=[0]), "doesn't match the size"),
    'rate as text': (group(lr='x'), "has lr='x', expected something like 0.1"),
    'endless rate': (group(lr=float('nan')), 'has lr=nan'),
    'one beta': (group(betas=(0.9,)), 'has betas=(0.9,)'),
    'uphill': (group(maximize=True), 'has maximize=True'),
    'negative rate': (group(lr=-1.0), 'Invalid learning rate: -1.0'),
    'two ways at once': (group(foreach=True), '`fused` and `foreach`'),
    'no optimizer': (
        lambda state: state.update(optimizer=[]),
        'TypeError|AttributeError',
    ),
    'two schedules': (
        lambda state: state['param_schedulers'].append({}),
        'param_schedulers holds 2, expected 1',
    ),
    'no schedule': (
        lambda state: state.pop('param_schedulers'),
        'param_schedulers holds 0, expected 1',
    ),
    'another schedule': (
        lambda state: state['param_schedulers'][0].pop('gamma'),
        'param_schedulers[0] is no state of MultiStepLR',
    ),
    'no method': (schedule(step=7), 'is no state of MultiStepLR'),
    'step as text': (schedule(last_step='x'), "has last_step='x'"),
    'of another value': (schedule(param_name='eps'), "param_name='eps'"),
    'of two groups': (schedule(base_values=[1, 2]), 'base_values=[1, 2]'),
}


@pytest.mark.parametrize('name', CASES)
def test_a_state_that_does_not_fit_is_refused(refused, name):
    change, said = CASES[name]
    message = refused(change)
    assert any(each in message for each in said.split('|')), message
    assert message.startswith(
        (
            ' can not be resumed from: ',
            ' is not one of a training',
            ': its state_dict',
            ' does not fit',
        )
    )


def test_epochs_end_with_the_training():
    loop = EpochBasedTrainLoop.__new__(EpochBasedTrainLoop)
    loop._max_epochs = 3
    # A batch may have had another size.
    training_state._check_counts(dict(epoch=3, iter=10**6), loop)
    with pytest.raises(ValueError, match="'epoch'.=4, expected 0 to 3"):
        training_state._check_counts(dict(epoch=4, iter=4), loop)


@pytest.mark.parametrize(
    'name',
    [
        name
        for name in ('Adam', 'AdamW', 'SGD', 'RMSprop', 'Adagrad', 'NAdam')
        + ('RAdam', 'Adamax', 'Adadelta', 'ASGD', 'Rprop', 'Adafactor')
        if hasattr(torch.optim, name)
    ],
)
def test_states_of_all_optimizers_fit(name):
    def make():
        model = nn.Linear(3, 2)
        momentum = dict(momentum=0.9) if name == 'SGD' else {}
        return model, getattr(torch.optim, name)(
            model.parameters(), lr=0.1, **momentum
        )

    model, optimizer = make()
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    again = make()[1]
    again.load_state_dict(optimizer.state_dict())
    training_state._check_optimizer(again)
