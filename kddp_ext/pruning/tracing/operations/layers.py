"""Layers, which read neurons and write others: products, convolutions, embeddings and attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kddp_ext.pruning.tracing.flow import NeuronFlow, Read
from kddp_ext.pruning.tracing.labels import Axes
from kddp_ext.pruning.tracing.recording import Operation
from kddp_ext.pruning.tracing.structure import StoredTensor


def product(flow: NeuronFlow, operation: Operation) -> None:
    """mm, bmm, addmm and baddbmm; and linear, whose weight is transposed."""
    if operation.name == "linear":
        a, b, *bias = (each for each in operation.args if each is not None)
        sums, writes = 1, 0  # the dimensions of the weight
    else:
        *bias, a, b = operation.args[: 3 if operation.name in ("addmm", "baddbmm") else 2]
        sums, writes = b.dim() - 2, b.dim() - 1
    axes = [*flow.labels.of(a)[:-1], flow.labels.of(b)[writes]]
    if b.dim() == 3:
        axes[0] = flow.labels.unite(axes[0], flow.labels.of(b)[0], flow.foreign_operand(operation))
    _contract(flow, operation, a, a.dim() - 1, b, sums)
    for each in bias:
        _add_bias(flow, operation, axes, each)
    flow.labels.set(operation.outputs[0], axes)
    stored, labels = flow.stored(b), flow.labels.of(b)[writes]
    if stored is not None:
        flow.applied[stored] += math.prod(operation.outputs[0].shape[:-1])
        axis = _stored_axis(flow, stored, labels)
        if labels is not None and axis is not None:
            flow.write(operation, stored, labels)
            flow.set_size(stored, axis, "out_features", "nf")


def _add_bias(flow: NeuronFlow, operation: Operation, axes: Axes, bias: Tensor) -> None:
    for back in range(1, bias.dim() + 1):
        if bias.shape[-back] > 1:
            axes[-back] = flow.labels.unite(axes[-back], flow.labels.of(bias)[-back], flow.foreign_operand(operation))


def _contract(flow: NeuronFlow, operation: Operation, a: Tensor, a_axis: int, b: Tensor, b_axis: int) -> None:
    """A sum over one dimension of two tensors, one of which is a stored weight where neurons are read."""
    mine, other = flow.labels.of(a)[a_axis], flow.labels.of(b)[b_axis]
    stored_a, stored_b = flow.stored(a), flow.stored(b)
    if (stored_a is None) == (stored_b is None):
        effect = "multiplies activations and sums over the neurons, or its weight is computed in the forward pass"
        for labels in (mine, other):
            flow.labels.freeze(labels, flow.reason(operation, effect))
        return
    flow.labels.unite(mine, other, flow.reason(operation, "reads them together with entries that cannot be removed"))
    value, value_axis, weight, tensor, axis = (
        (a, a_axis, stored_b, b, b_axis) if stored_b else (b, b_axis, stored_a, a, a_axis)
    )
    labels = flow.labels.of(tensor)[axis]
    if mine is not None and labels is not None and weight is not None:
        weight_axis = _stored_axis(flow, weight, labels)
        own = None if weight_axis is None else flow.stored_axes[weight][weight_axis]
        if weight_axis is None or own is None or not torch.equal(labels, own):
            flow.labels.freeze(mine, flow.reason(operation, f"reads them through a rearranged {weight.name}"))
            return
        computed = id(tensor) in flow.computed
        flow.reads.append(Read(operation, value, value_axis, weight, weight_axis, computed=computed))
        flow.set_size(weight, weight_axis, "in_features", "nx")  # nx is that of transformers' Conv1D


def _stored_axis(flow: NeuronFlow, stored: StoredTensor, labels: Tensor | None) -> int | None:
    """The dimension of a stored tensor that all these labels come from."""
    for axis, own in enumerate(flow.stored_axes[stored]):
        if own is not None and labels is not None and bool(((labels >= own[0]) & (labels <= own[-1])).all()):
            return axis
    return None


def convolution(flow: NeuronFlow, operation: Operation) -> None:
    """Convolutions of any dimension: transposed, depthwise and with groups."""
    value, weight, bias = operation.args[:3]
    transposed, groups = operation.args[6], operation.args[8]
    for axis in range(2, weight.dim()):
        flow.labels.freeze(flow.labels.of(weight)[axis], "a filter's positions cannot be removed")
    stored, (output,) = flow.stored(weight), operation.outputs
    x, reads, writes = flow.labels.of(value)[1], int(not transposed), int(transposed)
    w_in, w_out = flow.labels.of(weight)[reads], flow.labels.of(weight)[writes]
    if stored is None:
        flow.labels.freeze_all(
            [value, weight], flow.reason(operation, "has a weight that is computed in the forward pass")
        )
        return
    out = w_out
    if groups == 1:
        reason = flow.reason(operation, "reads them together with entries that cannot be removed")
        flow.labels.unite(x, w_in, reason)
    else:
        w_in, out = _grouped(flow, operation, stored, x, w_in, w_out, groups, transposed=transposed)
    if bias is not None:
        out = flow.labels.unite(out, flow.labels.of(bias)[0], flow.foreign_operand(operation))
    flow.labels.set(output, [flow.labels.of(value)[0], out, *[None] * (output.dim() - 2)])
    if x is not None and w_in is not None:
        padded = not transposed and any(operation.args[4])
        flow.reads.append(Read(operation, value, 1, stored, reads, groups, padded, id(weight) in flow.computed))
        flow.set_size(stored, reads, "in_channels")
    shape = value.shape if transposed else output.shape
    flow.applied[stored] += shape[0] * math.prod(shape[2:])
    if out is not None and not (groups > 1 and value.shape[1] == groups):  # a depthwise convolution computes none
        flow.write(operation, stored, out)
        flow.set_size(stored, writes, "out_channels")


def _grouped(
    flow: NeuronFlow, operation: Operation, stored: StoredTensor, x: Tensor | None, w_in: Tensor | None,
    w_out: Tensor | None, groups: int, *, transposed: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Labels of the inputs and outputs of a convolution with groups.

    Each group has the same number of inputs and of outputs. So either equally many channels of each group are removed,
    and the inputs are independent of the outputs; or whole groups, with their inputs and outputs. The second is the
    only way for a depthwise convolution.
    """
    reason = flow.reason(operation, f"has {groups} groups of channels, which must keep equal sizes")
    value, (output,) = operation.args[0], operation.outputs
    inputs, outputs = value.shape[1] // groups, output.shape[1] // groups
    if transposed:  # its weight is (inputs, outputs of a group)
        for labels in (x, w_in, w_out):
            flow.labels.freeze(labels, reason)
        return None, None
    whole = inputs == 1 or (outputs > 1 and flow.choose(operation, w_out, "groups", 2) == 1)
    if not whole and w_out is not None:
        if x is not None and w_in is not None:
            flow.labels.unite(flow.labels.unite_rows(x.view(groups, -1)), w_in, reason)
        flow.labels.unite_rows(w_out.view(groups, -1)) if outputs > 1 else flow.labels.freeze(w_out, reason)
        return w_in, w_out
    flow.labels.freeze(w_in, reason)
    if x is None or w_out is None:
        flow.labels.freeze(x, reason)
        flow.labels.freeze(w_out, _fixed_channels(flow, operation))
        return None, w_out
    flow.labels.unite(
        flow.labels.unite_rows(x.view(groups, -1).T), flow.labels.unite_rows(w_out.view(groups, -1).T), reason
    )
    flow.set_size(stored, 0, "in_channels", "groups", "out_channels")
    return None, w_out


