"""What ``check_gpu.sh`` says, and what its check of loss scaling sees."""

import copy
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from check_loss_scaling import skipped_steps
from torch import nn

from polynl_mm import PolyNL2d

TOOLS = Path(__file__).parents[2] / 'tools'
# In the logs, of what each step is to show.
SHOWN = """cityscapes made
Saving checkpoint at 1 epochs
NCCL version 2.0
resumed epoch: 1, iter: 10
fuse_test: 6 of 6
fuse_train: 6 of 6
Epoch(test) [1/1]
Iter(test) [1/1]
5 of 10 steps skipped
9 passed
"""


def test_no_gpu(start, finish, place):
    before = sorted(place.iterdir())
    done = finish(start('check_gpu.sh'))
    assert done.code == 1 and done.out == ''
    assert done.err.count('\n') == 1 and 'sees no GPU' in done.err
    assert sorted(place.iterdir()) == before


def test_wrong_option(start, finish):
    done = finish(start('check_gpu.sh', '--gpu'))
    assert done.code == 2 and done.out == ''
    assert done.err.startswith('usage: ') and done.err.count('\n') == 1


@pytest.fixture
def check(tmp_path):
    """Run it with a Python that only writes its arguments and a text."""
    (tmp_path / 'python').write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\n'
        f'[[ $1 != - ]] || exec cat > /dev/null\ncat {tmp_path}/text\n'
    )
    (tmp_path / 'python').chmod(0o755)

    def check(text):
        (tmp_path / 'text').write_text(text)
        done = subprocess.run(
            ['bash', TOOLS / 'check_gpu.sh'],
            cwd=tmp_path,
            env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'},
            capture_output=True,
            text=True,
        )
        assert done.stderr == ''
        *done.steps, last = done.stdout.splitlines()
        logs = tmp_path / 'work_dirs/check_gpu/logs'
        assert last == f'logs: {logs}'
        assert len(done.steps) == len([*logs.iterdir()]) == 10
        done.calls = (tmp_path / 'calls').read_text().splitlines()
        return done

    return check


def test_all_works(check):
    done = check(SHOWN)
    assert done.returncode == 0
    assert all(re.match('ok  .* s  ', step) for step in done.steps)
    trainings = [call for call in done.calls if 'train.py' in call]
    assert len(trainings) == 6 and all('--amp' in call for call in trainings)
    assert sum('--launcher pytorch' in call for call in trainings) == 1


@pytest.mark.parametrize(
    'text, failed',
    [
        ('', 10),
        (SHOWN.replace('NCCL', 'gloo'), 1),
        (SHOWN + 'Epoch(train) [1][10/10] loss: nan\n', 10),
    ],
)
def test_what_was_not_seen_has_failed(check, text, failed):
    done = check(text)
    assert done.returncode == 1
    wrong = [step for step in done.steps if step.startswith('FAILED')]
    assert len(wrong) == failed
    for step in wrong:
        assert Path(re.search(r'\(see (.*)\)', step)[1]).is_file()


@pytest.mark.long
def test_the_same_without_a_gpu(tmp_path):
    done = subprocess.run(
        ['bash', TOOLS / 'check_gpu.sh', '--cpu'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    _, *steps, _ = done.stdout.splitlines()
    assert [step.split()[0] for step in steps].count('ok') == 9
    assert done.stdout.count('not run') == 1


# -------------------------------------------------------- check of a training


@pytest.fixture(scope='module')
def trained():
    """State before, and what mmengine saves after ten steps."""
    if not hasattr(torch.amp, 'GradScaler'):
        pytest.skip('this torch scales no loss on a CPU')
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1))
    model.add_module('poly_nl', PolyNL2d(6, beta_init=0.5))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler('cpu', init_scale=1e12, backoff_factor=0.01)
    for _ in range(10):
        with torch.autocast('cpu', torch.float16):
            y = model(torch.randn(2, 3, 5, 7))
        scaler.scale(y.float().square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    after = dict(
        meta=dict(iter=10),
        state_dict=model.state_dict(),
        optimizer={
            **optimizer.state_dict(),
            'loss_scaler': scaler.state_dict(),
        },
    )
    return before, after


def test_skipped_steps(trained):
    before, after = trained
    said = skipped_steps(before, after, 1e12)
    count, end = re.match(r'(\d) of 10 .* 1e\+12 -> (\d+);', said).groups()
    assert float(end) == pytest.approx(1e12 * 0.01 ** int(count))
    assert 'all of 5 parameters' in said


def change(after, before, wrong):
    if wrong == 'was not scaled':
        after['optimizer'].pop('loss_scaler')
    elif wrong == 'not down':
        after['optimizer']['loss_scaler']['scale'] = 1e12
    elif wrong == '10 of 10 steps were taken':
        for state in after['optimizer']['state'].values():
            state['step'] = 10
    elif wrong == '0 of 10 steps were taken':
        after['optimizer']['state'] = {}
    elif wrong == 'not finite: 0.bias':
        after['state_dict']['0.bias'][1] = float('nan')
    else:
        before['poly_nl.w1.weight'] = after['state_dict']['poly_nl.w1.weight']


@pytest.mark.parametrize(
    'wrong',
    [
        'was not scaled',
        'not down',
        '10 of 10 steps were taken',
        '0 of 10 steps were taken',
        'not finite: 0.bias',
        'did not move: poly_nl.w1.weight',
    ],
)
def test_what_is_wrong_is_said(trained, wrong):
    before, after = copy.deepcopy(trained)
    change(after, before, wrong)
    with pytest.raises(ValueError, match=wrong):
        skipped_steps(before, after, 1e12)
