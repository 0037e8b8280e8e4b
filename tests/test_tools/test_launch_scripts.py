"""The shell scripts: what they hand on, word by word, from any folder."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools'

# Stands in for a program on PATH: writes down its arguments.
RECORDER = f"""#!{sys.executable}
import json, sys
json.dump(sys.argv[1:], open('arguments.json', 'w'))
"""

SETTINGS = [
    *('NNODES', 'NODE_RANK', 'MASTER_ADDR', 'PORT'),
    *('GPUS', 'GPUS_PER_NODE', 'CPUS_PER_TASK', 'SRUN_ARGS'),
]

# CONFIG, and CHECKPOINT or WORK_DIR, with what a careless script would split.
FIRST, SECOND = 'my config.py', 'other place/*'


@pytest.fixture
def call(tmp_path):
    """Run a script in another folder, with srun and python replaced."""
    programs = tmp_path / 'bin'
    programs.mkdir()
    for name in ('srun', 'python'):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    elsewhere = tmp_path / 'else where'
    elsewhere.mkdir()

    def call(script, *args, relative=False, **env):
        env = {
            key: value
            for key, value in os.environ.items()
            if key not in SETTINGS
        } | env
        env['PATH'] = f'{programs}:{env["PATH"]}'
        path = TOOLS / script
        done = subprocess.run(
            ['bash', os.path.relpath(path, elsewhere) if relative else path]
            + [*map(str, args)],
            cwd=elsewhere,
            env=env,
            capture_output=True,
            text=True,
        )
        recorded = elsewhere / 'arguments.json'
        done.arguments = (
            json.loads(recorded.read_text()) if recorded.exists() else None
        )
        return done

    return call


MORE = ['--cfg-options', 'a=[1, 2]', 'b="x y"', '']


@pytest.mark.parametrize('relative', [False, True])
@pytest.mark.parametrize(
    'script, args, handed',
    [
        ('dist_train.sh', [FIRST, 3], ['train.py', FIRST]),
        ('dist_test.sh', [FIRST, SECOND, 3], ['test.py', FIRST, SECOND]),
    ],
)
def test_dist(call, script, args, handed, relative):
    done = call(script, *args, *MORE, relative=relative)
    assert done.returncode == 0, done.stderr
    assert done.arguments == [
        str(TOOLS / 'torchrun.py'),
        '3',
        str(TOOLS / handed[0]),
        *handed[1:],
        '--launcher',
        'pytorch',
        *MORE,
    ]


@pytest.fixture
def torchrun(monkeypatch):
    """``torchrun.py`` with torchrun's place taken: gives its arguments."""
    run = pytest.importorskip('torch.distributed.run')
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
        monkeypatch.setenv(name, '1')

    def torchrun(main=None, **env):
        handed = []
        monkeypatch.setattr(run, 'main', main or handed.extend)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        start = runpy.run_path(str(TOOLS / 'torchrun.py'))['start']
        start(3, ['train.py', *MORE])
        return handed

    return torchrun


def test_torchrun(torchrun):
    assert torchrun(PORT='1234') == [
        '--nnodes=1',
        '--node-rank=0',
        '--master-addr=127.0.0.1',
        '--master-port=1234',
        '--nproc-per-node=3',
        'train.py',
        *MORE,
    ]


def test_torchrun_takes_a_free_port(torchrun):
    """Two jobs on a machine need not know of each other."""
    name, port = torchrun()[3].split('=')
    assert name == '--master-port'
    with socket.socket() as job:
        job.bind(('127.0.0.1', int(port)))
        job.listen()
        assert torchrun()[3] != f'{name}={port}'


def test_torchrun_on_several_nodes(torchrun):
    nodes = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.1.2.3')
    assert torchrun(**nodes)[3] == '--master-port=29500'
    assert torchrun(**nodes, PORT='1234')[:4] == [
        '--nnodes=2',
        '--node-rank=1',
        '--master-addr=10.1.2.3',
        '--master-port=1234',
    ]


