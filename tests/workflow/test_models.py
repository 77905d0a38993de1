"""The networks: shapes for every data set, whitening, sizes, and pruning."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
import torch

import kddp_ext
from kddp_ext.workflow.config import (
    Dataset,
    Preset,
    PruningConfig,
    RunConfig,
    StudentArchitecture,
    StudentConfig,
    TeacherConfig,
    preset,
)
from kddp_ext.workflow.datasets import INFO
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.measure import count_macs, count_parameters
from kddp_ext.workflow.models import (
    VGG11,
    FastTeacher,
    PlainStudent,
    PreActivationResNet,
    build_student,
    build_teacher,
    check_networks,
)

# Their places in VGG11.features on images of 16x16: 8 convolutions, 4 poolings.
VGG_CONVOLUTIONS = (0, 4, 8, 11, 15, 18, 22, 25)


@pytest.mark.parametrize("dataset", sorted(INFO))
@pytest.mark.parametrize("name", get_args(Preset))
def test_every_preset_builds_networks_that_fit_its_images(dataset: Dataset, name: Preset) -> None:
    config, info = preset(dataset, name), INFO[dataset]
    images = torch.zeros(2, info.channels, info.size, info.size)
    assert build_teacher(config, info)(images).shape == (2, info.classes)
    student = build_student(config, info)
    assert student(images).shape == (2, info.classes)
    pruner = kddp_ext.DynamicPruner(student, example_inputs=(images,))
    assert pruner.widths["hidden"] == config.student.width
    assert list(pruner.refused) == ["classifier"]


def test_the_seed_determines_the_weights_and_leaves_the_random_state() -> None:
    config, info = preset("digits", "quick"), INFO["digits"]
    state = torch.random.get_rng_state()
    one, same, other = (build_student(dataclasses.replace(config, seed=seed), info).hidden.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_whitening_decorrelates_the_patches() -> None:
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 1
    teacher = FastTeacher(3, 10, (8,))
    teacher.whiten(images)
    features = teacher.whitening(images)[:, :12].permute(0, 2, 3, 1).flatten(0, 2).double()
    torch.testing.assert_close(features.T.cov(), torch.eye(12, dtype=torch.float64), atol=0.05, rtol=0)
    assert not teacher.whitening.weight.requires_grad


def test_parameters_and_macs_are_counted_exactly() -> None:
    student = PlainStudent(image_channels=1, image_size=8, classes=10, channels=(4, 6), width=20)
    weights = 9 * 4 + 9 * 4 * 6 + 2 * (4 + 6) + (6 * 2 * 2 * 20 + 20) + (20 * 10 + 10)
    assert count_parameters(student) == weights
    macs = 9 * 4 * 64 + 9 * 4 * 6 * 16 + 6 * 2 * 2 * 20 + 20 * 10
    assert count_macs(student, torch.zeros(1, 1, 8, 8)) == macs


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (56, 0.85), (110, 1.7)])
def test_resnets_have_the_published_numbers_of_parameters(depth: int, millions: float) -> None:
    # He et al. 2015, table 6, in millions and to two digits.
    network = PreActivationResNet(3, 10, depth, (16, 32, 64))
    assert count_parameters(network) / 1e6 == pytest.approx(millions, rel=0.03)
    with_weights = [each for each in network.modules() if isinstance(each, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(with_weights) == depth + 2  # the two shortcuts with weights are extra


@pytest.mark.parametrize("dataset", sorted(INFO))
@pytest.mark.parametrize("architecture", ["vgg11", "resnet20"])
def test_every_student_learns_from_the_images_of_every_data_set(
    dataset: Dataset, architecture: StudentArchitecture
) -> None:
    info = INFO[dataset]
    channels = (4, 5, 6, 7, 8, 9, 10, 11) if architecture == "vgg11" else (4, 6, 8)
    student = build_student(tiny(architecture, channels), info)
    logits = student(torch.randn(4, info.channels, info.size, info.size))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in student.parameters())


def tiny(architecture: StudentArchitecture, channels: tuple[int, ...] = ()) -> RunConfig:
    student = StudentConfig(architecture=architecture, channels=channels, width=12)
    return RunConfig(student=student, pruning=PruningConfig(layers="all"))


def test_the_default_channels_are_those_of_the_papers() -> None:
    info = INFO["cifar10"]
    vgg, resnet = (build_student(tiny(architecture), info) for architecture in ("vgg11", "resnet20"))
    assert isinstance(vgg, VGG11)
    widths = [each.out_channels for each in vgg.features if isinstance(each, torch.nn.Conv2d)]
    assert widths == [64, 128, 256, 256, 512, 512, 512, 512]
    assert count_parameters(resnet) == count_parameters(PreActivationResNet(3, 10, 20, (16, 32, 64)))


@pytest.mark.parametrize(
    ("network", "prunable"),
    [
        (
            PreActivationResNet(3, 10, 20, (4, 6, 8)),
            {
                "conv": 4, "blocks.0.conv1": 4, "blocks.1.conv1": 4, "blocks.2.conv1": 4,
                "blocks.3.shortcut": 6, "blocks.3.conv1": 6, "blocks.4.conv1": 6, "blocks.5.conv1": 6,
                "blocks.6.shortcut": 8, "blocks.6.conv1": 8, "blocks.7.conv1": 8, "blocks.8.conv1": 8,
            },
        ),
        (
            VGG11(3, 16, 10, (4, 5, 6, 7, 8, 9, 10, 11), 12),
            {**{f"features.{n}": 4 + i for i, n in enumerate(VGG_CONVOLUTIONS)}, "hidden": 12},
        ),
    ],
    ids=["resnet20", "vgg11"],
)  # fmt: skip
def test_the_layers_that_can_be_pruned(network: torch.nn.Module, prunable: dict[str, int]) -> None:
    """A residual network's streams have the names of the layers that begin them."""
    widths = kddp_ext.DynamicPruner(network, example_inputs=(torch.zeros(2, 3, 16, 16),)).widths
    assert list(widths.items()) == list(prunable.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": StudentConfig(architecture="vgg11", channels=(8, 8))}, "--student.channels: expected 8 numbers"),
        ({"student": StudentConfig(architecture="resnet20", channels=(8,))}, "--student.channels: expected 3 numbers"),
        ({"teacher": TeacherConfig(architecture="resnet56")}, "--teacher.channels: expected 3 numbers for resnet56"),
        ({"student": StudentConfig(architecture="resnet20", channels=())}, "--pruning.layers: expected all"),
        ({"student": StudentConfig(shift=8), "augment": True}, "--student.shift: expected less than the image size 8"),
        (
            {"teacher": TeacherConfig(channels=(8, 8, 8))},
            "--teacher.channels: expected fewer channels: 3 poolings",
        ),
    ],
)
def test_impossible_networks_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkflowError, match=message):
        check_networks(RunConfig(**changes), INFO["digits"])
