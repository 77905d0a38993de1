"""The fused loss and the neurons' statistics as operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kddp_ext.ops import reference
from kddp_ext.ops.gradient_pool import pool
from kddp_ext.ops.library import ELEMENT_TYPES, is_native, library, native, scales_natively, workspace_on

_STATISTICS_ROWS = 5
_ABSENT = (0, 0, 0)
_PLAIN = (Tensor, torch.nn.Parameter)

library.define(
    "kd_l1_loss(Tensor student_logits, Tensor? teacher_logits, Tensor? labels, Tensor[] activations, "
    "float temperature, float alpha, float[] l1_weights, float[] samples, float label_smoothing, int ignore_index, "
    "int divergence, float jsd_beta, float dkd_target_weight, float dkd_non_target_weight, bool standardize_logits, "
    "bool logits_gradient, bool activation_gradients, bool scaled_gradients, bool statistics) "
    "-> (Tensor loss, Tensor terms, Tensor statistics, Tensor logits_gradient, Tensor[] activation_gradients)"
)
library.define("neuron_statistics(Tensor activation) -> Tensor")
library.define("scale_gradients(Tensor[] gradients, Tensor grad_loss, float[] factors) -> Tensor[]")
library.define("scale_gradients_(Tensor(a!)[] gradients, Tensor grad_loss, float[] factors) -> ()")

LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]


def _rows_side_by_side(matrix: Tensor) -> Tensor:
    """The matrix itself where the kernels can read it (any stride between rows), else a contiguous copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def _matrix(matrix: Tensor) -> tuple[int, int, int]:
    return (matrix.data_ptr(), ELEMENT_TYPES[matrix.dtype], matrix.stride(0))


def _loss_outputs(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    _labels: Tensor | None,
    activations: Sequence[Tensor],
    *settings: Any,
) -> LossOutputs:
    """Outputs of `kd_l1_loss` for its arguments, not yet filled. What is not wanted is empty."""
    logits_gradient, activation_gradients, _, statistics = settings[-4:]
    dtype, device = _result_type(student_logits, teacher_logits, activations), student_logits.device
    sums = (_STATISTICS_ROWS, sum([a.shape[1] for a in activations])) if statistics else (0,)
    return (
        torch.empty((), dtype=dtype, device=device),
        torch.empty(4, dtype=dtype, device=device),
        torch.empty(sums, dtype=torch.float64, device=device),
        _gradient_of(student_logits) if logits_gradient else student_logits.new_empty(0),
        [_gradient_of(a) for a in activations] if activation_gradients else [],
    )


def _result_type(student: Tensor, teacher: Tensor | None, activations: Sequence[Tensor]) -> torch.dtype:
    """That of the loss and its terms: float64 where an input is, else float32."""
    for tensor in (student, teacher, *activations):
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _gradient_of(tensor: Tensor) -> Tensor:
    if _is_plain(tensor):
        return pool.empty(tensor.shape, tensor.dtype)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor],
    temperature: float,
    alpha: float,
    l1_weights: Sequence[float],
    samples: Sequence[float],
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
    loss, terms, sums, of_logits, of_activations = outputs
    settings = (
        *(temperature, alpha, l1_weights, samples, label_smoothing, ignore_index, divergence, jsd_beta),
        *(dkd_target_weight, dkd_non_target_weight, standardize_logits),
    )
    _run(
        (student_logits, teacher_logits, labels, activations),
        settings,
        scaled_gradients,
        (loss, terms, sums if statistics else None, of_logits if logits_gradient else None, of_activations),
    )
    return outputs


def _run(
    inputs: tuple[Tensor, Tensor | None, Tensor | None, Sequence[Tensor]],
    settings: tuple[Any, ...],
    scaled_gradients: bool,
    outputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, list[Tensor]],
) -> None:
    """Fill the outputs. What is None, or of the activations' gradients an empty list, is not wanted."""
    student, teacher, labels, activations = inputs
    loss, terms, sums, of_logits, of_activations = outputs
    temperature, alpha, l1_weights, samples = settings[:4]
    # Bound to names, for a copy must outlive the call that is given its address.
    student = _rows_side_by_side(student)
    teacher = None if teacher is None else _rows_side_by_side(teacher)
    labels = None if labels is None else labels.contiguous()
    readable = [_rows_side_by_side(a) for a in activations]
    rows, classes = student.shape
    module, place = native(student)
    module.kd_l1_loss(
        rows,
        classes,
        _matrix(student),
        _ABSENT if teacher is None else _matrix(teacher),
        0 if labels is None else labels.data_ptr(),
        _layers(readable, l1_weights, samples, of_activations, sums),
        0 if sums is None else sums.shape[1],
        temperature,
        alpha,
        *settings[4:],
        scaled_gradients,
        0 if of_logits is None else of_logits.data_ptr(),
        ELEMENT_TYPES[loss.dtype],
        loss.data_ptr(),
        0 if terms is None else terms.data_ptr(),
        workspace_on(student.device),
        place,
    )


