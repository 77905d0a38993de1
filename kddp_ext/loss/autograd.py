"""The native loss as a node of autograd's graph, whose gradients the forward has computed already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kddp_ext import ops


class Inputs(NamedTuple):
    """Tensors, already validated: the activations are matrices, the teacher's logits want no gradient."""

    student_logits: Tensor
    teacher_logits: Tensor | None
    labels: Tensor | None
    activations: Sequence[Tensor]


class Settings(NamedTuple):
    """In the operator's order and types."""

    temperature: float
    alpha: float
    l1_weights: list[float]
    samples: list[float]
    label_smoothing: float
    ignore_index: int
    divergence: int
    jsd_beta: float
    dkd_target_weight: float
    dkd_non_target_weight: float
    standardize_logits: bool


class _Flags(NamedTuple):
    """What the operator is to compute besides the loss, in the operator's order."""

    logits_gradient: bool
    activation_gradients: bool
    scaled: bool
    statistics: bool


def native_loss(inputs: Inputs, settings: Settings, with_terms: bool, with_statistics: bool) -> tuple[Tensor, Any, Any]:
    """The loss, its terms, and the sums over each column of the activations.

    Args:
        inputs: what it is computed of.
        settings: how.
        with_terms: whether the terms are wanted; they may be None where not.
        with_statistics: whether the sums are wanted; likewise.
    """
    student, teacher, labels, activations = inputs
    differentiated = torch.is_grad_enabled()
    logits_gradient = differentiated and student.requires_grad
    activation_gradients = differentiated and any(settings.l1_weights) and any(a.requires_grad for a in activations)
    # float16 cannot hold a gradient that the batch size has divided.
    scaled = student.dtype == torch.float16 or torch.float16 in [a.dtype for a in activations]
    flags = _Flags(logits_gradient, activation_gradients, scaled, with_statistics)
    if is_tracing():
        traced: Any = _TracedLoss.apply
        loss, terms, sums, *_ = traced(student, teacher, labels, settings, flags, *activations)
        return loss, terms, sums
    loss, terms, sums, of_logits, of_activations = ops.kd_l1_loss(inputs, settings, flags, with_terms)
    if logits_gradient or activation_gradients:
        gradients = of_activations if of_logits is None else (of_logits, *of_activations)
        loss = _attach(loss, gradients, settings, flags, student, *activations)
    return loss, terms, sums


def is_tracing() -> bool:
    """Whether values cannot be looked at now."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class _TracedLoss(torch.autograd.Function):
    """The loss under torch.compile and torch.func, where only inputs and outputs of the forward may be saved."""

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        settings: Settings,
        flags: _Flags,
        *activations: Tensor,
    ) -> tuple[Tensor, ...]:
        loss, terms, sums, of_logits, of_activations = ops.kd_l1_loss_operator(
            student, teacher, labels, list(activations), *settings, *flags
        )
        return loss, terms, sums, of_logits, *of_activations

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rows = inputs[0].shape[0]
        _, _, _, ctx.settings, ctx.flags, *_ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        of_logits, *of_activations = _input_gradients(ctx, grad_loss, in_place=False)
        return (of_logits, None, None, None, None, *of_activations)


class _KnownGradients(torch.autograd.Function):
    """The eager case: the gradients are known before the node is made, which then costs half as much."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], settings: Settings, flags: _Flags, *inputs: Tensor
    ) -> Tensor:
        ctx.rows, ctx.settings, ctx.flags = inputs[0].shape[0], settings, flags
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the decorator costs what is saved elsewhere
            return _KnownGradients.backward_once(ctx, grad_loss)
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()
        return (None, None, None, None, *_input_gradients(ctx, grad_loss, in_place))

    @staticmethod
    @once_differentiable
    def backward_once(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *_input_gradients(ctx, grad_loss, in_place=False))


# Function.apply would inspect forward's signature for transforms, of which there are none here.
_attach: Any = super(torch.autograd.Function, _KnownGradients).apply


def _input_gradients(ctx: Any, grad_loss: Tensor | None, in_place: bool) -> tuple[Tensor | None, ...]:
    """Gradients with respect to the student's logits and each activation.

    They may overwrite what is saved `in_place`, where no other backward will need that.
    """
    settings, flags = ctx.settings, ctx.flags
    absent = [None] * len(settings.l1_weights)
    if grad_loss is None:
        return (None, *absent)
    gradients: Sequence[Tensor] = ctx.saved_tensors
    # The usual `loss.backward()` scales by 1: on the CPU one can look, and spare the memory a round.
    may_look = grad_loss.is_cpu and not ops.scales_natively(grad_loss.device)
    if flags.scaled or torch.compiler.is_compiling() or not may_look or grad_loss.item() != 1:
        gradients = _scaled_gradients(ctx, gradients, grad_loss, in_place)
    if not flags.logits_gradient:
        return (None, *(gradients[-len(absent) :] if flags.activation_gradients else absent))
    return tuple(gradients) if flags.activation_gradients else (gradients[0], *absent)


def _scaled_gradients(ctx: Any, gradients: Sequence[Tensor], grad_loss: Tensor, in_place: bool) -> Sequence[Tensor]:
    factors = None
    if ctx.flags.scaled:
        of_row, settings = 1 / max(ctx.rows, 1), ctx.settings
        factors = [weight / samples for weight, samples in zip(settings.l1_weights, settings.samples, strict=True)]
        factors = [of_row, *factors][-len(gradients) :] if ctx.flags.activation_gradients else [of_row]
    return ops.scale_gradients(gradients, grad_loss, factors, in_place=in_place)
