"""Every setting of a run or a sweep. These dataclasses are the command line, config.json and the key for resuming."""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from tyro.conf import FlagConversionOff, arg

from kddp_ext import LossSettings
from kddp_ext.workflow.errors import OptionError, WorkflowError

Config = TypeVar("Config")
Dataset = Literal["digits", "fashion-mnist", "cifar10"]
Preset = Literal["quick", "default"]
Precision = Literal["auto", "float32", "bfloat16"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "dkd", "skew_kl", "skew_reverse_kl", "symmetric_kl"]
Device = Literal["auto", "cpu", "cuda"]
Criterion = Literal["contribution", "mean_activation", "apoz", "dead"]
TeacherArchitecture = Literal["fast", "resnet20", "resnet56", "resnet110"]
TeacherOptimizer = Literal["sgd", "muon"]
StudentArchitecture = Literal["cnn", "vgg11", "resnet20"]
PrunedLayers = Literal["hidden", "all"]
PruningTime = Literal["every-epoch", "at-the-end"]
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

# Written into config.json. A config of another version is refused.
CONFIG_VERSION = 3


class Bound(NamedTuple):
    """The range of a number: its text in error messages, and whether it holds for a finite number."""

    text: str
    holds: Callable[[float], bool]


_POSITIVE = Bound("a positive number", lambda value: value > 0)
_NOT_NEGATIVE = Bound("a number of at least 0", lambda value: value >= 0)
PositiveInt = Annotated[int, _POSITIVE]
PositiveFloat = Annotated[float, _POSITIVE]
NaturalInt = Annotated[int, _NOT_NEGATIVE]
NaturalFloat = Annotated[float, _NOT_NEGATIVE]
BelowOne = Annotated[float, Bound("a number from 0 to below 1", lambda value: 0 <= value < 1)]
PositiveShare = Annotated[float, Bound("a number above 0, at most 1", lambda value: 0 < value <= 1)]


@dataclass(frozen=True)
class TeacherConfig:
    """The large network. It is trained once."""

    architecture: TeacherArchitecture = "fast"
    """fast trains in a few epochs; the others are the pre-activation networks of He et al. (2016)."""
    channels: tuple[PositiveInt, ...] = (32, 64)
    """Output channels of each block of fast, which halves the image's sides, or of each of a ResNet's 3 stages.
    None: the architecture's usual channels."""
    seed: NaturalInt = 0
    """Seed of the initial weights and of the order of the images. Runs with different --seed can share a teacher."""
    shift: NaturalInt = 2
    """Largest shift of augmented images, in pixels. Smaller shifts suit the teacher's short training."""
    epochs: PositiveInt = 12
    """Passes over the training images."""
    batch_size: PositiveInt = 128
    """Images per step."""
    optimizer: TeacherOptimizer = "sgd"
    """sgd uses Nesterov momentum; muon, for fast, makes the updates of the convolutions orthogonal (Jordan 2024)."""
    learning_rate: PositiveFloat = 0.4
    """Peak learning rate. sgd warms up over a quarter of the steps, muon starts at the peak; both decay to 0."""
    bias_learning_rate: PositiveFloat = 1.0
    """Factor on the learning rate of biases. fast tolerates large factors (Page 2018)."""
    classifier_learning_rate: PositiveFloat = 1.0
    """Factor on the learning rate of the last layer."""
    momentum: BelowOne = 0.9
    """Nesterov momentum of all parameters whose updates are not orthogonal."""
    weight_decay: NaturalFloat = 5e-4
    """L2 penalty on all weights whose updates are not orthogonal."""
    label_smoothing: BelowOne = 0.0
    """Label smoothing. The default is 0 because smoothed teachers are known to distil worse."""


@dataclass(frozen=True)
class StudentConfig:
    """The small network. Three stages train it, with Adam and a cosine schedule."""

    architecture: StudentArchitecture = "cnn"
    """cnn is a plain network with one hidden layer; with three convolutions it is known as cnn5."""
    channels: tuple[PositiveInt, ...] = (16, 32)
    """Output channels of cnn's convolutions (a pooling follows each), of vgg11's 8, or of resnet20's 3 stages.
    None: the architecture's usual channels."""
    width: PositiveInt = 512
    """Initial number of neurons in the hidden layer of cnn and vgg11. KDDP finds the final number."""
    epochs: PositiveInt = 20
    """Passes over the training images, in each of the three stages."""
    shift: NaturalInt = 4
    """Largest shift of augmented images, in pixels."""
    views: NaturalInt = 0
    """Number of augmented views of each image. Epochs cycle through them, so the teacher computes each view once.
    0 draws a new view in every epoch."""
    batch_size: PositiveInt = 64
    """Images per step."""
    learning_rate: PositiveFloat = 3e-3
    """Adam's learning rate at the first step; a cosine schedule decays it to 0."""
    weight_decay: NaturalFloat = 0.0
    """Adam's L2 penalty."""