_Layer = tuple[tuple[int, int, int], int, int, float, float, int, int]


def _layers(
    activations: Sequence[Tensor],
    l1_weights: Sequence[float],
    samples: Sequence[float],
    gradients: Sequence[Tensor],
    statistics: Tensor | None,
) -> list[_Layer]:
    """What `_core` wants to know of each layer; its statistics are columns of the one block `statistics`."""
    layers = []
    column = 0
    for index, activation in enumerate(activations):
        rows, neurons = activation.shape
        gradient = gradients[index].data_ptr() if gradients else 0
        block = 0 if statistics is None else statistics.data_ptr() + column * statistics.element_size()
        layers.append((_matrix(activation), rows, neurons, samples[index], l1_weights[index], gradient, block))
        column += neurons
    return layers


def _neuron_statistics(activation: Tensor) -> Tensor:
    readable = _rows_side_by_side(activation)
    statistics = activation.new_empty((_STATISTICS_ROWS, activation.shape[1]), dtype=torch.float64)
    unused = statistics.new_empty(1)  # the loss of nothing
    module, place = native(activation)
    # fmt: off
    module.kd_l1_loss(
        activation.shape[0], 0, _ABSENT, _ABSENT, 0,
        _layers([readable], [0.0], [1.0], [], statistics), activation.shape[1],
        1.0, 0.0, 0.0, 0, 0, 0.5, 1.0, 8.0, False,
        False, 0, ELEMENT_TYPES[unused.dtype], unused.data_ptr(), 0,
        workspace_on(activation.device), place,
    )
    # fmt: on
    return statistics


def _neuron_statistics_fake(activation: Tensor) -> Tensor:
    return activation.new_empty((_STATISTICS_ROWS, activation.shape[1]), dtype=torch.float64)


def _scale_gradients(gradients: Sequence[Tensor], grad_loss: Tensor, factors: Sequence[float]) -> list[Tensor]:
    if not scales_natively(grad_loss.device):
        return [gradient * (grad_loss * factor) for gradient, factor in zip(gradients, factors, strict=True)]
    outputs = _scaled_outputs(gradients, grad_loss, factors)
    _scale_into(outputs, gradients, grad_loss, factors)
    return outputs


def _scale_gradients_in_place(gradients: Sequence[Tensor], grad_loss: Tensor, factors: Sequence[float]) -> None:
    if scales_natively(grad_loss.device):
        _scale_into(gradients, gradients, grad_loss, factors)
    else:
        for gradient, factor in zip(gradients, factors, strict=True):
            gradient.mul_(grad_loss * factor)


def _scale_into(
    targets: Sequence[Tensor], gradients: Sequence[Tensor], grad_loss: Tensor, factors: Sequence[float]
) -> None:
    grad_loss = grad_loss.detach().to(torch.float64 if grad_loss.dtype == torch.float64 else torch.float32)
    module, place = native(grad_loss)
    module.scale(
        [
            (source.data_ptr(), target.data_ptr(), source.numel(), ELEMENT_TYPES[source.dtype], factor)
            for source, target, factor in zip(gradients, targets, factors, strict=True)
        ],
        grad_loss.data_ptr(),
        ELEMENT_TYPES[grad_loss.dtype],
        place,
    )


def _scaled_outputs(gradients: Sequence[Tensor], _grad_loss: Tensor, _factors: Sequence[float]) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


torch.library.register_fake("kddp::scale_gradients", _scaled_outputs, lib=library)
torch.library.register_fake("kddp::scale_gradients_", lambda *_: None, lib=library)

