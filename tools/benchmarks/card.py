"""One GPU: what a call takes of it, and what it can do at most."""

from __future__ import annotations

import gc
import statistics

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from . import timing

# Its zeroing also hides the host's launching of what is timed behind it.
LEAST_FLUSHED = 2**28
# What the ceilings are measured with: bytes, and rows of square matrices.
COPIED, ROWS = 2**30, 8192


class Products(TorchDispatchMode):
    """Counts the floating point operations of products, attention's as it is.

    ``FlopCounterMode`` also wants to know in which module they are, and so
    refuses ``torch.autograd.grad``.

    Attributes:
        flops (int): So far, two per multiply-add.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, and count it if it is known to be a product."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out


class Card:
    """The first GPU. Every figure of a call runs it several times.

    Attributes:
        device (str): Where tensors of a call are to lie.
        seconds (float): About how long a call is timed for one figure.
    """

    device = 'cuda'

    def __init__(self, seconds: float = 0.02) -> None:
        """Allocate what the L2 cache is flushed with; see the class."""
        self.seconds = seconds
        cache = getattr(
            torch.cuda.get_device_properties(0), 'L2_cache_size', 0
        )
        self._flushed = torch.empty(
            max(2 * cache, LEAST_FLUSHED),
            dtype=torch.int8,
            device=self.device,
        )

    def __str__(self) -> str:
        """Give the machine in a line."""
        return timing.machine(self.device, 'bf16 autocast and float32')

    def gpu(self, f) -> float:
        """Seconds of the GPU alone: a captured graph of the call, replayed.

        Raises:
            RuntimeError: The call can not be captured.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                f()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            f()
        seconds = self.eager(graph.replay)
        graph.reset()
        return seconds

    def eager(self, f) -> float:
        """Seconds between two events around the call, as it is launched.

        Median over several, the L2 cache flushed before each.
        """
        f()
        first = self._seconds_of([f])[0]
        count = int(min(max(self.seconds / first, 5), 100))
        return statistics.median(self._seconds_of([f] * count))

    def _seconds_of(self, calls) -> list[float]:
        torch.cuda.synchronize()
        events = []
        for f in calls:
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._flushed.zero_()
            pair[0].record()
            f()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def launches(self, f) -> int:
        """Kernels, copies and fills that the call gives the GPU.

        Raises:
            RuntimeError: The profiler sees none.
        """
        f()
        torch.cuda.synchronize()
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities) as seen:
            f()
            torch.cuda.synchronize()
        count = sum(
            event.device_type == DeviceType.CUDA for event in seen.events()
        )
        if not count:
            raise RuntimeError('the profiler sees no launch: it needs CUPTI')
        return count

    def peak(self, f) -> int:
        """Bytes that the call adds at its peak, after one."""
        return timing.added_at_peak(f, self.device)

    def flops(self, f) -> int:
        """Floating point operations of the call, see :class:`Products`."""
        with Products() as counter:
            f()
        return counter.flops

    def tidy(self) -> None:
        """Give back what the last contender held."""
        gc.collect()
        torch.cuda.empty_cache()

    def ceilings(self) -> dict:
        """What it reaches: bytes a second, operations a second by dtype."""
        found = dict(
            copy=self._copied(),
            bf16=self._multiplied(torch.bfloat16),
            fp16=self._multiplied(torch.float16),
            tf32=self._multiplied(torch.float32, tf32=True),
            float32=self._multiplied(torch.float32),
        )
        self.tidy()
        return found

    def _copied(self) -> float:
        source = torch.empty(COPIED, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return 2 * COPIED / self.eager(lambda: target.copy_(source))

    def _multiplied(self, dtype: torch.dtype, tf32: bool = False) -> float:
        a, b = (
            torch.randn(ROWS, ROWS, device=self.device, dtype=dtype)
            for _ in range(2)
        )
        switch = torch.backends.cuda.matmul
        before, switch.allow_tf32 = switch.allow_tf32, tf32
        try:
            return 2 * ROWS**3 / self.eager(lambda: a @ b)
        finally:
            switch.allow_tf32 = before
