"""The fast teacher's optimizer: Muon for its filters, SGD for its biases and classifier (Jordan 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

# Jordan's for this family of networks.
FILTER_MOMENTUM = 0.6
_STEPS = 3


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum; where a group says `orthogonalize`, its steps are orthogonal matrices.

    The step of a filter bank (O, I, K, K), as a matrix of O rows, keeps its singular vectors, and its singular
    values become about 1: directions that few images ask for count as much as common ones. Such a weight is scaled
    to the norm sqrt(O) before the step, so that the learning rate alone says how far it turns; a normalisation has
    to follow it. From Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein: "Muon: an optimizer for hidden layers
    in neural networks" (2024).

    Args:
        groups: parameters, each with the settings below that differ from the default.
        lr: learning rate.
        momentum: share of the last step's momentum that stays.
        weight_decay: L2 penalty on the parameters, where the steps are not orthogonal.
        orthogonalize: whether they are.
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

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient; returns what `closure`, called first, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

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
    """`matrix` with singular values of about 1: within 0.3 of it, but for those that were tiny next to the largest.

    Three steps of a Newton-Schulz iteration, X <- aX + b(XX')X + c(XX')(XX')X; the polynomial is Jordan's, steep
    at 0 rather than exact at 1.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.T
