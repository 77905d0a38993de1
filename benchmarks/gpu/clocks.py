"""How long a step takes, by the device's events or by the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

FLUSHED_BYTES = 256 << 20  # at least; several times the second-level cache of today's GPUs

Step = Callable[[], object]


class Clock(Protocol):
    """Gives the seconds that one call of a step takes, from `count` calls."""

    def seconds(self, step: Step, count: int) -> float:
        """Of one call."""


class EventClock:
    """Seconds between two events of the stream around each call, their median; the caches are cold before each.

    Between the calls an array larger than the second-level cache is written, as Triton's do_bench does. Launching a
    call's kernels may overlap with that write; what the host is late with beyond it is part of the time.

    Args:
        device: where that array lies.
    """

    def __init__(self, device: str = "cuda") -> None:
        cache: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flushed = torch.empty(max(FLUSHED_BYTES, 2 * cache), dtype=torch.uint8, device=device)

    def seconds(self, step: Step, count: int) -> float:
        """Median of `count` calls."""
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
    """The host's time for calls one after the other, waited for at the end, divided by their number.

    Launching is in it where it takes longer than the kernels, and what the last call left in the caches helps the next.

    Args:
        wait: returns when the device has done all its work.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def seconds(self, step: Step, count: int) -> float:
        """Mean of `count` calls."""
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            step()
        self._wait()
        return (time.perf_counter() - start) / count