@dataclass(frozen=True)
class DistillationConfig:
    """The distillation loss: alpha * KD + (1 - alpha) * cross-entropy."""

    temperature: float = 4.0
    """Divides the logits of teacher and student; the KD term is multiplied by its square."""
    alpha: float = 0.9
    """Weight of the KD term, 0 to 1."""
    divergence: Divergence = LossSettings.divergence
    """Divergence between the two softened distributions; docs/losses.md compares them."""
    jsd_beta: float = LossSettings.jsd_beta
    """jsd: the teacher's share of the mixture, between 0 and 1."""
    skew: float = LossSettings.skew
    """skew_kl and skew_reverse_kl: the share of the mixture that is not the other distribution, between 0 and 1."""
    dkd_target_weight: float = LossSettings.dkd_target_weight
    """dkd: weight of the divergence at the label."""
    dkd_non_target_weight: float = LossSettings.dkd_non_target_weight
    """dkd: weight of the divergence over the other classes."""
    standardize_logits: bool = LossSettings.standardize_logits
    """Z-score each row of logits of teacher and student before the softmax."""

    def loss(self, **others: Any) -> LossSettings:
        """These settings as `kddp_ext.LossSettings`, with `others` added or replaced."""
        try:
            return LossSettings(**{**dataclasses.asdict(self), **others})
        except (TypeError, ValueError) as error:
            name, _, reason = str(error).partition(":")
            raise WorkflowError(f"--distillation.{name.replace('_', '-')}:{reason}") from error


@dataclass(frozen=True)
class PruningConfig:
    """When neurons are removed. The pruner decides after an epoch, from that epoch's activations."""

    l1_weight: NaturalFloat = 0.015
    """Weight of the L1 penalty on the activations of the pruned layers."""
    l1_warmup: NaturalInt = 0
    """Epochs over which the penalty's weight rises linearly from 0."""
    l1_until: PositiveShare = 1.0
    """Share of the training after which the penalty is 0, so that the remaining neurons train without it."""
    layers: PrunedLayers = "hidden"
    """hidden: only the fully-connected layer, as in the paper. all: the convolutions' channels too."""
    when: PruningTime = "every-epoch"
    """every-epoch skips the last epoch, because nothing trains after it; at-the-end prunes once, after the last."""
    criterion: Criterion = "contribution"
    """How a neuron's activity is measured."""
    threshold: PositiveShare = 0.01
    """A neuron is inactive if its activity is below this share of the layer's highest."""
    patience: PositiveInt = 2
    """Checks in a row at which a neuron must be inactive before it is removed."""
    minimum_width: PositiveInt = 1
    """Number of neurons that each layer keeps at least."""
    round_to: PositiveInt = 1
    """Round widths up to a multiple of this (8 or 16 suits a GPU)."""
    compensate: FlagConversionOff[bool] = True
    """Add a removed neuron's mean output to the next layer's bias."""
    reconstruction_samples: NaturalInt = 256
    """Number of recent samples from which least squares redistributes removed neurons' outputs. 0 turns it off."""


class _Settings:
    """What both configs can do: check themselves, and become JSON and options."""

    def __post_init__(self) -> None:
        _check(self)

    def options(self) -> dict[str, Any]:
        """Every setting by the name of its field, such as "student.width"."""
        return _flatten(dataclasses.asdict(self))  # type: ignore[call-overload]

    def to_json(self) -> dict[str, Any]:
        """The settings as values that JSON can hold, with the format's version."""
        return {"version": CONFIG_VERSION, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[Config], values: Any) -> Config:
        """Rebuild what `to_json` returned; raises WorkflowError naming what is missing, unknown or out of range."""
        if not isinstance(values, dict):
            raise WorkflowError(f"expected a JSON object, got {reprlib.repr(values)}")
        values = dict(values)
        version = values.pop("version", None)
        if version != CONFIG_VERSION:
            raise WorkflowError(f"expected version {CONFIG_VERSION} of the settings, got {reprlib.repr(version)}")
        return _build(cls, values)


