"""Every setting of a run or a sweep. These dataclasses are the command line, config.json and the key for resuming."""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from tyro.conf import FlagConversionOff, arg

from kddp_ext import LossSettings
from kddp_ext.workflow.errors import OptionError, WorkflowError

Config = TypeVar("Config")
Dataset = Literal["digits", "fashion-mnist", "cifar10", "folder"]
Preset = Literal["quick", "default"]
Precision = Literal["auto", "float32", "bfloat16"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "dkd", "skew_kl", "skew_reverse_kl", "symmetric_kl"]
Device = Literal["auto", "cpu", "cuda"]
Criterion = Literal["contribution", "mean_activation", "apoz", "dead", "saliency"]
Resource = Literal["macs", "parameters"]
TeacherArchitecture = Literal["fast", "resnet20", "resnet56", "resnet110"]
TeacherOptimizer = Literal["sgd", "muon", "adam"]
StudentArchitecture = Literal["cnn", "vgg11", "resnet20", "fast"]
PrunedLayers = Literal["hidden", "all"]
PruningTime = Literal["every-epoch", "at-the-end"]
Selection = Literal["last", "best"]
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
CONFIG_VERSION = 4
FOLDER_SIZE = 64  # of the images of a folder: small enough for a CPU, and photographs are still recognisable


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
NaturalShare = Annotated[float, Bound("a number from 0 to 1", lambda value: 0 <= value <= 1)]
PositiveShare = Annotated[float, Bound("a number above 0, at most 1", lambda value: 0 < value <= 1)]


@dataclass(frozen=True)
class TeacherConfig:
    """The large network. It is trained once, unless it comes with weights."""

    network: Annotated[str, arg(aliases=("--teacher",), metavar="MODULE:FUNCTION[:WEIGHTS]", help_behavior_hint="")] = (
        ""
    )
    """A network of your own instead of --teacher.architecture: FUNCTION() or FUNCTION(classes=) returns it. With
    WEIGHTS, a .pt or .safetensors file, it is not trained."""
    mean: tuple[NaturalFloat, ...] = ()
    """Mean of the pixels, from 0 to 1, that your network expects. Default: the network's pretrained_cfg or mean, if it
    has one, else that of the training images."""
    std: tuple[PositiveFloat, ...] = ()
    """Standard deviation that belongs to --teacher.mean."""
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
    """sgd has Nesterov momentum; muon takes orthogonal steps for the filters of convolutions (Jordan et al. 2024);
    adam trains most networks of your own."""
    learning_rate: PositiveFloat = 0.4
    """Peak learning rate. sgd and adam warm up over a quarter of the steps, muon starts at the peak; it decays to 0."""
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

    @property
    def has_weights(self) -> bool:
        """Whether the network comes with weights, so that it is not trained."""
        return self.network.count(":") > 1


@dataclass(frozen=True)
class StudentConfig:
    """The small network. Three stages train it, with Adam and a cosine schedule."""

    network: Annotated[str, arg(aliases=("--student",), metavar="MODULE:FUNCTION", help_behavior_hint="")] = ""
    """A network of your own instead of --student.architecture: FUNCTION() or FUNCTION(classes=) returns it. It is
    pruned in all layers."""
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
    muon_learning_rate: NaturalFloat = 0.0
    """Learning rate at the first step of Muon (Jordan et al. 2024), which then trains the filters of convolutions by
    orthogonal steps, except depthwise ones: about the share by which a step changes them. 0: Adam trains everything."""
    weight_decay: NaturalFloat = 0.0
    """Adam's L2 penalty."""
    select: Annotated[Selection, arg(aliases=("--select",), help_behavior_hint="")] = "last"
    """Which epoch's weights are measured and saved as the student: those of the last one, or those with the best
    validation accuracy."""
    patience: NaturalInt = 0
    """End a training after this many epochs in a row without a better validation accuracy. 0: never."""


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
    """hidden: only the fully-connected layer, as in the paper. all: the convolutions' channels too, and what is added
    up in residual sums."""
    when: PruningTime = "every-epoch"
    """every-epoch skips the last epoch, because nothing trains after it; at-the-end prunes once, after the last."""
    steps: NaturalInt = 0
    """Steps between two checks. 0 checks after epochs, as `when` says."""
    start: BelowOne = 0.0
    """Share of the training before which nothing is removed."""
    until: PositiveShare = 1.0
    """Share of the training after which nothing is removed."""
    criterion: Criterion = "contribution"
    """How a neuron's activity is measured. saliency predicts the increase of the loss without it, for all layers."""
    threshold: PositiveShare = 0.01
    """A neuron is inactive if its activity is below this share of the layer's highest. saliency does not use it."""
    patience: PositiveInt = 2
    """Checks in a row at which a neuron must be inactive before it is removed. saliency does not use it."""
    target_macs: NaturalShare = 0.0
    """Share of the multiply-accumulates that is to be left, approached check by check. 0: no target."""
    target_parameters: NaturalShare = 0.0
    """The same for the parameters."""
    resource: Resource = "macs"
    """saliency: what a neuron costs. Those that are worth least for their cost are removed first."""
    loss_budget: NaturalFloat = 0.0
    """saliency: the share by which pruning may raise the loss above its lowest. 0: 0.01, or no limit with a target."""
    minimum_width: PositiveInt = 1
    """Number of neurons that each layer keeps at least."""
    round_to: PositiveInt = 1
    """Round widths up to a multiple of this (8 or 16 suits a GPU)."""
    compensate: FlagConversionOff[bool] = True
    """Add a removed neuron's mean output to the next layer's bias."""
    reconstruction_samples: NaturalInt = 256
    """Number of recent samples from which least squares redistributes removed neurons' outputs. 0 turns it off."""


