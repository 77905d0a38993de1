"""`fused_kd_l1_loss`: distillation, classification and activation penalty in one native pass."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from kddp_ext import ops
from kddp_ext.activations.layout import NeuronMatrix, as_matrix
from kddp_ext.activations.statistics import TrackedActivations
from kddp_ext.loss.checks import (
    as_sequence,
    check_label_values,
    check_tensors,
    check_tracked,
    require_constants,
    without_classes,
)
from kddp_ext.loss.settings import LossOptions, LossSettings
from kddp_ext.ops import reference

Backend = Literal["auto", "native", "reference"]
_devices_warned_of: set[str] = set()


class LossTerms(NamedTuple):
    """The terms of the loss before weighting: tensors without gradient, on the loss's device.

    They are 0-dim, but kd and ce have the shape of the labels with reduction "none".

    Attributes:
        kd: T² times the divergence, averaged over the rows whose label is not `ignore_index`, or as `reduction` says; 0
            without a teacher.
        ce: cross entropy with the labels, reduced in the same way; 0 without labels.
        l1: Σ|a| over the neurons of all layers, averaged over the batch and over positions.
        correct: number of rows whose highest logit is the label's; 0 without labels.
    """

    kd: Tensor
    ce: Tensor
    l1: Tensor
    correct: Tensor


@overload
def fused_kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Tensor | Sequence[Tensor] = ...,
    *,
    sample_weights: Tensor | None = ...,
    return_terms: Literal[False] = ...,
    backend: Backend = ...,
    **settings: Unpack[LossOptions],
) -> Tensor: ...
@overload
def fused_kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Tensor | Sequence[Tensor] = ...,
    *,
    sample_weights: Tensor | None = ...,
    return_terms: Literal[True],
    backend: Backend = ...,
    **settings: Unpack[LossOptions],
) -> tuple[Tensor, LossTerms]: ...
@overload
def fused_kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Tensor | Sequence[Tensor] = ...,
    *,
    sample_weights: Tensor | None = ...,
    return_terms: bool = ...,
    backend: Backend = ...,
    **settings: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossTerms]: ...


def fused_kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Tensor | Sequence[Tensor] = (),
    *,
    sample_weights: Tensor | None = None,
    return_terms: bool = False,
    backend: Backend = "auto",
    **settings: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossTerms]:
    """Distillation, classification and activation penalty: one value, with one pass over each input.

        loss = alpha · T² · D(softmax(t/T), softmax(s/T)) + (1 - alpha) · CE(s, labels) + Σ l1_weight · Σ|a| / N

    D is KL(softmax(t/T) ‖ softmax(s/T)) by default. The same pass computes the gradient, which `backward` only scales.
    The teacher's logits are constants. Sums are accumulated in float32 and float64.
    Second derivatives, forward mode and torch.func's transforms are computed by the reference in plain PyTorch.

    Args:
        student_logits: (..., C) float32, float64, bfloat16 or float16, with any strides; (N, C) for images, (B, S, C)
            for sequences. Every index of the leading dimensions is a row. `class_dim` moves the classes elsewhere.
        teacher_logits: the same shape, of any of these dtypes. May be None if alpha is 0.
        labels: (...) integers from 0 to C - 1, or `ignore_index`; or probabilities of the classes in the shape of
            student_logits, for mixup and cutmix, of any of these dtypes. May be None if alpha is 1.
        activations: the tensor or tensors to penalise, of any of these dtypes: (N, H) outputs of fully-connected
            layers, or (N, C, *positions) of convolutions, where each channel counts with the mean of |a| over
            positions. With the activations of a `DynamicPruner`, the same pass also updates the pruner's statistics.
        sample_weights: (...) of any of these dtypes, the weight of each row in KD and CE, at least 0; "mean" divides by
            their sum. A row of weight 0 is ignored, whatever it contains. Default None: all are 1.
        return_terms: also return the unweighted terms, for logging without a second computation.
        backend: "native" for the kernels (raises if this build has none for the device), "reference" for plain
            PyTorch, "auto" (default) for the kernels if there are any.
        **settings: the fields of `LossSettings`, which documents them and their defaults.

    Returns:
        The loss, 0-dim float32 (float64 if an input is), or of the shape of `labels` with reduction "none"; its
        gradients have the dtypes of the inputs. (loss, LossTerms) with `return_terms`. Both are 0 if there is no row or
        if every row is ignored.

    Raises:
        TypeError, ValueError: an argument is not as described. The message names it, what was expected and what came.
            On GPUs an out-of-range label does not raise, because checking it would need a sync; the loss is then NaN.

    The distillation term is by Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), with their factor T²; the penalty by
    Şener and Akbaş 2022 (doi 10.29109/gujsc.1141648). The other divergences are by Gu et al. 2024 (arXiv:2306.08543),
    Agarwal et al. 2024 (arXiv:2306.13649), Zhao et al. 2022 (arXiv:2203.08679) and Ko et al. 2024 (arXiv:2402.03898),
    standardised logits by Sun et al. 2024 (arXiv:2403.01427). docs/losses.md compares them, and the conventions of
    other libraries.
    """
    tensors = (student_logits, teacher_logits, labels, activations, sample_weights)
    return compute_loss(*tensors, _settings(settings), return_terms, backend)


_checked_settings = functools.lru_cache(maxsize=16, typed=True)(LossSettings)


def _settings(options: LossOptions) -> LossSettings:
    """The checked settings. A call with those of a recent one gets the same, which saves 5% of a small batch's time."""
    if torch.compiler.is_compiling() or not all(isinstance(value, float | int | str) for value in options.values()):
        return LossSettings(**options)  # tensors would be kept alive, and lists cannot be keys
    return _checked_settings(**options)


