"""What is called in a child does harm to it only; pictures have a size."""

import io
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
import zlib

import pytest
from PIL import Image

from polynl_mm.limits import MAX_PIXELS, MB, call_in_child, check_pixels


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


# Python is told to say where it crashed, in a file.
SPEAKING = """
import faulthandler, os, signal, sys
from polynl_mm.limits import MB, call_in_child

def speak_and_end():
    os.write(2, b'of the child')
    os.kill(os.getpid(), signal.SIGSEGV)

faulthandler.enable(open(sys.argv[1], 'w'))
try:
    call_in_child(speak_and_end, memory=256 * MB, seconds=60)
except ValueError as error:
    print(error)
"""


def test_a_crash_says_nothing_itself(tmp_path):
    ran = subprocess.run(
        [sys.executable, '-c', SPEAKING, str(tmp_path / 'where')],
        capture_output=True,
        text=True,
    )
    assert ran.stdout == 'reading it ends in SIGSEGV\n'
    assert ran.stderr == '' == (tmp_path / 'where').read_text()


def test_a_daemon_reads_in_a_child(capfd):
    """Such as the workers of a pool and of a data loader."""
    with multiprocessing.Pool(1) as pool:
        assert pool.apply(call, (fill, 7)) == 7
        assert (
            pool.apply(failure, (os._exit, 3)) == 'reading it ends in code 3'
        )
        assert pool.apply(is_daemon)
    assert call(is_daemon)


def is_daemon():
    return multiprocessing.current_process().daemon


def png(width, height):
    """A header; no decoder would come to where the rest is missing."""
    header = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n\0\0\0\r'
        + header
        + struct.pack('>I', zlib.crc32(header))
        + b'\0\0\0\0IDAT'
    )


def test_a_picture_is_measured_by_its_header():
    with pytest.raises(ValueError) as caught:
        check_pixels(png(30000, 30000))
    assert str(caught.value) == (
        '30000x30000 pixels are more than max_pixels=268435456'
    )
    # More than Pillow itself takes, whose own limit is left as it was.
    before = Image.MAX_IMAGE_PIXELS
    check_pixels(png(16384, 16384))
    assert 2 * before < 16384**2 == MAX_PIXELS
    assert Image.MAX_IMAGE_PIXELS == before


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WebP', 'TIFF', 'BMP', 'GIF'])
def test_every_kind_of_picture_is_measured(kind):
    file = io.BytesIO()
    Image.new('RGB', (7, 5)).save(file, kind)
    check_pixels(file.getvalue(), 35)
    with pytest.raises(ValueError, match='^7x5 pixels are more than .*=34$'):
        check_pixels(file.getvalue(), 34)


def test_what_is_no_picture_is_left_to_the_decoder():
    for content in (b'', b'text', png(9, 9)[:20]):
        check_pixels(content, 1)
