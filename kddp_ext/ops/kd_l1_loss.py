"""The fused loss as an operator with its derivatives, and the neuron statistics, which the same kernel computes.

The kernel computes the gradients together with the loss, so the backward only scales them. Everything else that
autograd can ask for (a second derivative, forward mode, torch.func) comes from the reference in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kddp_ext.ops import reference
from kddp_ext.ops.library import (
    ELEMENT_TYPES,
    is_native,
    library,
    native,
    needs_no_dispatcher,
    register,
    workspace_on,
)
from kddp_ext.ops.scale_gradients import is_batched, scale_gradients

# `scalars` holds temperature, alpha, the normalizer and one L1 weight for each activation. A schedule may change them
# at every step, and as values of a tensor they cost no new compilation. From `label_smoothing` to `by_row` the order is
# that of `LossSettings.constants`.
library.define(
    "kd_l1_loss(Tensor student_logits, Tensor? teacher_logits, Tensor? labels, Tensor? class_weights, "
    "Tensor? row_weights, Tensor[] activations, Tensor scalars, SymInt[] samples, "
    "float label_smoothing, int ignore_index, int divergence, "
    "float mixture_share, float teacher_weight, float student_weight, "
    "float dkd_target_weight, float dkd_non_target_weight, bool standardize_logits, bool by_row, "
    "bool logits_gradient, bool activation_gradients, bool scaled_gradients, bool statistics) "
    "-> (Tensor loss, Tensor terms, Tensor row_terms, Tensor statistics, "
    "Tensor logits_gradient, Tensor[] activation_gradients)"
)
library.define("neuron_statistics(Tensor activation) -> Tensor")

LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]
_Outputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, list[Tensor]]  # None: not wanted
# Logits of student and teacher, labels, weights of the classes and of the rows, as `kd_l1_loss` describes them.
RowInputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_STATISTICS_ROWS = 5
_TENSORS = 5  # inputs before the activations
_ABSENT = (0, 0, 0)
_NEUTRAL_SETTINGS = (1.0, 0.0, 0.0, 0.0, 0, 0, 0.5, 0.5, 0.5, 1.0, 8.0, False)  # for the statistics, which need no loss


class _Wanted(NamedTuple):
    """The optional outputs of the operator, in its order."""

    logits_gradient: bool
    activation_gradients: bool
    scaled_gradients: bool
    statistics: bool


class _Call(NamedTuple):
    """The arguments of a call that are not differentiable, and the optional outputs it asked for."""

    scalars: Sequence[float] | Tensor
    samples: Sequence[int]
    constants: tuple[Any, ...]
    wanted: _Wanted


def kd_l1_loss(
    tensors: RowInputs,
    activations: Sequence[Tensor],
    scalars: Sequence[Any],
    samples: Sequence[int],
    constants: tuple[Any, ...],
    *,
    statistics: bool,
) -> tuple[Tensor, Tensor, Any, Any]:
    """The loss, its four terms, its terms by row and (5, columns) statistics of the activations.

    The last two are empty tensors or None unless they are wanted. Only the loss is differentiable. `native_derivatives`
    says when this function must not be used.

    Args:
        tensors: the logits of student and teacher, (N, C), already checked; the labels, (N,) int64, or (N, C)
            probabilities; class_weights, (C,), the weight of each class in ce, of a floating dtype, as of
            `LossSettings.kernel_class_weights`; and row_weights, (2, N) float64, factors of each row's kd and ce; a row
            with two factors of 0 is ignored.
        activations: one matrix for each layer.
        scalars: temperature, alpha, normalizer, and the weight of each matrix; 0-dim tensors only under a compiler.
        samples: the number of samples in each matrix.
        constants: `LossSettings.constants()`.
        statistics: whether to compute the statistics.
    """
    grad_enabled = torch.is_grad_enabled()
    penalised = grad_enabled and any(isinstance(weight, Tensor) or weight != 0 for weight in scalars[3:])
    student_logits = tensors[0]
    wanted = _Wanted(
        logits_gradient=grad_enabled and student_logits.requires_grad,
        activation_gradients=penalised and any(a.requires_grad for a in activations),
        # float16 cannot hold gradients that were divided by the batch size.
        scaled_gradients=student_logits.dtype == torch.float16 or torch.float16 in [a.dtype for a in activations],
        statistics=statistics,
    )
    inputs, call = (*tensors, *activations), _Call(scalars, samples, constants, wanted)
    outputs: Any
    if needs_no_dispatcher(inputs):
        outputs = _compute(tensors, activations, call)
    else:
        arguments = (*tensors, list(activations), as_tensor(scalars), samples, *constants, *wanted)
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            loss, terms, rows, sums, *_ = _operator(*arguments)
            return loss, terms, rows, sums
        with torch.no_grad():
            outputs = _operator(*arguments)
    loss, terms, rows, sums, logits_gradient, activation_gradients = outputs
    if wanted.logits_gradient or wanted.activation_gradients:
        gradients = [*[logits_gradient][: wanted.logits_gradient], *activation_gradients]
        loss = _attach(loss, gradients, call, *inputs)
    return loss, terms, rows, sums


def native_derivatives() -> bool:
    """False under torch.func's transforms and forward mode, whose derivatives only the reference has."""
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def as_tensor(scalars: Sequence[Any]) -> Tensor:
    """(2 + layers,) float64 on the CPU, of numbers, symbolic numbers and 0-dim tensors."""
    values = [
        scalar.detach().to("cpu", torch.float64)
        if isinstance(scalar, Tensor)
        else torch.full((), scalar, dtype=torch.float64, device="cpu")
        for scalar in scalars
    ]
    return torch.stack(values)


