"""Muon, compared with singular value decompositions, and what it trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kddp_ext.workflow.config import RunConfig, StudentConfig, TeacherConfig
from kddp_ext.workflow.datasets import INFO
from kddp_ext.workflow.models import build_student, build_teacher
from kddp_ext.workflow.muon import Muon, orthogonalized
from kddp_ext.workflow.train import student_recipe, teacher_recipe


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(16, 72), (72, 16), (24, 24), (1, 9), (9, 1)])
def test_orthogonalized_keeps_singular_vectors_and_sets_values_near_one(shape: tuple[int, int]) -> None:
    left, _, right = torch.linalg.svd(normal(*shape), full_matrices=False)
    values = torch.linspace(1.0, 0.1, len(right), dtype=torch.float64)
    result = left.T @ orthogonalized(1e-3 * (left * values) @ right) @ right.T
    torch.testing.assert_close(result, result.diag().diag())
    assert 0.6 < result.diag().min() <= result.diag().max() < 1.3


def test_orthogonalized_zeros_are_zeros() -> None:
    assert not orthogonalized(torch.zeros(3, 5)).any()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_step_is_orthogonal_and_relative_to_the_filters(scale: float) -> None:
    start, gradients = scale * normal(6, 2, 3, 3), [normal(6, 2, 3, 3, seed=seed) for seed in (1, 2)]
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=0.24, momentum=0.6)
    momentum = torch.zeros_like(start)
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.6 * momentum + gradient
        moved = (before - weight) / before.norm() * 6**0.5 / 0.24
        torch.testing.assert_close(moved.flatten(1), orthogonalized((gradient + 0.6 * momentum).flatten(1)))


def test_training_continues_exactly_from_a_saved_state() -> None:
    weight = nn.Parameter(normal(6, 2, 3, 3))

    def steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.param_groups[0]["params"][0].grad = normal(6, 2, 3, 3, seed=step)
            optimizer.step()

    optimizer = Muon([weight], lr=0.1, momentum=0.9)
    steps(optimizer, 0, 2)
    resumed = copy.deepcopy(weight)
    other = Muon([resumed], lr=1.0, momentum=0.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, 2, 4)
    steps(other, 2, 4)
    assert torch.equal(resumed, weight)


def settings(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, tuple[str, float, float]]:
    """What trains each parameter: the optimizer, the factor on its learning rate and the weight decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (type(each).__name__, group.get("scale", 1.0), group.get("weight_decay", 0.0))
        for each in optimizers
        for group in each.param_groups
        for parameter in group["params"]
    }


def test_every_parameter_of_the_teacher_has_its_own_learning_rate() -> None:
    teacher = TeacherConfig(
        optimizer="muon", channels=(8, 16), bias_learning_rate=400.0, classifier_learning_rate=7.0, weight_decay=0.02
    )
    config = RunConfig(dataset="cifar10", teacher=teacher)
    model = build_teacher(config, INFO["cifar10"])
    expected = {
        name: ("Muon", 1.0, 0.0)
        if parameter.ndim == 4
        else ("SGD", 7.0, 0.02 / 7)
        if name == "classifier.weight"
        else ("SGD", 400.0, 0.02 / 400)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert settings(model, teacher_recipe(config).optimizers(model)) == expected


@pytest.mark.parametrize("rate", [0.0, 0.06])
def test_muon_trains_a_students_filters_if_it_has_a_learning_rate(rate: float) -> None:
    student = StudentConfig(learning_rate=0.003, muon_learning_rate=rate, weight_decay=0.1)
    config = RunConfig(dataset="cifar10", student=student)
    model = build_student(config, INFO["cifar10"])
    expected = {
        name: ("Muon", pytest.approx(20.0), 0.0) if rate and parameter.ndim == 4 else ("Adam", 1.0, 0.1)
        for name, parameter in model.named_parameters()
    }
    assert settings(model, student_recipe(config, "kd").optimizers(model)) == expected


@pytest.mark.parametrize("model", [nn.Linear(4, 2), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(3, 6, 3, bias=False)])
def test_muon_leaves_a_network_without_suitable_filters_or_with_nothing_else_to_the_other_optimizer(
    model: nn.Module,
) -> None:
    config = RunConfig(student=StudentConfig(muon_learning_rate=0.1), teacher=TeacherConfig(optimizer="muon"))
    for recipe in (student_recipe(config, "kd"), teacher_recipe(config)):
        (optimizer,) = recipe.optimizers(model)
        assert not isinstance(optimizer, Muon)