def _fixed_channels(flow: NeuronFlow, operation: Operation) -> str:
    """The reason why a convolution of whole groups keeps its outputs where its inputs cannot be removed."""
    value = operation.args[0]
    while id(value) in flow.moved:
        value = flow.moved[id(value)]
    if any(value is output for each in flow.recording.operations for output in each.outputs):
        return flow.reason(operation, "filters channels that cannot be removed")
    return "its channels are those of the model's inputs"


def embedding(flow: NeuronFlow, operation: Operation) -> None:
    """Rows are chosen by tokens; the entries of a row are neurons."""
    (output,), weight = operation.outputs, operation.args[0]
    rows, columns = flow.labels.of(weight)
    flow.labels.freeze(rows, flow.reason(operation, "chooses one of them for each token"))
    flow.labels.set(output, [None] * (output.dim() - 1) + [columns])
    stored = flow.stored(weight)
    if stored is not None and columns is not None:
        flow.write(operation, stored, columns)
        flow.set_size(stored, 1, "embedding_dim")


def attention(flow: NeuronFlow, operation: Operation) -> None:
    """scaled_dot_product_attention keeps batches and heads, and sums over positions and the entries of q and k."""
    query, key, value = operation.args[:3]
    axes: Axes = [None] * query.dim()
    reason = flow.reason(operation, "computes with all of them")
    for axis in range(query.dim() - 2):
        axes[axis], *parts = [flow.labels.of(each)[axis] for each in (query, key, value)]
        heads = axes[axis]
        if heads is not None and heads.numel() != key.shape[axis]:  # each head of k and v has several of q
            heads = flow.labels.unite_rows(heads.view(key.shape[axis], -1).T)
        for part in parts:
            flow.labels.unite(heads, part, reason)
    for tensor, axis in ((query, -2), (query, -1), (key, -2), (key, -1), (value, -2)):
        flow.labels.freeze(flow.labels.of(tensor)[axis], reason)
    axes[-1] = flow.labels.of(value)[-1]
    for mask in operation.inputs[3:]:  # it broadcasts over batches and heads
        for back in range(1, mask.dim() + 1):
            if back > 2 and mask.shape[-back] > 1:
                flow.labels.unite(axes[-back], flow.labels.of(mask)[-back], reason)
            else:
                flow.labels.freeze(flow.labels.of(mask)[-back], reason)
    for output in operation.outputs:  # the second is the logarithm of the sums of exponentials
        flow.labels.set(
            output, axes if output.dim() == 4 else [*axes[:2], None] if output.dim() == 3 else [None] * output.dim()
        )
