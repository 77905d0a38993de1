"""Telling whether another process took the processor away while something was timed.

On a machine whose cores are all in use, a competitor stops one thread of a parallel loop for a time slice, and the
others wait for it: every implementation then takes whole time slices, and ratios say nothing. The system counts how
often it happened: with nothing else running some 10 to 30 times a second and thread, with one competitor on two cores
70 to 110 times.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

LIMIT = 50.0  # interruptions a second and thread


class Watch:
    """What happened inside of `with watch.interruptions():`.

    Attributes:
        disturbed: whether this process was interrupted more often than `LIMIT`.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self.disturbed = False

    @contextmanager
    def interruptions(self) -> Iterator[None]:
        """Count what interrupts this process inside of `with`."""
        start, before = time.perf_counter(), _involuntary_switches()
        yield
        seconds = time.perf_counter() - start
        if (_involuntary_switches() - before) / seconds > LIMIT * self._threads:
            self.disturbed = True


def summary(results: Mapping[str, Any]) -> str:
    """In how many of the rounds that the figures are made of something else ran, by comparison."""
    counts = {name: _count(result) for name, result in results.items()}
    disturbed = [f"{name} {bad} of {rounds}" for name, (bad, rounds) in counts.items() if bad]
    if not disturbed:
        return f"None of {sum(rounds for _, rounds in counts.values())} rounds was disturbed by other processes."
    return f"Rounds disturbed by other processes: {', '.join(disturbed)}."


def _count(result: Any) -> tuple[int, int]:
    """Disturbed rounds and all rounds in a comparison's result, however deep they lie."""
    if isinstance(result, Mapping):
        if "disturbed_rounds" in result:
            return result["disturbed_rounds"], result["round_count"]
        result = list(result.values())
    if not isinstance(result, list):
        return 0, 0
    counts = [_count(part) for part in result]
    return sum(bad for bad, _ in counts), sum(rounds for _, rounds in counts)


def _involuntary_switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
