"""Checks of the loss's tensors. Every message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kddp_ext import ops
from kddp_ext.activations.statistics import TrackedActivations
from kddp_ext.loss.settings import LossSettings

_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensors(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor],
    sample_weights: Tensor | None,
    settings: LossSettings,
    scalars: Sequence[Any],
) -> None:
    """Raise unless the tensors are as `fused_kd_l1_loss` describes them."""
    check_values("student_logits", student_logits, student_logits)
    class_dim, dimensions = settings.class_dim, student_logits.dim()
    if dimensions == 0:
        raise ValueError("student_logits: expected at least 1 dimension, got shape ()")
    if not -dimensions <= class_dim < dimensions:
        shape = tuple(student_logits.shape)
        raise ValueError(
            f"class_dim: expected a dimension of student_logits, which have shape {shape}, got {class_dim}"
        )
    if student_logits.shape[class_dim] < 1:
        raise ValueError(f"student_logits: expected at least one class, got shape {tuple(student_logits.shape)}")
    if teacher_logits is not None:
        check_values("teacher_logits", teacher_logits, student_logits)
        if teacher_logits.shape != student_logits.shape:
            expected, got = tuple(student_logits.shape), tuple(teacher_logits.shape)
            raise ValueError(f"teacher_logits: expected the student's shape {expected}, got {got}")
    elif isinstance(settings.alpha, Tensor) or settings.alpha != 0:
        raise ValueError(f"teacher_logits: expected a tensor, since alpha is {settings.alpha} and not 0, got None")
    expected = without_classes(student_logits, class_dim)
    if labels is not None:
        _check_labels(labels, student_logits, expected, settings.divergence)
    elif isinstance(settings.alpha, Tensor) or settings.alpha != 1:
        raise ValueError(f"labels: expected a tensor, since alpha is {settings.alpha} and not 1, got None")
    elif settings.divergence == "dkd":
        raise ValueError("labels: expected a tensor, since divergence is 'dkd', got None")
    _check_activations(activations, student_logits, expected[0] if expected else 1)
    if settings.reduction == "none" and any(isinstance(weight, Tensor) or weight != 0 for weight in scalars[3:]):
        raise ValueError(
            "reduction: expected 'mean' or 'sum' with an l1_weight, because a penalty is no value of a row, got 'none'"
        )
    if sample_weights is not None:
        _check_weights("sample_weights", sample_weights, expected, student_logits)
    if settings.class_weights is not None:
        _check_weights("class_weights", settings.class_weights, student_logits.shape[class_dim:][:1], student_logits)


def _check_weights(name: str, weights: Tensor, shape: tuple[int, ...], student_logits: Tensor) -> None:
    check_values(name, weights, student_logits)
    if weights.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(weights.shape)}")
    tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    # As with labels, a check of values on a GPU would need a sync.
    if weights.is_cpu and not tracing and not ((weights >= 0) & (weights < torch.inf)).all():
        raise ValueError(f"{name}: expected finite numbers of at least 0, got {weights.min():g} to {weights.max():g}")


def require_constants(
    labels: Tensor | None, scalars: Sequence[Any], class_weights: Tensor | None, sample_weights: Tensor | None
) -> None:
    """Raise if labels or a setting require a gradient, which the kernels do not have."""
    values = (labels, *scalars, class_weights, sample_weights)
    if not (torch.is_grad_enabled() and any(isinstance(value, Tensor) for value in values)):
        return
    l1_weights = ["l1_weight"] * (len(scalars) - 3)
    names = ("labels", "temperature", "alpha", "normalizer", *l1_weights, "class_weights", "sample_weights")
    for name, value in zip(names, values, strict=True):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name}: expected a constant, because the kernels have no derivative with respect to it, got a tensor "
                "that requires a gradient; detach it, or use backend='reference'"
            )


def as_sequence(activations: Any) -> Sequence[Tensor]:
    """One or several activations as a sequence."""
    if isinstance(activations, Tensor):
        return (activations,)
    if not isinstance(activations, Sequence):
        raise TypeError(f"activations: expected a tensor or a sequence of tensors, got {type(activations).__name__}")
    return activations


def without_classes(student_logits: Tensor, class_dim: int) -> tuple[int, ...]:
    """The shape of the labels."""
    shape = student_logits.shape
    if class_dim == -1:
        return shape[:-1]
    return (*shape[:class_dim], *shape[class_dim:][1:])


def _check_labels(labels: Tensor, student_logits: Tensor, expected: tuple[int, ...], divergence: str) -> None:
    _check_dense("labels", labels)
    if labels.dtype in ops.ELEMENT_TYPES:
        expected = student_logits.shape
        if divergence == "dkd":
            raise ValueError("labels: expected classes, since divergence is 'dkd', got probabilities")
    elif labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"labels: expected an integer dtype such as int64, or probabilities, got {labels.dtype}")
    if labels.shape != expected:
        raise ValueError(f"labels: expected shape {tuple(expected)}, got {tuple(labels.shape)}")
    _check_device("labels", labels, student_logits)


def _check_activations(activations: Sequence[Tensor], student_logits: Tensor, rows: int) -> None:
    axes = activations.axes if isinstance(activations, TrackedActivations) else None
    for index, activation in enumerate(activations):
        name = f"activations[{index}]"
        check_values(name, activation, student_logits)
        shape = activation.shape
        if len(shape) < 2:
            expected = "(rows, neurons) or (rows, channels, *positions)"
            raise ValueError(f"{name}: expected {expected}, got shape {tuple(shape)}")
        if (axes is None or axes[index] == 1) and shape[0] != rows:
            raise ValueError(f"{name}: expected {rows} rows as in student_logits, got shape {tuple(shape)}")


def check_tracked(activations: TrackedActivations, l1_weights: Sequence[Any], student_logits: Tensor) -> None:
    """Raise if a pruner's activations could not update its statistics, or if their penalty would be silently lost."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "activations: a pruner's statistics cannot be updated inside torch.func's transforms; pass "
            "list(pruner.activations), and call pruner.activations.observe() outside"
        )
    for index, (activation, weight) in enumerate(zip(activations, l1_weights, strict=True)):
        penalised = isinstance(weight, Tensor) or weight != 0
        if penalised and student_logits.requires_grad and not activation.requires_grad:
            raise ValueError(
                f"activations[{index}]: expected a tensor that requires a gradient, as student_logits does, got one "
                "without, so its penalty would change nothing; use checkpoints with use_reentrant=False, call the "
                "model outside torch.no_grad(), and give frozen layers an l1_weight of 0"
            )


def check_values(name: str, tensor: Tensor, first: Tensor, first_name: str = "student_logits") -> None:
    """Raise unless `tensor` is a dense tensor of a dtype that the kernels read, on the device of the `first` one."""
    _check_dense(name, tensor)
    if tensor.dtype not in ops.ELEMENT_TYPES:
        raise TypeError(f"{name}: expected dtype float32, float64, bfloat16 or float16, got {tensor.dtype}")
    _check_device(name, tensor, first, first_name)


def _check_dense(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: expected a dense tensor, got layout {layout}")


def _check_device(name: str, tensor: Tensor, first: Tensor, first_name: str = "student_logits") -> None:
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected device {first.device} as {first_name}, got {tensor.device}")


def check_label_values(labels: Tensor, classes: int, ignore_index: int) -> None:
    """The check that the CPU kernels do in their pass; PyTorch's own functions do less of it, or none."""
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    rows = wrong.nonzero().flatten()
    if len(rows):
        row = int(rows[0])
        raise ValueError(
            f"labels: expected values from 0 to {classes - 1} or ignore_index={ignore_index}, got {int(labels[row])} "
            f"in row {row}"
        )
