"""GlooRunner: the same gradients as one process, and the user's settings.

Run as a script under torchrun, this file is the worker of its own tests.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmcv')

from mmengine.model import BaseModel  # noqa: E402
from mmengine.registry import MODEL_WRAPPERS  # noqa: E402
from torch import nn  # noqa: E402

ROOT = Path(__file__).parents[2]
WORLD = 2


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(
        (2 * WORLD, 5, 7, 3), generator=generator, dtype=torch.float64
    )


class Model(BaseModel):
    """A Poly-NL layer that is not the identity; the loss is a mean."""

    def __init__(self, norm=None, unused=False):
        super().__init__()
        from polynl_mm.layers import PolyNL2d

        torch.manual_seed(0)
        self.conv = nn.Conv2d(5, 5, 1)
        self.norm = norm(5) if norm else nn.Identity()
        self.layer = PolyNL2d(5, alpha_init=0.7, beta_init=0.9)
        if unused:
            self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, x, mode='loss'):
        y = self.layer(self.norm(self.conv(x)))
        return {'loss': (y * y.cos()).flatten(1).sum(1).mean()}

    def gradients(self):
        return {name: p.grad for name, p in self.named_parameters()}


def runner(work_dir, model, env_cfg=None, **cfg):
    from mmengine.config import Config

    from polynl_mm.engine.runner import GlooRunner

    return GlooRunner(
        model,
        str(work_dir),
        launcher='pytorch',
        env_cfg=env_cfg or {},
        experiment_name=work_dir.name.replace(' ', '_'),
        cfg=Config(cfg),
    )


@MODEL_WRAPPERS.register_module()
class OwnWrapper(nn.Module):
    """A wrapper that is no DistributedDataParallel: it takes no device."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def work(folder):
    rank = int(os.environ['RANK'])
    results = {}

    first = runner(
        folder / 'first',
        Model(),
        env_cfg=dict(dist_cfg=dict(backend='nccl', timeout=77)),
    )
    default = torch.distributed.distributed_c10d._get_default_group()
    results['backend'] = torch.distributed.get_backend()
    results['timeout'] = default._get_backend(torch.device('cpu')).options
    results['timeout'] = results['timeout']._timeout.total_seconds()
    results['wrapper'] = (
        type(first.model).__name__,
        first.model.device_ids,
        first.model.broadcast_buffers,
        first.model.find_unused_parameters,
    )
    share = batch().chunk(WORLD)[rank]
    first.model(share)['loss'].backward()
    results['gradients'] = first.model.module.gradients()

    def settings(name, model, **cfg):
        wrapped = runner(folder / name, model, **cfg).model
        results[name] = (
            type(wrapped).__name__,
            getattr(wrapped, 'device_ids', 'none'),
            getattr(wrapped, 'broadcast_buffers', None),
            getattr(wrapped, 'find_unused_parameters', None),
            getattr(wrapped, 'static_graph', None),
        )
        return wrapped

    settings('top level', Model(unused=True), find_unused_parameters=True)
    settings(
        'wrapper cfg',
        Model(),
        model_wrapper_cfg=dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=True,
            static_graph=True,
            device_ids=[0],
        ),
    )
    settings('own wrapper', Model(), model_wrapper_cfg=dict(type='OwnWrapper'))

    sync = runner(folder / 'sync', Model(nn.SyncBatchNorm))
    sync.model(share)
    before = sync.model.module.norm.running_mean.clone()
    sync.call_hook('before_val_epoch')
    results['means'] = before, sync.model.module.norm.running_mean
    convert = runner(
        folder / 'convert', Model(nn.BatchNorm2d), sync_bn='torch'
    )
    results['norms'] = {
        name: type(each.model.module.norm)
        for name, each in (('sync', sync), ('convert', convert))
    }
    results['hooks'] = {
        name: [type(hook).__name__ for hook in each.hooks]
        for name, each in (('first', first), ('sync', sync))
    }
    torch.save(results, folder / f'{rank}.pth')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gloo')
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone']
        + [f'--nproc-per-node={WORLD}', __file__, str(folder)],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope='module')
