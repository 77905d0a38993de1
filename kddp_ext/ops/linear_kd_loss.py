"""The loss of two last layers in chunks of rows, as an operator with its derivatives.

A chunk's logits are multiplied out, the loss kernel replaces them by their gradient, and two more products add it to
the gradients of the layer. The logits of all rows never exist, except for second derivatives, which are those of the
reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kddp_ext.ops import reference
from kddp_ext.ops.kd_l1_loss import (
    GradientNode,
    as_tensor,
    checked_values,
    loss_of_chunk,
    save,
    saved_by,
    take_gradients,
)
from kddp_ext.ops.library import library, overwrites_logits, register
from kddp_ext.ops.scale_gradients import is_batched, scale_gradients

# `scalars` holds temperature, alpha and the normalizer. From `label_smoothing` to `by_row` the order is that of
# `LossSettings.constants`.
library.define(
    "linear_kd_loss(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? labels, "
    "Tensor? class_weights, Tensor? row_weights, Tensor scalars, SymInt chunk_rows, "
    "float label_smoothing, int ignore_index, int divergence, "
    "float mixture_share, float weight_of_teacher, float weight_of_student, "
    "float dkd_target_weight, float dkd_non_target_weight, bool standardize_logits, bool by_row, "
    "bool hidden_gradient, bool weight_gradient, bool bias_gradient) "
    "-> (Tensor loss, Tensor terms, Tensor row_terms, "
    "Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient)"
)

_INPUTS = 9


class _Wanted(NamedTuple):
    """The gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool


class _Call(NamedTuple):
    """The arguments of a call that are not differentiable, the student's dtype, and the gradients that it requires."""

    dtype: torch.dtype
    scalars: Tensor
    chunk_rows: int
    constants: tuple[Any, ...]
    wanted: _Wanted


