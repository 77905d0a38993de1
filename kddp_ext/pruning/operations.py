"""What each operation does with the neurons of a value it reads: one handler an operation, in one table.

A handler either follows the neurons into the operation's result, or ends there because the operation reads
them (the next Linear), or refuses. An operation that is not in the table is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from kddp_ext.pruning.graph import OperationGraph, Refusal, StoredTensor


@dataclass
class NeuronPath:
    """The way of one layer's neurons through the graph, as far as it has been followed.

    Attributes:
        graph: the graph.
        axis: for each value that holds one entry a neuron, the dimension along which they lie.
        slices: stored tensors that hold one slice a neuron, and along which dimension.
        sizes: module attributes that hold the number of neurons.
        readers: the Linear operations that sum over the neurons.
    """

    graph: OperationGraph
    axis: dict[Node, int] = field(default_factory=dict)
    slices: list[tuple[StoredTensor, int]] = field(default_factory=list)
    sizes: list[tuple[str, str]] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)

    def add_slice(self, argument: Any, role: str, axis: int) -> StoredTensor | None:
        """Record that the stored tensor behind `argument`, if there is one, has a slice a neuron."""
        if argument is None:
            return None
        stored = self.graph.own(argument, role)
        self.slices.append((stored, axis))
        return stored

    def step(self, node: Node) -> None:
        """Follow the neurons through `node`, which reads at least one value that holds them."""
        if node.op == "output":
            if self.readers:
                raise Refusal("a value on their way also leaves the model as an output; do not return it")
            raise Refusal("its neurons are the model's outputs")
        name = operation_name(node)
        handler = HANDLERS.get(name)
        if handler is None:
            place = self.graph.place(node)
            raise Refusal(
                f"the operation {name} in {place} is not known to keep neurons apart; leave this layer "
                "unpruned or move the operation behind the next Linear"
            )
        handler(self, node)


Handler = Callable[[NeuronPath, Node], None]


def operation_name(node: Node) -> str:
    """'relu' for aten.relu.default and for its in-place form aten.relu_.default."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::").rstrip("_")
    return str(node.target)


def shape_of(node: Node) -> torch.Size:
    """Shape of a tensor-valued node."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.shape


def _pointwise(path: NeuronPath, node: Node) -> None:
    """Entry by entry, over one value or several of the same neurons: each neuron stays where it is."""
    carried = [source for source in node.all_input_nodes if source in path.axis]
    for other in node.all_input_nodes:
        if other not in path.axis and shape_of(other).numel() != 1:
            raise Refusal(_foreign_operand(path, node))
    if any(shape_of(source) != shape_of(node) for source in carried):
        raise Refusal(f"{operation_name(node)} in {path.graph.place(node)} broadcasts the neurons; keep the shape")
    axes = {path.axis[source] for source in carried}
    if len(axes) > 1:
        raise Refusal(f"{operation_name(node)} in {path.graph.place(node)} mixes different neurons")
    path.axis[node] = axes.pop()


def _foreign_operand(path: NeuronPath, node: Node) -> str:
    name, place = operation_name(node), path.graph.place(node)
    if name == "mul":
        return f"mul in {place} multiplies them by another tensor (a gated MLP?), which is not supported"
    if name in ("add", "sub", "rsub"):
        return f"{name} in {place} adds another tensor to them (a residual sum?), which is not supported"
    return f"{name} in {place} combines them with another tensor, which is not supported"


def _type_as(path: NeuronPath, node: Node) -> None:
    """Only the first argument's values go on; of the other, the dtype is read."""
    source = node.args[0]
    if isinstance(source, Node) and source in path.axis:
        path.axis[node] = path.axis[source]


def _assertion(path: NeuronPath, node: Node) -> None:
    """torch.export's check of dtype and device before a cast: it computes nothing."""


def _view(path: NeuronPath, node: Node) -> None:
    """A reshape that changes nothing. One that spells out the number of neurons fails with one neuron fewer."""
    source, sizes = node.args[0], node.args[1]
    assert isinstance(source, Node)
    assert isinstance(sizes, list | tuple)
    place = path.graph.place(node)
    if shape_of(source) != shape_of(node):
        raise Refusal(f"{operation_name(node)} in {place} rearranges the neurons, which is not supported")
    path.axis[node] = path.axis[source]