@dataclass(frozen=True)
class RunConfig(_Settings):
    """What is trained, on what, and how. Two runs with equal configs give equal results."""

    dataset: Dataset = "digits"
    """digits needs no download; cifar10 and fashion-mnist are downloaded once, or read from --data-dir."""
    preset: Preset = "default"
    """quick trades accuracy for minutes. Every option below overrides the preset's value."""
    seed: NaturalInt = 0
    """Seed of the students' initial weights and of the order of their images."""
    data_seed: NaturalInt = 0
    """Seed of the validation split and of the augmentation. Runs with the same one share a teacher's logits."""
    validation: NaturalInt = 200
    """Number of training images held out for choosing settings. 0 trains on all. Test images are used once, at the
    end."""
    augment: FlagConversionOff[bool] = False
    """Random shifts and, except for digits, horizontal flips."""
    precision: Precision = "auto"
    """auto uses bfloat16 where the hardware computes in it natively, and float32 elsewhere."""
    compile: FlagConversionOff[bool] = False
    """Train the networks through torch.compile."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.distillation.loss()  # checks its settings
        if self.teacher.optimizer == "muon" and self.teacher.architecture != "fast":
            raise WorkflowError(
                f"--teacher.optimizer: muon needs --teacher.architecture fast, got {self.teacher.architecture}"
            )


@dataclass(frozen=True)
class SweepConfig(_Settings):
    """A grid of trainings that share a teacher, the validation split and the views of the images.

    With the default lists this is a single run: its teacher, and one student in each of three stages.
    """

    run: Annotated[RunConfig, arg(name="")] = field(default_factory=RunConfig)
    """The settings that all trainings share; KDDP starts at `student.width`."""
    seeds: tuple[NaturalInt, ...] = (0,)
    """Seeds of the initial weights and of the order of the images. Each training runs once with each seed."""
    widths: tuple[PositiveInt, ...] = ()
    """Widths of the hidden layer for plain KD, in addition to the full width."""
    l1_weights: tuple[PositiveFloat, ...] = ()
    """Penalty weights for KDDP, in addition to the run's own. Each finds its own width."""
    retrain: bool = False
    """Also train students with KD, from scratch, at the widths that KDDP found."""
    ablations: tuple[Ablation, ...] = ()
    """KDDP at the run's own penalty weight with one thing changed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("seeds", "widths", "l1_weights", "ablations"):
            values = getattr(self, option)
            if len(set(values)) != len(values):
                raise OptionError(option, "different values", values)
        if not self.seeds:
            raise OptionError("seeds", "at least one seed", "none")
        names = [f"{weight:g}" for weight in {*self.l1_weights, self.run.pruning.l1_weight}]
        if len(set(names)) < len(names):  # their trainings would share a folder
            raise OptionError("l1_weights", "values that differ in six digits", self.l1_weights)
        if self.run.student.architecture == "resnet20" and self.widths:
            raise WorkflowError("--widths: expected none for resnet20, which has no hidden layer")

    def options(self) -> dict[str, Any]:
        """The run's settings, then the lists."""
        return {option.removeprefix("run."): value for option, value in super().options().items()}

    @classmethod
    def single(cls, run: RunConfig) -> SweepConfig:
        """The sweep that trains one run."""
        return cls(run, seeds=(run.seed,))


def differences(saved: RunConfig, wanted: RunConfig) -> list[str]:
    """The fields in which two configs differ, such as "student.width: 256 was saved, 512 is wanted"."""
    old, new = saved.options(), wanted.options()
    return [f"{key}: {old[key]} was saved, {new[key]} is wanted" for key in old if old[key] != new[key]]


def preset(dataset: Dataset, name: Preset) -> RunConfig:
    """The settings that `dataset` starts from. docs/workflow.md says how they were chosen."""
    return dataclasses.replace(_presets()[dataset, name], dataset=dataset, preset=name)


