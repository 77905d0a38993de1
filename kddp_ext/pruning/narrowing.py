"""The proof of a trace: with one neuron fewer in each layer, the model must run and do the same.

A graph holds the numbers that Python computed, so it cannot tell a constant from one that depends on the width
(1/sqrt(width), an assertion of a size). The graph of the same model one neuron narrower can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.fx import Node

from kddp_ext.pruning.graph import OperationGraph, StoredTensor, unchanged_modules
from kddp_ext.pruning.operations import operation_name

# Their sizes are checked where the neurons pass them.
_RESHAPES = ("view", "reshape")


@contextmanager
def one_neuron_fewer(
    model: nn.Module, slices: Sequence[tuple[StoredTensor, int]], sizes: Sequence[tuple[str, str]]
) -> Iterator[None]:
    """Within it, each of `slices` (a tensor and a dimension) and of `sizes` (a module's attribute) is one shorter.

    The tensors are views: nothing is copied, and all are put back at the end.
    """
    with unchanged_modules(model):
        for stored, axis in slices:
            module = model.get_submodule(stored.module)
            tensor = getattr(module, stored.attribute)
            shorter = tensor.detach().narrow(axis, 0, tensor.shape[axis] - 1)
            if stored.attribute in module._parameters:
                module._parameters[stored.attribute] = nn.Parameter(shorter, tensor.requires_grad)
            else:
                module._buffers[stored.attribute] = shorter
        for name, attribute in sizes:
            module = model.get_submodule(name)
            setattr(module, attribute, getattr(module, attribute) - 1)
        yield


def difference(wide: OperationGraph, narrow: OperationGraph) -> str | None:
    """The first operation in which two graphs differ by more than the shapes of their tensors; None where none does."""
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
    return "" if operation_name(node) in _RESHAPES else repr((node.args, node.kwargs))


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    return type(a) is type(b)
