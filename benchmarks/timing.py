"""The one timing harness: contenders take turns, and are compared within a turn.

The speed of a shared machine drifts by more than the differences of interest. Each round therefore times every
contender once, shortly after one another and in an order that rotates. A ratio is the median of the rounds' ratios.
A round in which another process took the processor away is timed again, as far as patience goes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils.benchmark import Timer

from benchmarks.disturbance import Watch
from benchmarks.settings import Settings

WARM_UP_CALLS = 5
PATIENCE = 3  # rounds tried for each round wanted
PAUSE = 0.3  # seconds after a disturbed round: what disturbs may be over then

Step = Callable[[], object]


class Quartiles(NamedTuple):
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float


class Rounds(NamedTuple):
    """Seconds a call, by contender and then by round; and in how many of the rounds something else ran."""

    seconds: dict[str, list[float]]
    disturbed: int = 0

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
            **self.quality(),
        }

    def quality(self) -> dict[str, int]:
        """How far the rounds can be trusted, for JSON."""
        return {"round_count": len(next(iter(self.seconds.values()))), "disturbed_rounds": self.disturbed}


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
    seconds = settings.seconds / settings.rounds
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=(threads or {}).get(name, settings.threads))
        for name, step in steps.items()
    }
    for timer in timers.values():  # until nothing is compiled or allocated for the first time any more
        timer.timeit(1 if settings.smoke else WARM_UP_CALLS)
        timer.blocked_autorange(min_run_time=seconds)
    return _rounds(lambda name: timers[name].blocked_autorange(min_run_time=seconds).median, list(steps), settings)


class Stopwatch:
    """Seconds of the named stages of one run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def stages_in_turns(runs: Mapping[str, Callable[[Stopwatch], None]], settings: Settings) -> dict[str, Rounds]:
    """Times what changes its input: each run prepares an input of its own and times its stages. Rounds by stage.

    Each is run once before, uncounted, which imports and allocates.
    """

    def run(name: str) -> dict[str, float]:
        stopwatch = Stopwatch()
        runs[name](stopwatch)
        return stopwatch.seconds

    for name in runs:
        run(name)
    rounds: Any = _rounds(run, list(runs), settings)
    stages = rounds.seconds[next(iter(runs))][0]
    return {
        stage: Rounds({name: [of[stage] for of in rounds.seconds[name]] for name in runs}, rounds.disturbed)
        for stage in stages
    }


def _rounds(measure: Callable[[str], Any], names: list[str], settings: Settings) -> Rounds:
    """What `measure` gives for each contender in each round: undisturbed rounds, and others only for want of those."""
    good: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    for number in range(settings.rounds * PATIENCE):
        watch = Watch(settings.threads)
        measured = {}
        for name in rotated(names, number):
            with watch.interruptions():
                measured[name] = measure(name)
        (bad if watch.disturbed else good).append(measured)
        if len(good) == settings.rounds or (settings.smoke and number + 1 == settings.rounds):
            break
        if watch.disturbed:
            time.sleep(PAUSE)
    kept = (good + bad)[: settings.rounds]
    return Rounds({name: [measured[name] for measured in kept] for name in names}, max(0, len(kept) - len(good)))


def rotated(names: list[str], number: int) -> list[str]:
    """Another contender comes first in each round, so that none always follows the same one."""
    first = number % len(names)
    return names[first:] + names[:first]
