"""The settings that the command line passes to all comparisons."""

from __future__ import annotations

from typing import NamedTuple


class Settings(NamedTuple):
    """How to measure.

    Attributes:
        threads: threads of every implementation.
        seconds: time for each implementation and shape, over all rounds.
        rounds: turns of each implementation; ratios are computed within a round.
        compile: whether to measure torch.compile, too.
        smoke: tiny shapes, to check that everything runs; the figures mean nothing.
    """

    threads: int
    seconds: float
    rounds: int
    compile: bool
    smoke: bool
