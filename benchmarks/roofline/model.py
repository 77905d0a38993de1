"""From launches, bytes and exponentials to a modelled time."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.roofline.gpus import Gpu

SECTOR_BYTES = 32  # what a GPU's memory moves at least
LAUNCH_SECONDS = 4e-6  # assumed: from one short kernel to the next, in a stream that the host keeps filled


class Traffic(NamedTuple):
    """What a pass costs.

    Attributes:
        launches: kernels started, one after the other.
        needed_bytes: that it has to read and write at least; 0 where nobody has said.
        moved_bytes: that it reads and writes.
        exponentials: that it computes.
    """

    launches: float
    needed_bytes: float
    moved_bytes: float
    exponentials: float = 0

    def plus(self, other: Traffic) -> Traffic:
        """One after the other."""
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> Traffic:
        """The same with so many times as many rows, in as many launches."""
        return Traffic(self.launches, *(factor * value for value in self[1:]))


class Modelled(NamedTuple):
    """Modelled seconds of a pass.

    Attributes:
        launching: of all launches.
        memory: for the moved bytes at the full bandwidth.
        exponentials: at the full rate.
        total: launching, and the longer of the two others.
        at_best: for the needed bytes alone.
    """

    launching: float
    memory: float
    exponentials: float
    total: float
    at_best: float

    @property
    def bound(self) -> str:
        """What takes the most of it."""
        parts = {"launches": self.launching, "memory": self.memory, "exponentials": self.exponentials}
        return max(parts, key=lambda name: parts[name])


def modelled(traffic: Traffic, gpu: Gpu, launch_seconds: float = LAUNCH_SECONDS) -> Modelled:
    """launches · latency + max(moved bytes / bandwidth, exponentials / rate)."""
    launching = traffic.launches * launch_seconds
    memory = traffic.moved_bytes / gpu.bandwidth
    exponentials = traffic.exponentials / gpu.exponentials
    total = launching + max(memory, exponentials)
    return Modelled(launching, memory, exponentials, total, traffic.needed_bytes / gpu.bandwidth)
