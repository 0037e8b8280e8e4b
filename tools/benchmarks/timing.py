"""Time, memory and operations of a call, and how they are told.

Contenders take turns in random order, and a ratio of two is the median of
their ratios in the same turn, its spread half the distance between the
quartiles, so that a machine that is slow for a second does not matter. Peak
memory is measured in a process of its own.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

try:
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:  # torch < 2.3
    _written_out = partial(
        torch.backends.cuda.sdp_kernel,
        enable_flash=False,
        enable_mem_efficient=False,
    )
else:
    _written_out = partial(sdpa_kernel, SDPBackend.MATH)

MODES = ('forward', 'training')
ROUNDS = 4


def allow_tf32(allowed: bool) -> None:
    """Let products and convolutions of float32 run in TF32 or not."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def machine(device: str, dtype: str = 'float32') -> str:
    """One line that says where the numbers come from."""
    name = platform.processor() or platform.machine()
    if device == 'cuda':
        name = torch.cuda.get_device_name()
    elif Path('/proc/cpuinfo').exists():
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                name = line.split(':')[1].strip()
                break
    return (
        f'{name}, {torch.get_num_threads()} threads, torch '
        f'{torch.__version__}, Python {platform.python_version()}, {dtype}'
    )


# -------------------------------------------------------------------- time


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock reads what it did."""
    if device == 'cuda':
        torch.cuda.synchronize()


def seconds_of(f, device: str) -> float:
    """Time of one call."""
    synchronize(device)
    start = time.perf_counter()
    f()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(
    make_calls,
    device: str,
    unit: str,
    turns: int = 100,
    seconds: float = math.inf,
    rounds: int = 1,
    track: Callable[[Iterable], Iterable] = iter,
) -> dict:
    """Seconds of each call by turn; None in turns that a slow one sat out.

    Args:
        make_calls: Called with the number of a round, it allocates and gives
            the calls by name.
        device (str): 'cpu' or 'cuda'.
        unit (str): Name of the call whose time ``seconds`` limits.
        turns (int): So many in each round at most, one at least.
        seconds (float): When the unit has taken its share of it, a round
            ends; what takes double that sits out the rest of the round.
        rounds (int): How often everything is allocated anew.
        track (Callable): Passes the turns of a round on; shows progress, for
            example.
    """
    share = seconds / rounds
    times = {}
    for i in range(rounds):
        calls = make_calls(i)
        if i == 0:
            for f in calls.values():
                f()
        spent = dict.fromkeys(calls, 0.0)
        order = list(calls)
        for turn in track(range(turns)):
            if turn and spent[unit] >= share:
                break
            # Nobody always follows the same one, which leaves the caches.
            random.shuffle(order)
            for name in order:
                taken = None
                if turn == 0 or spent[name] < 2 * share:
                    taken = seconds_of(calls[name], device)
                    spent[name] += taken
                times.setdefault(name, []).append(taken)
    return times


def seconds(times: list) -> tuple[float, float]:
    """Median over the turns, and half the distance of the quartiles."""
    return _median([t for t in times if t])


def ratio(times: list, unit: list) -> tuple[float, float]:
    """Time in units of another's: median over the turns of both.

    With half the distance of the quartiles.
    """
    return _median([a / b for a, b in zip(times, unit) if a and b])


def _median(values: list) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
    return middle, (high - low) / 2


# ------------------------------------------------------------------ memory


def added_at_peak(f, device: str, warm_up=None) -> int:
    """Bytes that a call adds at its peak, after one that does not count.

    To be run in a process of its own, see :func:`one_process_each`. Where a
    second call would take long, ``warm_up`` is a smaller one.
    """
    (warm_up or f)()
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    Path('/proc/self/clear_refs').write_text('5')
    before = _status('VmRSS')
    f()
    return _status('VmHWM') - before


def _status(key: str) -> int:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f'/proc/self/status has no {key}')


def one_process_each(device: str, *preload: str):
    """Pool that runs every task in a fresh process, for its peak memory.

    Where processes are forked, modules of the names ``preload`` are there
    already when one starts.
    """
    # Large blocks go back to the system when freed, so that the level before
    # a step holds nothing of the warm-up. Read at the start of a process.
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'
    # A fork of a process that has seen the GPU can not use it.
    method = 'spawn' if device == 'cuda' else 'forkserver'
    context = multiprocessing.get_context(method)
    if method == 'forkserver':
        context.set_forkserver_preload(['torch', *preload])
    return context.Pool(1, maxtasksperchild=1)


def saved_bytes(module, x) -> dict:
    """Bytes kept for backward, parameters not counted.

    Returns:
        dict: ``all`` of them, and ``large``, those of tensors of at least
        half the size of ``x``.
    """
    own = {p.data_ptr() for p in module.parameters()}
    kept = {}

    def keep(t):
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(x)
    half = x.numel() * x.element_size() / 2
    return dict(
        all=sum(kept.values()),
        large=sum(b for b in kept.values() if b >= half),
    )


# -------------------------------------------------------------- operations


def flops(f) -> int:
    """Floating point operations of the products, two per multiply-add.

    Attention counts as if its matrices were written out.
    """
    # The counter does not know the fused attention of a CPU.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _written_out(), FlopCounterMode(display=False) as counter:
            f()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


# ------------------------------------------------------------------ tables


def table(head: list, rows: list) -> str:
    """Markdown."""
    lines = [head, *rows]
    lines = ['| ' + ' | '.join(map(str, cells)) + ' |' for cells in lines]
    return '\n'.join([lines[0], '|---' * len(head) + '|', *lines[1:]])
