"""What a loop reports of the steps that it was timed over."""

from __future__ import annotations

from typing import NamedTuple


class Reading(NamedTuple):
    """Seconds of the timed steps, their mean loss, and whether other processes took the processor away meanwhile."""

    seconds: float
    loss: float
    disturbed: bool = False