def compute_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Tensor | Sequence[Tensor],
    sample_weights: Tensor | None,
    settings: LossSettings,
    return_terms: bool,
    backend: Backend,
) -> Tensor | tuple[Tensor, LossTerms]:
    """`fused_kd_l1_loss` with settings that are checked already."""
    check_output(return_terms, backend)
    activations = as_sequence(activations)
    scalars = settings.scalars(len(activations))
    check_tensors(student_logits, teacher_logits, labels, activations, sample_weights, settings, scalars)
    native = choose_native(student_logits.device, backend)
    tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if native:
        refuse_jit_trace("fused_kd_l1_loss")
        require_constants(labels, scalars, settings.class_weights, sample_weights)
    if not tracing and any(isinstance(scalar, Tensor) for scalar in scalars):
        numbers = settings.read().scalars(len(activations))  # also checks the values
        scalars = numbers if native else scalars
    logits = _as_rows(student_logits, settings.class_dim)
    targets = None if teacher_logits is None else _as_rows(teacher_logits.detach(), settings.class_dim)
    if labels is not None and labels.is_floating_point():
        labels = _as_rows(labels, settings.class_dim)
    elif labels is not None and (labels.dim() != 1 or labels.dtype != torch.int64):
        labels = labels.reshape(-1).to(torch.int64)
    tracked = activations if isinstance(activations, TrackedActivations) and torch.is_grad_enabled() else None
    if tracked is not None:
        check_tracked(tracked, scalars[3:], student_logits)
    matrices = as_matrices(activations)
    weights = settings.kernel_class_weights(labels), row_weights(logits, labels, sample_weights, settings)
    tensors, values = (logits, targets, labels, *weights), [matrix.values for matrix in matrices]
    samples, constants = [matrix.samples for matrix in matrices], settings.constants()
    if native and ops.native_derivatives():
        is_tracked = tracked is not None
        loss, terms, rows, sums = ops.kd_l1_loss(tensors, values, scalars, samples, constants, statistics=is_tracked)
        if tracked is not None:
            tracked.update(matrices, sums)
    else:
        if type(labels) is Tensor and labels.is_cpu and not labels.is_floating_point() and not tracing:
            check_label_values(labels, logits.shape[1], settings.ignore_index)
        loss, terms, rows = reference.kd_l1_loss(*tensors, values, scalars, samples, *constants)
        if tracked is not None:
            tracked.observe()
    if tracked is not None:
        record_loss(tracked, loss, terms, scalars, len(logits))
    by_row = settings.reduction == "none"
    if by_row:
        shape = without_classes(student_logits, settings.class_dim)
        loss, rows = loss.reshape(shape), rows.reshape(2, *shape)
    if not return_terms:
        return loss
    kd, ce, l1, correct = terms.unbind()
    return loss, LossTerms(rows[0] if by_row else kd, rows[1] if by_row else ce, l1, correct)


