"""The networks of the workflow. All take normalised images (N, C, S, S) and return logits (N, classes)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kddp_ext.workflow.config import RunConfig, StudentArchitecture, TeacherArchitecture
from kddp_ext.workflow.datasets import DatasetInfo
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.models import resnet, vgg
from kddp_ext.workflow.models.cnn import PlainStudent
from kddp_ext.workflow.models.resnet import PreActivationResNet
from kddp_ext.workflow.models.teacher import FastTeacher
from kddp_ext.workflow.models.vgg import VGG11

_DEPTHS = {"resnet20": 20, "resnet56": 56, "resnet110": 110}

# What an empty tuple of channels stands for: the papers' own.
_CHANNELS: dict[TeacherArchitecture | StudentArchitecture, tuple[int, ...]] = {
    "fast": (64, 256, 256),
    "cnn": (32, 64, 128),
    "vgg11": (64, 128, 256, 256, 512, 512, 512, 512),
    **dict.fromkeys(("resnet20", "resnet56", "resnet110"), (16, 32, 64)),
}


def build_teacher(config: RunConfig, info: DatasetInfo) -> nn.Module:
    """The teacher of a run, with the initial weights that its seed gives."""
    teacher = config.teacher
    channels = teacher.channels or _CHANNELS[teacher.architecture]
    if teacher.architecture == "fast":
        return _seeded(teacher.seed, lambda: FastTeacher(info.channels, info.classes, channels))
    depth = _DEPTHS[teacher.architecture]
    return _seeded(teacher.seed, lambda: PreActivationResNet(info.channels, info.classes, depth, channels))


def prepare_teacher(model: nn.Module, images: Tensor) -> None:
    """What a teacher does with training images, normalised (N, C, S, S), before it is trained: whitening, if any."""
    if isinstance(model, FastTeacher):
        model.whiten(images)


def build_student(config: RunConfig, info: DatasetInfo) -> nn.Module:
    """The student of a run at its full width, with the initial weights that the run's seed gives."""
    student = config.student
    channels = student.channels or _CHANNELS[student.architecture]
    if student.architecture in _DEPTHS:
        depth = _DEPTHS[student.architecture]
        return _seeded(config.seed, lambda: PreActivationResNet(info.channels, info.classes, depth, channels))
    made = PlainStudent if student.architecture == "cnn" else VGG11
    return _seeded(config.seed, lambda: made(info.channels, info.size, info.classes, channels, student.width))


def check_networks(config: RunConfig, info: DatasetInfo) -> None:
    """Refuse networks that cannot be built for the images, or not pruned as the config says.

    Raises:
        WorkflowError: channels are of the wrong number, or halve the images more often than they have pixels for;
            a hidden layer is to be pruned and there is none.
    """
    for network, shift in (("teacher", config.teacher.shift), ("student", config.student.shift)):
        if config.augment and shift >= info.size:
            raise WorkflowError(f"--{network}.shift: expected less than the images' {info.size} pixels, got {shift}")
    _check_channels("teacher", config.teacher.architecture, config.teacher.channels)
    _check_channels("student", config.student.architecture, config.student.channels)
    poolings = {
        # The whitening of 2x2 patches takes a pixel before the first block.
        "teacher": (config.teacher.architecture == "fast", config.teacher.channels, info.size - 1),
        "student": (config.student.architecture == "cnn", config.student.channels, info.size),
    }
    for network, (halves, channels, size) in poolings.items():
        if halves and size >> len(channels) == 0:
            raise WorkflowError(
                f"--{network}.channels: {len(channels)} poolings leave nothing of the {info.size}x{info.size} images"
            )
    if config.student.architecture == "resnet20" and config.pruning.layers == "hidden":
        raise WorkflowError(
            "--pruning.layers: expected all for --student.architecture resnet20, which has no hidden layer; got hidden"
        )


def _check_channels(network: str, architecture: str, channels: tuple[int, ...]) -> None:
    expected = {"vgg11": vgg.CONVOLUTIONS, **dict.fromkeys(_DEPTHS, resnet.STAGES)}.get(architecture)
    if channels and expected is not None and len(channels) != expected:
        raise WorkflowError(
            f"--{network}.channels: expected {expected} numbers for {architecture}, or none for its own, got {channels}"
        )


def _seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    # The caller's random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
