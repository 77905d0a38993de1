"""The trainings of a run or a sweep, as one list."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kddp_ext.workflow.config import Ablation, RunConfig, SweepConfig

Stage = Literal["teacher", "scratch", "kd", "kddp"]
Kind = Literal["teacher", "scratch", "kd", "kddp", "kd-at-found-width", "ablation"]
Change = Callable[[RunConfig], RunConfig]
STAGES: tuple[Stage, ...] = get_args(Stage)
TEACHER = "teacher"


@dataclass(frozen=True)
class Job:
    """One training. Its name, such as "kd-width_64-seed_1", is that of its folder: the stage and what differs."""

    name: str
    stage: Stage
    config: RunConfig


@dataclass(frozen=True)
class Point:
    """The same training with every seed: one row of the report. `is_base`: this is KDDP with the run's own settings."""

    label: str
    kind: Kind
    jobs: tuple[Job, ...]
    is_base: bool = False


def points(sweep: SweepConfig, found: Mapping[str, int]) -> list[Point]:
    """All points of a sweep, the teacher first. A single run has four.

    Args:
        found: the width that each finished KDDP training found, by the job's name. `sweep.retrain` adds points that
            train KD at these widths.
    """
    run = sweep.run
    widths, weights = sorted({*sweep.widths, run.student.width}), sorted({*sweep.l1_weights, run.pruning.l1_weight})
    kddp = [_kddp(sweep, weight, alone=len(weights) == 1) for weight in weights]
    return [
        Point(TEACHER, "teacher", (Job(TEACHER, "teacher", run),)),
        Point("scratch", "scratch", tuple(_job(sweep, "scratch", seed) for seed in sweep.seeds)),
        *(
            Point(
                "kd" if len(widths) == 1 else f"kd, width {width}",
                "kd",
                tuple(_kd(sweep, seed, width) for seed in sweep.seeds),
            )
            for width in widths
        ),
        *kddp,
        *(_retrained(sweep, point, found) for point in kddp if sweep.retrain),
        *(Point(f"kddp, {name}", "ablation", _students(sweep, name, _ABLATIONS[name])) for name in sweep.ablations),
    ]


def _job(sweep: SweepConfig, stage: Stage, seed: int, detail: str = "", change: Change = lambda config: config) -> Job:
    config = change(dataclasses.replace(sweep.run, seed=seed))
    parts = (stage, detail, "" if seed == sweep.run.seed else f"seed_{seed}")
    return Job("-".join(filter(None, parts)), stage, config)


def _students(sweep: SweepConfig, detail: str, change: Change) -> tuple[Job, ...]:
    return tuple(_job(sweep, "kddp", seed, detail, change) for seed in sweep.seeds)


def _kddp(sweep: SweepConfig, weight: float, *, alone: bool) -> Point:
    is_base = weight == sweep.run.pruning.l1_weight
    jobs = _students(sweep, "" if is_base else f"l1_{weight:g}", _with("pruning", l1_weight=weight))
    return Point("kddp" if alone else f"kddp, l1-weight {weight:g}", "kddp", jobs, is_base)


def _kd(sweep: SweepConfig, seed: int, width: int) -> Job:
    detail = "" if width == sweep.run.student.width else f"width_{width}"
    return _job(sweep, "kd", seed, detail, _with("student", width=width))


def _retrained(sweep: SweepConfig, point: Point, found: Mapping[str, int]) -> Point:
    jobs = tuple(_kd(sweep, job.config.seed, found[job.name]) for job in point.jobs if job.name in found)
    return Point(label_at_found_width(point), "kd-at-found-width", jobs)


def label_at_found_width(kddp: Point) -> str:
    """The label of the point that trains KD at the widths that `kddp` found."""
    return f"kd at the width of {kddp.label}"


def _with(section: str, **changes: Any) -> Change:
    """A function that changes settings of one section, such as "pruning"."""
    return lambda config: dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **changes)}
    )


def _with_threshold(factor: float) -> Change:
    """A function that multiplies the threshold, rounded to three digits."""

    def change(config: RunConfig) -> RunConfig:
        threshold = float(f"{config.pruning.threshold * factor:.3g}")
        return _with("pruning", threshold=min(1.0, threshold))(config)

    return change


_ABLATIONS: dict[Ablation, Change] = {
    "no-teacher": _with("distillation", alpha=0.0),
    "no-penalty": _with("pruning", l1_weight=0.0),
    "no-compensation": _with("pruning", compensate=False),
    "average-compensation": _with("pruning", reconstruction_samples=0),
    "mean-activation": _with("pruning", criterion="mean_activation"),
    "apoz": _with("pruning", criterion="apoz"),
    "dead": _with("pruning", criterion="dead"),
    "at-the-end": _with("pruning", when="at-the-end"),
    "threshold-third": _with_threshold(1 / 3),
    "threshold-triple": _with_threshold(3),
}
