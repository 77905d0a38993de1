"""What a recipe prescribes at each position of a training."""

from __future__ import annotations

import dataclasses

import pytest

from kddp_ext.workflow.config import PruningConfig, RunConfig, StudentConfig, TeacherConfig
from kddp_ext.workflow.trainer import student_recipe, teacher_recipe


def test_the_penalty_rises_stays_and_ends() -> None:
    pruning = PruningConfig(l1_weight=0.02, l1_warmup=2, l1_until=0.75)
    config = RunConfig(student=StudentConfig(epochs=8), pruning=pruning)
    recipe = student_recipe(config, "kddp")
    weights = [recipe.l1_weight_at(position) for position in (0.0, 0.125, 0.25, 0.5, 0.7499, 0.75, 1.0)]
    assert weights == pytest.approx([0.0, 0.01, 0.02, 0.02, 0.02, 0.0, 0.0])
    assert student_recipe(config, "kd").l1_weight_at(0.5) == 0.0


def test_without_warmup_and_end_the_penalty_is_there_throughout() -> None:
    recipe = student_recipe(RunConfig(pruning=PruningConfig(l1_weight=0.02)), "kddp")
    assert [recipe.l1_weight_at(position) for position in (0.0, 0.5, 0.9999)] == [0.02] * 3


def test_epochs_take_the_views_in_turn() -> None:
    config = RunConfig(student=StudentConfig(views=3))
    recipe = student_recipe(config, "kd")
    assert [recipe.view(epoch) for epoch in range(5)] == [0, 1, 2, 0, 1]
    own = student_recipe(dataclasses.replace(config, student=StudentConfig()), "kd")
    assert [own.view(epoch) for epoch in range(5)] == [0, 1, 2, 3, 4]


def test_the_teachers_learning_rate_is_a_triangle_without_its_corners() -> None:
    teacher = TeacherConfig(learning_rate=2.0, last_learning_rate=0.1)
    recipe = teacher_recipe(RunConfig(teacher=teacher))
    rates = [recipe.learning_rate(position) for position in (0.0, 0.23, 0.615, 1.0)]
    assert rates == pytest.approx([0.4, 2.0, 1.1, 0.2])
