"""Muon, which trains the filters of convolutions (Jordan et al. 2024). Another optimizer trains what else there is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonal steps.

    An orthogonal step of a filter bank (O, I, K, K), seen as a matrix of O rows, keeps the singular vectors of the
    gradient and sets its singular values to about 1, so that rare directions count as much as common ones. `lr` times
    the filter bank's norm over sqrt(O) scales it, so that the learning rate alone determines the change of direction.
    From Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein: "Muon: an optimizer for hidden layers in neural networks"
    (2024), where the filter bank is scaled to the norm sqrt(O) instead. Both are alike where a normalisation follows.
    """

    def __init__(self, filters: Iterable[nn.Parameter], *, lr: float, momentum: float) -> None:
        super().__init__(filters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without the closure, which nothing here needs
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, float]) -> None:
        momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(gradient))
        momentum.mul_(group["momentum"]).add_(gradient)
        update = gradient.add(momentum, alpha=group["momentum"])
        step = orthogonalized(update.flatten(1)).view_as(update)
        parameter.sub_(step * (group["lr"] * len(parameter) ** -0.5 * parameter.norm()))


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
