"""Operations that only move entries: they are run on the labels themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from kddp_ext.activations.layout import Layout
from kddp_ext.pruning.tracing.flow import NeuronFlow
from kddp_ext.pruning.tracing.labels import Axes, along
from kddp_ext.pruning.tracing.recording import Operation

PARTS = ("slice", "select", "split", "split_with_sizes", "unbind", "chunk")
SIZED = ("view", "_unsafe_view", "reshape", "expand", "slice", "split", "split_with_sizes")  # arguments are sizes


def movement(flow: NeuronFlow, operation: Operation) -> None:
    """view, permute, select and similar: run on the labels of each dimension."""
    source, of_source = operation.args[0], flow.labels.of(operation.args[0])
    labelled = [axis for axis, each in enumerate(of_source) if each is not None]
    labelled.sort(key=lambda axis: source.shape[axis] == 1)
    results = [_moved(flow, operation, axis) for axis in labelled]
    if operation.name in PARTS:  # the size of a part may be computed from that of the whole
        flow.sites += [(operation, labels) for labels in of_source if labels is not None]
    for index, output in enumerate(operation.outputs):
        axes: Axes = [None] * output.dim()
        for source_axis, result in zip(labelled, results, strict=True):
            for axis, labels in enumerate(result[index]):
                if labels is not None and operation.name in SIZED:
                    flow.sites.append((operation, labels))
                if labels is not None and axes[axis] is not None and source.shape[source_axis] == 1:
                    flow.labels.freeze(labels, "a single entry is never removed")
                    continue
                if labels is not None and axes[axis] is not None:
                    for each in (axes[axis], labels):
                        flow.labels.freeze(each, flow.reason(operation, "merges two dimensions of neurons"))
                    labels = None
                axes[axis] = labels if axes[axis] is None else axes[axis]
        flow.labels.set(output, axes)
        flow.move(source, output)


def _moved(flow: NeuronFlow, operation: Operation, axis: int) -> list[Axes]:
    """The labels of the outputs that come from dimension `axis` of the input."""
    source, labels = operation.args[0], flow.labels.of(operation.args[0])[axis]
    assert labels is not None
    if operation.name in PARTS:
        return _parts(flow, operation, axis, labels)
    if labels.numel() == 1:
        return [_moved_single(operation, axis, labels)]
    entries = along(labels, axis, source.shape)
    if operation.name in ("view", "_unsafe_view", "reshape"):
        result = entries.reshape(operation.outputs[0].shape)
    else:
        result = operation.target(entries, *operation.args[1:], **operation.kwargs)
    what = (tuple(source.shape[1:]), axis)
    return [flow.factored(operation, each, what) for each in (result if isinstance(result, list | tuple) else [result])]


def _moved_single(operation: Operation, axis: int, labels: Tensor) -> Axes:
    """The label of a single entry, which constant labels do not show; it is lost where its dimension is not clear."""
    source, output = operation.args[0], operation.outputs[0]
    axes: Axes = [None] * output.dim()
    if operation.name in ("permute", "transpose", "t"):
        marked = source.new_empty(
            [7919 if each == axis else size for each, size in enumerate(source.shape)], device="meta"
        )
        axes[operation.target(marked, *operation.args[1:]).shape.index(7919)] = labels
        return axes
    layout = Layout(axis).reshaped(source.shape, output.shape)
    if layout is not None:
        axes[layout.axis] = labels.expand(output.shape[layout.axis])
    return axes


def _parts(flow: NeuronFlow, operation: Operation, axis: int, labels: Tensor) -> list[Axes]:
    """slice, select, split and unbind along a dimension of neurons, whose bounds depend on the number of neurons."""
    source, dim = operation.args[0], operation.argument("dim", 0) % operation.args[0].dim()
    others: list[Axes] = [[None] * each.dim() for each in operation.outputs]
    if dim != axis:
        lost = operation.name in ("select", "unbind") and dim < axis
        for each in others:
            each[axis - lost] = labels
        return others
    size, sizes = source.shape[dim], [each.shape[dim] for each in operation.outputs if each.dim() == source.dim()]
    if operation.name in ("select", "unbind"):
        flow.labels.freeze(labels, flow.reason(operation, "takes single entries of them"))
    elif operation.name == "slice":
        start, end, step = slice(*(operation.argument(name) for name in ("start", "end", "step"))).indices(size)
        if (start, end, step) == (0, size, 1):
            others[0][dim] = labels
            return others
        equal = sizes[0] and size % sizes[0] == 0 and start % sizes[0] == 0
        way = flow.choose(operation, labels, "bounds", 3, by_proof=True)
        if step == 1 and equal and way == 0:  # one of several parts that keep equal sizes
            others[0][dim] = flow.labels.unite_rows(labels.view(-1, sizes[0]))
            return others
        if step != 1:
            flow.labels.freeze(labels, flow.reason(operation, "takes every second of them, or fewer"))
        elif way == 2:
            reason = flow.reason(operation, "cuts them at a fixed index")
            flow.labels.freeze(labels[: start if end == size else end], reason)
        others[0][dim] = labels[start:end:step]  # the proof compares the bounds
    elif len(set(sizes)) == 1:  # equal parts keep equal sizes
        first = flow.labels.unite_rows(labels.view(len(sizes), -1))
        for each in others:
            each[dim] = first
    else:
        for each, part in zip(others, labels.split(sizes), strict=True):
            each[dim] = part
    return others


def expand(flow: NeuronFlow, operation: Operation) -> None:
    """Dimensions of one entry are repeated: what is new cannot be removed."""
    (output,), source = operation.outputs, operation.args[0]
    axes = flow.labels.of(source)
    flow.labels.set(output, [None] * (output.dim() - source.dim()) + axes)
    flow.move(source, output)


def roll(flow: NeuronFlow, operation: Operation) -> None:
    """A shift around the end, which another number of neurons would change."""
    dims = operation.argument("dims") or range(operation.args[0].dim())
    flow.labels.set(operation.outputs[0], flow.without(operation, dims, "shifts them"))


def channel_shuffle(flow: NeuronFlow, operation: Operation) -> None:
    """Channel j of group g becomes channel j · groups + g; equally many channels of each group are removed."""
    axes, groups = list(flow.labels.of(operation.args[0])), operation.args[1]
    if axes[1] is not None:
        axes[1] = flow.labels.unite_rows(axes[1].view(groups, -1)).repeat_interleave(groups)
    flow.labels.set(operation.outputs[0], axes)


def strided(flow: NeuronFlow, operation: Operation) -> None:
    """as_strided with the shape of its argument, which PyTorch uses to change a memory format."""
    (output,), source = operation.outputs, operation.args[0]
    if output.shape == source.shape:
        flow.labels.set(output, flow.labels.of(source))
    else:
        flow.labels.freeze_all([source], flow.reason(operation, "rearranges them"))


def concatenation(flow: NeuronFlow, operation: Operation) -> None:
    """The labels along the dimension follow each other; those along the others are equal."""
    (output,) = operation.outputs
    sources = [each for each in operation.args[0] if each.dim() == output.dim()]  # cat skips empty vectors
    axes: Axes = [None] * output.dim()
    dim = operation.argument("dim", 0) % output.dim()
    reason = flow.reason(operation, "joins them to entries that cannot be removed")
    for axis in range(output.dim()):
        parts = [flow.labels.of(each)[axis] for each in sources]
        if axis != dim:
            axes[axis] = parts[0]
            for part in parts[1:]:
                axes[axis] = flow.labels.unite(axes[axis], part, reason)
        elif any(part is not None for part in parts):
            axes[axis] = torch.cat([
                _frozen(flow, each.shape[axis]) if part is None else part
                for each, part in zip(sources, parts, strict=True)
            ])  # fmt: skip
    flow.labels.set(output, axes)


def stack(flow: NeuronFlow, operation: Operation) -> None:
    """A new dimension, whose entries cannot be removed; the labels along the others are equal."""
    (output,), sources = operation.outputs, operation.args[0]
    reason = flow.reason(operation, "joins them to entries that cannot be removed")
    axes = list(flow.labels.of(sources[0]))
    for source in sources[1:]:
        axes = [flow.labels.unite(*each, reason) for each in zip(axes, flow.labels.of(source), strict=True)]
    axes.insert(operation.argument("dim", 0) % output.dim(), None)
    flow.labels.set(output, axes)


def _frozen(flow: NeuronFlow, size: int) -> Tensor:
    """Labels of entries that cannot be removed."""
    labels = flow.labels.new(size)
    flow.labels.freeze(labels, "its entries cannot be removed")
    return labels


def padding(flow: NeuronFlow, operation: Operation) -> None:
    """Padding adds entries that cannot be removed."""
    (output,), source = operation.outputs, operation.args[0]
    axes, pad = flow.labels.of(source), operation.args[1]
    for index in range(len(pad) // 2):
        axis, (before, behind) = source.dim() - 1 - index, pad[2 * index : 2 * index + 2]
        labels = axes[axis]
        if labels is not None and (before or behind):
            if min(before, behind) < 0 or operation.name != "constant_pad_nd":
                flow.labels.freeze(labels, flow.reason(operation, "takes away or repeats some of them"))
                labels = None
            else:
                labels = torch.cat([_frozen(flow, before), labels, _frozen(flow, behind)])
        axes = [*axes[:axis], labels, *axes[axis + 1 :]]
    flow.labels.set(output, axes)


def index(flow: NeuronFlow, operation: Operation) -> None:
    """Indexing by tensors: the other dimensions keep their labels."""
    (output,), source, indices = operation.outputs, operation.args[0], operation.args[1]
    axes = flow.labels.of(source)
    indexed = [axis for axis, index in enumerate(indices) if index is not None]
    for axis in indexed:
        flow.labels.freeze(axes[axis], flow.reason(operation, "takes some of them by their indices"))
    if indexed != list(range(indexed[0], indexed[-1] + 1)) or any(
        indices[axis].dtype in (torch.bool, torch.uint8) for axis in indexed
    ):
        flow.labels.freeze_all([source], flow.reason(operation, "mixes dimensions"))
        return
    new = output.dim() - (source.dim() - len(indexed))
    flow.labels.set(output, [*axes[: indexed[0]], *[None] * new, *axes[indexed[-1] + 1 :]])


def index_select(flow: NeuronFlow, operation: Operation) -> None:
    axes = flow.without(operation, [operation.args[1]], "takes some of them by their indices")
    flow.labels.set(operation.outputs[0], axes)


def glu(flow: NeuronFlow, operation: Operation) -> None:
    (output,), source = operation.outputs, operation.args[0]
    axes, dim = list(flow.labels.of(source)), operation.argument("dim", -1) % source.dim()
    if axes[dim] is not None:
        axes[dim] = flow.labels.unite_rows(axes[dim].view(2, -1))
    flow.labels.set(output, axes)
