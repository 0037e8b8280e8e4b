"""Trainings that are killed at random moments, and gone on with.

In the night, with other long tests, or alone:

    python -m pytest -m long tests/reliability/test_kill_resume.py

Ten kills each of three tasks in one and in two processes, half of them with
workers that load the data; with an average of the weights (EMA). Of two, the
launcher is killed. A line each goes to the standard output (``-s``). In short,
of single steps and without processes, it is
tests/test_engine/test_resuming.py.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from helpers import differing  # noqa: E402

from polynl_mm.engine.checkpoints import newest, read_state  # noqa: E402

ROOT = Path(__file__).parents[2]
KILLS = 5

# Task -> its mini config, and how long it takes here.
TASKS = {
    'wider_face': (
        'retinaface_r50-polynl_mini-wider.py',
        'train_cfg = dict(max_epochs=5)',
    ),
    'coco': (
        'mask-rcnn_r50-polynl_mini-coco.py',
        'train_cfg = dict(max_epochs=5, val_interval=1)\n'
        # Flips, so that there is something random in the pictures.
        "flip = dict(type='RandomFlip', prob=0.5)\n"
        'pipeline = [*_base_.train_pipeline[:-1], flip,'
        ' _base_.train_pipeline[-1]]\n'
        'train_dataloader = dict(dataset=dict(pipeline=pipeline))',
    ),
    'cityscapes': (
        'polynl_r18-d4_mini-cityscapes.py',
        'train_cfg = dict(max_iters=20, val_interval=4)\n'
        'model = dict(decode_head=dict(dropout_ratio=0.1))\n'
        'default_hooks = dict(checkpoint=dict(interval=4))',
    ),
}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """Give a folder with the configs and their data."""
    folder = tmp_path_factory.mktemp('kills')
    for task, (config, rest) in TASKS.items():
        data = folder / f'data/mini_{task.split("_")[0]}'
        sizes = ('--seed', '0', '--train', '16', '--val', '16')
        subprocess.run(
            [sys.executable, ROOT / 'tools/make_mini_data.py', task, *sizes]
            + ['--out', str(data)],
            check=True,
        )
        (folder / f'{task}.py').write_text(
            f'_base_ = {str(ROOT / "configs/mini" / config)!r}\n'
            'custom_hooks = _base_.polynl_hooks + '
            "[dict(type='EMAHook', momentum=0.1)]\n"
            f'{rest}\n'
        )
    return folder


class Job:
    """A training of a task, in a folder of its own."""

    def __init__(self, place, task, processes, workers, name):
        self.place, self.task, self.workers = place, task, workers
        self.processes, self.folder = processes, place / name

    def start(self):
        """Start it, with --resume, which starts anew where nothing is."""
        tool = (
            [sys.executable, ROOT / 'tools/train.py', f'{self.task}.py']
            if self.processes == 1
            else ['bash', ROOT / 'tools/dist_train.sh', f'{self.task}.py', '2']
        )
        loader = 'train_dataloader'
        options = [
            f'{loader}.num_workers={self.workers}',
            f'{loader}.persistent_workers={self.workers > 0}',
            f'{loader}.batch_size=2',
        ]
        self.log = open(f'{self.folder}.log', 'a')
        self.process = subprocess.Popen(
            [*tool, '--work-dir', str(self.folder), '--resume']
            + ['--cfg-options', *options],
            cwd=self.place,
            env={
                **os.environ,
                'PATH': os.pathsep.join(
                    [os.path.dirname(sys.executable), os.environ['PATH']]
                ),
                'OMP_NUM_THREADS': '1',
                'CUDA_VISIBLE_DEVICES': '',
            },
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def began(self):
        """Wait until the runner has made the folder of its log."""
        while not [*self.folder.glob('2*')] and self.process.poll() is None:
            time.sleep(0.01)
        return time.monotonic()

    def kill(self):
        """Kill it, or what started it, and wait until all has ended."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + 30
        while self.left():
            assert time.monotonic() < deadline, self.left()
            time.sleep(0.1)

    def left(self):
        """Give the processes that have the folder in their command."""
        found = []
        for file in Path('/proc').glob('[0-9]*/cmdline'):
            with contextlib.suppress(OSError):
                if str(self.folder).encode() + b'\0' in file.read_bytes():
                    found.append(file.parent.name)
        return found

    def end(self):
        """Wait for its end; what a training could go on from."""
        code = self.process.wait(timeout=600)
        self.log.close()
        text = Path(f'{self.folder}.log').read_text()
        assert code == 0, text[-3000:]
        state = read_state(newest(str(self.folder)))
        best = [*self.folder.glob('best_*.pth')]
        assert len(best) == 1
        state['best'] = torch.load(best[0])['state_dict']
        state['best_name'] = best[0].name
        return state


KEYS = (
    *('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'),
    *('best', 'best_name'),
)


@pytest.mark.long
@pytest.mark.parametrize('workers', (0, 2))
@pytest.mark.parametrize('processes', (1, 2))
@pytest.mark.parametrize('task', TASKS)
def test_killed_trainings_end_as_the_unbroken_one(
    place, task, processes, workers
):
    job = Job(place, task, processes, workers, f'{task}{processes}{workers}')
    job.start()
    began = job.began()
    whole = job.end()
    seconds = time.monotonic() - began
    draw = random.Random(f'{task} {processes} {workers}')
    failed = []
    for number in range(KILLS):
        killed = Job(
            place, task, processes, workers, f'{job.folder.name}-{number}'
        )
        killed.start()
        killed.began()
        time.sleep(draw.uniform(0, seconds))
        killed.kill()
        left = newest(str(killed.folder))
        at = read_state(left)['meta']['iter'] if left else 0
        killed.start()
        state = killed.end()
        other = [
            path
            for key in KEYS
            for path in differing(whole[key], state[key], key)
        ]
        print(
            f'{task}, {processes} processes, {workers} workers: killed, gone '
            f'on from iteration {at}: {len(other)} differences',
            flush=True,
        )
        failed += other[:3]
        shutil.rmtree(killed.folder)
    assert failed == []
    assert not (place / '.dist_test').exists()
