"""How a tool ends; test_tools/test_bad_input.py has its command line."""

import subprocess
import sys

import pytest

pytest.importorskip('torch')
pytest.importorskip('mmengine')

LEAVING = """
import atexit

import torch
from polynl_mm.engine import cli


class Kept:
    def __del__(self):
        print('finalised')


def tool():
    torch.distributed.init_process_group(
        'gloo', init_method='file://' + FILE, rank=0, world_size=1)
    print('done')
    if ERROR:
        raise cli.StartError('why')


kept = Kept()
atexit.register(print, 'at exit')
cli.run(tool)
print('not reached')
"""


@pytest.mark.parametrize('error', [False, True])
def test_leaves_before_python_is_finalised(tmp_path, error):
    """A thread of gloo that meets the finalisation aborts the process."""
    code = f'FILE = {str(tmp_path / "store")!r}\nERROR = {error}\n' + LEAVING
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.returncode == (2 if error else 0), done.stderr
    assert ('error: why' in done.stderr) == error
    assert done.stdout.split('\n') == ['done', 'at exit', '']
