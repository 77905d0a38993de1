"""Batch normalisation over the batches of several processes (Ioffe and Szegedy, 2015), on any device.

torch's SyncBatchNorm does the same on GPUs and refuses tensors of a CPU. It is also a module of another type, while
here the modules stay what they are: their names, states and what prunes them know nothing of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kddp_ext.workflow.processes import Processes


def join_batches(model: nn.Module, processes: Processes) -> None:
    """Have each BatchNorm of `model` normalise by the mean and variance over all processes, while it trains.

    Their `forward` is replaced on the instance, so this comes after what traces the model. Evaluation is as it was.
    With one process nothing is changed.
    """
    if processes.count == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = partial(_forward, module, processes)  # type: ignore[method-assign]


def _forward(module: _BatchNorm, processes: Processes, inputs: Tensor) -> Tensor:
    if not module.training:
        return type(module).forward(module, inputs)
    module._check_input_dim(inputs)
    results = _Normalisation.apply(  # type: ignore[no-untyped-call]
        inputs, module.weight, module.bias, module.eps, processes
    )
    output, mean, variance, count = results
    if module.running_mean is not None and module.running_var is not None:
        _update(module, mean, variance * (count / (count - 1)))
    return output  # type: ignore[no-any-return]


@torch.no_grad()
def _update(module: _BatchNorm, mean: Tensor, unbiased_variance: Tensor) -> None:
    factor: float | Tensor = 0.0 if module.momentum is None else module.momentum
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # the mean of all batches
            factor = 1 / module.num_batches_tracked
    for running, latest in ((module.running_mean, mean), (module.running_var, unbiased_variance)):
        assert running is not None
        running.mul_(1 - factor).add_(latest.to(running.dtype) * factor)


class _Normalisation(torch.autograd.Function):
    """(N, C, ...) to the same, in float32 or float64; also each channel's mean and variance (C,), and the count ()."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, processes: Processes
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = inputs.to(_computed_in(inputs))
        variance, mean = torch.var_mean(values, _reduced(inputs), correction=0)
        count = torch.full_like(mean, inputs.numel() / inputs.shape[1])
        # Moments of parts to those of the whole (Chan, Golub and LeVeque, 1979): no difference of large squares.
        means, variances, counts = processes.stack(torch.stack([mean, variance, count])).unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total
        scale, shift = (None if each is None else each.to(mean.dtype) for each in (weight, bias))
        output = nn.functional.batch_norm(inputs, mean, variance, scale, shift, eps=eps)
        ctx.processes = processes
        ctx.save_for_backward(inputs, weight, mean, (variance + eps).rsqrt(), total)
        ctx.mark_non_differentiable(mean, variance, total)
        return output, mean, variance, total[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, inverse, total = ctx.saved_tensors
        shape = (1, -1) + (1,) * (inputs.dim() - 2)
        dtype, reduced = _computed_in(inputs), _reduced(inputs)
        gradient = gradient.to(dtype)
        normalised = (inputs.to(dtype) - mean.view(shape)) * inverse.view(shape)
        to_bias, to_weight = gradient.sum(reduced), (gradient * normalised).sum(reduced)
        to_inputs = None
        if ctx.needs_input_grad[0]:
            # Each process's loss depends on the inputs of all, through the mean and the variance.
            shift, scale = (ctx.processes.sum(torch.stack([to_bias, to_weight])) / total).unbind()
            factor = inverse if weight is None else inverse * weight.to(dtype)
            to_inputs = (gradient - shift.view(shape) - normalised * scale.view(shape)) * factor.view(shape)
            to_inputs = to_inputs.to(inputs.dtype)
        if weight is None:
            return to_inputs, None, None, None, None
        return to_inputs, to_weight.to(weight.dtype), to_bias.to(weight.dtype), None, None


def _computed_in(inputs: Tensor) -> torch.dtype:
    return torch.promote_types(inputs.dtype, torch.float32)


def _reduced(inputs: Tensor) -> list[int]:
    return [axis for axis in range(inputs.dim()) if axis != 1]
