"""The loss of knowledge distillation with dynamic pruning, in one native pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kddp_ext import loss_arguments as arguments
from kddp_ext import ops, reference
from kddp_ext.divergences import DIVERGENCES
from kddp_ext.neuron_matrix import NeuronMatrix, neuron_matrix
from kddp_ext.statistics import TrackedActivations

Backend = Literal["auto", "native", "reference"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "dkd"]
_devices_warned_of: set[str] = set()


class LossTerms(NamedTuple):
    """What the loss is made of, before weighting: 0-dim tensors without gradient, on the loss's device.

    Attributes:
        kd: T² times the divergence, averaged over the rows that are not ignored; 0 without a teacher.
        ce: cross entropy with the labels, averaged likewise; 0 without labels.
        l1: Σ|a| over the neurons of all layers, averaged over the batch, and over positions where there are any.
        correct: number of rows whose highest logit is the label's; 0 without labels.
    """

    kd: Tensor
    ce: Tensor
    l1: Tensor
    correct: Tensor


# fmt: off
@overload
def fused_kd_l1_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, activations: Sequence[Tensor] = ...,
    *, temperature: float = ..., alpha: float = ..., l1_weight: float | Sequence[float] = ...,
    label_smoothing: float = ..., ignore_index: int = ..., divergence: Divergence = ..., jsd_beta: float = ...,
    dkd_target_weight: float = ..., dkd_non_target_weight: float = ..., standardize_logits: bool = ...,
    return_terms: Literal[False] = ..., backend: Backend = ...,
) -> Tensor: ...
@overload
def fused_kd_l1_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, activations: Sequence[Tensor] = ...,
    *, temperature: float = ..., alpha: float = ..., l1_weight: float | Sequence[float] = ...,
    label_smoothing: float = ..., ignore_index: int = ..., divergence: Divergence = ..., jsd_beta: float = ...,
    dkd_target_weight: float = ..., dkd_non_target_weight: float = ..., standardize_logits: bool = ...,
    return_terms: Literal[True], backend: Backend = ...,
) -> tuple[Tensor, LossTerms]: ...
@overload
def fused_kd_l1_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, activations: Sequence[Tensor] = ...,
    *, temperature: float = ..., alpha: float = ..., l1_weight: float | Sequence[float] = ...,
    label_smoothing: float = ..., ignore_index: int = ..., divergence: Divergence = ..., jsd_beta: float = ...,
    dkd_target_weight: float = ..., dkd_non_target_weight: float = ..., standardize_logits: bool = ...,
    return_terms: bool = ..., backend: Backend = ...,
) -> Tensor | tuple[Tensor, LossTerms]: ...
# fmt: on


def fused_kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor] = (),
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    l1_weight: float | Sequence[float] = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    dkd_target_weight: float = 1.0,
    dkd_non_target_weight: float = 8.0,
    standardize_logits: bool = False,
    return_terms: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, LossTerms]:
    """Distillation, classification and activation penalty: one value, one pass over each input.

        loss = alpha · T² · D(softmax(t/T), softmax(s/T)) + (1 - alpha) · CE(s, labels) + Σ l1_weight · Σ|a| / N

    with D the divergence, KL(softmax(t/T) ‖ softmax(s/T)) unless another is named.
    The gradient is computed in the same pass and only scaled in `backward`. The teacher's logits are constants.
    Sums are taken in float32 and float64; gradients have the dtype of their input. The loss is differentiable once.

    Args:
        student_logits: (N, C) float32, float64, bfloat16 or float16, with any strides.
        teacher_logits: (N, C), of any of these dtypes. None is allowed where alpha is 0.
        labels: (N,) integers from 0 to C - 1, or `ignore_index`. None is allowed where alpha is 1.
        activations: what is to be penalised, of any of these dtypes: (N, H) outputs of fully-connected layers, or
            (N, C, *positions) of convolutions, whose channels count with the mean of |a| over positions. Those of a
            `DynamicPruner` gather its statistics in the same pass.
        temperature: T, what both logits are divided by; 4 is Hinton's choice for images of few classes.
        alpha: share of the distillation term, from 0 to 1; 0.9 as RepDistiller and most others have it.
        l1_weight: weight of the penalty, one for all activations or one for each. 0 penalises nothing.
        label_smoothing: from 0 to 1, as in `torch.nn.functional.cross_entropy`.
        ignore_index: rows with this label have no part in KD and CE, and a gradient of 0.
        divergence: D. With p the teacher's distribution and q the student's: "forward_kl", KL(p ‖ q); "reverse_kl",
            KL(q ‖ p), which prefers a student that is right where it is sure; "jsd", jsd_beta · KL(p ‖ m) +
            (1 - jsd_beta) · KL(q ‖ m) with m = jsd_beta · p + (1 - jsd_beta) · q; "dkd", the divergence of
            (p_y, 1 - p_y) at the label y and that over the other classes, weighted apart (needs labels).
        jsd_beta: of "jsd", between 0 and 1; 0.5 is the symmetric divergence.
        dkd_target_weight: of "dkd", at least 0; 1 as in the paper.
        dkd_non_target_weight: of "dkd", at least 0; 8 is the paper's choice for CIFAR-100.
        standardize_logits: whether D sees (x - mean) / (std + 1e-7) of each row instead of the logits, on both
            sides, so that the student need not match the teacher's scale. The cross entropy sees them as they are.
        return_terms: whether to return the unweighted terms too, for logging without a second computation.
        backend: "native" for the kernels (an error where this build has none for the device), "reference" for
            plain PyTorch, "auto" for the kernels where there are any.

    Returns:
        The loss, 0-dim float32 (float64 where an input is), or (loss, LossTerms) with `return_terms`. Both are 0
        where N is 0 or every row is ignored.

    Raises:
        TypeError, ValueError: an argument is not as described. The message names it, what was expected and what
            came. Only a label that is no class is not an error on a GPU, which nobody waits for: the loss is then NaN.

    The distillation term is Hinton, Vinyals and Dean 2015 (arXiv:1503.02531) with their factor T²; the penalty is
    that of Şener and Akbaş 2022 (doi 10.29109/gujsc.1141648). The other divergences: Gu et al. 2024
    (arXiv:2306.08543), Agarwal et al. 2024 (arXiv:2306.13649), Zhao et al. 2022 (arXiv:2203.08679), standardised
    logits Sun et al. 2024 (arXiv:2403.01427). docs/losses.md has them all, and other libraries' conventions.
    """
    arguments.check_logits(student_logits, teacher_logits, labels, activations, alpha)
    arguments.check_settings(temperature, alpha, label_smoothing, ignore_index)
    arguments.check_divergence(divergence, jsd_beta, standardize_logits, dkd_target_weight, dkd_non_target_weight)
    if divergence == "dkd" and labels is None:
        raise ValueError("labels: expected a tensor, since divergence is 'dkd', got None")
    weights = arguments.check_weights(l1_weight, len(activations))
    if labels is not None and labels.dtype != torch.int64:
        labels = labels.to(torch.int64)
    matrices = _matrices(activations)
    inputs = _Inputs(student_logits, _constant(teacher_logits), labels, [matrix.values for matrix in matrices])
    settings = _Settings(
        float(temperature),
        float(alpha),
        weights,
        [float(max(matrix.samples, 1)) for matrix in matrices],
        float(label_smoothing),
        ignore_index,
        DIVERGENCES.index(divergence),
        float(jsd_beta),
        float(dkd_target_weight),
        float(dkd_non_target_weight),
        standardize_logits,
    )
    tracked = activations if isinstance(activations, TrackedActivations) and torch.is_grad_enabled() else None
    if _choose_native(student_logits.device, backend):
        loss, terms, sums = _native_loss(inputs, settings, return_terms, tracked is not None)
        if tracked is not None:
            tracked.update(matrices, sums)
    else:
        loss, terms = _reference_loss(inputs, settings)
        if tracked is not None:
            tracked.observe()
    return (loss, LossTerms(*terms.unbind())) if return_terms else loss


def _matrices(activations: Sequence[Tensor]) -> list[NeuronMatrix]:
    if isinstance(activations, TrackedActivations):
        return activations.matrices()
    return [neuron_matrix(activation) for activation in activations]


def _constant(teacher_logits: Tensor | None) -> Tensor | None:
    return teacher_logits.detach() if teacher_logits is not None and teacher_logits.requires_grad else teacher_logits


class _Inputs(NamedTuple):
    student_logits: Tensor
    teacher_logits: Tensor | None
    labels: Tensor | None
    activations: Sequence[Tensor]


class _Settings(NamedTuple):
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


def _native_loss(
    inputs: _Inputs, settings: _Settings, with_terms: bool, with_statistics: bool
) -> tuple[Tensor, Any, Any]:
    """The loss, its terms, and the sums over each column of the activations."""
    student, teacher, labels, activations = inputs
    training = torch.is_grad_enabled()
    logits_gradient = training and student.requires_grad
    activation_gradients = training and any(settings.l1_weights) and any(a.requires_grad for a in activations)
    # float16 cannot hold a gradient that the batch size has divided.
    scaled = student.dtype == torch.float16 or torch.float16 in [a.dtype for a in activations]
    flags = _Flags(logits_gradient, activation_gradients, scaled, with_statistics)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        traced: Any = _TracedLoss.apply
        loss, terms, sums, *_ = traced(student, teacher, labels, settings, flags, *activations)
        return loss, terms, sums
    loss, terms, sums, of_logits, of_activations = ops.kd_l1_loss(inputs, settings, flags, with_terms)
    if logits_gradient or activation_gradients:
        gradients = of_activations if of_logits is None else (of_logits, *of_activations)
        loss = _attach(loss, gradients, settings, flags, student, *activations)
    return loss, terms, sums


def _reference_loss(inputs: _Inputs, settings: _Settings) -> tuple[Tensor, Tensor]:
    named = settings._asdict() | {"divergence": DIVERGENCES[settings.divergence]}
    return reference.kd_l1_loss(*inputs, **named)


class _TracedLoss(torch.autograd.Function):
    """The loss under torch.compile and torch.func, where only inputs and outputs of the forward may be saved."""

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        settings: _Settings,
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
        ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], settings: _Settings, flags: _Flags, *inputs: Tensor
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


def _choose_native(device: torch.device, backend: Backend) -> bool:
    arguments.check_backend(backend)
    if backend == "reference":
        return False
    if ops.is_native(device):
        return True
    if backend == "native":
        raise ValueError(f"backend: this build of kddp_ext has no native kernels for {device.type!r} tensors")
    if device.type not in _devices_warned_of:
        _devices_warned_of.add(device.type)
        warnings.warn(
            f"kddp_ext has no native kernels for {device.type!r} in this build: the loss runs in plain PyTorch",
            stacklevel=3,
        )
    return False