def record_loss(tracked: TrackedActivations, loss: Tensor, terms: Tensor, scalars: Sequence[Any], rows: int) -> None:
    """Tell the observer, if there is one, the loss and the mean loss of a row without the penalty."""
    if tracked.observer is None:
        return
    _, alpha, divisor, *_ = scalars
    per_row = 1.0 if isinstance(divisor, float) and divisor == 0 else divisor / max(rows, 1)
    kd, ce = terms[:2].detach()
    # Rows that are not reduced become a mean by what the caller does with them.
    tracked.record(loss, (alpha * kd + (1 - alpha) * ce) * per_row, per_row if loss.dim() == 0 else 1.0)


def _as_rows(logits: Tensor, class_dim: int) -> Tensor:
    """The logits as (rows, classes)."""
    if logits.dim() == 2 and class_dim in (1, -1):
        return logits
    return logits.movedim(class_dim, -1).reshape(-1, logits.shape[class_dim])


def row_weights(
    logits: Tensor,
    labels: Tensor | None,
    sample_weights: Tensor | None,
    settings: LossSettings,
) -> Tensor | None:
    """(2, rows) float64 factors of KD and CE. For "mean" they are scaled to the number of rows, which is divided by.

    Those of CE contain the class's weight, unless the kernels read the class weights themselves.
    """
    hard = labels is not None and not labels.is_floating_point()
    if sample_weights is None and (settings.class_weights is None or not hard):
        return None
    valid = torch.ones(len(logits), dtype=torch.float64, device=logits.device)
    if labels is not None and hard:
        valid = (labels != settings.ignore_index).to(torch.float64)
    of_samples = valid if sample_weights is None else valid * sample_weights.reshape(-1)
    of_labels = of_samples
    if settings.class_weights is not None and labels is not None and hard:
        of_classes = settings.class_weights.to(torch.float64)[labels.clamp(0, logits.shape[1] - 1)]
        of_labels = of_samples * of_classes
    in_kernels = settings.kernel_class_weights(labels) is not None
    weights = torch.stack([of_samples, of_samples if in_kernels else of_labels])
    if settings.reduction == "mean" and settings.normalizer is None:
        totals = torch.stack([of_samples.sum(), of_labels.sum()])[:, None]
        weights = torch.where(totals > 0, weights * (valid.sum() / totals), 0)
    return weights


def as_matrices(activations: Sequence[Tensor]) -> list[NeuronMatrix]:
    if isinstance(activations, TrackedActivations):
        return activations.matrices()
    return [as_matrix(activation) for activation in activations]


def choose_native(device: torch.device, backend: Backend) -> bool:
    if backend == "reference":
        return False
    if ops.is_native(device):
        return True
    if backend == "native":
        raise ValueError(f"backend: expected 'auto' or 'reference', got 'native', but {ops.why_not_native(device)}")
    if device.type not in _devices_warned_of:
        _devices_warned_of.add(device.type)
        warnings.warn(
            f"the loss runs in plain PyTorch, because {ops.why_not_native(device)}",
            stacklevel=4,
        )
    return False


def refuse_jit_trace(function: str) -> None:
    """Raise under torch.jit.trace."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            f"{function}: torch.jit.trace cannot record the native kernels; use backend='reference' or torch.export"
        )


def check_output(return_terms: bool, backend: str) -> None:
    """Raise unless `return_terms` and `backend` are as `fused_kd_l1_loss` describes them."""
    if not isinstance(return_terms, bool):
        raise TypeError(f"return_terms: expected a bool, got {type(return_terms).__name__}")
    if not isinstance(backend, str) or backend not in ("auto", "native", "reference"):
        raise ValueError(f"backend: expected 'auto', 'native' or 'reference', got {backend!r}")