def linear_kd_loss(
    *inputs: Any, scalars: Sequence[Any], chunk_rows: int, constants: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its four terms (l1 is 0), and its terms by row. Only the loss is differentiable.

    Args:
        inputs: the student's hidden states (N, D), weight (C, D) and bias (C,), the teacher's, and labels, class
            weights and row weights as of `kd_l1_loss`. All are checked; all but the student's hidden states and weight
            may be None.
        scalars: temperature, alpha, and the normalizer of all rows.
        chunk_rows: the most rows whose logits exist at a time.
        constants: `LossSettings.constants()`.
    """
    required = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs[:3]]
    call = _Call(inputs[0].dtype, as_tensor(scalars), chunk_rows, constants, _Wanted(*required))
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        loss, terms, rows, *_ = _operator(*inputs, call.scalars, chunk_rows, *constants, *_in_forward(call))
        return loss, terms, rows
    with torch.no_grad():
        loss, terms, rows, *gradients = _operator(*inputs, call.scalars, chunk_rows, *constants, *_in_forward(call))
    if any(required):
        gradients = [gradient for gradient, each in zip(gradients, _in_forward(call), strict=True) if each]
        loss = _attach(loss, gradients, call, *inputs)
    return loss, terms, rows


def _in_forward(call: _Call) -> _Wanted:
    """The gradients that the forward computes: none by row, since the weight's needs the factor of each row."""
    return _Wanted(False, False, False) if call.constants[-1] else call.wanted


# ------------------------------------------------------------------------------------------------ the computation


def _linear_kd_loss(*arguments: Any) -> tuple[Tensor, ...]:
    student, teacher, (labels, class_weights, row_weights) = arguments[:3], arguments[3:6], arguments[6:_INPUTS]
    (scalars, chunk_rows, *constants), wanted = arguments[_INPUTS:-3], _Wanted(*arguments[-3:])
    values, outputs = checked_values(scalars), _outputs(*arguments)
    loss, terms, row_terms, hidden_gradient, weight_gradient, bias_gradient = outputs
    for sum_of_chunks in (loss, terms, row_terms, weight_gradient, bias_gradient):
        sum_of_chunks.zero_()
    hidden, weight, _ = student
    rows, classes = len(hidden), len(weight)
    chunk_rows = -(-rows // -(-rows // chunk_rows)) if rows else 0  # chunks of nearly equal sizes
    buffers: list[Any] = [
        None if layer[0] is None else layer[0].new_empty(chunk_rows, classes) for layer in (student, teacher)
    ]
    in_place = overwrites_logits(hidden)
    gradient_buffer = buffers[0] if in_place or not any(wanted) else torch.empty_like(buffers[0])
    totals = torch.zeros(5, dtype=torch.float64, device=loss.device)  # the loss and its terms
    for start in range(0, rows, chunk_rows or 1):
        count = min(chunk_rows, rows - start)
        part = slice(start, start + count)
        logits = [_logits(*each, part) for each in zip((student, teacher), buffers, strict=True)]
        of_logits = gradient_buffer[:count] if any(wanted) else None
        labels_of_rows = None if labels is None else labels[part]
        inputs: Any = (*logits, labels_of_rows, class_weights, None if row_weights is None else row_weights[:, part])
        value, of_chunk, by_row = loss_of_chunk(inputs, values, tuple(constants), of_logits)
        if by_row is not None:
            loss[part] = value
            row_terms[:, part] = by_row
        totals[0] += value.sum()
        totals[1:] += of_chunk
        if of_logits is None:
            continue
        if wanted.hidden:
            torch.mm(of_logits, weight, out=hidden_gradient[part])
        if wanted.weight:
            _add_product(weight_gradient, of_logits.t(), hidden[part])
        if wanted.bias:
            bias_gradient += of_logits.sum(0, dtype=bias_gradient.dtype)
    if not constants[-1]:
        loss.copy_(totals[0])
    terms.copy_(totals[1:])
    return outputs


def _outputs(*arguments: Any) -> tuple[Tensor, ...]:
    """The outputs of the operator for its arguments, not filled yet. Gradients that are not wanted are empty."""
    student_hidden, student_weight, _, teacher_hidden = arguments[:4]
    by_row, with_hidden, with_weight, with_bias = arguments[-4:]
    is_double = any(x is not None and x.dtype == torch.float64 for x in (student_hidden, teacher_hidden))
    dtype, rows = torch.float64 if is_double else torch.float32, student_hidden.shape[0]
    wide = torch.promote_types(student_weight.dtype, torch.float32)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=student_hidden.device)

    return (
        empty(rows) if by_row else empty(),
        empty(4),
        empty(2, rows) if by_row else empty(0),
        empty(*student_hidden.shape, dtype=student_hidden.dtype) if with_hidden else empty(0),
        empty(*student_weight.shape, dtype=wide) if with_weight else empty(0),
        empty(student_weight.shape[0], dtype=wide) if with_bias else empty(0),
    )


def _logits(layer: tuple[Any, ...], buffer: Tensor | None, part: slice) -> Tensor | None:
    """A layer's outputs for some rows, in `buffer`; None without a layer."""
    hidden, weight, bias = layer
    if buffer is None:
        return None
    rows = hidden[part]
    out = buffer[: len(rows)]
    return torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right, summed in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


# ------------------------------------------------------------------------------------------------ the derivatives


class _LinearLossNode(GradientNode):
    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * (3 + _INPUTS)
        call: _Call = ctx.call
        by_row = call.constants[-1]
        inputs, gradients, owned = take_gradients(ctx, _INPUTS, "fused_linear_kd_loss", read_inputs=by_row)
        if torch.is_grad_enabled():  # create_graph=True
            return (None, None, None, *_differentiable_gradients(call, inputs, grad_loss))
        return (None, None, None, *_by_input(call, inputs, gradients, grad_loss, owned))


_attach: Any = _LinearLossNode.apply


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The operator's own node, for compilers and dispatch modes."""
    tensors, (scalars, chunk_rows), arguments = inputs[:_INPUTS], inputs[_INPUTS:][:2], inputs[_INPUTS + 2 :]
    required = [x is not None and x.requires_grad for x in tensors[:3]]
    ctx.call = _Call(tensors[0].dtype, scalars, chunk_rows, tuple(arguments[:-3]), _Wanted(*required))
    ctx.mark_non_differentiable(*output[1:])
    gradients = [gradient for gradient, each in zip(output[3:], _in_forward(ctx.call), strict=True) if each]
    save(ctx, scalars, *tensors, *gradients)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    scalars, *saved = saved_by(ctx)
    call: _Call = ctx.call._replace(scalars=scalars)
    inputs, gradients = saved[:_INPUTS], saved[_INPUTS:]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        by_input = _differentiable_gradients(call, inputs, grad_loss)
    else:
        by_input = _by_input(call, inputs, gradients, grad_loss, owned=False)
    return (*by_input, None, None, *(None,) * (len(call.constants) + len(call.wanted)))


def _by_input(
    call: _Call, inputs: Sequence[Any], gradients: Sequence[Tensor], grad_loss: Tensor, owned: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of each input; `owned` gradients are overwritten. The inputs are read by row only."""
    if not call.constants[-1]:
        scaled = _scaled(call, gradients, grad_loss, owned)
    elif is_batched(grad_loss):
        return _differentiable_gradients(call, inputs, grad_loss)
    else:
        scaled = _gradients_of_rows(call, inputs, grad_loss)
    found = iter(scaled)
    of_student = [next(found).to(call.dtype) if each else None for each in call.wanted]
    return (*of_student, *(None,) * (_INPUTS - len(of_student)))


def _scaled(call: _Call, gradients: Sequence[Tensor], grad_loss: Tensor, owned: bool) -> Sequence[Tensor]:
    """The gradients times `grad_loss`; overwritten if they are `owned`, and new tensors otherwise."""
    factors: list[Any] | None = None
    if call.dtype == torch.float16:  # the kernel has not divided the logits' gradient by the normalizer
        factor = 1 / call.scalars[2]
        factors = [factor if torch.compiler.is_compiling() else factor.item()] * len(gradients)
    return scale_gradients(gradients, grad_loss, factors, in_place=owned)


def _gradients_of_rows(call: _Call, inputs: Sequence[Any], grad_loss: Tensor) -> list[Tensor]:
    """The gradients of Σ grad_loss · loss over the rows."""
    factors = grad_loss.to(torch.float64).expand(2, -1)
    row_weights = inputs[-1]
    if row_weights is not None:
        factors = torch.where(row_weights == 0, 0, row_weights * factors)
    arguments = (call.scalars, call.chunk_rows, *call.constants[:-1], False, *call.wanted)
    gradients = _operator(*inputs[:-1], factors, *arguments)[3:]
    return [gradient for gradient, each in zip(gradients, call.wanted, strict=True) if each]


def _differentiable_gradients(call: _Call, inputs: Sequence[Any], grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the plain formula, which are differentiable themselves."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        # The same tensor may be two inputs. Views let each have its own partial derivative.
        views: list[Any] = [x if x is None else x.view_as(x) for x in inputs]
        student_logits = F.linear(*views[:3])
        teacher_logits = None if views[3] is None else F.linear(*views[3:6])
        arguments: Any = (student_logits, teacher_logits, *views[6:], [], call.scalars.tolist(), [], *call.constants)
        loss, *_ = reference.kd_l1_loss(*arguments)
        wanted = [x for x, each in zip(views, call.wanted, strict=False) if each]
        found = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=create_graph, allow_unused=True))
    of_student = [next(found) if each else None for each in call.wanted]
    return (*of_student, *(None,) * (_INPUTS - len(of_student)))


_operator = register("linear_kd_loss", _linear_kd_loss, _outputs)
torch.library.register_autograd("kddp::linear_kd_loss", _backward, setup_context=_set_up, lib=library)