for _device in ("CPU", "CUDA"):
    library.impl("kd_l1_loss", _kd_l1_loss, _device)
    library.impl("neuron_statistics", _neuron_statistics, _device)
    library.impl("scale_gradients", _scale_gradients, _device)
    library.impl("scale_gradients_", _scale_gradients_in_place, _device)
torch.library.register_fake("kddp::kd_l1_loss", _loss_outputs, lib=library)
torch.library.register_fake("kddp::neuron_statistics", _neuron_statistics_fake, lib=library)

# Bound once: looking an operator up by its name costs more than a small batch's loss.
kd_l1_loss_operator = torch.ops.kddp.kd_l1_loss.default
_neuron_statistics_operator = torch.ops.kddp.neuron_statistics.default
_scale_gradients_operator = torch.ops.kddp.scale_gradients.default
_scale_gradients_in_place_operator = torch.ops.kddp.scale_gradients_.default


def kd_l1_loss(
    inputs: tuple[Tensor, Tensor | None, Tensor | None, Sequence[Tensor]],
    settings: tuple[Any, ...],
    flags: tuple[bool, bool, bool, bool],
    with_terms: bool,
) -> tuple[Tensor, Any, Any, Any, list[Tensor]]:
    """The operator `kddp::kd_l1_loss`, without PyTorch's dispatcher where nothing there could take part.

    For a small batch the dispatcher and the tensors that nobody wants take a third of the time. Modes, tensor
    subclasses, transforms, the compiler and the profiler all see the operator.

    Args:
        inputs: student_logits, teacher_logits, labels, activations.
        settings: the operator's, from temperature to standardize_logits.
        flags: the operator's, from logits_gradient on.
        with_terms: whether the terms are wanted.

    Returns:
        As the operator; what is not wanted may be None.
    """
    student, teacher, labels, activations = inputs
    if not (_nothing_intercepts() and _is_plain(student) and _is_plain(teacher) and _is_plain(labels)) or not all(
        map(_is_plain, activations)
    ):
        detached = [activation.detach() for activation in activations]
        outputs: LossOutputs = kd_l1_loss_operator(student.detach(), teacher, labels, detached, *settings, *flags)
        return outputs
    logits_gradient, activation_gradients, scaled, statistics = flags
    dtype = _result_type(student, teacher, activations)
    wanted = (
        torch.empty((), dtype=dtype),
        torch.empty(4, dtype=dtype) if with_terms else None,
        _empty_statistics(activations) if statistics else None,
        pool.empty(student.shape, student.dtype) if logits_gradient else None,
        [pool.empty(a.shape, a.dtype) for a in activations] if activation_gradients else [],
    )
    _run(inputs, settings, scaled, wanted)
    return wanted


def _empty_statistics(activations: Sequence[Tensor]) -> Tensor:
    return torch.empty((_STATISTICS_ROWS, sum([a.shape[1] for a in activations])), dtype=torch.float64)


def _is_plain(tensor: Tensor | None) -> bool:
    # One whose memory holds the negative of its values, such as conj().imag, is resolved by the dispatcher.
    return tensor is None or (type(tensor) in _PLAIN and tensor.is_cpu and not tensor.is_neg())


def _nothing_intercepts() -> bool:
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
    )


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


def scale_gradients(
    gradients: Sequence[Tensor], grad_loss: Tensor, factors: Sequence[float] | None = None, *, in_place: bool = False
) -> Sequence[Tensor]:
    """Each gradient times `grad_loss` times its factor; on a GPU in one launch.

    Args:
        gradients: contiguous, as `kd_l1_loss` returns them.
        grad_loss: a 0-dim tensor on their device, which stays there.
        factors: one for each gradient; None, 1 for all.
        in_place: whether the gradients are overwritten and returned; a GPU then leaves alone what is scaled by 1.

    Returns:
        One for each gradient, of its shape and dtype.
    """
    if torch.compiler.is_compiling() or (not in_place and not scales_natively(grad_loss.device)):
        scales = [grad_loss] * len(gradients) if factors is None else [grad_loss * factor for factor in factors]
        return [gradient * scale for gradient, scale in zip(gradients, scales, strict=True)]
    factors = [1.0] * len(gradients) if factors is None else factors
    if in_place:
        _scale_gradients_in_place_operator(gradients, grad_loss, factors)
        return gradients
    scaled: list[Tensor] = _scale_gradients_operator(gradients, grad_loss, factors)
    return scaled
