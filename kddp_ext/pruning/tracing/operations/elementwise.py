"""Elementwise operations, which make labels equal, and those that mix the entries of some dimensions only."""

from __future__ import annotations

import re

from kddp_ext.pruning.tracing.flow import NeuronFlow
from kddp_ext.pruning.tracing.labels import Axes
from kddp_ext.pruning.tracing.operations.normalisation import MIXES, divides_by_root_mean_square
from kddp_ext.pruning.tracing.recording import Operation


def pointwise(flow: NeuronFlow, operation: Operation) -> None:
    """The labels of all operands are equal, dimension by dimension; operands of one entry broadcast."""
    for output in operation.outputs:
        operands = [each for each in operation.inputs if each.dim() <= output.dim()]
        axes: Axes = []
        for back in range(output.dim(), 0, -1):
            size = output.shape[-back]
            parts = [
                flow.labels.of(each)[-back] for each in operands if each.dim() >= back and each.shape[-back] == size
            ]
            if size == 1:  # a single entry is never removed, and may be a number that broadcasts
                parts = [part for part in parts if part is not None]
            label = parts[0] if parts else None
            for part in parts[1:]:
                if part is not label:
                    label = flow.labels.unite(label, part, flow.foreign_operand(operation))
            axes.append(label)
        flow.labels.set(output, axes)
    for each in operation.inputs:  # nn.RMSNorm scales by its weight in an elementwise product
        if each.dim() == 1:
            flow.set_size(flow.stored(each), 0, "normalized_shape")
    if operation.name in ("clone", "_to_copy", "detach", "alias", "lift_fresh"):
        flow.move(operation.args[0], operation.outputs[0])


def pool(flow: NeuronFlow, operation: Operation) -> None:
    """Pooling, interpolation and padding by reflection: over the last dimensions, for each channel separately."""
    source, name = operation.args[0], operation.name
    dimensions = int(re.findall(r"(\d)d", name)[0])
    axes = flow.without(operation, range(source.dim() - dimensions, source.dim()), "pools over them")
    for output in operation.outputs:
        flow.labels.set(output, axes)


def one_dimension(flow: NeuronFlow, operation: Operation) -> None:
    """softmax, cumsum, sort, topk and similar."""
    _mix(flow, operation, [operation.argument("dim", -1)], kept=True)


def reduction(flow: NeuronFlow, operation: Operation) -> None:
    """mean, sum, amax, var and similar over some dimensions."""
    dims = operation.argument("dim")
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        dims = range(operation.args[0].dim())
    dims = [dims] if isinstance(dims, int) else list(dims)
    _mix(flow, operation, dims, kept=bool(operation.argument("keepdim", False)))


def _mix(flow: NeuronFlow, operation: Operation, dims: list[int], *, kept: bool) -> None:
    source = operation.args[0]
    over = {dim % source.dim() for dim in dims} if source.dim() else set()
    in_norm = "norm" in flow.kind(operation).lower()
    accepted = divides_by_root_mean_square(flow, operation, over) or (in_norm and not flow.keep_norm_statistics)
    axes = flow.without(operation, over, None if accepted else MIXES if in_norm else "computes with all of them")
    for output in operation.outputs:
        same = output.dim() == source.dim() or kept
        flow.labels.set(output, axes if same else [each for axis, each in enumerate(axes) if axis not in over])
