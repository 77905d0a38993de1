"""What a recipe prescribes at each position of a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from kddp_ext.workflow.config import PruningConfig, RunConfig, StudentConfig, TeacherConfig, for_own_networks, preset
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.models import build_teacher
from kddp_ext.workflow.runtime import Runtime
from kddp_ext.workflow.train import Training, student_recipe, teacher_recipe, train


def test_the_penalty_rises_stays_and_ends() -> None:
    pruning = PruningConfig(l1_weight=0.02, l1_warmup=2, l1_until=0.75)
    config = RunConfig(student=StudentConfig(epochs=8), pruning=pruning)
    recipe = student_recipe(config, "kddp")
    weights = [recipe.l1_weight_at(position) for position in (0.0, 0.125, 0.25, 0.5, 0.7499, 0.75, 1.0)]
    assert weights == pytest.approx([0.0, 0.01, 0.02, 0.02, 0.02, 0.0, 0.0])
    assert student_recipe(config, "kd").l1_weight_at(0.5) == 0.0
    throughout = student_recipe(RunConfig(pruning=PruningConfig(l1_weight=0.02)), "kddp")
    assert [throughout.l1_weight_at(position) for position in (0.0, 0.5, 0.9999)] == [0.02] * 3


@pytest.mark.parametrize(
    ("pruning", "checks"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7]),
        ({"start": 0.25, "until": 0.75}, [3, 4, 5, 6]),
        ({"when": "at-the-end"}, [8]),
    ],
)
def test_epochs_after_which_neurons_are_removed(pruning: dict[str, Any], checks: list[int]) -> None:
    recipe = student_recipe(RunConfig(student=StudentConfig(epochs=8), pruning=PruningConfig(**pruning)), "kddp")
    assert [epoch + 1 for epoch in range(8) if recipe.prunes_after(epoch)] == checks
    assert recipe.checks(100) == len(checks)


@pytest.mark.parametrize(("start", "until"), [(0.0, 1.0), (0.25, 0.5), (0.26, 0.49)])
def test_steps_at_which_neurons_are_removed(start: float, until: float) -> None:
    pruning = PruningConfig(steps=12, start=start, until=until)
    recipe = student_recipe(RunConfig(student=StudentConfig(epochs=4), pruning=pruning), "kddp")
    checks = [step for step in range(12, 401, 12) if start * 400 <= step <= until * 400]
    assert recipe.checks(100) == len(checks)


def test_epochs_take_the_views_in_turn() -> None:
    config = RunConfig(student=StudentConfig(views=3))
    recipe = student_recipe(config, "kd")
    assert [recipe.view(epoch) for epoch in range(5)] == [0, 1, 2, 0, 1]
    own = student_recipe(dataclasses.replace(config, student=StudentConfig()), "kd")
    assert [own.view(epoch) for epoch in range(5)] == [0, 1, 2, 3, 4]


def test_the_teachers_learning_rate_is_a_triangle_or_falls_all_along() -> None:
    sgd = teacher_recipe(RunConfig(teacher=TeacherConfig(learning_rate=2.0)))
    assert [sgd.learning_rate(position) for position in (0.0, 0.23, 0.615, 1.0)] == pytest.approx([0.4, 2.0, 1.0, 0.0])
    muon = teacher_recipe(RunConfig(teacher=TeacherConfig(learning_rate=2.0, optimizer="muon")))
    assert [muon.learning_rate(position) for position in (0.0, 0.25, 1.0)] == pytest.approx([2.0, 1.5, 0.0])


def test_the_whitenings_bias_learns_in_three_epochs_and_the_filters_in_all(
    image_data: Callable[..., ImageData],
) -> None:
    data, config = image_data(), RunConfig(teacher=TeacherConfig(channels=(4, 8), epochs=5, batch_size=25))
    model, recipe = build_teacher(config, data.info), teacher_recipe(config)
    seen: list[tuple[Any, ...]] = []

    def epoch_done(_metrics: dict[str, Any]) -> None:
        seen.append(tuple(model.get_parameter(name).detach().clone() for name in ("whitening.bias", filters)))

    filters = "blocks.0.layers.0.weight"
    training = Training(model, model, recipe.optimizers(model), None, [])
    train(training, recipe, data, None, Runtime(), epoch_done)
    moved = [(before[0] - after[0]).any() for before, after in pairwise(seen)]
    assert moved == [True, True, False, False]
    assert all((before[1] - after[1]).any() for before, after in pairwise(seen))


def test_a_teacher_of_the_users_own_is_trained_with_adam() -> None:
    config = for_own_networks(preset("digits", "default"), "networks:big", "")
    recipe = teacher_recipe(config)
    (optimizer,) = recipe.optimizers(nn.Linear(4, 2))
    assert isinstance(optimizer, torch.optim.Adam)
    assert (recipe.learning_rate(0.0), recipe.learning_rate(1.0)) == pytest.approx((2e-4, 0))
    assert recipe.frozen_from == {}
    assert teacher_recipe(for_own_networks(config, "networks:big:weights.pt", "")).epochs == 0
