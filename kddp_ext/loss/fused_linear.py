"""`fused_linear_kd_loss`: the loss of two last layers, without the logits of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from kddp_ext import ops
from kddp_ext.activations.statistics import TrackedActivations
from kddp_ext.loss.checks import (
    as_sequence,
    check_label_values,
    check_tensors,
    check_tracked,
    check_values,
    require_constants,
)
from kddp_ext.loss.functional import (
    Backend,
    LossTerms,
    as_matrices,
    check_output,
    choose_native,
    compute_loss,
    record_loss,
    refuse_jit_trace,
    row_weights,
)
from kddp_ext.loss.settings import LossOptions, LossSettings

# Of a chunk's logits for one network. The two matrices of a layer are read again for each chunk, so larger chunks are
# faster; from 64 MiB on there is little to gain (docs/performance.md).
CHUNK_BYTES = 64 << 20


@overload
def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    activations: Tensor | Sequence[Tensor] = ...,
    *,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    sample_weights: Tensor | None = ...,
    chunk_rows: int | None = ...,
    return_terms: Literal[False] = ...,
    backend: Backend = ...,
    **settings: Unpack[LossOptions],
) -> Tensor: ...
@overload
def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    activations: Tensor | Sequence[Tensor] = ...,
    *,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    sample_weights: Tensor | None = ...,
    chunk_rows: int | None = ...,
    return_terms: Literal[True],
    backend: Backend = ...,
    **settings: Unpack[LossOptions],
) -> tuple[Tensor, LossTerms]: ...
@overload
def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    activations: Tensor | Sequence[Tensor] = ...,
    *,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    sample_weights: Tensor | None = ...,
    chunk_rows: int | None = ...,
    return_terms: bool = ...,
    backend: Backend = ...,
    **settings: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossTerms]: ...


def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    activations: Tensor | Sequence[Tensor] = (),
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    sample_weights: Tensor | None = None,
    chunk_rows: int | None = None,
    return_terms: bool = False,
    backend: Backend = "auto",
    **settings: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossTerms]:
    """`fused_kd_l1_loss` of two linear layers' outputs, in the memory of a few rows of logits.

    For many classes or the vocabulary of a language model. The result is that of

        fused_kd_l1_loss(F.linear(student_hidden, student_weight, student_bias),
                         F.linear(teacher_hidden, teacher_weight, teacher_bias), labels, ...)

    but the logits are multiplied out for one chunk of rows at a time. The forward pass also computes the gradients, and
    `backward` scales them; reduction "none" computes them in `backward`, from logits that are multiplied out again. The
    gradients of weight and bias are summed in float32, or float64. The teacher's side is constant.

    Second derivatives, forward mode, torch.func's transforms and backend "reference" use the formula above, with all
    logits in memory. Under autocast the layers compute in its dtype, as `torch.nn.functional.linear` does.

    Args:
        student_hidden: (..., D) inputs of the student's last layer: float32, float64, bfloat16 or float16, with any
            strides. Every index of the leading dimensions is a row.
        student_weight: (C, D), the layer's weight, in the same dtype.
        teacher_hidden: (..., D_teacher), the same for the teacher, with the same leading dimensions; its dtype may
            differ from the student's. May be None if alpha is 0.
        teacher_weight: (C, D_teacher), in the dtype of `teacher_hidden`. None without it.
        labels: as of `fused_kd_l1_loss`.
        activations: as of `fused_kd_l1_loss`.
        student_bias: (C,), in the dtype of `student_hidden`, or None (default).
        teacher_bias: (C,), in the dtype of `teacher_hidden`, or None (default).
        sample_weights: as of `fused_kd_l1_loss`.
        chunk_rows: the most rows of a chunk. By default a chunk's logits take 64 MiB for each network, which is enough
            for the products to be as fast as those of all rows.
        return_terms: as of `fused_kd_l1_loss`.
        backend: as of `fused_kd_l1_loss`.
        **settings: the fields of `LossSettings`; `class_dim` must be -1.

    Returns:
        As of `fused_kd_l1_loss`. Only the gradients that are required are computed.

    Raises:
        TypeError, ValueError: an argument is not as described. The message names it, what was expected and what came.

    Chunks that compute their gradient in the forward pass are by Hsu et al. 2024 (Liger Kernel, arXiv:2410.10989).
    """
    checked = LossSettings(**settings)
    check_output(return_terms, backend)
    student = _autocast(student_hidden, student_weight, student_bias)
    teacher = _autocast(teacher_hidden, teacher_weight, teacher_bias)
    _check_layers(student, teacher, checked)
    student_hidden, student_weight, _ = student
    activations = as_sequence(activations)
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_BYTES // (student_weight.shape[0] * student_weight.element_size()))
    elif not isinstance(chunk_rows, int) or isinstance(chunk_rows, bool):
        raise TypeError(f"chunk_rows: expected an integer or None, got {type(chunk_rows).__name__}")
    elif chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least 1, got {chunk_rows}")
    native = choose_native(student_hidden.device, backend)
    if not native or not ops.native_derivatives():
        logits = F.linear(*student), None if teacher[0] is None else F.linear(*teacher)
        return compute_loss(*logits, labels, activations, sample_weights, checked, return_terms, backend)
    refuse_jit_trace("fused_linear_kd_loss")
    logits = _stand_in_logits(*student[:2]), None if teacher[0] is None else _stand_in_logits(*teacher[:2])
    scalars = checked.scalars(len(activations))
    check_tensors(*logits, labels, activations, sample_weights, checked, scalars)
    require_constants(labels, scalars, checked.class_weights, sample_weights)
    if not torch.compiler.is_compiling() and any(isinstance(scalar, Tensor) for scalar in scalars):
        scalars = checked.read().scalars(len(activations))  # also checks the values
    arguments = (labels, activations, sample_weights, checked, scalars, chunk_rows, return_terms)
    return _compute(student, teacher, logits[0], *arguments)


_Layer = tuple[Any, Any, Any]  # hidden states, weight and bias


def _compute(
    student: _Layer,
    teacher: _Layer,
    logits: Tensor,
    labels: Tensor | None,
    activations: Sequence[Tensor],
    sample_weights: Tensor | None,
    settings: LossSettings,
    scalars: Sequence[Any],
    chunk_rows: int,
    return_terms: bool,
) -> Tensor | tuple[Tensor, LossTerms]:
    """The loss by the kernels. `logits` has the shape and dtype of the student's, and no memory."""
    shape, classes = logits.shape[:-1], logits.shape[-1]
    if labels is not None and labels.is_floating_point():
        labels = labels.reshape(-1, classes)
    elif labels is not None:
        labels = labels.reshape(-1).to(torch.int64)
        if type(labels) is Tensor and labels.is_cpu and not torch.compiler.is_compiling():
            check_label_values(labels, classes, settings.ignore_index)
    tracked = activations if isinstance(activations, TrackedActivations) and torch.is_grad_enabled() else None
    matrices = as_matrices(activations)
    temperature, alpha, normalizer, *l1_weights = scalars
    if tracked is not None:
        differentiable = [x for x in student if x is not None and x.requires_grad]
        check_tracked(tracked, l1_weights, differentiable[0] if differentiable else logits)
    rows = shape.numel()
    weights = _weights_of_chunks(logits.reshape(rows, classes), labels, sample_weights, settings)
    loss, terms, by_row = ops.linear_kd_loss(
        *_as_rows(student, rows),
        *_as_rows(teacher, rows),
        labels,
        settings.kernel_class_weights(labels),
        weights,
        scalars=[temperature, alpha, max(rows, 1) if _divides_by_rows(settings) else normalizer],
        chunk_rows=chunk_rows,
        constants=settings.constants(),
    )
    kd, ce, l1, correct = terms.unbind()
    if matrices:
        share = 1.0 if _divides_by_rows(settings) else rows / normalizer
        penalty, of_penalty, _, sums = ops.kd_l1_loss(
            (logits.new_empty(0, classes), None, None, None, None),
            [matrix.values for matrix in matrices],
            [1.0, 0.0, 0.0, *[weight * share for weight in l1_weights]],
            [matrix.samples for matrix in matrices],
            (*settings.constants()[:-1], False),
            statistics=tracked is not None,
        )
        l1 = of_penalty[2] * share
        if settings.reduction != "none":
            loss = loss + penalty
        if tracked is not None:
            tracked.update(matrices, sums)
            record_loss(
                tracked, loss, terms, [temperature, alpha, 0.0 if _divides_by_rows(settings) else normalizer], rows
            )
    if settings.reduction == "none":
        loss, kd, ce = (values.reshape(shape) for values in (loss, *by_row.unbind()))
    return (loss, LossTerms(kd, ce, l1, correct)) if return_terms else loss


