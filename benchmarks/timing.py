"""The one timing harness: contenders take turns, and are compared within a turn.

The speed of a shared machine drifts by more than the differences of interest. Each round therefore times every
contender once, shortly after one another and in an order that rotates. A ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils.benchmark import Timer

from benchmarks.settings import Settings

WARM_UP_CALLS = 5

Step = Callable[[], object]


class Quartiles(NamedTuple):
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float


class Rounds(NamedTuple):
    """Seconds a call, by contender and then by round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of a contender."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> Quartiles:
        """How many times as long `name` takes as `base`, round by round."""
        return quartiles([a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)])

    def to_json(self, base: str) -> dict[str, Any]:
        """Medians, ratios to `base`, and what they were made of."""
        return {
            "seconds": {name: self.median(name) for name in self.seconds},
            f"times_{base}": {name: self.ratio(name, base)._asdict() for name in self.seconds if name != base},
            "rounds": self.seconds,
        }


def quartiles(values: list[float]) -> Quartiles:
    """Median, lower and upper quartile; of a single value, that value."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, low, high)


def in_turns(steps: Mapping[str, Step], settings: Settings, threads: Mapping[str, int] | None = None) -> Rounds:
    """Times what can be called again and again.

    Args:
        steps: the contenders.
        settings: `seconds` is what each contender gets in all, `rounds` over how many turns.
        threads: threads of each contender, where they differ.
    """
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=(threads or {}).get(name, settings.threads))
        for name, step in steps.items()
    }
    for timer in timers.values():
        _warm_up(timer, settings)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for names in _orders(list(steps), settings.rounds):
        for name in names:
            timed = timers[name].blocked_autorange(min_run_time=settings.seconds / settings.rounds)
            seconds[name].append(timed.median)
    return Rounds(seconds)


class Stopwatch:
    """Seconds of the named stages of one run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def stages_in_turns(runs: Mapping[str, Callable[[Stopwatch], None]], rounds: int) -> dict[str, Rounds]:
    """Times what changes its input: each run prepares an input of its own and times its stages. Rounds by stage.

    A first round, which imports and allocates, is not counted.
    """
    stages: dict[str, dict[str, list[float]]] = {}
    for round_number, names in enumerate(_orders(list(runs), rounds + 1)):
        for name in names:
            stopwatch = Stopwatch()
            runs[name](stopwatch)
            if round_number > 0:
                for stage, seconds in stopwatch.seconds.items():
                    stages.setdefault(stage, {run: [] for run in runs})[name].append(seconds)
    return {stage: Rounds(seconds) for stage, seconds in stages.items()}


def _warm_up(timer: Timer, settings: Settings) -> None:
    """Calls until nothing is compiled or allocated for the first time any more."""
    timer.timeit(1 if settings.smoke else WARM_UP_CALLS)
    timer.blocked_autorange(min_run_time=settings.seconds / settings.rounds)


def _orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The contenders in rotating order, so that none always follows the same one."""
    for number in range(rounds):
        first = number % len(names)
        yield names[first:] + names[:first]
