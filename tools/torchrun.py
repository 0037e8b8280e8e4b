"""Start a tool in several processes, as the dist_*.sh scripts need it.

    python torchrun.py GPUS SCRIPT [its arguments ...]

This is torchrun with what OpenMMLab users set in the environment (NNODES,
NODE_RANK, MASTER_ADDR, PORT). It shares the cores between processes where
there is no GPU, and is quiet where train.py or test.py has said already what
is wrong.
"""

import logging
import os
import socket
import sys

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

# The exit code of a tool that has said in a line why it can not start.
SAID = 2


def threads(processes):
    """Give each process its share of the cores; beside a GPU, one is enough.

    torchrun always gives one, and warns that it does.
    """
    if torch.cuda.is_available():
        return 1
    cores = os.cpu_count()
    if hasattr(os, 'sched_getaffinity'):
        # This job may be confined to some of them.
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // processes)


def number(name, default, least):
    """Read a number from the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        stop(f'{name}={text}: expected a number, {least} or more')
    return int(text)


def free_port():
    """Find a port that no other job on this machine has."""
    with socket.socket() as probe:
        probe.bind(('', 0))
        return probe.getsockname()[1]


def stop(message):
    """End with a line."""
    print(f'torchrun.py: error: {message}', file=sys.stderr)
    sys.exit(SAID)


def start(processes, command):
    """Run torchrun in this process."""
    nodes = number('NNODES', 1, 1)
    # Several nodes must know it beforehand; one alone takes a free one.
    port = number('PORT', 29500 if nodes > 1 else free_port(), 1)
    for name in ('MASTER_ADDR', 'NODE_RANK'):
        if nodes > 1 and name not in os.environ:
            stop(f'NNODES={nodes}, but {name} is not set')
    for variable in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
        os.environ.setdefault(variable, str(threads(processes)))
    # Logs how each process ended, which ChildFailedError tells again.
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    try:
        main(
            [
                f'--nnodes={nodes}',
                f'--node-rank={number("NODE_RANK", 0, 0)}',
                f'--master-addr={os.environ.get("MASTER_ADDR", "127.0.0.1")}',
                f'--master-port={port}',
                f'--nproc-per-node={processes}',
                *command,
            ]
        )
    except ChildFailedError as error:
        if SAID in (failure.exitcode for failure in error.failures.values()):
            sys.exit(SAID)
        raise
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except RuntimeError as error:
        if 'EADDRINUSE' not in str(error):
            raise
        stop(
            f'port {port} is in use, perhaps by another job: set PORT to a '
            'free one'
        )


if __name__ == '__main__':
    start(int(sys.argv[1]), sys.argv[2:])