def _divides_by_rows(settings: LossSettings) -> bool:
    """Whether the divisor is the number of valid rows or the sum of their weights."""
    return settings.reduction == "mean" and settings.normalizer is None


def _weights_of_chunks(
    logits: Tensor, labels: Tensor | None, sample_weights: Tensor | None, settings: LossSettings
) -> Tensor | None:
    """The factors of the rows' KD and CE, which turn a division by all rows into one by the valid rows of all chunks.

    As factors they need no transfer of their number from the device.
    """
    weights = row_weights(logits, labels, sample_weights, settings)
    if labels is None or labels.is_floating_point() or not _divides_by_rows(settings):
        return weights
    valid = (labels != settings.ignore_index).to(torch.float64)
    share = len(labels) / valid.sum().clamp(min=1)
    return (valid.expand(2, -1) if weights is None else weights) * share


def _as_rows(layer: _Layer, rows: int) -> _Layer:
    hidden, weight, bias = layer
    return (None if hidden is None else hidden.reshape(rows, hidden.shape[-1])), weight, bias


def _stand_in_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """A tensor of one element with the logits' shape and dtype, for the checks."""
    return hidden.new_empty(()).expand(*hidden.shape[:-1], weight.shape[0])


def _autocast(hidden: Any, weight: Any, bias: Any) -> _Layer:
    """The tensors in autocast's dtype, if it is active. Like `F.linear` it leaves float64 alone."""
    tensors = (hidden, weight, bias)
    device = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    if not isinstance(hidden, Tensor) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    is_cast = [isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 for x in tensors]
    cast = [x.to(dtype) if each else x for x, each in zip(tensors, is_cast, strict=True)]
    return cast[0], cast[1], cast[2]


