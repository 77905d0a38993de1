"""The fused loss, the neuron statistics and the scaling of gradients as operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kddp_ext.ops import reference
from kddp_ext.ops.gradient_pool import pool
from kddp_ext.ops.library import ELEMENT_TYPES, is_native, library, native, scales_natively, workspace_on

# From `temperature` to `standardize_logits`: the order of `LossSettings.operator_arguments`.
library.define(
    "kd_l1_loss(Tensor student_logits, Tensor? teacher_logits, Tensor? labels, Tensor[] activations, "
    "float[] l1_weights, float[] samples, "
    "float temperature, float alpha, float label_smoothing, int ignore_index, int divergence, float jsd_beta, "
    "float dkd_target_weight, float dkd_non_target_weight, bool standardize_logits, "
    "bool logits_gradient, bool activation_gradients, bool scaled_gradients, bool statistics) "
    "-> (Tensor loss, Tensor terms, Tensor statistics, Tensor logits_gradient, Tensor[] activation_gradients)"
)
library.define("neuron_statistics(Tensor activation) -> Tensor")
library.define("scale_gradients(Tensor[] gradients, Tensor grad_loss, float[] factors) -> Tensor[]")
library.define("scale_gradients_(Tensor(a!)[] gradients, Tensor grad_loss, float[] factors) -> ()")

LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]
_STATISTICS_ROWS = 5
_ABSENT = (0, 0, 0)
_NEUTRAL_SETTINGS = (1.0, 0.0, 0.0, 0, 0, 0.5, 1.0, 8.0, False)  # for the statistics, which need no loss
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor],
    *arguments: Any,
) -> LossOutputs:
    """The operator `kddp::kd_l1_loss`; `arguments` are those of its schema from `l1_weights` on.

    If nothing could intercept the call, it skips PyTorch's dispatcher, which takes 15 to 25% of the time of a small
    batch (128 × 10 logits, 128 × 1024 activations). Modes, tensor subclasses, transforms, the compiler, the tracer and
    the profiler all see the operator.
    """
    tensors = (student_logits, teacher_logits, labels, *activations)
    if _nothing_intercepts() and all(map(_is_plain, tensors)):
        return _kd_l1_loss(student_logits, teacher_logits, labels, activations, *arguments)
    detached = [activation.detach() for activation in activations]
    outputs: LossOutputs = kd_l1_loss_operator(student_logits.detach(), teacher_logits, labels, detached, *arguments)
    return outputs


def _nothing_intercepts() -> bool:
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
    )


def _is_plain(tensor: Tensor | None) -> bool:
    # The dispatcher resolves tensors whose memory holds the negative of their values, such as conj().imag.
    return tensor is None or (type(tensor) in _PLAIN_TYPES and tensor.is_cpu and not tensor.is_neg())


def _kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor],
    l1_weights: Sequence[float],
    samples: Sequence[float],
    *arguments: Any,
) -> LossOutputs:
    *settings, with_logits_gradient, _, scaled_gradients, with_statistics = arguments
    outputs = _loss_outputs(student_logits, teacher_logits, labels, activations, l1_weights, samples, *arguments)
    loss, terms, statistics, logits_gradient, activation_gradients = outputs
    # These names keep copies alive while the kernel uses their addresses.
    student = _readable(student_logits)
    teacher = None if teacher_logits is None else _readable(teacher_logits)
    labels = None if labels is None else labels.contiguous()
    readable = [_readable(activation) for activation in activations]
    module, place = native(student)
    module.kd_l1_loss(
        *student.shape,
        _matrix(student),
        _ABSENT if teacher is None else _matrix(teacher),
        0 if labels is None else labels.data_ptr(),
        _layers(readable, l1_weights, samples, activation_gradients, statistics if with_statistics else None),
        statistics.shape[-1],
        *settings,
        scaled_gradients,
        logits_gradient.data_ptr() if with_logits_gradient else 0,
        ELEMENT_TYPES[loss.dtype],
        loss.data_ptr(),
        terms.data_ptr(),
        workspace_on(student.device),
        place,
    )
    return outputs


def _loss_outputs(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    _labels: Tensor | None,
    activations: Sequence[Tensor],
    *arguments: Any,
) -> LossOutputs:
    """The outputs of the operator for its arguments, not filled yet. Optional outputs that are not wanted are empty."""
    with_logits_gradient, with_activation_gradients, _, with_statistics = arguments[-4:]
    inputs = (student_logits, teacher_logits, *activations)
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in inputs)
    dtype, device = torch.float64 if is_double else torch.float32, student_logits.device
    columns = sum([activation.shape[1] for activation in activations])
    return (
        torch.empty((), dtype=dtype, device=device),
        torch.empty(4, dtype=dtype, device=device),
        torch.empty((_STATISTICS_ROWS, columns) if with_statistics else (0,), dtype=torch.float64, device=device),
        _gradient_of(student_logits) if with_logits_gradient else student_logits.new_empty(0),
        [_gradient_of(activation) for activation in activations] if with_activation_gradients else [],
    )


def _gradient_of(tensor: Tensor) -> Tensor:
    if _is_plain(tensor):
        return pool.empty(tensor.shape, tensor.dtype)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _readable(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows are contiguous, whatever their stride, else a contiguous copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def _matrix(matrix: Tensor) -> tuple[int, int, int]:
    return (matrix.data_ptr(), ELEMENT_TYPES[matrix.dtype], matrix.stride(0))


_Layer = tuple[tuple[int, int, int], int, int, float, float, int, int]


def _layers(
    activations: Sequence[Tensor],
    l1_weights: Sequence[float],
    samples: Sequence[float],
    gradients: Sequence[Tensor],
    statistics: Tensor | None,
) -> list[_Layer]:
    """The description of each layer for `_core`. The layer's statistics are columns of the block `statistics`."""
    layers = []
    column = 0
    for index, activation in enumerate(activations):
        rows, neurons = activation.shape
        gradient = gradients[index].data_ptr() if gradients else 0
        block = 0 if statistics is None else statistics.data_ptr() + column * statistics.element_size()
        layers.append((_matrix(activation), rows, neurons, samples[index], l1_weights[index], gradient, block))
        column += neurons
    return layers


