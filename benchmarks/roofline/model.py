"""From launches, bytes, instructions and exponentials to a modelled time."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.roofline.gpus import Gpu

SECTOR_BYTES = 32  # the unit in which a GPU moves memory
LAUNCH_SECONDS = 4e-6  # assumed: between short kernels of a stream that the host keeps filled


class Traffic(NamedTuple):
    """The costs of a pass.

    Attributes:
        launches: kernels, one after the other.
        needed_bytes: the minimum to read and write; 0 if unknown.
        moved_bytes: bytes read and written.
        exponentials: computed exponentials.
        instructions: executed by all threads together, exponentials included.
    """

    launches: float
    needed_bytes: float
    moved_bytes: float
    exponentials: float = 0
    instructions: float = 0

    def plus(self, other: Traffic) -> Traffic:
        """The costs of both passes, one after the other."""
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> Traffic:
        """The costs of `factor` times as many rows, in the same number of launches."""
        return Traffic(self.launches, *(factor * value for value in self[1:]))


class Modelled(NamedTuple):
    """Modelled seconds of a pass.

    Attributes:
        launching: time of all launches.
        memory: time of the moved bytes at peak bandwidth.
        exponentials: time of the exponentials at their peak rate.
        instructions: time of the instructions at their peak rate.
        total: launching plus the longest of the other three.
        at_best: time of the needed bytes only.
    """

    launching: float
    memory: float
    exponentials: float
    instructions: float
    total: float
    at_best: float

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        parts = {
            "launches": self.launching,
            "memory": self.memory,
            "exponentials": self.exponentials,
            "instructions": self.instructions,
        }
        return max(parts, key=lambda name: parts[name])


def modelled(traffic: Traffic, gpu: Gpu, launch_seconds: float = LAUNCH_SECONDS) -> Modelled:
    """launches · latency + max(moved bytes / bandwidth, exponentials / rate, instructions / rate)."""
    launching = traffic.launches * launch_seconds
    memory = traffic.moved_bytes / gpu.bandwidth
    exponentials = traffic.exponentials / gpu.exponentials
    instructions = traffic.instructions / gpu.instructions
    total = launching + max(memory, exponentials, instructions)
    return Modelled(launching, memory, exponentials, instructions, total, traffic.needed_bytes / gpu.bandwidth)
