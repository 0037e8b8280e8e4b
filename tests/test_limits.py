"""What is called in a child does harm to the child only."""

import os
import signal
import time

import pytest

from polynl_mm.limits import MB, call_in_child


def fill(size):
    return len(bytearray(size))


def refuse(text):
    raise KeyError(text)


def end(how):
    os.kill(os.getpid(), how)


def call(function, *args, memory=256 * MB, seconds=60):
    return call_in_child(function, *args, memory=memory, seconds=seconds)


def failure(*args, **limits):
    with pytest.raises(ValueError) as caught:
        call(*args, **limits)
    return str(caught.value)


def test_result_comes_back():
    assert call(fill, 100 * MB) == 100 * MB


def test_errors_keep_their_text():
    assert failure(refuse, 'page 7') == "'page 7'"


def test_memory_is_limited():
    assert failure(fill, 8000 * MB) == 'reading it takes more than 256 MB'


def test_time_is_limited():
    start = time.monotonic()
    said = failure(time.sleep, 100, seconds=0.5)
    assert said == 'reading it takes more than 0.5 s'
    assert time.monotonic() - start < 20


@pytest.mark.parametrize('how', [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_is_told(how, capfd):
    assert failure(end, how) == f'reading it ends in {how.name}'
    assert failure(os._exit, 3) == 'reading it ends in code 3'
    assert capfd.readouterr() == ('', '')
