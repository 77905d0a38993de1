"""Measures contenders in turns on a GPU, as `benchmarks.timing` does, without checking for other processes."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.gpu.clocks import Clock, Step
from benchmarks.settings import Settings
from benchmarks.timing import WARM_UP_CALLS, Rounds, rotated

MOST_CALLS = 200  # per contender and round


def in_turns(steps: Mapping[str, Step], clock: Clock, settings: Settings) -> Rounds:
    """Seconds per call of each contender in each round.

    Args:
        steps: the steps by contender.
        clock: measures them.
        settings: `seconds` is the total time per contender, `rounds` the number of turns.
    """
    counts = {name: _calls(step, clock, settings) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(settings.rounds):
        for name in rotated(list(steps), number):
            seconds[name].append(clock.seconds(steps[name], counts[name]))
    return Rounds(seconds)


def _calls(step: Step, clock: Clock, settings: Settings) -> int:
    """The number of calls that fill a round, after a warm-up that compiles and allocates."""
    once = clock.seconds(step, 1 if settings.smoke else WARM_UP_CALLS)
    once = min(once, clock.seconds(step, 1 if settings.smoke else WARM_UP_CALLS))
    wanted = settings.seconds / settings.rounds / once if once > 0 else MOST_CALLS
    return int(max(1, min(wanted, MOST_CALLS)))