def neuron_statistics(activation: Tensor) -> Tensor:
    """Sums over the samples of an activation, one column for each neuron.

    Args:
        activation: (N, H) float32, float64, bfloat16 or float16, with any strides.

    Returns:
        (5, H) float64: Σ|a|, Σa, Σa², the number of nonzeros, max|a|.
    """
    if not is_native(activation.device):
        return reference.neuron_statistics(activation)
    statistics: Tensor = _neuron_statistics_operator(activation.detach())
    return statistics


def _neuron_statistics(activation: Tensor) -> Tensor:
    readable = _readable(activation)
    statistics = _neuron_statistics_output(activation)
    loss = statistics.new_empty(1)  # the kernel needs an output for the loss; it is unused
    layers = _layers([readable], [0.0], [1.0], [], statistics)
    rows, neurons = activation.shape
    module, place = native(activation)
    module.kd_l1_loss(
        *(rows, 0, _ABSENT, _ABSENT, 0, layers, neurons),
        *_NEUTRAL_SETTINGS,
        *(False, 0, ELEMENT_TYPES[loss.dtype], loss.data_ptr(), 0),
        *(workspace_on(activation.device), place),
    )
    return statistics


def _neuron_statistics_output(activation: Tensor) -> Tensor:
    return activation.new_empty((_STATISTICS_ROWS, activation.shape[1]), dtype=torch.float64)


def scale_gradients(
    gradients: Sequence[Tensor], grad_loss: Tensor, factors: Sequence[float] | None = None, *, in_place: bool = False
) -> Sequence[Tensor]:
    """Each gradient times `grad_loss` times its factor; on a GPU in one launch.

    Args:
        gradients: contiguous, as `kd_l1_loss` returns them.
        grad_loss: a 0-dim tensor on their device; the host does not read it.
        factors: one for each gradient; None stands for 1.
        in_place: overwrite the gradients and return them; a GPU then skips those that are scaled by 1.

    Returns:
        One tensor for each gradient, of its shape and dtype.
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


for _device in ("CPU", "CUDA"):
    library.impl("kd_l1_loss", _kd_l1_loss, _device)
    library.impl("neuron_statistics", _neuron_statistics, _device)
    library.impl("scale_gradients", _scale_gradients, _device)
    library.impl("scale_gradients_", _scale_gradients_in_place, _device)
torch.library.register_fake("kddp::kd_l1_loss", _loss_outputs, lib=library)
torch.library.register_fake("kddp::neuron_statistics", _neuron_statistics_output, lib=library)
torch.library.register_fake("kddp::scale_gradients", _scaled_outputs, lib=library)
torch.library.register_fake("kddp::scale_gradients_", lambda *_: None, lib=library)

# Looking an operator up by its name at each call would take longer than the loss of a small batch.
kd_l1_loss_operator = torch.ops.kddp.kd_l1_loss.default
_neuron_statistics_operator = torch.ops.kddp.neuron_statistics.default
_scale_gradients_operator = torch.ops.kddp.scale_gradients.default
_scale_gradients_in_place_operator = torch.ops.kddp.scale_gradients_.default