# ------------------------------------------------------------------------------------------------ the computation


def _kd_l1_loss(*arguments: Any) -> LossOutputs:
    tensors, activations, call = _split(arguments)
    outputs = _compute(tensors, activations, call._replace(scalars=checked_values(arguments[_TENSORS + 1])))
    return _with_placeholders(outputs, tensors[0])


def _fake_kd_l1_loss(*arguments: Any) -> LossOutputs:
    (student_logits, teacher_logits, *_), activations, call = _split(arguments)
    outputs = _loss_outputs(student_logits, teacher_logits, activations, call.constants[-1], call.wanted)
    return _with_placeholders(outputs, student_logits)


def _split(arguments: tuple[Any, ...]) -> tuple[RowInputs, list[Tensor], _Call]:
    """The operator's arguments: those by row, the activations, and all others."""
    activations, scalars, samples, *others = arguments[_TENSORS:]
    call = _Call(scalars, samples, tuple(others[:-4]), _Wanted(*others[-4:]))
    return arguments[:_TENSORS], activations, call


def checked_values(scalars: Tensor) -> list[float]:
    """The numbers in `scalars`; raises a ValueError unless they are as `LossSettings` describes them."""
    values: list[float] = scalars.tolist()
    temperature, alpha, normalizer, *l1_weights = values
    finite = all(0 <= value < math.inf for value in (temperature, normalizer, *l1_weights))
    if not (finite and temperature > 0 and 0 <= alpha <= 1):
        raise ValueError(
            "temperature, alpha, normalizer, l1_weight: expected a finite number above 0, a number from 0 to 1, and "
            f"finite numbers of at least 0, got {temperature}, {alpha}, {normalizer}, {l1_weights}"
        )
    return values


