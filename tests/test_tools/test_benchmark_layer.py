"""The costs of one layer: turns, both doors."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmcv')

from benchmarks import layer, timing  # noqa: E402
from benchmarks.core import HERE, Core  # noqa: E402

from polynl_mm.layers import PolyNL2d  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_turns(monkeypatch):
    monkeypatch.setattr(timing, 'seconds_of', lambda f, device: f())
    rounds = []

    def make_calls(i):
        rounds.append(i)
        return dict(unit=lambda: 1.0, slow=lambda: 4.0, quick=lambda: 0.25)

    times = timing.take_turns(make_calls, 'cpu', 'unit', seconds=6, rounds=2)
    assert rounds == [0, 1]
    # Three turns a round, until the unit has had its half of the time.
    assert times == dict(
        unit=[1.0] * 6, slow=[4.0, 4.0, None] * 2, quick=[0.25] * 6
    )
    assert timing.ratio(times['slow'], times['unit']) == (4, 0)
    assert timing.ratio([1, 2, None, 8], [1, 1, 1, 2]) == (2, 0.75)
    assert timing.seconds([1, 3, None, 5]) == (3, 1)
    times = timing.take_turns(make_calls, 'cpu', 'unit', turns=4)
    assert [len(t) for t in times.values()] == [4, 4, 4]


@pytest.mark.parametrize(
    'device, method', [('cpu', 'forkserver'), ('cuda', 'spawn')]
)
def test_no_child_is_a_fork_of_what_has_seen_the_gpu(
    device, method, monkeypatch
):
    def get_context(name):
        assert name == method
        return SimpleNamespace(
            Pool=lambda *args, **kwargs: name,
            set_forkserver_preload=lambda names: None,
        )

    monkeypatch.setattr(os, 'environ', dict(os.environ))
    monkeypatch.setattr(timing.multiprocessing, 'get_context', get_context)
    assert timing.one_process_each(device) == method


@pytest.mark.parametrize('mode', timing.MODES)
def test_modules_that_are_compared_are_the_layer(mode):
    torch.manual_seed(0)
    on_x, behind = layer.OnX(8, HERE), layer.Behind(8, HERE)
    plain = PolyNL2d(8)
    plain.load_state_dict(on_x.state_dict())
    x = torch.randn(1, 8, 3, 5)
    torch.testing.assert_close(on_x(x), plain(x))
    assert (on_x(x) - x).abs().max() > 0.1
    plain.load_state_dict(behind.state_dict(), strict=False)
    h = torch.randn(1, 2, 3, 5)
    with torch.no_grad():
        x = behind.conv(h) * behind.scale[:, None, None]
        expected = plain(x + behind.shift[:, None, None])
    behind.train(mode == 'training')
    y = behind(h)
    torch.testing.assert_close(y, expected)
    if mode == 'training':
        y.sum().backward()
        assert all(p.grad is not None for p in behind.parameters())


def test_the_operation_is_called_as_its_commit_wants():
    Params = namedtuple('Params', 'w1 w2 w3 alpha beta b1 b2', defaults='--')
    Conv = namedtuple('Conv', 'a b')

    def said(name):
        return lambda *args, **kwargs: (name, args, kwargs)

    form = dict(form='gram')
    core = Core(
        SimpleNamespace(
            Params=Params,
            Conv=Conv,
            poly_nl=said('on x'),
            poly_nl_behind=said('behind'),
            project=lambda conv, p: p._replace(w1=conv.a + p.w1),
        )
    )
    conv, p = core.conv('a', 'b'), core.params(*'123!?')
    assert core.poly_nl('x', p, 'gram') == (
        *('on x', ('x', Params('1', '2', '3', '!', '?')), form),
    )
    assert core.poly_nl_behind('h', conv, core.project(conv, p), 'gram') == (
        'behind',
        ('h', Conv('a', 'b'), Params('a1', '2', '3', '!', '?')),
        form,
    )
    core = Core(
        SimpleNamespace(
            poly_nl=said('on x'),
            poly_nl_behind=said('behind'),
            project=lambda a, b, w1, w2: (a + w1, a + w2, b + w1, b + w2),
        )
    )
    conv, p = core.conv('a', 'b'), core.params(*'123!?')
    assert core.poly_nl('x', p, 'gram') == ('on x', ('x', *'123!?'), form)
    assert core.poly_nl_behind('h', conv, core.project(conv, p), 'gram') == (
        'behind',
        ('h', 'a', 'b', 'a1', 'a2', '3', '!', '?', 'b1', 'b2'),
        form,
    )


def run(*args, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / 'tools/benchmark_layer.py'), *args],
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ''},
        capture_output=True,
        text=True,
    )


def test_one_small_case(tmp_path):
    done = run(
        *('--channels', '16', '--positions', '16', '--seconds', '0.001'),
        *('--no-memory', '--json', 'out.json'),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'out.json').read_text())
    (row,) = result['rows']
    names = ('conv', 'auto', 'direct', 'gram', 'NonLocal2d', 'ContextBlock')
    assert tuple(row['contenders']) == names
    assert 'anywhere: training, auto / direct' in done.stdout
