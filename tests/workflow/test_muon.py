"""Muon, compared with singular value decompositions and with torch's SGD."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kddp_ext.workflow.config import RunConfig, TeacherConfig
from kddp_ext.workflow.datasets import INFO
from kddp_ext.workflow.models import build_teacher
from kddp_ext.workflow.muon import FILTER_MOMENTUM, Muon, orthogonalized
from kddp_ext.workflow.train import teacher_recipe


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


def test_muon_without_orthogonal_steps_is_sgd() -> None:
    start = normal(4, 3)
    mine, reference = (nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05}
    optimizers = (Muon([{"params": [mine]}], **settings), torch.optim.SGD([reference], nesterov=True, **settings))
    for step in range(4):
        for parameter in (mine, reference):
            parameter.grad = normal(4, 3, seed=step)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.step()
    torch.testing.assert_close(mine, reference)


def test_a_filter_bank_is_scaled_and_moves_by_an_orthogonal_step() -> None:
    start, gradient = normal(6, 2, 3, 3), normal(6, 2, 3, 3, seed=1)
    weight = nn.Parameter(start.clone())
    weight.grad = gradient.clone()
    Muon([{"params": [weight], "orthogonalize": True}], lr=0.24, momentum=0.6).step()
    moved = (start * 6**0.5 / start.norm() - weight) / 0.24
    torch.testing.assert_close(moved.flatten(1), orthogonalized(gradient.flatten(1)))


def test_training_continues_exactly_from_a_saved_state() -> None:
    weights = [nn.Parameter(normal(6, 18).view(6, 2, 3, 3)), nn.Parameter(normal(5))]
    groups = [{"params": weights[:1], "orthogonalize": True}, {"params": weights[1:], "weight_decay": 0.1}]

    def steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            for parameter in optimizer.param_groups[0]["params"] + optimizer.param_groups[1]["params"]:
                parameter.grad = normal(*parameter.shape, seed=step)
            optimizer.step()

    optimizer = Muon(groups, lr=0.1, momentum=0.9)
    steps(optimizer, 0, 2)
    others = copy.deepcopy(weights)
    other = Muon([{"params": others[:1]}, {"params": others[1:]}], lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, 2, 4)
    steps(other, 2, 4)
    for mine, expected in zip(others, weights, strict=True):
        assert torch.equal(mine, expected)


def test_every_parameter_of_the_teacher_has_its_own_learning_rate() -> None:
    teacher = TeacherConfig(
        optimizer="muon", channels=(8, 16), bias_learning_rate=400.0, classifier_learning_rate=7.0, weight_decay=0.02
    )
    config = RunConfig(dataset="cifar10", teacher=teacher)
    model = build_teacher(config, INFO["cifar10"])
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group.get("scale", 1.0), group["weight_decay"], group["orthogonalize"], group["momentum"])
        for group in teacher_recipe(config).optimizer(model).param_groups
        for parameter in group["params"]
    }
    expected = {
        name: (1.0, 0.0, True, FILTER_MOMENTUM)
        if parameter.ndim == 4
        else (7.0, 0.02 / 7, False, 0.9)
        if name == "classifier.weight"
        else (400.0, 0.02 / 400, False, 0.9)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert found == expected
