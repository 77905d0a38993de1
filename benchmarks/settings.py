"""What the command line sets, for every comparison alike."""

from __future__ import annotations

from typing import NamedTuple


class Settings(NamedTuple):
    """How to measure.

    Attributes:
        threads: threads of every implementation.
        seconds: how long each implementation is timed at each shape, over all rounds.
        rounds: how many turns each implementation gets; a ratio is made within a round.
        compile: whether to measure torch.compile too.
        smoke: tiny shapes, to see that everything runs; the figures mean nothing.
    """

    threads: int
    seconds: float
    rounds: int
    compile: bool
    smoke: bool
