"""Contenders take turns on a GPU, as in `benchmarks.timing`; no other process is looked for."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.gpu.clocks import Clock, Step
from benchmarks.settings import Settings
from benchmarks.timing import WARM_UP_CALLS, Rounds, rotated

MOST_CALLS = 200  # of a contender in a round


def in_turns(steps: Mapping[str, Step], clock: Clock, settings: Settings) -> Rounds:
    """Seconds a call of each contender in each round.

    Args:
        steps: the contenders.
        clock: what times them.
        settings: `seconds` is what each contender gets in all, `rounds` over how many turns.
    """
    counts = {name: _calls(step, clock, settings) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(settings.rounds):
        for name in rotated(list(steps), number):
            seconds[name].append(clock.seconds(steps[name], counts[name]))
    return Rounds(seconds)


def _calls(step: Step, clock: Clock, settings: Settings) -> int:
    """How many calls fill a round, after a warm-up in which all is compiled and allocated."""
    once = clock.seconds(step, 1 if settings.smoke else WARM_UP_CALLS)
    once = min(once, clock.seconds(step, 1 if settings.smoke else WARM_UP_CALLS))
    wanted = settings.seconds / settings.rounds / once if once > 0 else MOST_CALLS
    return int(max(1, min(wanted, MOST_CALLS)))
