"""What both loops share: students, their teachers, the images, and the result of a timed turn."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from kddp_ext.workflow.config import RunConfig, StudentConfig, TeacherConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import INFO, RawDataset, read_dataset
from kddp_ext.workflow.models import build_student, build_teacher

SMOKE_IMAGES = 40


class Reading(NamedTuple):
    """Seconds of the timed steps, their mean loss, and whether another process took the processor meanwhile."""

    seconds: float
    loss: float
    disturbed: bool = False


class Pair(NamedTuple):
    """A student and its teacher.

    Attributes:
        title: the name of its row.
        teacher, student: their sections of the workflow's config.
        smoke_teacher, smoke_student: tiny networks that show whether everything runs.
    """

    title: str
    teacher: TeacherConfig
    student: StudentConfig
    smoke_teacher: TeacherConfig
    smoke_student: StudentConfig

    def config(self, smoke: bool) -> RunConfig:
        """The config of a run on CIFAR-10 with augmentation."""
        teacher, student = (self.smoke_teacher, self.smoke_student) if smoke else (self.teacher, self.student)
        validation = SMOKE_IMAGES // 5 if smoke else 5000
        return RunConfig(dataset="cifar10", validation=validation, augment=True, teacher=teacher, student=student)


PAIRS = {
    "cnn5": Pair(
        "cnn5 from the fast teacher, batch 256",
        TeacherConfig(channels=(64, 256, 256)),
        StudentConfig(channels=(32, 64, 128), width=1024, batch_size=256),
        TeacherConfig(channels=(8, 8)),
        StudentConfig(channels=(4, 8), width=16, batch_size=8),
    ),
    "resnet": Pair(
        "ResNet-20 from ResNet-56, batch 128",
        TeacherConfig(architecture="resnet56", channels=()),
        StudentConfig(architecture="resnet20", channels=(), batch_size=128),
        TeacherConfig(architecture="resnet20", channels=(2, 3, 4)),
        StudentConfig(architecture="resnet20", channels=(2, 3, 4), batch_size=8),
    ),
}


def build_networks(config: RunConfig) -> tuple[nn.Module, nn.Module]:
    """The teacher in evaluation mode and the student, with random weights, which take as long as trained ones."""
    info = INFO[config.dataset]
    return build_teacher(config, info).eval(), build_student(config, info)


def load_images(config: RunConfig, data_dir: str | None, smoke: bool) -> ImageData:
    """CIFAR-10 from `data_dir`, or without it random images of its shape: 50000 of 32x32 in colour."""
    if data_dir is not None:
        raw = read_dataset("cifar10", Path(data_dir))
    else:
        random, count = np.random.default_rng(0), SMOKE_IMAGES if smoke else 50_000
        images = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels = random.integers(0, 10, count)
        raw = RawDataset(images, labels, images[:1], labels[:1])
    return ImageData(raw, INFO["cifar10"], config, torch.device("cpu"))
