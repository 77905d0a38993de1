"""Every setting of a run: these dataclasses are the command line, config.json and the resume key."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tyro.conf import FlagConversionOff

from kddp_ext.workflow.errors import WorkflowError

Dataset = Literal["digits", "fashion-mnist", "cifar10"]
Preset = Literal["quick", "default"]
Precision = Literal["auto", "float32", "bfloat16"]
Criterion = Literal["contribution", "mean_activation", "apoz", "dead"]

# Written into config.json; a reader refuses what a later version wrote.
CONFIG_VERSION = 1


@dataclass(frozen=True)
class TeacherConfig:
    """The large network. Trained once, with SGD, Nesterov momentum and a triangular learning rate."""

    channels: tuple[int, ...] = (32, 64)
    """Output channels of each block; a block halves the image's sides."""
    epochs: int = 12
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 0.4
    """Peak learning rate, reached after a fifth of the steps."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 penalty on the weights."""
    label_smoothing: float = 0.0
    """Share of each label spread over all classes. Smoothing is known to spoil teachers, hence 0."""


@dataclass(frozen=True)
class StudentConfig:
    """The network to be made small. Three stages train the same one, with Adam and a cosine schedule."""

    channels: tuple[int, ...] = (16, 32)
    """Output channels of each convolution; each is followed by 2x2 pooling."""
    width: int = 512
    """Neurons of the hidden layer at the start. KDDP finds the final number."""
    epochs: int = 20
    """Passes over the training images, in each of the three stages."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 3e-3
    """Adam's learning rate at the first step; a cosine takes it to zero."""
    weight_decay: float = 0.0
    """Adam's L2 penalty."""


@dataclass(frozen=True)
class DistillationConfig:
    """How much the teacher says: loss = alpha * KD + (1 - alpha) * cross-entropy."""

    temperature: float = 4.0
    """Softens both distributions; the KD term is multiplied by its square."""
    alpha: float = 0.9
    """Weight of the teacher, 0 to 1; the labels have the rest."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "dkd"] = "forward_kl"
    """Between the two softened distributions; docs/losses.md says what each is for."""
    jsd_beta: float = 0.5
    """Of jsd: the teacher's share of the mixture, between 0 and 1."""
    dkd_target_weight: float = 1.0
    """Of dkd: weight of the divergence at the label."""
    dkd_non_target_weight: float = 8.0
    """Of dkd: weight of the divergence over the other classes."""
    standardize_logits: bool = False
    """Whether each row of logits is z-scored before it is softened, on both sides."""


@dataclass(frozen=True)
class PruningConfig:
    """When a neuron goes. Decided after every epoch but the last, from that epoch's activations."""

    l1_weight: float = 0.015
    """Weight of the L1 penalty on the hidden layer's activations."""
    criterion: Criterion = "contribution"
    """What a neuron is judged by."""
    threshold: float = 0.01
    """A neuron below it is marked."""
    patience: int = 2
    """Epochs in a row that a neuron must be marked before it is removed."""
    minimum_width: int = 1
    """Neurons that always stay."""
    round_to: int = 1
    """Keep the width a multiple of this (8 or 16 suits a GPU)."""
    compensate: FlagConversionOff[bool] = True
    """Add a removed neuron's mean output to the next layer's bias."""


