"""Fused layers where they are switched on: in training, and in tests.

By the hook and by ``tools/test.py --fuse``, against the same runs without.
All start from weights with which the branch is 0.4 of what it is added to.
"""

import os
import pickle
import re
import runpy
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from helpers import SHARE, calibrate, layers_of, randomize  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

import polynl_mm  # noqa: E402
from polynl_mm import fusion, layers, ops  # noqa: E402
from polynl_mm.engine import checks  # noqa: E402
from polynl_mm.engine.start import build_runner  # noqa: E402

TOOLS = Path(__file__).parents[2] / 'tools'

# As mmdet trains: norm_eval, frozen stages. 16 layers, 3 of them frozen. At
# three times the rate a change of w3 by 1e-6 turns a unit on or off in the
# fifth iteration, and the losses differ by 1e-2 at the end, fused or not.
CONFIG = """
_base_ = 'det.py'
model = dict(backbone=dict(
    _delete_=True, type='ResNet', depth=50, base_channels=4,
    norm_cfg=dict(type='BN'), norm_eval=True, frozen_stages=1,
    zero_init_residual=False, out_indices=(1, 2, 3),
    plugins=[dict(
        cfg=dict(type='polynl_mm.PolyNL2d'), position='after_conv3')]))
load_from = 'start.pth'
train_cfg = dict(max_epochs=2)
optim_wrapper = dict(
    _delete_=True, optimizer=dict(type='SGD', lr=0.0003, momentum=0.9),
    clip_grad=dict(max_norm=1.))
param_scheduler = None
default_hooks = dict(logger=dict(interval=1))
"""
EMA = "dict(type='EMAHook', momentum=0.3)"
HOOK = "dict(type='polynl_mm.PolyNLHook', {})"

# Name of a config -> its custom_hooks.
HOOKS = {
    'none': None,
    'null': 'None',
    'ema': f'[{EMA}]',
    'ours': f'[{HOOK.format("interval=9")}, {EMA}]',
    'off': f'({HOOK.format("fuse_test=False")},)',
    'early': f'[{HOOK.format("priority=0")}, {EMA}]',
    'scope': "[dict(type='PolyNLHook', _scope_='polynl_mm')]",
    'train': f'[{HOOK.format("fuse_train=True")}]',
}


@pytest.fixture(scope='module')
def here(place):
    """The configs, their data and the start weights, as current folder."""
    for name, value in HOOKS.items():
        line = '' if value is None else f'custom_hooks = {value}\n'
        (place / f'{name}.py').write_text(CONFIG + line)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        pytest.MonkeyPatch.context() as patch,
        DefaultScope.overwrite_default_scope('mmengine'),
    ):
        patch.chdir(place)
        # These models are so small that their layers would run unfused.
        rate = ops.choice._CPU._replace(launch=0)
        patch.setattr(ops.choice, '_CPU', rate)
        (place / 'by_arithmetic.py').write_text(
            f'from polynl_mm.ops import choice\nchoice._CPU = choice.{rate}\n'
        )
        (place / 'two.py').write_text(
            "_base_ = 'train.py'\n"
            "custom_imports = dict(imports=['by_arithmetic'])\n"
        )
        patch.setattr(os, 'environ', dict(os.environ))
        # A third of the time of these short runs.
        patch.setattr(
            'mmengine.config.config.FormatCode',
            lambda text, **_: (text, None),
            raising=False,
        )
        for config, data, file in (
            ('none.py', 'det', 'start.pth'),
            ('seg.py', 'seg', 'seg.pth'),
        ):
            model = build(config)
            images = [
                cv2.imread(f'data/{data}/img/{i}.png') / 255 for i in range(4)
            ]
            x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
            calibrate(model.backbone, x.float())
            # The steps would be those of beta alone, were it small.
            with torch.no_grad():
                for layer in layers_of(model).values():
                    layer.w3.weight *= layer.beta / SHARE
                    layer.beta.fill_(SHARE)
            torch.save(dict(state_dict=model.state_dict()), file)
        yield place
    torch.set_num_threads(threads)


def build(config):
    """A model in evaluation mode, drawn as if it were trained."""
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    torch.manual_seed(0)
    model.init_weights()
    return randomize(model.eval())


