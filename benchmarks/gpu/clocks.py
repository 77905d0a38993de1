"""Clocks for a step: events of the device, or the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

FLUSHED_BYTES = 256 << 20  # several times the second-level cache of current GPUs

Step = Callable[[], object]


class Clock(Protocol):
    """Measures the seconds of one call of a step."""

    def seconds(self, step: Step, count: int) -> float:
        """Seconds per call, from `count` calls."""


class EventClock:
    """The median time between two events around each call, with cold caches.

    An array that is larger than the second-level cache is written before each call, as Triton's do_bench does. A call's
    launches may overlap with that write; if the host takes longer, the rest is part of the time.

    Args:
        device: the device of that array.
    """

    def __init__(self, device: str = "cuda") -> None:
        cache: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flushed = torch.empty(max(FLUSHED_BYTES, 2 * cache), dtype=torch.uint8, device=device)

    def seconds(self, step: Step, count: int) -> float:
        """The median of `count` calls."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            self._flushed.zero_()
            start.record()
            step()
            end.record()
        torch.cuda.synchronize()
        milliseconds: list[float] = [start.elapsed_time(end) for start, end in events]
        return statistics.median(milliseconds) * 1e-3


class WallClock:
    """The host's time for consecutive calls, divided by their number.

    It contains launching if that takes longer than the kernels. Calls find what the previous one left in the caches.

    Args:
        wait: returns when the device has finished all work.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def seconds(self, step: Step, count: int) -> float:
        """The mean of `count` calls."""
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            step()
        self._wait()
        return (time.perf_counter() - start) / count
