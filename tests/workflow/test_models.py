"""The networks: shapes for every data set, whitening, and what is counted of them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

import kddp_ext
from kddp_ext.workflow.config import Dataset, Preset, preset
from kddp_ext.workflow.datasets import INFO
from kddp_ext.workflow.measure import count_macs, count_parameters, latency
from kddp_ext.workflow.models import Student, Teacher, build_student, build_teacher


@pytest.mark.parametrize("dataset", get_args(Dataset))
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


def test_the_seed_decides_the_initial_weights_and_leaves_the_callers_alone() -> None:
    config, info = preset("digits", "quick"), INFO["digits"]
    state = torch.random.get_rng_state()
    one, same, other = (build_student(config, info, seed).hidden.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_whitening_decorrelates_the_patches() -> None:
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 1
    teacher = Teacher(3, 10, (8,))
    teacher.whiten(images)
    features = teacher.whitening(images)[:, :12].permute(0, 2, 3, 1).flatten(0, 2).double()
    torch.testing.assert_close(features.T.cov(), torch.eye(12, dtype=torch.float64), atol=0.05, rtol=0)
    assert not teacher.whitening.weight.requires_grad


def test_parameters_and_macs_are_counted_exactly() -> None:
    student = Student(image_channels=1, image_size=8, classes=10, channels=(4, 6), width=20)
    weights = 9 * 4 + 9 * 4 * 6 + 2 * (4 + 6) + (6 * 2 * 2 * 20 + 20) + (20 * 10 + 10)
    assert count_parameters(student) == weights
    macs = 9 * 4 * 64 + 9 * 4 * 6 * 16 + 6 * 2 * 2 * 20 + 20 * 10
    assert count_macs(student, torch.zeros(1, 1, 8, 8)) == macs
    assert not student.hidden._forward_hooks


def test_latency_grows_with_the_batch() -> None:
    student = Student(1, 8, 10, (4,), 20)
    image = torch.zeros(1, 1, 8, 8)
    assert 0 < latency(student, image, 1, budget=0.02) < latency(student, image, 2000, budget=0.02)
