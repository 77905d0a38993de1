"""The fused loss and the neurons' statistics as operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kddp_ext import reference
from kddp_ext.ops.library import ELEMENT_TYPES, core, is_native, library

_STATISTICS_ROWS = 5
_ABSENT = (0, 0, 0)

library.define(
    "kd_l1_loss(Tensor student_logits, Tensor? teacher_logits, Tensor? labels, Tensor[] activations, "
    "float temperature, float alpha, float[] l1_weights, float label_smoothing, int ignore_index, "
    "int divergence, float jsd_beta, float dkd_target_weight, float dkd_non_target_weight, bool standardize_logits, "
    "bool logits_gradient, bool activation_gradients, bool scaled_gradients, bool statistics) "
    "-> (Tensor loss, Tensor terms, Tensor statistics, Tensor logits_gradient, Tensor[] activation_gradients)"
)
library.define("neuron_statistics(Tensor activation) -> Tensor")

LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]


def _rows_side_by_side(matrix: Tensor) -> Tensor:
    """The matrix itself where the kernels can read it (any stride between rows), else a contiguous copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def _matrix(matrix: Tensor) -> tuple[int, int, int]:
    return (matrix.data_ptr(), ELEMENT_TYPES[matrix.dtype], matrix.stride(0))


def _workspace(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _loss_outputs(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    _labels: Tensor | None,
    activations: Sequence[Tensor],
    *settings: Any,
) -> LossOutputs:
    """Outputs of `kd_l1_loss` for its arguments, not yet filled. What is not wanted is empty."""
    logits_gradient, activation_gradients, _, statistics = settings[-4:]
    dtypes = [x.dtype for x in (student_logits, teacher_logits, *activations) if x is not None]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    device = student_logits.device
    sums = (_STATISTICS_ROWS, sum([a.shape[1] for a in activations])) if statistics else (0,)
    return (
        torch.empty((), dtype=dtype, device=device),
        torch.empty(4, dtype=dtype, device=device),
        torch.empty(sums, dtype=torch.float64, device=device),
        _contiguous_like(student_logits) if logits_gradient else student_logits.new_empty(0),
        [_contiguous_like(a) for a in activations] if activation_gradients else [],
    )


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor],
    temperature: float,
    alpha: float,
    l1_weights: Sequence[float],
    label_smoothing: float,
    ignore_index: int,
    divergence: int,
    jsd_beta: float,
    dkd_target_weight: float,
    dkd_non_target_weight: float,
    standardize_logits: bool,
    logits_gradient: bool,
    activation_gradients: bool,
    scaled_gradients: bool,
    statistics: bool,
) -> LossOutputs:
    flags = (logits_gradient, activation_gradients, scaled_gradients, statistics)
    outputs = _loss_outputs(student_logits, teacher_logits, labels, activations, *flags)
    loss, terms, gathered, gradient, of_activations = outputs
    # Bound to names, for a copy must outlive the call that is given its address.
    student = _rows_side_by_side(student_logits)
    teacher = None if teacher_logits is None else _rows_side_by_side(teacher_logits)
    labels = None if labels is None else labels.contiguous()
    readable = [_rows_side_by_side(a) for a in activations]
    core.kd_l1_loss(
        student.shape[0],
        student.shape[1],
        _matrix(student),
        _ABSENT if teacher is None else _matrix(teacher),
        0 if labels is None else labels.data_ptr(),
        _layers(readable, l1_weights, of_activations, gathered if statistics else None),
        gathered.shape[-1],
        temperature,
        alpha,
        label_smoothing,
        ignore_index,
        divergence,
        jsd_beta,
        dkd_target_weight,
        dkd_non_target_weight,
        standardize_logits,
        scaled_gradients,
        gradient.data_ptr() if logits_gradient else 0,
        ELEMENT_TYPES[loss.dtype],
        loss.data_ptr(),
        terms.data_ptr(),
        _workspace,
        torch.get_num_threads(),
    )
    return outputs


_Layer = tuple[tuple[int, int, int], int, float, int, int]


def _layers(
    activations: Sequence[Tensor],
    l1_weights: Sequence[float],
    gradients: Sequence[Tensor],
    statistics: Tensor | None,
) -> list[_Layer]:
    """What `_core` wants to know of each layer; its statistics are columns of the one block `statistics`."""
    layers = []
    column = 0
    for index, activation in enumerate(activations):
        neurons = activation.shape[1]
        gradient = gradients[index].data_ptr() if gradients else 0
        block = 0 if statistics is None else statistics.data_ptr() + column * statistics.element_size()
        layers.append((_matrix(activation), neurons, l1_weights[index], gradient, block))
        column += neurons
    return layers


def _neuron_statistics(activation: Tensor) -> Tensor:
    readable = _rows_side_by_side(activation)
    statistics = activation.new_empty((_STATISTICS_ROWS, activation.shape[1]), dtype=torch.float64)
    unused = torch.empty(5, dtype=torch.float64)  # the loss of nothing
    core.kd_l1_loss(
        activation.shape[0], 0, _ABSENT, _ABSENT, 0, _layers([readable], [0.0], [], statistics), activation.shape[1],
        1.0, 0.0, 0.0, 0, 0, 0.5, 1.0, 8.0, False, False, 0, ELEMENT_TYPES[unused.dtype], unused.data_ptr(), unused[1:].data_ptr(), _workspace,
        torch.get_num_threads(),
    )  # fmt: skip
    return statistics


def _neuron_statistics_fake(activation: Tensor) -> Tensor:
    return activation.new_empty((_STATISTICS_ROWS, activation.shape[1]), dtype=torch.float64)


library.impl("kd_l1_loss", _kd_l1_loss, "CPU")
library.impl("neuron_statistics", _neuron_statistics, "CPU")
torch.library.register_fake("kddp::kd_l1_loss", _loss_outputs, lib=library)
torch.library.register_fake("kddp::neuron_statistics", _neuron_statistics_fake, lib=library)

# Bound once: looking an operator up by its name costs more than a small batch's loss.
kd_l1_loss = torch.ops.kddp.kd_l1_loss.default
_neuron_statistics_operator = torch.ops.kddp.neuron_statistics.default


def neuron_statistics(activation: Tensor) -> Tensor:
    """Sums over the samples of an activation, a column each neuron.

    Args:
        activation: (N, H) float32, float64, bfloat16 or float16, with any strides.

    Returns:
        (5, H) float64: Σ|a|, Σa, Σa², the count of nonzeros, max|a|.
    """
    if not is_native(activation.device):
        return reference.neuron_statistics(activation)
    statistics: Tensor = _neuron_statistics_operator(activation.detach())
    return statistics