def results(folder):
    return [
        torch.load(folder / f'{rank}.pth', weights_only=False)
        for rank in range(WORLD)
    ]


def logs(folder, name):
    return [file.read_text() for file in (folder / name).glob('*/*.log')]


def test_gradients_equal_those_of_one_process(results):
    alone = Model()
    alone(batch())['loss'].backward()
    expected = alone.gradients()
    assert expected['layer.w1.weight'].abs().max() > 1e-3
    for each in results:
        torch.testing.assert_close(
            each['gradients'], expected, rtol=1e-10, atol=1e-12
        )


def test_group_is_gloo_with_the_timeout_of_the_config(results):
    for each in results:
        assert each['backend'] == 'gloo'
        assert each['timeout'] == 77


def test_defaults_are_those_of_mmengine(results):
    assert results[0]['wrapper'] == (
        'MMDistributedDataParallel',
        None,
        False,
        False,
    )


def test_settings_of_the_user_are_kept(results):
    ddp = 'MMDistributedDataParallel'
    assert results[0]['top level'] == (ddp, None, False, True, False)
    assert results[0]['wrapper cfg'] == (ddp, None, True, False, True)
    assert results[0]['own wrapper'][:2] == ('OwnWrapper', 'none')


@pytest.mark.parametrize(
    'name, count', [('sync', '1 SyncBN'), ('convert', '0 SyncBN')]
)
def test_sync_bn_is_reverted_with_one_warning(folder, results, name, count):
    (log,) = logs(folder, name)
    assert results[0]['norms'][name] is not nn.SyncBatchNorm
    assert log.count('became BatchNorm') == 1
    assert f'WARNING - No accelerator: {count} layers' in log


def test_each_act_is_logged_once(folder):
    (log,) = logs(folder, 'first')
    assert log.count('process group of 2 over gloo') == 1
    assert log.count('without device ids') == 1
    assert 'SyncBN' not in log.split('No accelerator', 1)[1]


def test_statistics_of_process_0_are_evaluated(results):
    (first, after_first), (second, after_second) = (
        each['means'] for each in results
    )
    assert not torch.equal(first, second)
    assert torch.equal(after_first, first)
    assert torch.equal(after_second, first)
    hooks = results[0]['hooks']
    assert 'BroadcastBuffersHook' in hooks['sync']
    assert 'BroadcastBuffersHook' in hooks['first']


@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_other_launchers_are_refused(tmp_path, launcher):
    from polynl_mm.engine.runner import GlooRunner

    with pytest.raises(ValueError, match=f"launcher='{launcher}'.*torchrun"):
        GlooRunner(Model(), str(tmp_path), launcher=launcher)


def test_accelerator_is_not_left_idle(tmp_path, monkeypatch):
    from polynl_mm.engine import runner

    monkeypatch.setattr(runner, 'get_device', lambda: 'cuda')
    with pytest.raises(ValueError, match='there is one .cuda.'):
        runner.GlooRunner(Model(), str(tmp_path), launcher='pytorch')


def test_parts_of_results_lie_in_the_folder_of_the_run(tmp_path):
    metrics = [
        SimpleNamespace(collect_device=device, collect_dir=folder)
        for device, folder in (('cpu', None), ('cpu', 'own'), ('gpu', None))
    ]
    evaluator = SimpleNamespace(metrics=metrics)
    runner = SimpleNamespace(
        log_dir=str(tmp_path),
        val_evaluator=evaluator,
        test_evaluator=evaluator,
    )
    from polynl_mm.engine.runner import CollectHook

    CollectHook().before_test_epoch(runner)
    assert [metric.collect_dir for metric in metrics] == [
        str(tmp_path / 'parts'),
        'own',
        None,
    ]


if __name__ == '__main__':
    from polynl_mm.engine import cli

    cli.run(lambda: work(Path(sys.argv[1])))
