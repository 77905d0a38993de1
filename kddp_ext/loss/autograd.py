"""The native loss as a node of autograd's graph. The forward computes the gradients; the backward only scales them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kddp_ext import ops
from kddp_ext.loss.settings import LossSettings


class _Outputs(NamedTuple):
    """The optional outputs of the operator, in its order."""

    logits_gradient: bool
    activation_gradients: bool
    scaled_gradients: bool
    statistics: bool


class _Backward(NamedTuple):
    """What the backward needs besides the gradients. The factors are None unless the gradients are still unscaled."""

    outputs: _Outputs
    layers: int
    factors: list[float] | None


def native_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor],
    l1_weights: list[float],
    samples: list[float],
    settings: LossSettings,
    *,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its four terms, and (5, columns) statistics of the activations (empty without `statistics`).

    Args:
        student_logits, teacher_logits, labels: as of `fused_kd_l1_loss`, already checked.
        activations: one matrix for each layer.
        l1_weights: the weight of each matrix.
        samples: the number that the sum of each matrix is divided by.
        settings: all other settings.
        statistics: whether to compute the statistics.
    """
    grad_enabled = torch.is_grad_enabled()
    outputs = _Outputs(
        logits_gradient=grad_enabled and student_logits.requires_grad,
        activation_gradients=grad_enabled and any(l1_weights) and any(a.requires_grad for a in activations),
        # float16 cannot hold gradients that were divided by the batch size.
        scaled_gradients=student_logits.dtype == torch.float16 or torch.float16 in [a.dtype for a in activations],
        statistics=statistics,
    )
    arguments = (l1_weights, samples, *settings.operator_arguments(), *outputs)
    factors = None
    if outputs.scaled_gradients:
        of_layers = [weight / count for weight, count in zip(l1_weights, samples, strict=True)]
        factors = [1 / max(student_logits.shape[0], 1)] * outputs.logits_gradient
        factors += of_layers * outputs.activation_gradients
    backward = _Backward(outputs, len(activations), factors)
    if is_tracing():
        traced: Any = _TracedLoss.apply
        loss, terms, sums, *_ = traced(student_logits, teacher_logits, labels, arguments, backward, *activations)
        return loss, terms, sums
    loss, terms, sums, logits_gradient, activation_gradients = ops.kd_l1_loss(
        student_logits, teacher_logits, labels, activations, *arguments
    )
    if outputs.logits_gradient or outputs.activation_gradients:
        gradients = (logits_gradient, *activation_gradients) if outputs.logits_gradient else activation_gradients
        loss = _attach(loss, gradients, backward, student_logits, *activations)
    return loss, terms, sums


def is_tracing() -> bool:
    """True under torch.compile or torch.func, where the values of tensors are not available."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class _TracedLoss(torch.autograd.Function):
    """The loss under torch.compile and torch.func, where a node may save only inputs and outputs of its forward."""

    @staticmethod
    def forward(
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        arguments: tuple[Any, ...],
        backward: _Backward,
        *activations: Tensor,
    ) -> tuple[Tensor, ...]:
        loss, terms, sums, logits_gradient, activation_gradients = ops.kd_l1_loss_operator(
            student_logits, teacher_logits, labels, list(activations), *arguments
        )
        return loss, terms, sums, logits_gradient, *activation_gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.description = inputs[4]
        ctx.mark_non_differentiable(*output[1:])
        gradients = output[3:] if ctx.description.outputs.logits_gradient else output[4:]
        ctx.save_for_backward(*gradients)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        logits_gradient, *activation_gradients = _input_gradients(ctx, grad_loss, in_place=False)
        return (logits_gradient, None, None, None, None, *activation_gradients)


class _EagerLoss(torch.autograd.Function):
    """Attaches gradients that are known already to the loss, which costs half of a node with a whole forward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], backward: _Backward, *inputs: Tensor) -> Tensor:
        ctx.description = backward
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: without the decorator's cost in the usual case
            return _EagerLoss.backward_once(ctx, grad_loss)
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()
        return (None, None, None, *_input_gradients(ctx, grad_loss, in_place))

    @staticmethod
    @once_differentiable
    def backward_once(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, None, *_input_gradients(ctx, grad_loss, in_place=False))


# Function.apply would inspect the forward's signature for torch.func's transforms, none of which is active here.
_attach: Any = super(torch.autograd.Function, _EagerLoss).apply


def _input_gradients(ctx: Any, grad_loss: Tensor | None, in_place: bool) -> tuple[Tensor | None, ...]:
    """The gradients for the student's logits and each activation.

    With `in_place` they may overwrite the saved gradients, because no other backward will need those.
    """
    description: _Backward = ctx.description
    outputs, layers, factors = description
    if grad_loss is None:
        return (None,) * (1 + layers)
    gradients: Sequence[Tensor] = ctx.saved_tensors
    # The usual `loss.backward()` scales by 1. On the CPU the value can be read, which saves a pass over memory.
    readable = grad_loss.is_cpu and not ops.scales_natively(grad_loss.device) and not torch.compiler.is_compiling()
    if factors is not None or not readable or grad_loss.item() != 1:
        gradients = ops.scale_gradients(gradients, grad_loss, factors, in_place=in_place)
    logits_gradient = gradients[0] if outputs.logits_gradient else None
    return (logits_gradient, *(gradients[-layers:] if outputs.activation_gradients else (None,) * layers))
