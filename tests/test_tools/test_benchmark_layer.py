"""The costs of one layer: turns, both doors, another commit's operation."""

import json
import os
import shutil
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

# Behind the operation of the commit compared with: slower, and larger.
SLOWED = """

import time as _time

_quick, _quick_behind = poly_nl, poly_nl_behind


def poly_nl(x, *args, **kwargs):
    _time.sleep(0.1)
    return _quick(x, *args, **kwargs) + 0 * x.exp().log1p()


def poly_nl_behind(*args, **kwargs):
    _time.sleep(0.1)
    y = _quick_behind(*args, **kwargs)
    return y + 0 * y.exp().log1p()
"""


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
    shown = []
    times = timing.take_turns(
        *(make_calls, 'cpu', 'unit'),
        turns=4,
        track=lambda turns: (shown.append(t) or t for t in turns),
    )
    assert [len(t) for t in times.values()] == [4, 4, 4]
    assert shown == [0, 1, 2, 3]


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


def test_operations_that_differ_are_not_timed(monkeypatch):
    def doubled(x, *args, **kwargs):
        return 2 * HERE.ops.poly_nl(x, *args, **kwargs)

    other = {**vars(HERE.ops), 'poly_nl': doubled}
    monkeypatch.setattr(
        layer, 'core_in', lambda folder: Core(SimpleNamespace(**other))
    )
    against = layer.Against('old', '/nowhere')
    with pytest.raises(
        layer.Disagreement, match='C=16 N=16: .* differ by 0.5'
    ):
        layer.run_case(16, 16, 'cpu', 0.001, against=against)


@pytest.fixture(scope='module')
def repository(tmp_path_factory):
    """A repository of this code; its one commit has a slower operation."""
    if shutil.which('git') is None:
        pytest.skip('git has the other commit')
    root = tmp_path_factory.mktemp('repository')
    for name in ('polynl_mm', 'tools'):
        shutil.copytree(ROOT / name, root / name)
    ops = root / 'polynl_mm/ops/__init__.py'
    text = ops.read_text()
    ops.write_text(text + SLOWED)
    author = ('-c', 'user.name=A', '-c', 'user.email=a@b.c')
    for command in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'slow']):
        subprocess.run(['git', *author, *command], cwd=root, check=True)
    ops.write_text(text)
    return root


def run(repository, *args):
    return subprocess.run(
        [sys.executable, str(repository / 'tools/benchmark_layer.py'), *args],
        cwd=repository,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ''},
        capture_output=True,
        text=True,
    )


@pytest.mark.long
def test_against_a_commit(repository):
    done = run(
        repository,
        *('--against', 'HEAD', '--channels', '128', '--positions', '4096'),
        *('--seconds', '0.02', '--json', 'out.json'),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((repository / 'out.json').read_text())
    (row,) = result['rows']
    assert row['auto'] == row['auto@HEAD']
    cases = row['contenders']
    for door in ('auto', 'behind'):
        here, there = cases[f'{door}@here'], cases[f'{door}@HEAD']
        spent = [min(filter(None, case['forward'])) for case in (here, there)]
        assert spent[0] < 0.1 < spent[1]
        # A map of exp(x), kept for its gradient.
        map_ = 128 * 4096 * 4
        assert there['peak_bytes'] > here['peak_bytes'] + 0.9 * map_
    found = {case['ratio']: case for case in result['against']}
    assert list(found) == [
        f'{door} / {door}@HEAD, {what}'
        for door in ('auto', 'behind')
        for what in (*timing.MODES, 'peak of a training step')
    ]
    assert all(case['worst'] < 0.9 for case in found.values())
    assert {case['where'] for case in found.values()} == {'C=128 N=4096'}
    lines = done.stdout.splitlines()
    assert lines[-6].startswith('auto / auto@HEAD, forward: at most 0.')
    assert lines[-1].endswith(', at C=128 N=4096')
    (table,) = (line for line in lines if 'auto@HEAD, forward |' in line)
    assert len(table.split('|')) == 2 + 10
    assert 'forward, time in units of one 1x1 convolution' in lines


def test_without_another_commit(repository):
    done = run(
        repository,
        *('--channels', '16', '--positions', '16', '--seconds', '0.001'),
        *('--no-memory', '--json', 'out.json'),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((repository / 'out.json').read_text())
    (row,) = result['rows']
    names = ('conv', 'auto', 'direct', 'gram', 'NonLocal2d', 'ContextBlock')
    assert tuple(row['contenders']) == names
    assert 'against' not in result and '@' not in done.stdout
    assert 'anywhere: training, auto / direct' in done.stdout


def test_a_commit_that_is_not_there(repository):
    done = run(repository, '--against', 'nowhere')
    assert done.returncode == 1
    assert done.stderr.startswith('benchmark_layer.py: --against: fatal: ')
    assert done.stderr.count('\n') == 1