class _Settings:
    """What all configs can do: check themselves, and become JSON and options."""

    def __post_init__(self) -> None:
        _check(self)

    def options(self) -> dict[str, Any]:
        """Every setting by the name of its field, such as "student.width"."""
        return flattened(dataclasses.asdict(self))  # type: ignore[call-overload]

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
    """digits needs no download; cifar10 and fashion-mnist are downloaded once, or read from --data-dir; folder is your
    own images, in --data-dir."""
    data_dir: Annotated[str, arg(metavar="DIR", help_behavior_hint="")] = ""
    """Folder of the data set, or its parent. For folder: train/CLASS/* and val/CLASS/* or test/CLASS/*, or CLASS/*, of
    which a fifth is held out. Default: download the data set once."""
    size: PositiveInt = FOLDER_SIZE
    """folder: side in pixels to which images are resized; the longer side is cropped around the centre."""
    channels: Literal[0, 1, 3] = 0
    """folder: 1 reads grey images, 3 colour. 0: grey if all images are."""
    flip: FlagConversionOff[bool] = True
    """folder: whether a mirrored image still shows its class, so that augmentation may flip it."""
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
    """Random shifts and, except for digits, horizontal flips (for folder, see --flip)."""
    precision: Precision = "auto"
    """auto uses bfloat16 where the hardware computes in it natively, and float32 elsewhere."""
    compile: FlagConversionOff[bool] = False
    """Train the networks through torch.compile."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)

    @property
    def has_hidden_layer(self) -> bool:
        """Whether the student has the hidden layer of `student.width` neurons."""
        return not self.student.network and self.student.architecture not in ("resnet20", "fast")

    @property
    def data_path(self) -> Path | None:
        """`data_dir` as a path; None for a download."""
        return Path(self.data_dir) if self.data_dir else None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.distillation.loss()  # checks its settings
        if self.pruning.loss_budget and self.pruning.criterion != "saliency":
            raise OptionError("pruning.loss-budget", "0 with another criterion than saliency", self.pruning.loss_budget)
        if self.pruning.start >= self.pruning.until:
            expected = f"less than --pruning.until, which is {self.pruning.until:g}"
            raise OptionError("pruning.start", expected, self.pruning.start)
        if bool(self.teacher.mean) != bool(self.teacher.std):
            raise WorkflowError("--teacher.mean, --teacher.std: expected both or none, got one")
        if self.student.network.count(":") > 1:
            raise OptionError("student", "MODULE:FUNCTION, because students are trained", self.student.network)


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
        if self.widths and not self.run.has_hidden_layer:
            student = self.run.student.network or self.run.student.architecture
            raise WorkflowError(f"--widths: expected none for {student}, which has no hidden layer of --student.width")
        if self.retrain and self.run.student.network:
            raise WorkflowError("--retrain: expected False, because --student has no hidden layer of --student.width")

    def options(self) -> dict[str, Any]:
        """The run's settings, then the lists."""
        return {option.removeprefix("run."): value for option, value in super().options().items()}

    @classmethod
    def single(cls, run: RunConfig) -> SweepConfig:
        """The sweep that trains one run."""
        return cls(run, seeds=(run.seed,))


