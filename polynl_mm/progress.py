"""Lines that say how far a long check is, for a terminal and a log alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar('Item')

INTERVAL = 15.0  # seconds between two lines


def with_estimate(
    items: Iterable[Item],
    total: int,
    what: str,
    say: Callable[[str], None],
    interval: float = INTERVAL,
) -> Iterator[Item]:
    """Pass items on, and tell now and then how long the rest will take.

    Nothing is told of what is done within the interval.

    Args:
        items: What is worked at, each before the next is asked for.
        total: How many there are.
        what: Their name, in the plural.
        say: Told a line, such as '1200 of 2975 labels read, 25 s left'.
        interval: Seconds between two lines.
    """
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= interval and done < total:
            last = now
            left = (now - start) / done * (total - done)
            say(f'{done} of {total} {what} read, {left:.0f} s left')
