"""Every setting of a run: these dataclasses are the command line, config.json and the resume key."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from tyro.conf import FlagConversionOff

from kddp_ext.files import without_digest
from kddp_ext.workflow.config_checks import (
    BELOW_ONE,
    INSIDE_SHARE,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_SHARE,
    SHARE,
    check_bounds,
    check_types,
)
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.read_files import read_json

Settings = TypeVar("Settings")
Dataset = Literal["digits", "fashion-mnist", "cifar10"]
Preset = Literal["quick", "default"]
Precision = Literal["auto", "float32", "bfloat16"]
Criterion = Literal["contribution", "mean_activation", "apoz", "dead"]
TeacherArchitecture = Literal["fast", "resnet20", "resnet56", "resnet110"]
TeacherOptimizer = Literal["sgd", "muon"]
StudentArchitecture = Literal["cnn", "vgg11", "resnet20"]
PrunedLayers = Literal["hidden", "all"]
PruningTime = Literal["every-epoch", "at-the-end"]

# Written into config.json; a reader refuses what another version wrote.
CONFIG_VERSION = 2


@dataclass(frozen=True)
class TeacherConfig:
    """The large network, trained once."""

    architecture: TeacherArchitecture = "fast"
    """fast trains in few passes; the others are the pre-activation networks of He et al. (2016)."""
    channels: tuple[int, ...] = (32, 64)
    """Output channels of each block of fast, which halves the image's sides, or of each of a ResNet's 3 stages.
    None: those that the architecture is known with."""
    seed: int = 0
    """Decides its initial weights and the order of its images: runs with other seeds share a teacher."""
    shift: int = 2
    """Augmented images move by up to so many pixels; few passes bear less than the students' many."""
    epochs: int = 12
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    optimizer: TeacherOptimizer = "sgd"
    """sgd has Nesterov momentum; muon, for fast, makes the steps of its filters orthogonal (Jordan 2024)."""
    learning_rate: float = 0.4
    """Its highest value: sgd's rises to it over a quarter of the steps, muon's starts there; both fall to 0."""
    bias_learning_rate: float = 1.0
    """How many times faster biases learn. fast bears many times (Page 2018)."""
    classifier_learning_rate: float = 1.0
    """How many times faster the last layer learns."""
    momentum: float = 0.9
    """Nesterov momentum, of all that has no orthogonal steps."""
    weight_decay: float = 5e-4
    """L2 penalty on the weights without orthogonal steps."""
    label_smoothing: float = 0.0
    """Share of each label spread over all classes. Smoothing is known to spoil teachers, hence 0."""


@dataclass(frozen=True)
class StudentConfig:
    """The network to be made small. Three stages train the same one, with Adam and a cosine schedule."""

    architecture: StudentArchitecture = "cnn"
    """cnn is plain, with one hidden layer; with three convolutions it is known as cnn5."""
    channels: tuple[int, ...] = (16, 32)
    """Output channels: of cnn's convolutions, each before a pooling; of vgg11's 8; of resnet20's 3 stages.
    None: those that the architecture is known with."""
    width: int = 512
    """Neurons of the hidden layer of cnn and vgg11 at the start. KDDP finds the final number."""
    epochs: int = 20
    """Passes over the training images, in each of the three stages."""
    shift: int = 4
    """Augmented images move by up to so many pixels."""
    views: int = 0
    """Different augmented views of each image, which the epochs take in turn: the teacher answers each once.
    0 gives every epoch its own."""
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
    """When a neuron goes. Decided after an epoch, from that epoch's activations."""

    l1_weight: float = 0.015
    """Weight of the L1 penalty on the activations of the layers that are pruned."""
    l1_warmup: int = 0
    """Epochs over which the penalty's weight rises linearly from 0."""
    l1_until: float = 1.0
    """Share of the training after which there is no penalty: what stays is then trained free of its pull to 0."""
    layers: PrunedLayers = "hidden"
    """hidden: the fully-connected layer alone, as in the paper. all: the convolutions' channels too."""
    when: PruningTime = "every-epoch"
    """every-epoch but the last, after which nothing could be made up for; or once, at-the-end of all."""
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
    reconstruction_samples: int = 256
    """From so many recent samples, neurons that stay take over what varied in those that go. 0: they don't."""