def _flatten(path: NeuronPath, node: Node) -> None:
    """A flatten of dimensions before the neurons, or of none."""
    source = node.args[0]
    assert isinstance(source, Node)
    dimensions, axis = len(shape_of(source)), path.axis[source]
    start, end = (_argument(node, i, name, default) for i, name, default in ((1, "start_dim", 0), (2, "end_dim", -1)))
    start, end = start % dimensions, end % dimensions
    if start == end:
        path.axis[node] = axis
    elif end < axis:
        path.axis[node] = axis - (end - start)
    else:
        raise Refusal(f"flatten in {path.graph.place(node)} merges the neurons with another dimension")


def _batch_norm(path: NeuronPath, node: Node) -> None:
    """One scale, shift and pair of running statistics a neuron."""
    source, *tensors = node.args[:5]
    place = path.graph.place(node)
    if not isinstance(source, Node) or path.axis.get(source) != 1:
        raise Refusal(f"batch_norm in {place} normalises over dimension 1, but the neurons lie along another")
    name = path.graph.module(node)
    module = path.graph.model.get_submodule(name)
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise Refusal(f"batch_norm in {place} is applied by hand; use nn.BatchNorm1d")
    for argument in tensors:
        stored = path.add_slice(argument, f"batch norm of {name}", 0)
        if stored is not None and stored.module != name:
            raise Refusal(f"batch_norm in {place} reads {stored.name}, which another module holds")
    path.sizes.append((name, "num_features"))
    path.axis[node] = 1


def _prelu(path: NeuronPath, node: Node) -> None:
    """One slope for all neurons, or one each."""
    source, slope = node.args[0], node.args[1]
    if not isinstance(source, Node) or source not in path.axis or not isinstance(slope, Node):
        raise Refusal(f"prelu in {path.graph.place(node)} takes its slopes from the neurons")
    if shape_of(slope).numel() > 1:
        name = path.graph.module(node)
        module = path.graph.model.get_submodule(name)
        if path.axis[source] != 1 or not isinstance(module, nn.PReLU):
            raise Refusal(f"prelu in {path.graph.place(node)} has a slope for each entry of another dimension")
        path.add_slice(slope, f"slope of {name}", 0)
        path.sizes.append((name, "num_parameters"))
    path.axis[node] = path.axis[source]


def _linear(path: NeuronPath, node: Node) -> None:
    """The next layer: it sums over the neurons, and their way ends."""
    source, weight = node.args[0], node.args[1]
    place = path.graph.place(node)
    if any(argument in path.axis for argument in node.args[1:] if isinstance(argument, Node)):
        raise Refusal(f"linear in {place} uses them as its weight or bias")
    assert isinstance(source, Node)
    if path.axis[source] != len(shape_of(source)) - 1:
        raise Refusal(f"linear in {place} sums over another dimension than theirs")
    name = path.graph.module(node)
    module = path.graph.model.get_submodule(name)
    stored = path.graph.own(weight, f"weight of {name or 'the next layer'}")
    if not isinstance(module, nn.Linear) or stored != StoredTensor(name, "weight"):
        raise Refusal(f"linear in {place} reads {stored.name} by hand; call an nn.Linear module instead")
    path.slices.append((stored, 1))
    path.sizes.append((name, "in_features"))
    path.readers.append(node)


def _mixes_neurons(path: NeuronPath, node: Node) -> None:
    raise Refusal(
        f"{operation_name(node)} in {path.graph.place(node)} computes each neuron from all of them, so "
        "removing one would change the others; use BatchNorm1d there or leave this layer unpruned"
    )


def _argument(node: Node, position: int, name: str, default: int) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    assert isinstance(value, int)
    return value


# Each entry of the result depends on the same entry of the inputs alone.
POINTWISE = """
    relu relu6 gelu silu mish tanh sigmoid hardtanh hardswish hardsigmoid leaky_relu elu selu celu softplus
    log_sigmoid threshold hardshrink softshrink abs neg exp expm1 log log1p sqrt rsqrt square reciprocal
    sin cos erf sign pow clamp clamp_min clamp_max add sub rsub mul div maximum minimum
    dropout alpha_dropout to _to_copy contiguous clone detach alias
""".split()  # noqa: SIM905 - a list would be a page long

HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(["layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax"], _mixes_neurons),
    "type_as": _type_as,
    "_assert_tensor_metadata": _assertion,
    "view": _view,
    "reshape": _view,
    "flatten": _flatten,
    "batch_norm": _batch_norm,
    "prelu": _prelu,
    "linear": _linear,
}