def loss_of_chunk(
    tensors: RowInputs, scalars: Sequence[float], constants: tuple[Any, ...], gradient: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, its terms and, if they are wanted, its terms by row, without autograd and activations.

    Args:
        tensors: as of `kd_l1_loss`.
        scalars: temperature, alpha and normalizer.
        constants: `LossSettings.constants()`.
        gradient: contiguous, of the shape and dtype of the student's logits; receives their gradient. On the CPU it may
            be `student_logits` itself, because the kernel has read a block of classes when it overwrites it.
    """
    wanted = _Wanted(gradient is not None, False, tensors[0].dtype == torch.float16, False)
    loss, terms, rows, *_ = _compute(tensors, [], _Call(scalars, [], constants, wanted), gradient)
    return loss, terms, rows


def _compute(
    tensors: RowInputs, activations: Sequence[Tensor], call: _Call, logits_gradient: Tensor | None = None
) -> _Outputs:
    student_logits, teacher_logits, labels, class_weights, row_weights = tensors
    scalars, samples, constants, wanted = call
    *settings, by_row = constants
    allocated = wanted if logits_gradient is None else wanted._replace(logits_gradient=False)
    outputs = _loss_outputs(student_logits, teacher_logits, activations, by_row, allocated)
    loss, terms, rows, statistics, of_logits, activation_gradients = outputs
    of_logits = of_logits if logits_gradient is None else logits_gradient
    # These names keep copies alive while the kernel uses their addresses.
    student = _readable(student_logits)
    teacher = None if teacher_logits is None else _readable(teacher_logits)
    in_double = torch.float64 in (student.dtype, student.dtype if teacher is None else teacher.dtype)
    soft_labels = None
    if labels is not None and labels.is_floating_point():
        too_wide = labels.dtype == torch.float64 and not in_double
        soft_labels, labels = _readable(labels.to(torch.float32) if too_wide else labels), None
    labels = None if labels is None else labels.contiguous()
    if class_weights is not None:
        class_weights = class_weights.to(torch.float64 if in_double else torch.float32).contiguous()
    row_weights = None if row_weights is None else row_weights.contiguous()
    readable = [_readable(activation) for activation in activations]
    temperature, alpha, normalizer, *l1_weights = scalars
    divisors = [float(reference.penalty_divisor(count, student.shape[0], normalizer)) for count in samples]
    total = loss.new_empty(()) if by_row else loss
    module, place = native(student)
    module.kd_l1_loss(
        *student.shape,
        _matrix(student),
        _ABSENT if teacher is None else _matrix(teacher),
        0 if labels is None else labels.data_ptr(),
        _ABSENT if soft_labels is None else _matrix(soft_labels),
        0 if class_weights is None else class_weights.data_ptr(),
        0 if row_weights is None else row_weights.data_ptr(),
        _layers(readable, l1_weights, divisors, activation_gradients, statistics),
        0 if statistics is None else statistics.shape[-1],
        temperature,
        alpha,
        normalizer,
        *settings,
        wanted.scaled_gradients,
        0 if of_logits is None else of_logits.data_ptr(),
        ELEMENT_TYPES[loss.dtype],
        total.data_ptr(),
        terms.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        workspace_on(student.device),
        place,
    )
    if rows is not None:
        kd, ce = rows
        # A term of weight 0 is left out, because it may be infinite.
        loss.copy_(ce if alpha == 0 else kd if alpha == 1 else alpha * kd + (1 - alpha) * ce)
    return outputs


def _loss_outputs(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    activations: Sequence[Tensor],
    by_row: bool,
    wanted: _Wanted,
) -> _Outputs:
    """The outputs of the operator for its arguments, not filled yet."""
    is_double = torch.float64 in [x.dtype for x in (student_logits, teacher_logits, *activations) if x is not None]
    dtype, rows = torch.float64 if is_double else torch.float32, student_logits.shape[0]
    terms = student_logits.new_empty(4, dtype=dtype)
    return (
        terms.new_empty((rows,) if by_row else ()),
        terms,
        terms.new_zeros(2, rows) if by_row else None,  # ignored rows stay 0
        terms.new_empty((_STATISTICS_ROWS, sum([a.shape[1] for a in activations])), dtype=torch.float64)
        if wanted.statistics
        else None,
        _gradient_of(student_logits) if wanted.logits_gradient else None,
        [_gradient_of(activation) for activation in activations] if wanted.activation_gradients else [],
    )


def _with_placeholders(outputs: _Outputs, student_logits: Tensor) -> LossOutputs:
    """The outputs of the operator, which has to return a tensor in place of None."""
    loss, terms, rows, statistics, logits_gradient, activation_gradients = outputs
    return (
        loss,
        terms,
        terms.new_empty(0) if rows is None else rows,
        terms.new_empty(0, dtype=torch.float64) if statistics is None else statistics,
        student_logits.new_empty(0) if logits_gradient is None else logits_gradient,
        activation_gradients,
    )


def _gradient_of(tensor: Tensor) -> Tensor:
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
    divisors: Sequence[float],
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
        layers.append((_matrix(activation), rows, neurons, divisors[index], l1_weights[index], gradient, block))
        column += neurons
    return layers


# ------------------------------------------------------------------------------------------------ the derivatives


class GradientNode(torch.autograd.Function):
    """Attaches gradients that are known already to the loss, which costs half of a node with a whole forward.

    The gradients belong to this node alone. They are handed out once, by a backward after which the graph is freed;
    any other backward hands out copies. So nobody else's tensor is ever written. The inputs are saved for the second
    derivative.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], call: Any, *inputs: Tensor | None) -> Tensor:
        ctx.call = call
        ctx.packed = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        # Hooks on saved tensors may move the gradients elsewhere, or recompute them (checkpointing).
        ctx.gradients = None if ctx.packed else gradients
        save(ctx, *inputs, *(gradients if ctx.packed else ()))
        return loss


