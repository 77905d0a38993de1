"""Counts PyTorch's operations and the bytes of their tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.roofline.model import SECTOR_BYTES, Traffic

aten = torch.ops.aten

# Uninitialized memory and aliases: no kernel.
_FREE = {
    aten.detach,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.lift_fresh,
    aten.new_empty,
    aten.new_empty_strided,
}
# These use a tensor's shape only.
_FILLS = {aten.full_like, aten.new_full, aten.new_ones, aten.new_zeros, aten.ones_like, aten.zeros_like}

# The bytes that an operation reads, if it does not read all of its arguments.
_READS: dict[Any, Callable[[list[Tensor], list[Tensor]], int]] = {
    # One logarithm per row, and the labels.
    aten.nll_loss_forward: lambda inputs, outputs: inputs[0].shape[0] * SECTOR_BYTES + _touched(inputs[1:]),
    # It uses the shape of the logarithms only.
    aten.nll_loss_backward: lambda inputs, outputs: _touched([inputs[0], *inputs[2:]]),
    # As much as it writes, and the indices.
    aten.index_select: lambda inputs, outputs: _touched([*outputs, *inputs[1:]]),
}
# It fills the gradient with zeros first.
_LAUNCHES = {aten.nll_loss_backward: 2}


class Operation(NamedTuple):
    """One call of an operation that is not free."""

    name: str
    launches: int
    read_bytes: int
    written_bytes: int


class OperationCounter(TorchDispatchMode):
    """Records the operations inside of `with`, forward and backward.

    Each operation counts as one kernel that reads each of its tensors once and writes its results once. Some kernels do
    more (a softmax reads rows that are too long for shared memory twice), none does less. Operators of this package are
    not counted themselves, only what they call: the emulator counts their kernels.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            with self:  # calls the kernel directly, because the operator would be dispatched here again
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        results = func(*args, **kwargs)
        if not (func.is_view or func.overloadpacket in _FREE):
            self.operations.append(_operation(func, _tensors((args, kwargs)), _tensors(results)))
        return results

    def traffic(self) -> Traffic:
        """The costs of all operations. The needed bytes are unknown."""
        launches = sum(operation.launches for operation in self.operations)
        moved = sum(operation.read_bytes + operation.written_bytes for operation in self.operations)
        return Traffic(launches, 0, moved)


def _operation(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> Operation:
    packet = func.overloadpacket
    if packet in _FILLS:
        read = 0
    elif packet in _READS:
        read = _READS[packet](inputs, outputs)
    else:
        read = _touched(inputs)
    return Operation(str(func), _LAUNCHES.get(packet, 1), read, _touched(outputs))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _touched(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements. Elements that a tensor repeats (expand) count once."""
    return sum(_elements(tensor) * tensor.element_size() for tensor in tensors)


def _elements(tensor: Tensor) -> int:
    return math.prod(
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or size == 0
    )
