"""Detects whether another process took the processor during a timing.

If all cores are in use, another process stops one thread of a parallel loop for a time slice, and the other threads
wait: every implementation then takes whole time slices, and ratios mean nothing. The system counts these interruptions:
10 to 30 a second and thread on a quiet machine, 70 to 110 with one other busy process on two cores.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

LIMIT = 50.0  # interruptions a second and thread


class Watch:
    """Watches the code inside `with watch.interruptions():`.

    Attributes:
        disturbed: whether this process was interrupted more often than `LIMIT` allows.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self.disturbed = False

    @contextmanager
    def interruptions(self) -> Iterator[None]:
        """Count the interruptions of this process inside the context."""
        start, before = time.perf_counter(), _involuntary_switches()
        yield
        seconds = time.perf_counter() - start
        if (_involuntary_switches() - before) / seconds > LIMIT * self._threads:
            self.disturbed = True


def summary(results: Mapping[str, Any]) -> str:
    """One sentence: how many rounds of each comparison were disturbed."""
    counts = {name: _count(result) for name, result in results.items()}
    disturbed = [f"{name} {bad} of {rounds}" for name, (bad, rounds) in counts.items() if bad]
    if not disturbed:
        return f"None of {sum(rounds for _, rounds in counts.values())} rounds was disturbed by other processes."
    return f"Rounds disturbed by other processes: {', '.join(disturbed)}."


def _count(result: Any) -> tuple[int, int]:
    """The numbers of disturbed rounds and of all rounds anywhere in a comparison's result."""
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
