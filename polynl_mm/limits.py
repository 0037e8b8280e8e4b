"""Files of others cost no more than they should: memory, time, pixels.

A reader of a damaged or malicious file may crash, hang, or ask for any memory.
No look at the file beforehand finds all of that: :func:`call_in_child`. How
large a picture is, its header says: :func:`check_pixels`. One that is cut off
is no picture: :func:`decode_picture`.
"""

from __future__ import annotations

import faulthandler
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable

import numpy as np

MB = 2**20
# 16384 x 16384; decoded to 3 bytes each, 0.8 GB.
MAX_PIXELS = 2**28
# A marker of a JPEG after the data of a scan, in which 00 or a restart follows
# FF where FF does not fill.
_MARKER = re.compile(rb'\xff[^\x00\xd0-\xd7\xff]')
_PILLOW = threading.Lock()
# What is forked while it is held may start children, too.
_STARTING = threading.RLock()
# Elsewhere a child must import everything anew.
_START = 'fork' if sys.platform == 'linux' else 'spawn'


def call_in_child(read: Callable, *args, memory: int, seconds: float):
    """Call a function in a child process that may do harm to itself only.

    Args:
        read (Callable): Of a module. It must not need a GPU.
        args: Its arguments.
        memory (int): Bytes that it may take beside those of this process; on
            Linux only, elsewhere it is not limited.
        seconds (float): Time that it may take.

    Returns:
        What it gives; must be picklable.

    Raises:
        ValueError: It raised, with the text of that error; or it crashed, or
            took too long or too much memory, which the message says.
    """
    # Here, as looking up any polynl_mm type imports this module.
    import multiprocessing

    context = multiprocessing.get_context(_START)
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(
        target=_call, args=(theirs, read, args, memory), daemon=True
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside threads. The child waits for none.
        warnings.simplefilter('ignore', DeprecationWarning)
        _start(child)
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise ValueError(f'reading it takes more than {seconds:g} s')
        done, value = ours.recv()
    except EOFError:
        child.join()
        name = (
            signal.Signals(-child.exitcode).name
            if child.exitcode < 0
            else f'code {child.exitcode}'
        )
        raise ValueError(f'reading it ends in {name}') from None
    finally:
        child.kill()
        child.join()
        ours.close()
    if not done:
        raise ValueError(value)
    return value


def _start(child) -> None:
    """Start it, also in a worker of a pool or of a data loader.

    They are daemons, to which multiprocessing refuses children, as those
    could outlive them; this one ends by itself.
    """
    import multiprocessing

    this = multiprocessing.current_process()
    with _STARTING:
        daemon = this.daemon
        if daemon:
            this.daemon = False
        try:
            child.start()
        finally:
            if daemon:
                this.daemon = True


def _call(pipe, read: Callable, args: tuple, memory: int) -> None:
    # How it ends is for the parent to tell, in a line.
    faulthandler.disable()
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    if sys.platform == 'linux':
        _limit(memory)
    try:
        result = True, read(*args)
    except Exception as error:
        result = False, str(error)
        # SystemError where an extension loses the MemoryError; the last is
        # said by torch's allocator.
        if isinstance(error, (MemoryError, SystemError)) or (
            "can't allocate" in str(error)
        ):
            result = False, f'reading it takes more than {memory // MB} MB'
    pipe.send(result)


def _limit(memory: int) -> None:
    import resource

    with open('/proc/self/statm') as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + memory
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def check_pixels(content: bytes, most: int = MAX_PIXELS) -> None:
    """Look at the size of a picture before it is decoded.

    What Pillow does not know is left to the decoder; OpenCV's takes up to
    ``OPENCV_IO_MAX_IMAGE_PIXELS`` (2**30).

    Args:
        content (bytes): A file; its header is read.
        most (int): The most pixels that it may have.

    Raises:
        ValueError: It has more.
    """
    from PIL import Image

    # Pillow has a limit of its own, for all of a process.
    with _PILLOW:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
        except Exception:  # Pillow raises all kinds on a damaged file
            return
        finally:
            Image.MAX_IMAGE_PIXELS = before
    if width * height > most:
        raise ValueError(
            f'{width}x{height} pixels are more than max_pixels={most}'
        )


def decode_picture(
    content: bytes,
    path: str | os.PathLike,
    decode: Callable[[bytes], np.ndarray | None],
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decode a picture, or say which file is no whole one.

    OpenCV decodes a truncated JPEG without a word and fills what is missing,
    and its error on an empty file names no file. Here a JPEG must have its
    end; what phones append to it may be anything (Motion Photos).

    Args:
        content (bytes): What the file holds.
        path (str or PathLike): Its name, for the messages.
        decode (Callable): Gives the pixels; None or an error says that there
            are none.
        max_pixels (int): The most that it may have, for a small file can be a
            picture that fills the memory.

    Returns:
        ndarray: What ``decode`` gives.

    Raises:
        ValueError: The file is empty, truncated, too large or no picture.
    """
    if not content:
        raise ValueError(f'{path}: empty, expected a picture')
    if content.startswith(b'\xff\xd8') and not _jpeg_ends(content):
        raise ValueError(
            f'{path}: truncated, {len(content)} bytes of a JPEG without its '
            f'end'
        )
    try:
        check_pixels(content, max_pixels)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    try:
        image = decode(content)
    except Exception as error:
        raise ValueError(f'{path}: not a readable picture ({error})') from (
            error
        )
    if image is None:
        raise ValueError(f'{path}: not a readable picture')
    return image


def _jpeg_ends(content: bytes) -> bool:
    """Walk from marker to marker to the end of a JPEG that has a scan."""
    at, scanned = 2, False
    while True:
        # Also past what does not belong there, as decoders do.
        marker = _MARKER.search(content, at)
        if marker is None:
            return False
        kind, at = content[marker.end() - 1], marker.end()
        if kind == 0xD9:
            return scanned
        # These two have no length.
        if kind not in (0x01, 0xD8):
            at += max(2, int.from_bytes(content[at : at + 2], 'big'))
        scanned = scanned or kind == 0xDA