@dataclass(frozen=True)
class ShrinkConfig(_Settings):
    """How a trained network is made smaller."""

    target_macs: NaturalShare = 0.0
    """Share of the multiply-accumulates that is to be left."""
    target_parameters: NaturalShare = 0.0
    """The same for the parameters. Without a target, the loss budget alone finds the size."""
    loss_budget: NaturalFloat = 0.0
    """The share by which pruning may raise the loss above its lowest. 0: 0.01, or no limit with a target."""
    epochs: PositiveInt = 6
    """Passes over the training images."""
    batch_size: NaturalInt = 0
    """Images per step. 0: as many as the students of the source's run."""
    learning_rate: PositiveFloat = 1e-3
    """Adam's learning rate at the first step; a cosine schedule decays it to 0."""
    muon_learning_rate: NaturalFloat = 0.015
    """The same of Muon, which trains the filters of convolutions; 0: Adam trains them, too, as it does where a loss
    budget is to be kept, because Muon's first steps raise the loss."""
    temperature: PositiveFloat = 4.0
    """Divides the logits of both networks."""
    alpha: NaturalShare = 0.9
    """Weight of the distillation; the rest is the cross entropy with the labels."""
    shift: NaturalInt = 2
    """Largest shift of augmented images, in pixels."""
    checks: NaturalInt = 0
    """Checks in each pass at which neurons may be removed. 0: 40, or 8 where a loss budget decides, with at least four
    steps between them, because the loss has to fall again."""
    until: NaturalShare = 0.0
    """Share of the training after which nothing is removed. 0: 0.05, so that what is left is trained for long, or 0.25
    where a loss budget decides."""
    round_to: PositiveInt = 1
    """Round widths up to a multiple of this. 8 makes convolutions much faster in ONNX Runtime; a layer with fewer
    neurons stays as it is."""
    reconstruction_samples: NaturalInt = 4096
    """Number of recent samples from which least squares redistributes removed neurons' outputs. A batch gives at most
    an eighth of them."""
    seed: NaturalInt = 0
    """Seed of the order of the images."""
    calibrate: NaturalInt = 0
    """Train nothing: prune in eight steps, with what N training images tell. For those who have no time."""


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The options in which two configs differ, such as "student.width: 256 was saved, 512 is wanted".

    The place of the data does not count.
    """
    return [
        f"{key}: {saved.get(key)} was saved, {value} is wanted"
        for key, value in wanted.items()
        if saved.get(key) != value and key != "data_dir"
    ]


def preset(dataset: Dataset, name: Preset, size: int = FOLDER_SIZE, images: int = 0) -> RunConfig:
    """The settings that `dataset` starts from; those of "folder" depend on the size and the number of the images.

    docs/workflow.md says how they were chosen.
    """
    config = _folder_preset(name, size, images) if dataset == "folder" else _presets()[dataset, name]
    return dataclasses.replace(config, dataset=dataset, preset=name)


def for_own_networks(config: RunConfig, teacher: str, student: str) -> RunConfig:
    """`config` with the networks MODULE:FUNCTION and with settings that suit more networks; "" keeps a network."""
    if teacher:
        own = TeacherConfig(
            network=teacher,
            shift=config.teacher.shift,
            epochs=config.teacher.epochs,
            batch_size=min(256, config.teacher.batch_size),
            optimizer="adam",  # needs no learning rate for each architecture
            learning_rate=1e-3,
            weight_decay=0.0,
        )
        config = dataclasses.replace(config, teacher=own)
    if student:
        own_student = dataclasses.replace(config.student, network=student, learning_rate=1e-3)
        pruning = dataclasses.replace(config.pruning, layers="all")
        config = dataclasses.replace(config, student=own_student, pruning=pruning)
    return config


def _folder_preset(name: Preset, size: int, images: int) -> RunConfig:
    """Settings for images that nobody has tuned: few images make enough steps by small batches and many epochs.

    A network has a pooling for each halving of the image's side down to 4 to 7 pixels.
    """
    quick = name == "quick"
    poolings = min(6, max(1, (size // 4).bit_length() - 1))
    teacher = (32, 64, 128, 256, 256, 256) if quick else (64, 128, 256, 256, 256, 256)
    student = (16, 32, 64, 64, 64, 64) if quick else (32, 64, 128, 128, 128, 128)
    batch_size = 32 if images < 5000 else 128
    epochs_for_steps = (500 if quick else 1500) * batch_size // max(1, images)
    return RunConfig(
        size=size,
        validation=0,
        augment=True,
        teacher=TeacherConfig(
            channels=teacher[: max(2, poolings)],
            shift=size // 16,
            epochs=min(100, max(8 if quick else 20, epochs_for_steps * 2 // 3)),
            batch_size=batch_size,
            learning_rate=0.2,
        ),
        student=StudentConfig(
            channels=student[:poolings],
            width=256 if quick else 512,
            shift=size // 8,
            epochs=min(200, max(10 if quick else 30, epochs_for_steps)),
            views=16,
            batch_size=batch_size,
            learning_rate=2e-3,
        ),
        pruning=PruningConfig(l1_weight=1e-3, l1_until=0.5),
    )


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
    digits = RunConfig(
        precision="float32",  # a network this small gains nothing from bfloat16
        teacher=TeacherConfig(channels=(64, 128)),
        student=StudentConfig(channels=(4, 8), batch_size=32, learning_rate=6e-3),
        pruning=PruningConfig(l1_weight=0.01, l1_until=0.5),
    )
    return {
        ("digits", "default"): digits,
        ("digits", "quick"): dataclasses.replace(digits, student=dataclasses.replace(digits.student, epochs=12)),
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
    if kind is str:
        return None if isinstance(value, str) else "text"
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


def flattened(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The values by dotted names with underscores."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + str(key).replace("-", "_")
        flat.update(flattened(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat
