"""torchrun as the dist_*.sh tools need it.

It shares the cores between processes where there is no GPU, and is quiet where
train.py or test.py has said already what is wrong.
"""

import logging
import os
import sys

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main, parse_args

# The exit code of a tool that has said in a line why it can not start.
SAID = 2


def threads(processes):
    """Give each process its share of the cores; beside a GPU, one is enough.

    torchrun always gives one, and warns that it does.
    """
    if torch.cuda.is_available():
        return 1
    return max(1, os.cpu_count() // processes)


if __name__ == '__main__':
    args = parse_args(sys.argv[1:])
    for variable in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
        os.environ.setdefault(variable, str(threads(int(args.nproc_per_node))))
    # Logs how each process ended, which ChildFailedError tells again.
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        if SAID in (failure.exitcode for failure in error.failures.values()):
            sys.exit(SAID)
        raise
    except RuntimeError as error:
        if 'EADDRINUSE' not in str(error):
            raise
        sys.exit(
            f'torchrun.py: error: port {args.master_port} is in use, perhaps '
            'by another job: set PORT to a free one'
        )
