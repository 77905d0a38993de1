"""What the finished trainings of a sweep left on disk, point by point."""

from __future__ import annotations

import reprlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kddp_ext.workflow.config_checks import LIMIT
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.job import Job
from kddp_ext.workflow.sweep_config import Point


@dataclass(frozen=True)
class Measured:
    """A point with the results of its finished trainings.

    Attributes:
        point: what was trained.
        jobs: its finished trainings; never empty.
        results: the figures of each.
        epochs: the metrics of each.
    """

    point: Point
    jobs: tuple[Job, ...]
    results: tuple[dict[str, Any], ...]
    epochs: tuple[list[dict[str, Any]], ...]

    def values(self, key: str) -> list[float]:
        """The figure `key` of each seed.

        Raises:
            WorkflowError: a result has no such number, because it was damaged or written by another version.
        """
        figures: list[Any] = [result.get(key) for result in self.results]
        for job, figure in zip(self.jobs, figures, strict=True):
            if not isinstance(figure, int | float) or (isinstance(figure, int) and abs(figure) >= LIMIT):
                raise WorkflowError(f"the result of {job.name}: expected a number {key}, found {reprlib.repr(figure)}")
        return [float(figure) for figure in figures]

    def mean(self, key: str) -> float:
        """The mean of the figure `key` over the seeds."""
        return statistics.fmean(self.values(key))

    def deviation(self, key: str) -> float | None:
        """Its standard deviation over the seeds (of a sample: n - 1); None for a single one."""
        return statistics.stdev(self.values(key)) if len(self.results) > 1 else None


def measure_points(folder: RunFolder, points: Sequence[Point]) -> list[Measured]:
    """The points of which at least one training is finished."""
    measured = []
    for point in points:
        results = {job: result for job in point.jobs if (result := folder.read_result(job.name)) is not None}
        if results:
            epochs = tuple(folder.read_epochs(job.name) for job in results)
            measured.append(Measured(point, tuple(results), tuple(results.values()), epochs))
    return measured
