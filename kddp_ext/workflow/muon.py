"""The fast teacher's optimizer: Muon for its filters, SGD for its biases and classifier (Jordan 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

FILTER_MOMENTUM = 0.6  # Jordan's value for this family of networks


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and, for groups with `orthogonalize`, orthogonal steps.

    An orthogonal step of a filter bank (O, I, K, K), seen as a matrix of O rows, keeps the singular vectors of the
    gradient and sets its singular values to about 1, so that rare directions count as much as common ones. The weight
    is scaled to the norm sqrt(O) before each step, so that the learning rate alone determines the change of direction.
    A normalisation must follow the layer. From Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein: "Muon: an
    optimizer for hidden layers in neural networks" (2024).
    Each group may override the settings.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        orthogonalize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "orthogonalize": orthogonalize}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without the closure, which nothing here needs
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        gradient = gradient.add(parameter, alpha=group["weight_decay"])
        momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(gradient))
        momentum.mul_(group["momentum"]).add_(gradient)
        update = gradient.add(momentum, alpha=group["momentum"])
        if group["orthogonalize"]:
            parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
            update = orthogonalized(update.flatten(1)).view_as(update)
        parameter.sub_(update, alpha=group["lr"])


def orthogonalized(matrix: Tensor) -> Tensor:
    """`matrix` with its singular values set to 1 ± 0.3, except values that are tiny next to the largest.

    Three steps of a Newton-Schulz iteration, X <- aX + b(XX')X + c(XX')(XX')X. Jordan's polynomial is steep at 0 rather
    than exact at 1.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.T