_BOUNDS = {
    "seed": NOT_NEGATIVE,
    "data_seed": NOT_NEGATIVE,
    "validation": NOT_NEGATIVE,
    "teacher.seed": NOT_NEGATIVE,
    "teacher.shift": NOT_NEGATIVE,
    "teacher.epochs": POSITIVE,
    "teacher.batch_size": POSITIVE,
    "teacher.learning_rate": POSITIVE,
    "teacher.bias_learning_rate": POSITIVE,
    "teacher.classifier_learning_rate": POSITIVE,
    "teacher.momentum": BELOW_ONE,
    "teacher.weight_decay": NOT_NEGATIVE,
    "teacher.label_smoothing": BELOW_ONE,
    "student.width": POSITIVE,
    "student.epochs": POSITIVE,
    "student.views": NOT_NEGATIVE,
    "student.shift": NOT_NEGATIVE,
    "student.batch_size": POSITIVE,
    "student.learning_rate": POSITIVE,
    "student.weight_decay": NOT_NEGATIVE,
    "distillation.temperature": POSITIVE,
    "distillation.alpha": SHARE,
    "distillation.jsd_beta": INSIDE_SHARE,
    "distillation.dkd_target_weight": NOT_NEGATIVE,
    "distillation.dkd_non_target_weight": NOT_NEGATIVE,
    "pruning.l1_weight": NOT_NEGATIVE,
    "pruning.l1_warmup": NOT_NEGATIVE,
    "pruning.l1_until": POSITIVE_SHARE,
    "pruning.threshold": POSITIVE_SHARE,
    "pruning.patience": POSITIVE,
    "pruning.minimum_width": POSITIVE,
    "pruning.round_to": POSITIVE,
    "pruning.reconstruction_samples": NOT_NEGATIVE,
}


@dataclass(frozen=True)
class RunConfig:
    """What is trained, on what, and how. Two runs with equal configs give equal results."""

    dataset: Dataset = "digits"
    """digits needs no download; cifar10 and fashion-mnist are fetched once, or read from --data-dir."""
    preset: Preset = "default"
    """quick trades accuracy for minutes. Every option below overrides its preset's value."""
    seed: int = 0
    """Decides the students' initial weights and the order of their images."""
    data_seed: int = 0
    """Decides the validation split and the augmentation. Runs that share it share a teacher's logits."""
    validation: int = 200
    """Training images held out to choose settings by. 0 trains on all. The test images are used once, at the end."""
    augment: FlagConversionOff[bool] = False
    """Random shifts and horizontal flips."""
    precision: Precision = "auto"
    """auto takes bfloat16 where the processor computes in it natively, else float32."""
    compile: FlagConversionOff[bool] = False
    """Whether the networks are trained through torch.compile."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)

    def __post_init__(self) -> None:
        check_types(self)
        check_bounds(self.options(), _BOUNDS)
        for option in ("teacher.channels", "student.channels"):
            channels = self.options()[option]
            if any(each < 1 for each in channels):
                raise WorkflowError(f"--{option}: expected positive numbers, got {channels}")
        if self.teacher.optimizer == "muon" and self.teacher.architecture != "fast":
            raise WorkflowError(f"--teacher.optimizer: muon is for fast alone, got {self.teacher.architecture}")

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
        values = dict(_object("the config", values))
        version = values.pop("version", None)
        if version != CONFIG_VERSION:
            raise WorkflowError(
                f"config version {reprlib.repr(version)} is not one that this version of kddp_ext reads"
            )
        try:
            return cls(
                teacher=TeacherConfig(**_tuples(_object("teacher", values.pop("teacher")))),
                student=StudentConfig(**_tuples(_object("student", values.pop("student")))),
                distillation=DistillationConfig(**_object("distillation", values.pop("distillation"))),
                pruning=PruningConfig(**_object("pruning", values.pop("pruning"))),
                **values,
            )
        except (TypeError, KeyError) as error:
            raise WorkflowError(f"the config does not fit this version of kddp_ext: {error}") from error


def differences(saved: RunConfig, wanted: RunConfig) -> list[str]:
    """The fields in which two configs differ, each as "student.width: 256 was saved, 512 is wanted"."""
    old, new = saved.options(), wanted.options()
    return [f"{key}: {old[key]} was saved, {new[key]} is wanted" for key in old if old[key] != new[key]]


def load_config(path: Path) -> RunConfig:
    """Read a run's config.json; raises WorkflowError naming the file when it can't be used."""
    return read_settings(path, RunConfig.from_json, "a run")


def read_settings(path: Path, from_json: Callable[[dict[str, Any]], Settings], owner: str) -> Settings:
    """What `from_json` makes of a JSON object; raises WorkflowError naming the file and its owner when it can't."""
    try:
        values = read_json(path, "JSON")
        return from_json(without_digest(values) if isinstance(values, dict) else values)
    except ValueError as error:
        raise WorkflowError(f"{path} is not the config of {owner}: {error}") from error


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _object(name: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise WorkflowError(f"{name}: expected a JSON object, got {reprlib.repr(values)}")
    return values


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
