"""What a sweep trains: a grid over the settings of one run, as a list of trainings."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from kddp_ext.workflow.config import RunConfig, differences, read_settings
from kddp_ext.workflow.config_checks import POSITIVE, check_bounds, check_types
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.job import Job, Stage

Ablation = Literal[
    "no-teacher",
    "no-penalty",
    "no-compensation",
    "average-compensation",
    "mean-activation",
    "apoz",
    "dead",
    "at-the-end",
    "threshold-third",
    "threshold-triple",
]
TEACHER = "teacher"


@dataclass(frozen=True)
class SweepConfig:
    """The trainings of a sweep. All share a teacher, the validation split and the views of the images."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    """What all of them have in common; `student.width` is scratch's, and where KDDP starts."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each training runs once with each: initial weights and order of the images."""
    widths: tuple[int, ...] = (16, 64, 256)
    """Widths of the hidden layer for plain KD, besides the full one: the curve to compare with."""
    l1_weights: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """Penalty weights for KDDP: each finds a width of its own."""
    retrain: bool = True
    """Whether KD also trains, from scratch, students of the very widths that KDDP found."""
    ablations: tuple[Ablation, ...] = ()
    """KDDP at the run's own penalty weight, with one thing changed."""

    def __post_init__(self) -> None:
        check_types(self)
        for option in ("seeds", "widths", "l1_weights", "ablations"):
            values = getattr(self, option)
            if len(set(values)) != len(values):
                raise WorkflowError(f"--{option.replace('_', '-')}: expected different values, got {values}")
        if not self.seeds or min(self.seeds) < 0:
            raise WorkflowError(f"--seeds: expected one or more numbers of at least 0, got {self.seeds}")
        for option in ("widths", "l1_weights"):
            for value in getattr(self, option):
                check_bounds({option: value}, {option: POSITIVE})
        names = [f"{weight:g}" for weight in {*self.l1_weights, self.run.pruning.l1_weight}]
        if len(set(names)) < len(names):  # their trainings would share a folder
            raise WorkflowError(f"--l1-weights: expected six digits to tell them apart, got {self.l1_weights}")
        if self.run.student.architecture == "resnet20" and self.widths:
            raise WorkflowError("--widths: resnet20 has no hidden layer, expected none")

    def to_json(self) -> dict[str, Any]:
        """The config as plain values, as sweep.json holds it."""
        own = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "run"}
        values: dict[str, Any] = json.loads(json.dumps(own))
        return {**values, "run": self.run.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SweepConfig:
        """Rebuild what `to_json` returned; raises WorkflowError on fields this version doesn't know."""
        if not isinstance(values, dict):
            raise WorkflowError(f"expected a JSON object, got {reprlib.repr(values)}")
        try:
            own: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in values.items()}
            own["run"] = RunConfig.from_json(own["run"])
            return cls(**own)
        except (TypeError, KeyError) as error:
            raise WorkflowError(f"the config does not fit this version of kddp_ext: {error}") from error

    def differences(self, wanted: SweepConfig) -> list[str]:
        """What a sweep of `wanted` would train otherwise. More of anything is no difference: it is trained besides."""
        return differences(self.run, wanted.run)


@dataclass(frozen=True)
class Point:
    """The same training under every seed: a point of the report's curves.

    Attributes:
        label: names it in tables.
        kind: scratch, kd, kddp, kd-at-found-width or ablation.
        jobs: one for each seed.
        is_base: whether it is KDDP as the run's settings have it, of which ablations change one thing.
    """

    label: str
    kind: str
    jobs: tuple[Job, ...]
    is_base: bool = False


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep's sweep.json; raises WorkflowError naming the file when it can't be used."""
    return read_settings(path, SweepConfig.from_json, "a sweep")


def points(sweep: SweepConfig, found: Mapping[str, int]) -> list[Point]:
    """All points of a sweep.

    Args:
        found: the width that each finished KDDP training found, by the job's name. Those at whose widths KD is to
            be trained are among the points once they are known.
    """
    width = sweep.run.student.width
    widths, weights = sorted({*sweep.widths, width}), sorted({*sweep.l1_weights, sweep.run.pruning.l1_weight})
    kddp = [_kddp(sweep, weight) for weight in weights]
    return [
        Point("scratch", "scratch", _jobs(sweep, "scratch", "scratch", lambda config: config)),
        *(Point(f"KD, width {each}", "kd", tuple(_kd(sweep, seed, each) for seed in sweep.seeds)) for each in widths),
        *kddp,
        *(_retrained(sweep, point, found) for point in kddp if sweep.retrain),
        *(_ablation(sweep, ablation) for ablation in sweep.ablations),
    ]


def _kddp(sweep: SweepConfig, weight: float) -> Point:
    jobs = _jobs(sweep, f"kddp-l1_{weight:g}", "kddp", _with_pruning(l1_weight=weight))
    return Point(f"KDDP, l1_weight {weight:g}", "kddp", jobs, is_base=weight == sweep.run.pruning.l1_weight)


def _ablation(sweep: SweepConfig, ablation: Ablation) -> Point:
    return Point(ablation, "ablation", _jobs(sweep, f"ablation-{ablation}", "kddp", _ABLATIONS[ablation]))


def _retrained(sweep: SweepConfig, point: Point, found: Mapping[str, int]) -> Point:
    jobs = tuple(_kd(sweep, job.config.seed, found[job.name]) for job in point.jobs if job.name in found)
    return Point(f"KD at the widths of {point.label}", "kd-at-found-width", jobs)


def _kd(sweep: SweepConfig, seed: int, width: int) -> Job:
    config = _seeded(sweep, seed)
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, width=width))
    return Job(f"kd-width_{width}-seed_{seed}", "kd", config)


Change = Callable[[RunConfig], RunConfig]


def _jobs(sweep: SweepConfig, name: str, stage: Stage, change: Change) -> tuple[Job, ...]:
    return tuple(Job(f"{name}-seed_{seed}", stage, change(_seeded(sweep, seed))) for seed in sweep.seeds)


def _seeded(sweep: SweepConfig, seed: int) -> RunConfig:
    return dataclasses.replace(sweep.run, seed=seed)


def _with_pruning(**changes: Any) -> Change:
    return lambda config: dataclasses.replace(config, pruning=dataclasses.replace(config.pruning, **changes))


def _with_threshold(factor: float) -> Change:
    def change(config: RunConfig) -> RunConfig:
        threshold = min(1.0, _rounded(config.pruning.threshold * factor))
        return _with_pruning(threshold=threshold)(config)

    return change


def _rounded(value: float) -> float:
    return round(value, 2 - math.floor(math.log10(value)))


def _without_teacher(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, distillation=dataclasses.replace(config.distillation, alpha=0.0))


_ABLATIONS: dict[Ablation, Change] = {
    "no-teacher": _without_teacher,
    "no-penalty": _with_pruning(l1_weight=0.0),
    "no-compensation": _with_pruning(compensate=False),
    "average-compensation": _with_pruning(reconstruction_samples=0),
    "mean-activation": _with_pruning(criterion="mean_activation"),
    "apoz": _with_pruning(criterion="apoz"),
    "dead": _with_pruning(criterion="dead"),
    "at-the-end": _with_pruning(when="at-the-end"),
    "threshold-third": _with_threshold(1 / 3),
    "threshold-triple": _with_threshold(3),
}