@functools.cache
def _presets() -> dict[tuple[Dataset, Preset], RunConfig]:
    cifar10_teacher = TeacherConfig(
        channels=(64, 256, 256),
        epochs=10,
        batch_size=2000,
        optimizer="muon",  # with Jordan's rates, for steps of 2000 images
        learning_rate=0.24,
        bias_learning_rate=440.0,
        classifier_learning_rate=7.0,
        momentum=0.85,
        weight_decay=1 / 60,
    )
    cifar10_student = StudentConfig(channels=(32, 64, 128), width=1024, epochs=12, batch_size=256, views=8)
    return {
        ("digits", "default"): RunConfig(
            precision="float32",  # a network this small gains nothing from bfloat16
            teacher=TeacherConfig(channels=(64, 128)),
            student=StudentConfig(channels=(4, 8), batch_size=32, learning_rate=6e-3),
            pruning=PruningConfig(l1_weight=0.01, l1_until=0.5),
        ),
        ("digits", "quick"): RunConfig(
            precision="float32",
            teacher=TeacherConfig(channels=(64, 128)),
            student=StudentConfig(channels=(4, 8), epochs=12, batch_size=32, learning_rate=6e-3),
            pruning=PruningConfig(l1_weight=0.01, l1_until=0.5),
        ),
        ("fashion-mnist", "default"): RunConfig(
            validation=5000,
            teacher=TeacherConfig(channels=(32, 64, 128), epochs=10, batch_size=256, learning_rate=0.3),
            student=StudentConfig(channels=(16, 32), epochs=15, batch_size=256),
            pruning=PruningConfig(l1_weight=1e-3),
        ),
        ("fashion-mnist", "quick"): RunConfig(
            validation=5000,
            teacher=TeacherConfig(channels=(32, 64, 128), epochs=3, batch_size=256, learning_rate=0.3),
            student=StudentConfig(channels=(8, 16), width=256, epochs=8, batch_size=256, learning_rate=6e-3),
            distillation=DistillationConfig(temperature=2.0),
            pruning=PruningConfig(l1_weight=2e-3, l1_until=0.5),
        ),
        ("cifar10", "default"): RunConfig(
            validation=0,  # the settings have been chosen, so it trains on all images
            augment=True,
            teacher=cifar10_teacher,
            student=cifar10_student,
            pruning=PruningConfig(l1_weight=1e-3, l1_until=0.25),
        ),
        ("cifar10", "quick"): RunConfig(
            validation=5000,
            augment=True,
            teacher=dataclasses.replace(cifar10_teacher, channels=(32, 64, 256), epochs=6),
            student=dataclasses.replace(cifar10_student, epochs=5, views=0),
            pruning=PruningConfig(l1_weight=5e-4),
        ),
    }


def _check(config: Any, prefix: str = "") -> None:
    """Check every field of a dataclass against its annotation; raises WorkflowError naming the option."""
    hints = get_type_hints(type(config), include_extras=True)
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            _check(value, "" if each.name == "run" else f"{each.name}.")
        elif (expected := _expected_instead(value, hints[each.name])) is not None:
            raise OptionError(prefix + each.name, expected, reprlib.repr(value))


def _expected_instead(value: Any, hint: Any) -> str | None:
    """What an annotation allows, where `value` is something else; None where it fits."""
    kind, *bounds = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if get_origin(kind) is Literal:
        return None if value in get_args(kind) else f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return "a list"
        return next((text for each in value if (text := _expected_instead(each, get_args(kind)[0])) is not None), None)
    if kind is bool:
        return None if isinstance(value, bool) else "True or False"
    is_number = isinstance(value, kind | int) and not isinstance(value, bool)
    if not is_number or (isinstance(value, int) and abs(value) >= 2**63):
        return "a number" if kind is float else "a whole number of at most 63 bits"
    for bound in bounds:
        if isinstance(bound, Bound) and not (math.isfinite(value) and bound.holds(value)):
            return bound.text
    return None


def _build(kind: type[Config], values: dict[str, Any], prefix: str = "") -> Config:
    """An instance of the dataclass `kind` from the values of a JSON object."""
    hints = get_type_hints(kind)
    if unlike := values.keys() ^ hints.keys():
        names = ", ".join(f"{prefix}{name}" for name in sorted(map(str, unlike)))
        raise WorkflowError(f"the settings do not fit this version of kddp_ext: missing or unknown: {names}")
    fields = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise WorkflowError(f"{prefix}{name}: expected a JSON object, got {reprlib.repr(value)}")
            value = _build(hints[name], value, f"{prefix}{name}.")
        fields[name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
