"""Verifies a trace: with one neuron fewer in each layer, the model must run the same operations.

A graph holds the numbers that Python computed, so it cannot tell a constant from a number that depends on the width
(1/sqrt(width), an asserted size). Comparing it with the graph of the narrowed model can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.fx import Node

from kddp_ext.pruning.tracing.graph import OperationGraph, unchanged_modules
from kddp_ext.pruning.tracing.groups import NeuronGroup, NeuronSlices
from kddp_ext.pruning.tracing.operations import CONVOLUTIONS, groups_of, operation_name, shape_of


@contextmanager
def one_neuron_fewer(model: nn.Module, groups: Sequence[NeuronGroup]) -> Iterator[None]:
    """Narrow every tensor and size of `groups` by one neuron inside the context; restore them at the end."""
    with unchanged_modules(model):
        for group in groups:
            for slices in group.slices:
                _shorten(model, slices)
            for count in group.counts:
                module = model.get_submodule(count.module)
                setattr(module, count.attribute, getattr(module, count.attribute) - count.entries)
        yield


def _shorten(model: nn.Module, slices: NeuronSlices) -> None:
    module, attribute, axis = model.get_submodule(slices.stored.module), slices.stored.attribute, slices.layout.axis
    tensor = getattr(module, attribute)
    # Only the shape matters, so a view is enough.
    shorter = tensor.detach().narrow(axis, 0, tensor.shape[axis] - slices.layout.entries)
    parameter = attribute in module._parameters
    setattr(module, attribute, nn.Parameter(shorter, tensor.requires_grad) if parameter else shorter)


def difference(wide: OperationGraph, narrow: OperationGraph) -> str | None:
    """The first difference between two graphs, other than the shapes of their tensors; None where there is none."""
    for before, after in zip_longest(wide.nodes, narrow.nodes):
        if before is None or after is None:
            return "it runs more or fewer operations"
        if before.target != after.target:
            return f"{operation_name(before)} in {wide.place(before)} becomes {operation_name(after)}"
        if _numbers(before) != _numbers(after):
            return f"{operation_name(before)} in {wide.place(before)} computes with another number"
    for name, value in wide.constants.items():
        if not _equal(value, narrow.constants.get(name)):
            return f"it computes with another constant tensor, {name}"
    return None


def _numbers(node: Node) -> str:
    name, arguments = operation_name(node), node.args
    if name in ("view", "reshape"):  # these sizes were checked when the neurons were followed
        return ""
    if name in CONVOLUTIONS and groups_of(node) == shape_of(node)[-1 - CONVOLUTIONS[name]]:
        arguments = arguments[:6]  # without `groups`, which is the number of channels of a depthwise convolution
    return repr((arguments, node.kwargs))


def _equal(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b)
