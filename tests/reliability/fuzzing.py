"""Damage files in many ways, and see how a reader takes it.

FUZZ is how many mutants of each kind are read, 200 if not set, and FUZZ_FIRST
the number of the first one: a mutant is made from its number alone.
"""

import os
import random
import sys
from collections import Counter

from polynl_mm.limits import MB, call_in_child

COUNT = int(os.environ.get('FUZZ', 200))
FIRST = int(os.environ.get('FUZZ_FIRST', 0))
BATCH = 2000

# What no reader of data has to do.
FORBIDDEN = (
    'os.system',
    'os.exec',
    'os.posix_spawn',
    'os.fork',
    'os.remove',
    'os.rename',
    'subprocess.Popen',
    'socket.connect',
    'ctypes.dlopen',
)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


class Stumbled(Exception):
    """What was read could not be used."""


def mutate(data, rng):
    """Give a damaged copy of some bytes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        at, other = rng.randrange(len(data)), rng.randrange(len(data))
        size = rng.choice((1, 2, 4, 8, 32, 256))
        how = rng.randrange(8)
        if how < 2:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            data[at] = rng.randrange(256)
        elif how == 3:
            del data[at:]
        elif how == 4:
            del data[at : at + size]
        elif how == 5:
            data[at:at] = data[other : other + size]
        elif how == 6:
            one, two = data[at : at + size], data[other : other + size]
            data[at : at + len(two)] = two
            data[other : other + len(one)] = one
        else:
            width = rng.choice((1, 2, 4))
            number = rng.choice(NUMBERS) % 256**width
            data[at : at + width] = number.to_bytes(width, 'little')
    return bytes(data)


def fuzz(make, read, file, production, count=COUNT):
    """Read many mutants.

    They are read in children of many each. One that a child dies of, or that
    takes it longer than any may, is given to ``production``, which must raise
    a ValueError of one line.

    Args:
        make: Gives a mutant, given a generator of random numbers.
        read: Reads a file, given its path; what it raises is a refusal, unless
            it is Stumbled.
        file (Path): Where to write them.
        production: As ``read``, in a child.

    Returns:
        Counter: How many were read, refused, and ended a child.
    """
    found = Counter()
    at = FIRST
    while at < FIRST + count:
        progress = file.with_suffix('.progress')
        progress.write_text('0 0 0')
        end = min(at + BATCH, FIRST + count)
        try:
            call_in_child(
                *(_read_all, make, read, file, progress, at, end),
                memory=1024 * MB,
                seconds=60 + (end - at) * 0.2,
            )
            died = False
        except ValueError as error:
            # Of a mutant that breaks what it should not.
            assert str(error).startswith('reading it'), error
            died = True
        done, accepted, refused = map(int, progress.read_text().split())
        found.update(read=accepted, refused=refused)
        at += done
        if died:
            file.write_bytes(make(random.Random(at)))
            try:
                production(file)
            except ValueError as error:
                assert '\n' not in str(error)
                found['ended a child'] += 1
            else:
                raise AssertionError(f'mutant {at} ends a child, or not')
            at += 1
    return found


def _read_all(make, read, file, progress, start, end):
    heard = []

    def listen(event, args):
        if event in FORBIDDEN:
            heard.append((event, args))

    sys.addaudithook(listen)
    accepted = refused = 0
    for at in range(start, end):
        file.write_bytes(make(random.Random(at)))
        progress.write_text(f'{at - start} {accepted} {refused}')
        heard.clear()
        try:
            read(file)
            accepted += 1
        except Stumbled as error:
            raise ValueError(f'mutant {at}: {error}') from error
        except Exception:
            refused += 1
        if heard:
            raise ValueError(f'mutant {at} did {heard}')
    progress.write_text(f'{end - start} {accepted} {refused}')
