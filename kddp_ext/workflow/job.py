"""One training of a run or a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kddp_ext.workflow.config import RunConfig

Stage = Literal["teacher", "scratch", "kd", "kddp"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        name: of its folder; that of the stage in a run that has each stage once.
        stage: what is trained, and under what.
        config: its settings.
    """

    name: str
    stage: Stage
    config: RunConfig