class _LossNode(GradientNode):
    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = len(ctx.needs_input_grad) - 3
        if grad_loss is None:
            return (None,) * (3 + inputs)
        tensors, gradients, owned = take_gradients(ctx, inputs, "fused_kd_l1_loss")
        if torch.is_grad_enabled():  # create_graph=True
            return (None, None, None, *_differentiable_gradients(ctx, grad_loss, tensors))
        scaled = _scaled(ctx.call, gradients, grad_loss, owned)
        return (None, None, None, *_by_input(ctx.call, scaled, inputs - _TENSORS))


# Function.apply would inspect the forward's signature for torch.func's transforms, none of which is active here.
_attach: Any = super(torch.autograd.Function, _LossNode).apply


def take_gradients(
    ctx: Any, inputs: int, function: str, *, read_inputs: bool = False
) -> tuple[list[Any], Sequence[Tensor], bool]:
    """The saved inputs, empty unless they are needed, the gradients, and whether the caller owns these from now on."""
    if ctx.gradients is None and not ctx.packed:
        raise RuntimeError(
            f"Trying to backward through the graph of {function} a second time, but its gradients have been handed out "
            "already. Specify retain_graph=True for the first backward."
        )
    create_graph = torch.is_grad_enabled()
    # Checkpoints allow reading the saved tensors once.
    tensors = saved_by(ctx) if ctx.packed or read_inputs or create_graph else []
    gradients = tensors[inputs:] if ctx.packed else ctx.gradients
    owned = not (ctx.packed or create_graph or torch._C._autograd._get_current_graph_task_keep_graph())
    if owned:
        ctx.gradients = None
    return tensors[:inputs], gradients, owned


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward. Autograd refuses inference tensors, which may be a teacher's: `ctx` keeps them."""
    ctx.inference = inference = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.save_for_backward(*[None if i in inference else x for i, x in enumerate(tensors)] if inference else tensors)


