"""What the loss accepts. Every error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kddp_ext import ops
from kddp_ext.activations.statistics import TrackedActivations
from kddp_ext.ops.divergences import DIVERGENCES

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_logits(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor],
    alpha: float,
) -> None:
    _check_matrix("student_logits", student_logits, student_logits)
    rows, classes = student_logits.shape
    if classes < 1:
        raise ValueError(f"student_logits: expected at least one class, got shape {tuple(student_logits.shape)}")
    if teacher_logits is not None:
        _check_matrix("teacher_logits", teacher_logits, student_logits)
        if teacher_logits.shape != student_logits.shape:
            raise ValueError(
                f"teacher_logits: expected the student's shape {(rows, classes)}, got {tuple(teacher_logits.shape)}"
            )
    elif alpha != 0:
        raise ValueError(f"teacher_logits: expected a tensor, since alpha is {alpha} and not 0, got None")
    if labels is not None:
        _check_labels(labels, student_logits)
    elif alpha != 1:
        raise ValueError(f"labels: expected a tensor, since alpha is {alpha} and not 1, got None")
    if isinstance(activations, Tensor) or not isinstance(activations, Sequence):
        raise TypeError(f"activations: expected a sequence of tensors, got {type(activations).__name__}")
    axes = activations.axes if isinstance(activations, TrackedActivations) else None
    for number, activation in enumerate(activations):
        _check_tensor(f"activations[{number}]", activation, student_logits)
        if activation.dim() < 2:
            raise ValueError(
                f"activations[{number}]: expected (rows, neurons) or (rows, channels, *positions), got shape "
                f"{tuple(activation.shape)}"
            )
        axis = 1 if axes is None else axes[number]
        if axis == 1 and activation.shape[0] != rows:
            raise ValueError(
                f"activations[{number}]: expected {rows} rows as in student_logits, got shape {tuple(activation.shape)}"
            )


def _check_matrix(name: str, matrix: Tensor, student_logits: Tensor) -> None:
    _check_tensor(name, matrix, student_logits)
    if matrix.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(matrix.shape)}")


def _check_tensor(name: str, tensor: Tensor, student_logits: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    _check_layout(name, tensor)
    if tensor.dtype not in ops.ELEMENT_TYPES:
        raise TypeError(f"{name}: expected dtype float32, float64, bfloat16 or float16, got {tensor.dtype}")
    _check_device(name, tensor, student_logits)


def _check_labels(labels: Tensor, student_logits: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
    _check_layout("labels", labels)
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"labels: expected an integer dtype such as int64, got {labels.dtype}")
    if labels.shape != student_logits.shape[:1]:
        raise ValueError(f"labels: expected shape {(student_logits.shape[0],)}, got {tuple(labels.shape)}")
    _check_device("labels", labels, student_logits)


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got layout {'nested' if tensor.is_nested else tensor.layout}"
        )


def _check_device(name: str, tensor: Tensor, student_logits: Tensor) -> None:
    if tensor.device != student_logits.device:
        raise ValueError(f"{name}: expected device {student_logits.device} as student_logits, got {tensor.device}")


def check_settings(temperature: float, alpha: float, label_smoothing: float, ignore_index: int) -> None:
    _check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    for name, value in (("alpha", alpha), ("label_smoothing", label_smoothing)):
        _check_number(name, value)
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        bits = ignore_index.bit_length()
        raise ValueError(f"ignore_index: expected an integer of 64 bits, as labels are, got one of {bits}")


def check_output(return_terms: bool, backend: str) -> None:
    if not isinstance(return_terms, bool):
        raise TypeError(f"return_terms: expected a bool, got {type(return_terms).__name__}")
    if not isinstance(backend, str) or backend not in ("auto", "native", "reference"):
        raise ValueError(f"backend: expected 'auto', 'native' or 'reference', got {backend!r}")


def check_divergence(divergence: str, jsd_beta: float, standardize_logits: bool, *dkd_weights: float) -> None:
    if not isinstance(divergence, str) or divergence not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    _check_number("jsd_beta", jsd_beta)
    if not 0 < jsd_beta < 1:
        raise ValueError(
            f"jsd_beta: expected a number between 0 and 1 (at the ends use 'forward_kl', 'reverse_kl'), got {jsd_beta}"
        )
    if not isinstance(standardize_logits, bool):
        raise TypeError(f"standardize_logits: expected a bool, got {type(standardize_logits).__name__}")
    for name, weight in zip(("dkd_target_weight", "dkd_non_target_weight"), dkd_weights, strict=True):
        _check_number(name, weight)
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {weight}")


def check_label_values(labels: Tensor, classes: int, ignore_index: int) -> None:
    """What the kernels of the CPU check as they go; PyTorch's own functions say less, or nothing."""
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    rows = wrong.nonzero().flatten()
    if len(rows):
        row = int(rows[0])
        raise ValueError(
            f"labels: expected values from 0 to {classes - 1} or ignore_index={ignore_index}, got {int(labels[row])} "
            f"in row {row}"
        )


def check_weights(l1_weight: float | Sequence[float], layers: int) -> list[float]:
    if isinstance(l1_weight, str | bytes) or not isinstance(l1_weight, Sequence):
        return [_checked_weight(l1_weight)] * layers
    if len(l1_weight) != layers:
        raise ValueError(f"l1_weight: expected one weight for each of {layers} activations, got {len(l1_weight)}")
    return [_checked_weight(weight) for weight in l1_weight]


def _checked_weight(weight: Any) -> float:
    _check_number("l1_weight", weight)
    if not 0 <= weight < math.inf:
        raise ValueError(f"l1_weight: expected a finite number of at least 0, got {weight}")
    return float(weight)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, float):  # which it nearly always is
        return
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: expected a finite number, got one that no float can hold") from error
