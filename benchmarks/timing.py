"""The timing harness: implementations take turns, and ratios are computed within a turn.

The speed of a shared machine drifts by more than the differences of interest. So each round times every
implementation once, one right after the other, in rotating order. A ratio is the median of the rounds' ratios.
Rounds that another process disturbed are repeated, up to a limit.
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
PATIENCE = 3  # rounds at most for each round wanted
PAUSE = 0.3  # seconds after a disturbed round, in which the disturbance may end

Step = Callable[[], object]


class Quartiles(NamedTuple):
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float


class Rounds(NamedTuple):
    """Seconds a call, by implementation and round, and the number of disturbed rounds among them."""

    seconds: dict[str, list[float]]
    disturbed: int = 0

    def median(self, name: str) -> float:
        """Median seconds of an implementation."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> Quartiles:
        """The time of `name` divided by that of `base`, over the rounds."""
        return quartiles([a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)])

    def to_json(self, base: str) -> dict[str, Any]:
        """Medians, ratios to `base`, and the seconds of every round."""
        return {
            "seconds": {name: self.median(name) for name in self.seconds},
            f"times_{base}": {name: self.ratio(name, base)._asdict() for name in self.seconds if name != base},
            "rounds": self.seconds,
            **self.quality(),
        }

    def quality(self) -> dict[str, int]:
        """The numbers of all and of disturbed rounds, for JSON."""
        return {"round_count": len(next(iter(self.seconds.values()))), "disturbed_rounds": self.disturbed}


def quartiles(values: list[float]) -> Quartiles:
    """Median, lower and upper quartile; for a single value, that value."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, low, high)


def in_turns(steps: Mapping[str, Step], settings: Settings, threads: Mapping[str, int] | None = None) -> Rounds:
    """Time steps that can be repeated.

    Args:
        steps: the implementations.
        settings: `seconds` is the time of each implementation over all `rounds`.
        threads: threads of each implementation, if they differ.
    """
    seconds = settings.seconds / settings.rounds
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=(threads or {}).get(name, settings.threads))
        for name, step in steps.items()
    }
    for timer in timers.values():  # so that nothing is compiled or first allocated during the timing
        timer.timeit(1 if settings.smoke else WARM_UP_CALLS)
        timer.blocked_autorange(min_run_time=seconds)
    return _rounds(lambda name: timers[name].blocked_autorange(min_run_time=seconds).median, list(steps), settings)


class Stopwatch:
    """Measures the seconds of named stages of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def stages_in_turns(runs: Mapping[str, Callable[[Stopwatch], None]], settings: Settings) -> dict[str, Rounds]:
    """Time runs that change their input: each prepares its own input and times its stages. Returns rounds by stage.

    Each runs once before without being counted, which imports and allocates.
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
    """The results of `measure` for each name and round; disturbed rounds are used only if there are too few others."""
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
    """The names in rotating order, so that none always follows the same one."""
    first = number % len(names)
    return names[first:] + names[:first]