def _check_layers(student: _Layer, teacher: _Layer, settings: LossSettings) -> None:
    """Raise unless the layers and `class_dim` are as `fused_linear_kd_loss` describes them."""
    if settings.class_dim != -1:
        raise ValueError(f"class_dim: expected -1, since hidden states end with features, got {settings.class_dim}")
    hidden, weight, _ = student
    _check_layer("student", student, hidden)
    if teacher[0] is None:
        for name, each in zip(("teacher_weight", "teacher_bias"), teacher[1:], strict=True):
            if each is not None:
                raise ValueError(f"{name}: expected None without teacher_hidden, got a {type(each).__name__}")
        if isinstance(settings.alpha, Tensor) or settings.alpha != 0:
            raise ValueError(f"teacher_hidden: expected a tensor, since alpha is {settings.alpha} and not 0, got None")
        return
    _check_layer("teacher", teacher, hidden)
    if teacher[0].shape[:-1] != hidden.shape[:-1]:
        expected, got = tuple(hidden.shape[:-1]), tuple(teacher[0].shape[:-1])
        raise ValueError(f"teacher_hidden: expected the leading dimensions {expected} of student_hidden, got {got}")
    if len(teacher[1]) != len(weight):
        raise ValueError(f"teacher_weight: expected {len(weight)} classes as in student_weight, got {len(teacher[1])}")


def _check_layer(side: str, layer: _Layer, student_hidden: Any) -> None:
    names = [f"{side}_{part}" for part in ("hidden", "weight", "bias")]
    for name, tensor in zip(names, layer, strict=True):
        if tensor is None and name.endswith("bias"):
            continue
        check_values(name, tensor, student_hidden, "student_hidden")
        if tensor.dtype != layer[0].dtype:
            raise TypeError(f"{name}: expected dtype {layer[0].dtype} as {names[0]}, got {tensor.dtype}")
    hidden, weight, bias = layer
    if hidden.dim() == 0:
        raise ValueError(f"{names[0]}: expected at least 1 dimension, got shape ()")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        expected = f"(classes, {hidden.shape[-1]}), with at least one class"
        raise ValueError(f"{names[1]}: expected shape {expected}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names[2]}: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
