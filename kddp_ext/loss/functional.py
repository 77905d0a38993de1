"""The loss of knowledge distillation with dynamic pruning, in one native pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from kddp_ext import ops
from kddp_ext.activations.layout import NeuronMatrix, as_matrix
from kddp_ext.activations.statistics import TrackedActivations
from kddp_ext.loss import arguments
from kddp_ext.loss.autograd import Inputs, Settings, is_tracing, native_loss
from kddp_ext.ops import reference
from kddp_ext.ops.divergences import DIVERGENCES

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
    arguments.check_settings(temperature, alpha, label_smoothing, ignore_index)
    arguments.check_divergence(divergence, jsd_beta, standardize_logits, dkd_target_weight, dkd_non_target_weight)
    arguments.check_output(return_terms, backend)
    arguments.check_logits(student_logits, teacher_logits, labels, activations, alpha)
    if divergence == "dkd" and labels is None:
        raise ValueError("labels: expected a tensor, since divergence is 'dkd', got None")
    weights = arguments.check_weights(l1_weight, len(activations))
    if labels is not None and labels.dtype != torch.int64:
        labels = labels.to(torch.int64)
    matrices = _matrices(activations)
    inputs = Inputs(student_logits, _constant(teacher_logits), labels, [matrix.values for matrix in matrices])
    settings = Settings(
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
        loss, terms, sums = native_loss(inputs, settings, return_terms, tracked is not None)
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
    return [as_matrix(activation) for activation in activations]


def _constant(teacher_logits: Tensor | None) -> Tensor | None:
    return teacher_logits.detach() if teacher_logits is not None and teacher_logits.requires_grad else teacher_logits


def _reference_loss(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    labels = inputs.labels
    if type(labels) is Tensor and labels.is_cpu and not is_tracing():
        arguments.check_label_values(labels, inputs.student_logits.shape[1], settings.ignore_index)
    named = settings._asdict() | {"divergence": DIVERGENCES[settings.divergence]}
    return reference.kd_l1_loss(*inputs, **named)


def _choose_native(device: torch.device, backend: Backend) -> bool:
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