@contextmanager
def counted():
    """Count the calls of the fused computation, by whether it is trained."""
    calls = Counter()
    behind = ops.poly_nl_behind

    def spy(*args, **kwargs):
        calls[torch.is_grad_enabled()] += 1
        return behind(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for module in (fusion, layers):
            patch.setattr(module, 'poly_nl_behind', spy)
        yield calls


def told(work_dir):
    """What the hook has logged: pairs of the level and the lines."""
    (log,) = Path(work_dir).glob('2*/*.log')
    lines = r'- (\w+) - (fuse_\w+: .*(?:\nleft: .*)*)'
    return re.findall(lines, log.read_text())


def predictions(file):
    samples = pickle.loads(Path(file).read_bytes())
    return [sample['pred_instances'] for sample in samples]


def assert_same(gots, wants, tolerance=1e-4):
    assert len(wants) == 8 and all(len(want['scores']) for want in wants)
    for got, want in zip(gots, wants, strict=True):
        assert torch.equal(got['labels'], want['labels'])
        for key, unit in (('scores', 1), ('bboxes', 64)):
            difference = (got[key] - want[key]).abs().max()
            assert difference <= tolerance * unit, key


def assert_fused(seen, counts='16 of 16', batches=4):
    assert seen.told == [
        (
            'INFO',
            f'fuse_test: {counts} Poly-NL layers fused with the convolution '
            'before them',
        )
    ]
    # In some layers the map may have too few positions.
    assert seen.calls[False] >= 6 * batches and not seen.calls[True]


# ---------------------------------------------------------------- training


@pytest.fixture(scope='module')
def run(here):
    """Give a function that takes a runner through train() and test()."""

    def run(name, hook=None, config='ema.py', phases='train test', **options):
        cfg = Config.fromfile(config)
        options = {k.replace('__', '.'): v for k, v in options.items()}
        cfg.merge_from_dict(options)
        if hook:
            # Before the EMAHook: its place must not matter.
            hook = dict(type='polynl_mm.PolyNLHook', **hook)
            cfg.custom_hooks = [hook, *cfg.get('custom_hooks', [])]
        cfg.work_dir = cfg.experiment_name = name
        dumps = {phase: f'{name}_{phase}.pkl' for phase in ('val', 'test')}
        for phase, file in dumps.items():
            dump = dict(type='DumpDetResults', out_file_path=file)
            key = f'{phase}_evaluator'
            cfg[key] = [cfg[key], dump]
        with counted() as calls:
            runner = Runner.from_cfg(cfg)
            model = runner.model
            for phase in phases.split():
                metrics = getattr(runner, phase)()
        assert runner.model is model and not model.training
        seen = SimpleNamespace(calls=calls, told=told(name), metrics=metrics)
        for phase, file in dumps.items():
            if os.path.exists(file):
                setattr(seen, phase, predictions(file))
        if 'train' in phases:
            history = runner.message_hub.get_scalar('train/loss').data[0]
            seen.losses = [float(loss) for loss in history]
        return seen

    return run


BOTH = dict(fuse_train=True, fuse_test=True)


@pytest.fixture(scope='module')
def plain(run):
    return run('plain')


@pytest.fixture(scope='module')
def fused(run):
    return run('fused', BOTH)


def assert_losses(gots, wants):
    assert max(wants) > 1.2 * min(wants)
    torch.testing.assert_close(gots, wants, rtol=2e-4, atol=0)


def assert_states(gots, wants):
    """They differ by far less than the training has changed them."""
    assert list(gots) == list(wants)
    start = torch.load('start.pth')['state_dict']
    moved = error = 0
    for key, before in start.items():
        key = key if key in wants else f'module.{key}'
        got, want = gots[key].double(), wants[key].double()
        moved = max(moved, (want - before).abs().max())
        error = max(error, (got - want).abs().max())
    assert moved > 3e-4
    assert error < 1e-3 * moved


def test_training_is_the_same(plain, fused):
    assert len(plain.losses) == 8
    assert_losses(fused.losses, plain.losses)
    assert not plain.calls
    # Eight steps; in some layers the map may have too few positions.
    assert fused.calls[True] >= 8 * 6
    assert fused.told == [
        (
            'INFO',
            f'{argument}: 16 of 16 Poly-NL layers fused with the convolution '
            'before them',
        )
        for argument in ('fuse_train', 'fuse_test')
    ]


def test_evaluation_is_the_same(plain, fused):
    """In between with the weights of EMAHook, at the end without."""
    assert fused.calls[False] > 0
    assert_same(fused.val, plain.val)
    assert_same(fused.test, plain.test)
    assert fused.metrics == plain.metrics


@pytest.mark.parametrize('priority', ['HIGHEST', 'LOWEST'])
def test_averaged_weights_are_tested(run, plain, fused, priority):
    seen = run(
        f'averaged_{priority}',
        dict(fuse_test=True, priority=priority),
        phases='test',
        load_from='fused/epoch_2.pth',
        resume=True,
    )
    assert_fused(seen)
    assert_same(seen.test, plain.val)
    with pytest.raises(AssertionError):
        assert_same(seen.test, plain.test)


def test_checkpoints_are_the_same(here, plain, fused):
    ours, theirs = (
        torch.load(f'{name}/epoch_2.pth') for name in ('fused', 'plain')
    )
    for key in ('state_dict', 'ema_state_dict'):
        assert_states(ours[key], theirs[key])
    build('none.py').load_state_dict(ours['state_dict'])
    checks.check_checkpoint(
        Config.fromfile('none.py'), 'fused/epoch_2.pth', resume=True
    )


def test_resumed(run, plain, fused):
    """From a checkpoint of the training without."""
    options = dict(load_from='plain/epoch_1.pth', resume=True)
    again = run('again', BOTH, phases='train', **options)
    assert 4 * 6 <= again.calls[True] < fused.calls[True]
    assert again.losses[:4] == plain.losses[:4]
    assert_losses(again.losses, plain.losses)
    assert_same(again.val, plain.val)


BATCH = dict(
    config='none.py',
    phases='train',
    train_cfg__max_epochs=1,
    model__backbone__norm_eval=False,
)
REASON = 'the BatchNorm2d uses the statistics of the batch'


def test_statistics_of_the_batch(run):
    """Only what is frozen is fused."""
    hook = dict(fuse_train=True)
    plain, fused = run('b0', **BATCH), run('b1', hook, **BATCH)
    assert_losses(fused.losses, plain.losses)
    assert fused.calls[True] == 4 * 3
    ((level, line),) = fused.told
    assert level == 'INFO'
    assert line.startswith('fuse_train: 3 of 16 Poly-NL layers')
    assert re.search(
        r'left: backbone.layer2.0.*layer4.2[^:]*: ' + REASON, line
    )


def test_nothing_to_fuse_is_a_warning(run):
    hook = dict(fuse_train=True)
    seen = run('b2', hook, **BATCH, model__backbone__frozen_stages=-1)
    assert not seen.calls
    ((level, line),) = seen.told
    assert level == 'WARNING'
    assert line.startswith('fuse_train: 0 of 16 Poly-NL layers')
    assert REASON in line and 'norm_eval=True' in line


def test_state_of_a_fused_model_as_a_start_is_named(here, start, finish):
    """In one line: it holds constants in the place of parameters."""
    model = build('none.py')
    state = polynl_mm.fuse_poly_nl(model)[0].state_dict()
    torch.save(dict(state_dict=state), 'constants.pth')
    job = finish(
        start(
            *('train.py', 'none.py', '--work-dir', 'constants'),
            *('--cfg-options', 'load_from=constants.pth'),
        )
    )
    assert job.code == 2
    *_, line = job.err.strip().splitlines()
    assert line.startswith(
        "train.py: error: checkpoint constants.pth: 'backbone.layer1.0.poly_nl"
    )
    assert 'on which fuse_poly_nl was called' in line
    assert 'Traceback' not in job.err


# ------------------------------------------------------------- tools/test.py


@pytest.fixture(scope='module')
def evaluate(here):
    """Give a function that runs ``tools/test.py`` in this process."""
    numbers = count()

    def evaluate(config, checkpoint, *args):
        name = f'evaluated{next(numbers)}'
        runners = []
        options = ('--work-dir', name, '--cfg-options')
        options += (f'experiment_name={name}',)

        def keep(*args):
            runners.append(build_runner(*args))
            return runners[0]

        with counted() as calls, pytest.MonkeyPatch.context() as patch:
            patch.setattr('polynl_mm.engine.start.build_runner', keep)
            patch.setattr(
                sys, 'argv', ['test.py', config, checkpoint, *args, *options]
            )
            patch.setattr(sys, 'path', sys.path[:])
            runpy.run_path(str(TOOLS / 'test.py'))['main']()
        (runner,) = runners
        modules = [*runner.model.modules()]
        assert not any(isinstance(m, fusion.FusedPolyNL) for m in modules)
        metrics = {
            key: values.data[0][-1]
            for key, values in runner.message_hub.log_scalars.items()
            if key.startswith('test/') and 'time' not in key
        }
        assert metrics
        return SimpleNamespace(calls=calls, told=told(name), metrics=metrics)

    return evaluate


@pytest.fixture(scope='module')
def tested(evaluate):
    return evaluate('none.py', 'start.pth', '--out', 'tested.pkl')


@pytest.mark.parametrize(
    'name', ['none', 'null', 'ours', 'off', 'early', 'scope']
)
def test_fuse(evaluate, tested, name):
    """Whatever ``custom_hooks`` are."""
    seen = evaluate(f'{name}.py', 'start.pth', '--fuse', '--out', 'fused.pkl')
    assert_fused(seen)
    assert not tested.told and not tested.calls
    assert seen.metrics == tested.metrics
    assert_same(predictions('fused.pkl'), predictions('tested.pkl'))


def test_fuse_with_the_hook_given_as_a_class(evaluate, tested, here):
    """In a config that is Python and imports it."""
    (here / 'lazy.py').write_text(
        'from polynl_mm.engine.hooks import PolyNLHook\n'
        + Config.fromfile('none.py').pretty_text
        + '\ncustom_hooks = [dict(type=PolyNLHook, fuse_test=True)]\n'
    )
    seen = evaluate('lazy.py', 'start.pth', '--fuse')
    assert_fused(seen)
    assert seen.metrics == tested.metrics


def test_fuse_and_tta(evaluate, tested):
    plain = evaluate('none.py', 'start.pth', '--tta', '--out', 'tta.pkl')
    fused = evaluate(
        'ours.py', 'start.pth', '--tta', '--fuse', '--out', 'f.pkl'
    )
    assert_fused(fused, batches=2 * 4)
    assert fused.metrics == plain.metrics
    assert_same(predictions('f.pkl'), predictions('tta.pkl'))


def test_fuse_segmentation(evaluate):
    plain = evaluate('seg.py', 'seg.pth', '--out', 'labels')
    fused = evaluate('seg.py', 'seg.pth', '--fuse', '--out', 'fused_labels')
    assert_fused(fused, '6 of 6')
    assert fused.metrics == pytest.approx(plain.metrics, abs=0.1)
    maps = [
        np.stack([cv2.imread(f'{folder}/{i}.png', 0) for i in range(8)])
        for folder in ('fused_labels', 'labels')
    ]
    assert 0.01 < maps[1].mean() < 0.99
    assert (maps[0] != maps[1]).mean() < 1e-3


def test_fuse_without_layers(evaluate, here):
    """Nothing is wrong with the result, but it is said."""
    text = CONFIG.replace(
        "position='after_conv3'", "stages=(False,) * 4, position='after_conv3'"
    )
    (here / 'bare.py').write_text(text)
    state = torch.load('start.pth')['state_dict']
    torch.save(
        {k: v for k, v in state.items() if 'poly_nl' not in k}, 'bare.pth'
    )
    seen = evaluate('bare.py', 'bare.pth', '--fuse')
    assert seen.told == [
        (
            'WARNING',
            'fuse_test: no Poly-NL layer in the model, nothing to fuse',
        )
    ]


# ------------------------------------------------------------ two processes


ONE_BY_ONE = 'train_dataloader.batch_size=1'


@pytest.fixture(scope='module')
def jobs(here, start, finish, free_port):
    """A training and a test, side by side."""
    runs = dict(
        train=start(
            *('dist_train.sh', 'two.py', 2, '--work-dir', 'two'),
            *('--cfg-options', ONE_BY_ONE),
            PORT=free_port(),
            PYTHONPATH=os.pathsep.join([str(here), *sys.path[:2]]),
        ),
        test=start(
            *('dist_test.sh', 'none.py', 'start.pth', 2, '--fuse'),
            *('--work-dir', 'two_test', '--out', 'two.pkl'),
            PORT=free_port(),
        ),
    )
    return {name: finish(run) for name, run in runs.items()}


def test_two_processes_train(run, jobs):
    """As one does, unfused, that adds up the gradients of two batches.

    Had a parameter no gradient, DistributedDataParallel would raise.
    """
    assert jobs['train'].code == 0, jobs['train'].err
    assert jobs['train'].out.count('fuse_train: 16 of 16') == 1
    key, value = ONE_BY_ONE.split('=')
    plain = run(
        'one',
        config='none.py',
        phases='train',
        optim_wrapper__accumulative_counts=2,
        **{key: int(value)},
    )
    two, one = (torch.load(f'{name}/epoch_2.pth') for name in ('two', 'one'))
    assert_states(two['state_dict'], one['state_dict'])
    # Those of the first process, of every other batch.
    losses = two['message_hub']['log_scalars']['train/loss'].data[0]
    assert_losses([*map(float, losses)], plain.losses[::2])
    assert len(losses) == 8


def test_two_processes_test(jobs, tested):
    assert jobs['test'].code == 0, jobs['test'].err
    assert jobs['test'].out.count('fuse_test: 16 of 16') == 1
    assert_same(predictions('two.pkl'), predictions('tested.pkl'))
