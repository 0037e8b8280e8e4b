"""Curves of logs as mmengine writes them, and what is refused."""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmengine')
pytest.importorskip('matplotlib')

from polynl_mm.engine import cli  # noqa: E402

TOOL = Path(__file__).parents[2] / 'tools/plot_curves.py'


def log(place, name, lines, resume=False, **cfg):
    folder = place / name / 'vis_data'
    folder.mkdir(parents=True)
    text = '\n'.join(map(json.dumps, lines))
    (folder / 'scalars.json').write_text(text + '\n')
    text = [f'{k} = {v!r}\n' for k, v in dict(cfg, resume=resume).items()]
    (folder / 'config.py').write_text(''.join(text))


def trained(step, loss, length=10, **layers):
    """The lines of an iteration, in epochs of a length; None: without."""
    line = dict(lr=0.1, loss=loss, loss_a=loss, time=1.0, iter=step)
    if length:
        line['epoch'] = -(-step // length)
    lines = [dict(line, step=step)]
    if layers:
        values = {f'poly_nl/a.{k}': v for k, v in layers.items()}
        lines.append(dict(values, step=step))
    return lines


@pytest.fixture
def plot(tmp_path, monkeypatch, capfd):
    """Run the tool; give its output, or its line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])

    def plot(*args, told=''):
        monkeypatch.setattr(sys, 'argv', [TOOL.name, *map(str, args)])
        module = runpy.run_path(str(TOOL))
        plot.curves = module['curves']
        capfd.readouterr()
        try:
            cli.run(module['main'])
        except SystemExit as error:
            assert error.code == 2
            (line,) = capfd.readouterr().err.splitlines()
            return line
        out, err = capfd.readouterr()
        assert err.removeprefix(f'{TOOL.name}: ').rstrip() == told
        return out

    return plot


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setattr(sys, 'path', sys.path[:])
    return runpy.run_path(str(TOOL))


def test_a_resumed_training_is_one(tmp_path, tool):
    """What was done again counts once; a run that began anew stands alone."""
    log(tmp_path, '20260101_000000', trained(5, 9.0) + trained(20, 9.0))
    log(
        tmp_path,
        '20260102_000000',
        # A validation's step is its epoch.
        trained(10, 1.0, beta=0.1) + [dict(mIoU=30.0, time=1.0, step=1)]
        + trained(20, 2.0) + trained(30, 3.0),
    )  # fmt: skip
    log(
        tmp_path,
        '20260103_000000',
        [dict(mIoU=40.0, step=2)] + trained(30, 4.0, beta=0.2)
        + [dict(mIoU=50.0, step=3)],
        resume=True,
    )  # fmt: skip
    found, metrics = tool['curves'](tmp_path)
    assert found == {
        'lr': {10: 0.1, 20: 0.1, 30: 0.1},
        'loss': {10: 1.0, 20: 2.0, 30: 4.0},
        'loss_a': {10: 1.0, 20: 2.0, 30: 4.0},
        'poly_nl/a.beta': {10: 0.1, 30: 0.2},
        'mIoU': {10: 30.0, 20: 40.0, 30: 50.0},
    }
    assert metrics == {'mIoU'}
    panels = tool['chosen']([(found, metrics)], None)
    assert panels == {
        'loss': ['loss'],
        'metrics of the validation': ['mIoU'],
        'beta': ['poly_nl/a.beta'],
    }
    panels = tool['chosen']([(found, metrics)], ['lr', 'loss*'])
    assert panels == {'loss': ['loss', 'loss_a'], 'lr': ['lr']}


def test_validations_are_drawn_where_they_were(tmp_path, tool):
    """Though no iteration is logged there."""
    lines = []
    for epoch, shown in enumerate((50, 125, 200), 1):
        lines += trained(shown, 1.0, 75) + [dict(mAP=0.1, step=epoch)]
    log(tmp_path / 'a', '20260101_000000', lines)
    # Killed in the fourth; one that validates before it logs anything.
    log(tmp_path / 'a', '20260102_000000', [dict(mAP=0.2, step=4)], True)
    found, _ = tool['curves'](tmp_path / 'a')
    assert found['mAP'] == {75: 0.1, 150: 0.1, 225: 0.1, 300: 0.2}
    assert [*found['loss']] == [50, 125, 200]

    # By iterations: from 100 on again, what was there up to 190.
    lines = [trained(step, 1.0, None) for step in range(10, 200, 10)]
    log(tmp_path / 'b', '20260101_000000', sum(lines, []))
    log(
        tmp_path / 'b',
        '20260102_000000',
        [dict(mIoU=7.0, step=120), *trained(150, 2.0, None)],
        resume=True,
    )
    found, _ = tool['curves'](tmp_path / 'b')
    assert found['mIoU'] == {120: 7.0}
    assert [*found['loss']] == [*range(10, 130, 10), 150]

    # One epoch alone does not tell how long it is.
    log(tmp_path / 'c', '20260101_000000', trained(50, 1.0, 75))
    log(tmp_path / 'c', '20260102_000000', [dict(mAP=0.1, step=1)], True)
    found, _ = tool['curves'](tmp_path / 'c')
    assert found['mAP'] == {50: 0.1} and found['loss'] == {50: 1.0}


def epochs(first, last, begin, length, interval=1):
    """The lines of whole epochs, each with a validation behind."""
    lines = []
    for epoch in range(first, last + 1):
        for inner in range(interval, length + 1, interval):
            line = dict(lr=0.1, loss=1.0, epoch=epoch, step=begin + inner)
            lines.append(dict(line, iter=line['step']))
        begin += length
        lines.append(dict(mAP=0.1 * epoch, step=epoch))
    return lines


@pytest.mark.parametrize('interval', (1, 3))
def test_an_epoch_may_have_another_length_in_each_run(
    tmp_path, tool, interval
):
    """As with another batch size, or number of processes."""
    runs = (
        epochs(1, 2, 0, 8, interval),
        epochs(3, 4, 16, 4, interval),
        # One epoch does not tell its length: this one's is not that before.
        epochs(5, 5, 24, 9, interval),
        # Killed in the epoch after: it begins where that one had ended.
        epochs(6, 6, 33, 9, interval)[:2],
        epochs(6, 7, 33, 2 * interval, interval),
    )
    for number, lines in enumerate(runs):
        log(tmp_path, f'2026010{number}_000000', lines, number > 0)
    found, _ = tool['curves'](tmp_path)
    steps = [s['step'] for run in runs for s in run if 'loss' in s]
    assert [*found['loss']] == sorted({*steps})
    ends = [8, 16, 20, 24, 33, 33 + 2 * interval, 33 + 4 * interval]
    assert [*found['mAP']] == ends


def test_a_run_that_was_resumed_from_elsewhere(tmp_path, plot):
    """What was trained in its work directory before is not of it."""
    kept = dict(checkpoint=dict(out_dir='kept'))
    for name, cfg, joined in (
        ('own', dict(load_from=f'{tmp_path}/b/../own/e.pth'), True),
        ('moved', dict(load_from='old/e.pth', work_dir='old'), True),
        ('newest', dict(load_from=None), True),
        ('below', dict(load_from=f'{tmp_path}/below/b/e.pth'), False),
        ('other', dict(load_from=f'{tmp_path}/b/e.pth'), False),
        ('out', dict(load_from='kept/out/e.pth', default_hooks=kept), True),
        ('no_out', dict(load_from='kept/no_out/e.pth'), False),
    ):
        folder = tmp_path / name
        log(folder, '20260101_000000', trained(5, 9.0))
        log(folder, '20260102_000000', trained(20, 1.0), resume=True, **cfg)
        log(folder, '20260103_000000', trained(30, 1.0), resume=True)
        told = '' if joined else (
            f'{name}/20260102_000000 was resumed from {cfg["load_from"]}, '
            f'which is not of {name}: the runs before it are left out'
        )  # fmt: skip
        plot(name, '--out', 'c.png', told=told)
        found, _ = plot.curves(folder)
        assert [*found['loss']] == [5, 20, 30][not joined :], name
    (folder / '20260103_000000/vis_data/config.py').write_text('a = [')
    line = plot(name, '--out', 'c.png')
    assert '20260103_000000/vis_data/config.py can not be read: ' in line


def test_a_line_that_is_cut_off_is_passed_over(tmp_path, plot):
    file = tmp_path / 'a/20260101_000000/vis_data/scalars.json'
    log(tmp_path / 'a', '20260101_000000', trained(10, 1.0))
    file.write_text(file.read_text() + '{"loss": 1.')
    told = f'{file.relative_to(tmp_path)}, line 2 is cut off: passed over'
    out = plot('a', '--out', 'c.png', told=told)
    assert out == '1 keys in c.png\n'


def test_two_trainings_in_a_picture(tmp_path, plot):
    for name in 'ab':
        values = dict(alpha=1.0, beta=0.1, share=0.2, gate_spread=1.1)
        lines = trained(10, 1.0, **values) + trained(20, 0.5, **values)
        log(tmp_path / name, '20260101_000000', lines)
    assert plot('a', 'b', '--out', 'curves.png') == '5 keys in curves.png\n'
    assert Path('curves.png').stat().st_size > 5000
    out = plot('a', '--keys', '*.beta', 'loss_a', '--out', 'curves.svg')
    assert out == '2 keys in curves.svg\n'


def test_bad_input(tmp_path, plot):
    log(tmp_path / 'a', '20260101_000000', trained(10, 1.0))
    args = ('--out', 'curves.png')
    assert 'b has no <time of the start>/vis_data/scalars.json' in (
        plot('a', 'b', *args)
    )
    assert '--keys los: no such key; nearest: loss' in (
        plot('a', '--keys', 'los', *args)
    )
    file = tmp_path / 'a/20260101_000000/vis_data/scalars.json'
    whole = file.read_text()
    for damaged in ('{"loss": 1.\n', '[1]', '{"loss": 1.0}'):
        file.write_text(whole + damaged)
        line = plot('a', *args)
        assert 'a/20260101_000000/vis_data/scalars.json, line 2: ' in line
        assert repr(damaged.strip()) in line
    file.write_text(whole)
    for out in ('curves.none', 'curves'):
        assert f'--out {out}: expected a name that ends in one of ' in (
            plot('a', '--out', out)
        )
    assert not [*Path('.').glob('curves*')]