@pytest.mark.parametrize(
    'env, said',
    [
        (dict(NNODES='two'), 'NNODES=two: expected a number, 1 or more'),
        (dict(NNODES='0'), 'NNODES=0: expected a number, 1 or more'),
        (dict(PORT='a'), 'PORT=a: expected a number, 1 or more'),
        (dict(NODE_RANK=''), 'NODE_RANK=: expected a number, 0 or more'),
        # Every node would wait for itself.
        (dict(NNODES='2', NODE_RANK='1'), 'MASTER_ADDR is not set'),
        (dict(NNODES='2', MASTER_ADDR='a'), 'NODE_RANK is not set'),
    ],
)
def test_torchrun_with_wrong_settings(torchrun, capsys, env, said):
    with pytest.raises(SystemExit, match='2'):
        torchrun(**env)
    line = capsys.readouterr().err
    assert line.count('\n') == 1 and said in line


def test_torchrun_interrupted(torchrun):
    api = pytest.importorskip('torch.distributed.elastic.multiprocessing.api')

    def interrupted(arguments):
        raise api.SignalException('', signal.SIGINT)

    with pytest.raises(SystemExit, match='130'):
        torchrun(main=interrupted)


@pytest.mark.parametrize('gpus', ['0', '-1', '02', 'abc', '1.5', '', None])
@pytest.mark.parametrize(
    'script, args',
    [('dist_train.sh', [FIRST]), ('dist_test.sh', [FIRST, SECOND])],
)
def test_dist_with_a_wrong_gpu_count(call, script, args, gpus):
    done = call(script, *args, *([] if gpus is None else [gpus]))
    assert done.returncode == 2
    assert done.arguments is None
    assert done.stderr.startswith('usage: ')
    assert done.stderr.count('\n') == 1
    assert f'{script} CONFIG' in done.stderr and 'GPUS' in done.stderr


SLURM = [
    ('slurm_train.sh', ['train.py', FIRST, '--work-dir', SECOND]),
    ('slurm_test.sh', ['test.py', FIRST, SECOND]),
]


@pytest.mark.parametrize('script, handed', SLURM)
def test_slurm(call, script, handed):
    done = call(script, 'gpu part', 'a job', FIRST, SECOND, *MORE)
    assert done.returncode == 0, done.stderr
    assert done.arguments == [
        '--partition=gpu part',
        '--job-name=a job',
        '--gres=gpu:8',
        '--ntasks=8',
        '--ntasks-per-node=8',
        '--cpus-per-task=5',
        '--kill-on-bad-exit=1',
        'python',
        '-u',
        str(TOOLS / handed[0]),
        *handed[1:],
        *MORE,
        '--launcher',
        'slurm',
    ]


@pytest.mark.parametrize('script, handed', SLURM)
def test_slurm_with_fewer_gpus_than_a_node_has(call, script, handed):
    done = call(script, 'p', 'j', FIRST, SECOND, GPUS='1')
    assert done.arguments[2:5] == [
        '--gres=gpu:1',
        '--ntasks=1',
        '--ntasks-per-node=1',
    ]


@pytest.mark.parametrize('name', ['GPUS', 'GPUS_PER_NODE'])
@pytest.mark.parametrize('script, handed', SLURM)
def test_slurm_with_a_wrong_gpu_count(call, script, handed, name):
    done = call(script, 'p', 'j', FIRST, SECOND, **{name: '2x'})
    assert done.returncode == 2
    assert done.arguments is None
    assert done.stderr.startswith('usage: ')


@pytest.mark.parametrize('script, handed', SLURM)
def test_slurm_settings(call, script, handed):
    done = call(
        *(script, 'p', 'j', FIRST, SECOND),
        GPUS='4',
        GPUS_PER_NODE='2',
        CPUS_PER_TASK='3',
        SRUN_ARGS='--quotatype=spot --exclusive',
    )
    assert done.arguments[2:9] == [
        '--gres=gpu:2',
        '--ntasks=4',
        '--ntasks-per-node=2',
        '--cpus-per-task=3',
        '--kill-on-bad-exit=1',
        '--quotatype=spot',
        '--exclusive',
    ]


@pytest.mark.parametrize('script, handed', SLURM)
def test_slurm_with_an_argument_missing(call, script, handed):
    done = call(script, 'p', 'j', FIRST)
    assert done.returncode == 2
    assert done.arguments is None
    assert done.stderr.startswith('usage: ')
    assert done.stderr.count('\n') == 1


def test_cores_are_shared_without_a_gpu(monkeypatch):
    torch = pytest.importorskip('torch')
    threads = runpy.run_path(str(TOOLS / 'torchrun.py'))['threads']
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(8))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert [threads(n) for n in (1, 2, 3, 9)] == [8, 4, 2, 1]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert threads(2) == 1