def saved_by(ctx: Any) -> list[Any]:
    """The tensors of `save`."""
    return [ctx.inference[i].clone() if i in ctx.inference else x for i, x in enumerate(ctx.saved_tensors)]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: LossOutputs) -> None:
    """The operator's own node, for compilers and dispatch modes."""
    tensors, activations, ctx.call = _split(inputs)
    _, terms, rows, statistics, logits_gradient, activation_gradients = output
    ctx.layers = len(activations)
    ctx.mark_non_differentiable(terms, rows, statistics, logits_gradient, *activation_gradients)
    gradients = [*[logits_gradient][: ctx.call.wanted.logits_gradient], *activation_gradients]
    save(ctx, ctx.call.scalars, *tensors, *activations, *gradients)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    scalars, *saved = saved_by(ctx)
    ctx.call = ctx.call._replace(scalars=scalars)
    inputs, gradients = saved[: _TENSORS + ctx.layers], saved[_TENSORS + ctx.layers :]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        by_input = _differentiable_gradients(ctx, grad_loss, inputs)
    else:
        by_input = _by_input(ctx.call, _scaled(ctx.call, gradients, grad_loss, owned=False), ctx.layers)
    *of_tensors, activations = (*by_input[:_TENSORS], list(by_input[_TENSORS:]))
    of_samples: list[Tensor] | None = None if ctx.call.samples else []  # torch takes an empty list for one of tensors
    others = (None,) * (len(ctx.call.constants) + len(ctx.call.wanted))
    return (*of_tensors, activations, None, of_samples, *others)


def _scaled(call: _Call, gradients: Sequence[Tensor], grad_loss: Tensor, owned: bool) -> Sequence[Tensor]:
    """The gradients times `grad_loss`; overwritten if they are `owned`, and new tensors otherwise."""
    if call.constants[-1]:  # by row, of logits alone
        by_row = grad_loss[..., None].to(gradients[0].dtype)
        return [gradients[0].mul_(by_row) if owned and not is_batched(grad_loss) else gradients[0] * by_row]
    factors = _factors(call, len(gradients[0])) if call.wanted.scaled_gradients else None
    return scale_gradients(gradients, grad_loss, factors, in_place=owned)


def _factors(call: _Call, rows: int) -> list[Any]:
    """What the kernel has left out of each gradient, see `scaled_gradients` in csrc/include/kddp/kd_l1_loss.h."""
    _, _, normalizer, *l1_weights = call.scalars
    factors = [1 / reference.divisor(normalizer, max(rows, 1))] * call.wanted.logits_gradient
    if call.wanted.activation_gradients:
        factors += [
            weight / reference.penalty_divisor(count, rows, normalizer)
            for weight, count in zip(l1_weights, call.samples, strict=True)
        ]
    return factors


def _by_input(call: _Call, gradients: Sequence[Tensor], layers: int) -> tuple[Tensor | None, ...]:
    """The gradients of each input, in the order of `kd_l1_loss`."""
    student = gradients[0] if call.wanted.logits_gradient else None
    activations = gradients[len(gradients) - layers :] if call.wanted.activation_gradients else (None,) * layers
    return (student, *(None,) * (_TENSORS - 1), *activations)


def _differentiable_gradients(ctx: Any, grad_loss: Tensor, inputs: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """The gradients of the reference, which are differentiable themselves."""
    call: _Call = ctx.call
    with torch.enable_grad():
        # An activation is usually an ancestor of the logits. Views let each input have its own partial derivative.
        views: list[Any] = [x if x is None else x.view_as(x) for x in inputs]
        arguments: Any = (*views[:_TENSORS], views[_TENSORS:], call.scalars, call.samples, *call.constants)
        loss, *_ = reference.kd_l1_loss(*arguments)
        wanted = [x for x in views if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=True, allow_unused=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in views)


# ------------------------------------------------------------------------------------------------ the statistics


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
        *(rows, 0, _ABSENT, _ABSENT, 0, _ABSENT, 0, 0, layers, neurons),
        *_NEUTRAL_SETTINGS,
        *(False, 0, ELEMENT_TYPES[loss.dtype], loss.data_ptr(), 0, 0),
        *(workspace_on(activation.device), place),
    )
    return statistics


def _neuron_statistics_output(activation: Tensor) -> Tensor:
    return activation.new_empty((_STATISTICS_ROWS, activation.shape[1]), dtype=torch.float64)


_operator = register("kd_l1_loss", _kd_l1_loss, _fake_kd_l1_loss)
_neuron_statistics_operator = register("neuron_statistics", _neuron_statistics, _neuron_statistics_output)
torch.library.register_autograd("kddp::kd_l1_loss", _backward, setup_context=_set_up, lib=library)