@dataclass(frozen=True)
class RunConfig:
    """What is trained, on what, and how. Two runs with equal configs give equal results."""

    dataset: Dataset = "digits"
    """digits needs no download; cifar10 and fashion-mnist are fetched once, or read from --data-dir."""
    preset: Preset = "default"
    """quick trades accuracy for minutes. Every option below overrides its preset's value."""
    seed: int = 0
    """Decides the validation split, the initial weights, the order of the images and their augmentation."""
    validation: int = 200
    """Training images held out to watch progress. The test images are used once, when a stage ends."""
    augment: FlagConversionOff[bool] = False
    """Random crops and horizontal flips."""
    precision: Precision = "auto"
    """auto takes bfloat16 where the processor computes in it natively, else float32."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)

    def __post_init__(self) -> None:
        _check(self)

    def to_json(self) -> dict[str, Any]:
        """The config as plain values, as config.json holds it."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"version": CONFIG_VERSION, **values}

    def options(self) -> dict[str, Any]:
        """Every setting by the name of its option, such as "student.width"."""
        return _flatten(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunConfig:
        """Rebuild what `to_json` returned; raises WorkflowError on fields this version doesn't know."""
        values = dict(values)
        version = values.pop("version", None)
        if version != CONFIG_VERSION:
            raise WorkflowError(f"config version {version!r} is not one that this version of kddp_ext reads")
        try:
            return cls(
                teacher=TeacherConfig(**_tuples(values.pop("teacher"))),
                student=StudentConfig(**_tuples(values.pop("student"))),
                distillation=DistillationConfig(**values.pop("distillation")),
                pruning=PruningConfig(**values.pop("pruning")),
                **values,
            )
        except (TypeError, KeyError) as error:
            raise WorkflowError(f"the config does not fit this version of kddp_ext: {error}") from error


def preset(dataset: Dataset, name: Preset) -> RunConfig:
    """The settings that a data set starts from. docs/workflow.md says how they were chosen."""
    quick = name == "quick"
    if dataset == "digits":
        return RunConfig(
            dataset=dataset,
            preset=name,
            precision="float32",  # a network this small gains nothing from bfloat16
            teacher=TeacherConfig(epochs=6 if quick else 12),
            student=StudentConfig(epochs=8 if quick else 20),
            pruning=PruningConfig(l1_weight=5e-3 if quick else 0.015),
        )
    if dataset == "fashion-mnist":
        return RunConfig(
            dataset=dataset,
            preset=name,
            validation=5000,
            teacher=TeacherConfig(channels=(32, 64, 128), epochs=3 if quick else 10, batch_size=256, learning_rate=0.3),
            student=StudentConfig(channels=(16, 32), epochs=4 if quick else 15, batch_size=256),
            pruning=PruningConfig(l1_weight=1e-3),
        )
    return RunConfig(
        dataset=dataset,
        preset=name,
        validation=5000,
        augment=True,
        teacher=TeacherConfig(
            channels=(32, 64, 256) if quick else (64, 256, 256),
            epochs=7 if quick else 10,
            batch_size=256,
            learning_rate=0.3,
        ),
        student=StudentConfig(
            channels=(32, 64, 128),
            width=1024,
            epochs=5 if quick else 25,
            batch_size=256,
        ),
        pruning=PruningConfig(l1_weight=5e-4),
    )


def differences(saved: RunConfig, wanted: RunConfig) -> list[str]:
    """The fields in which two configs differ, each as "student.width: 256 was saved, 512 is wanted"."""
    old, new = saved.options(), wanted.options()
    return [f"{key}: {old[key]} was saved, {new[key]} is wanted" for key in old if old[key] != new[key]]


def load_config(path: Path) -> RunConfig:
    """Read a run's config.json; raises WorkflowError naming the file when it can't be used."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise WorkflowError("expected a JSON object")
        return RunConfig.from_json(values)
    except (json.JSONDecodeError, UnicodeDecodeError, WorkflowError) as error:
        raise WorkflowError(f"{path} is not the config of a run: {error}") from error


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _check(config: RunConfig) -> None:
    """Refuse what no run can use, by the name of its option."""
    choices: dict[str, tuple[Any, tuple[str, ...]]] = {
        "dataset": (config.dataset, get_args(Dataset)),
        "preset": (config.preset, get_args(Preset)),
        "precision": (config.precision, get_args(Precision)),
        "pruning.criterion": (config.pruning.criterion, get_args(Criterion)),
    }
    for option, (value, allowed) in choices.items():
        if value not in allowed:
            raise WorkflowError(f"--{option}: expected one of {', '.join(allowed)}, got {value!r}")

    positive = {
        "validation": config.validation,
        "teacher.epochs": config.teacher.epochs,
        "teacher.batch-size": config.teacher.batch_size,
        "teacher.learning-rate": config.teacher.learning_rate,
        "student.width": config.student.width,
        "student.epochs": config.student.epochs,
        "student.batch-size": config.student.batch_size,
        "student.learning-rate": config.student.learning_rate,
        "distillation.temperature": config.distillation.temperature,
        "pruning.patience": config.pruning.patience,
        "pruning.minimum-width": config.pruning.minimum_width,
        "pruning.round-to": config.pruning.round_to,
    }
    for option, number in positive.items():
        if not 0 < number < float("inf"):
            raise WorkflowError(f"--{option}: expected a positive number, got {number}")

    not_negative = {
        "seed": config.seed,
        "teacher.weight-decay": config.teacher.weight_decay,
        "student.weight-decay": config.student.weight_decay,
        "pruning.l1-weight": config.pruning.l1_weight,
        "distillation.dkd-target-weight": config.distillation.dkd_target_weight,
        "distillation.dkd-non-target-weight": config.distillation.dkd_non_target_weight,
    }
    for option, number in not_negative.items():
        if not 0 <= number < float("inf"):
            raise WorkflowError(f"--{option}: expected a number of at least 0, got {number}")

    below_one = {
        "teacher.momentum": config.teacher.momentum,
        "teacher.label-smoothing": config.teacher.label_smoothing,
    }
    for option, number in below_one.items():
        if not 0 <= number < 1:
            raise WorkflowError(f"--{option}: expected a number from 0 to below 1, got {number}")
    if not 0 < config.pruning.threshold <= 1:
        raise WorkflowError(
            f"--pruning.threshold: expected a number above 0, at most 1, got {config.pruning.threshold}"
        )
    if not 0 <= config.distillation.alpha <= 1:
        raise WorkflowError(f"--distillation.alpha: expected a number from 0 to 1, got {config.distillation.alpha}")
    if not 0 < config.distillation.jsd_beta < 1:
        raise WorkflowError(
            f"--distillation.jsd-beta: expected a number between 0 and 1, got {config.distillation.jsd_beta}"
        )
    for option, channels in {
        "teacher.channels": config.teacher.channels,
        "student.channels": config.student.channels,
    }.items():
        if not channels or min(channels) < 1:
            raise WorkflowError(f"--{option}: expected one or more positive numbers, got {channels}")
