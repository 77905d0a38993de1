"""What an optimizer keeps of a parameter, as far as it can be sliced along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kddp_ext.pruning.tracing.graph import StoredTensor


def require_sliceable_optimizer(optimizer: Optimizer) -> None:
    """Raise a ValueError for an optimizer whose state is not kept parameter by parameter."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: LBFGS keeps one flat history of all parameters, which cannot be sliced")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError(
            "optimizer: SparseAdam takes sparse gradients alone, and those of the layers that are pruned are dense"
        )
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise ValueError(
            "optimizer: ZeroRedundancyOptimizer keeps each parameter's state on one rank alone, where the others "
            "cannot slice it; use a plain optimizer on every rank"
        )


def sliceable_state(stored: StoredTensor, tensor: Tensor, optimizer: Optimizer) -> dict[Any, Tensor]:
    """The tensors in an optimizer's state of `tensor` that have its dimensions, by key; scalars stay as they are.

    Args:
        stored: where the model holds it, for the message.
        tensor: the parameter.
        optimizer: it need not hold it.

    Raises:
        ValueError: there is something of which it is not known how it follows the parameter's shape.
    """
    sliceable = {}
    state = optimizer.state.get(tensor, {})
    for key, value in state.items():
        if value is None or isinstance(value, bool | int | float | str):
            continue
        if isinstance(value, Tensor) and value.dim() == 0:
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided or not _fits(value.shape, tensor.shape):
            kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} keeps {key!r} of {stored.name}, {kind}, and it is "
                f"not known how that follows the parameter's shape {tuple(tensor.shape)}; nothing was pruned"
            )
        sliceable[key] = value
    return sliceable


def _fits(shape: torch.Size, parameter: torch.Size) -> bool:
    return len(shape) == len(parameter) and all(a in (1, b) for a, b in zip(shape, parameter, strict=True))
