"""What each operation does to the neurons of a value that it reads: a table with one handler for each operation.

A handler follows the neurons into the operation's result, or ends because the operation reads them (the next Linear
layer or convolution), or refuses them. An operation that is not in the table is always refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from kddp_ext.activations.layout import Layout
from kddp_ext.pruning.tracing.graph import OperationGraph, Refusal
from kddp_ext.pruning.tracing.groups import NeuronCount, NeuronSlices, StoredTensor

# The number of dimensions that each operation convolves or pools over.
CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
POOLINGS = {
    f"{kind}{n}d": n for n in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
}


@dataclass
class NeuronPath:
    """The path of some layers' neurons through the graph, as far as it has been followed.

    `readers` are the operations that sum over the neurons: Linear layers and convolutions. `factors` are values outside
    the path that the neurons are multiplied with elementwise.
    """

    graph: OperationGraph
    at: dict[Node, Layout] = field(default_factory=dict)  # the layout of the neurons in each value on the path
    slices: list[NeuronSlices] = field(default_factory=list)
    counts: list[NeuronCount] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    factors: list[Node] = field(default_factory=list)

    def add_slices(self, argument: Any, role: str, layout: Layout) -> StoredTensor | None:
        """Record that the stored tensor behind `argument`, unless it is None, has slices of each neuron."""
        if argument is None:
            return None
        stored = self.graph.own(argument, role)
        self.slices.append(NeuronSlices(stored, layout))
        return stored

    def add_module(
        self, node: Node, kind: type[nn.Module], tensors: Iterable[Any], sizes: Iterable[str], layout: Layout
    ) -> None:
        """Record that the module that runs `node` slices `tensors` by neuron, and counts neurons in its `sizes`."""
        name = self.graph.module(node)
        if not isinstance(self.graph.model.get_submodule(name), kind):
            raise self.refusal(node, f"is a function call; use a {kind.__name__.strip('_')} module")
        for argument in tensors:
            stored = self.add_slices(argument, f"parameter of {name}", Layout(0, layout.outer, layout.inner))
            if stored is not None and stored.module != name:
                raise self.refusal(node, f"reads {stored.name} of another module")
        self.counts += [NeuronCount(name, size, layout.entries) for size in sizes]

    def step(self, node: Node) -> None:
        """Follow the neurons through `node`, which reads at least one value on the path."""
        if node.op == "output":
            if self.readers:
                raise Refusal("a value that holds its neurons is also an output of the model; do not return it")
            raise Refusal("its neurons are the model's outputs")
        name = operation_name(node)
        handler = HANDLERS.get(name)
        if handler is None:
            place = self.graph.place(node)
            raise Refusal(
                f"the pruner does not know whether the operation {name} in {place} keeps neurons separate; leave this "
                "layer unpruned or move the operation behind the next Linear layer or convolution"
            )
        handler(self, node)

    def source(self, node: Node) -> Node:
        """The first argument of `node`, proven to be a value on the path."""
        source = node.args[0]
        if not isinstance(source, Node) or source not in self.at:
            raise self.refusal(node, "reads its settings from the neurons")
        return source

    def refusal(self, node: Node, reason: str) -> Refusal:
        return Refusal(f"{operation_name(node)} in {self.graph.place(node)} {reason}")


Handler = Callable[[NeuronPath, Node], None]


def operation_name(node: Node) -> str:
    """'relu' for aten.relu.default and for the in-place aten.relu_.default."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::").rstrip("_")
    return "getitem" if node.target is operator.getitem else str(node.target)


def shape_of(node: Node) -> torch.Size:
    """Shape of the value of `node`; of the first where it has several."""
    value = node.meta["val"]
    value = value[0] if isinstance(value, tuple | list) else value
    assert isinstance(value, Tensor)
    return value.shape


def groups_of(convolution: Node) -> int:
    groups = argument_of(convolution, 6, "groups", 1)
    assert isinstance(groups, int)
    return groups


def argument_of(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument that may be passed by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _pointwise(path: NeuronPath, node: Node) -> None:
    """An elementwise operation on one or several values of the same neurons keeps their layout."""
    carried = [source for source in node.all_input_nodes if source in path.at]
    for other in node.all_input_nodes:
        if other in path.at or shape_of(other).numel() == 1:
            continue
        if operation_name(node) != "mul" or shape_of(other) != shape_of(node) or path.graph.stored(other):
            raise Refusal(foreign_operand(path.graph, node))
        path.factors.append(other)
    if any(shape_of(source) != shape_of(node) for source in carried):
        raise path.refusal(node, "broadcasts the neurons; keep their shape")
    layouts = {path.at[source] for source in carried}
    if len(layouts) > 1:
        raise path.refusal(node, "combines different neurons")
    path.at[node] = layouts.pop()


def foreign_operand(graph: OperationGraph, node: Node) -> str:
    """The reason why neurons cannot be followed through `node`, which combines them with another tensor."""
    name, effect = operation_name(node), "combines them with another tensor"
    if name == "mul":
        effect = "multiplies them by another tensor (a scale, or a gate that no Linear layer or convolution computes?)"
    elif name in ("add", "sub", "rsub"):
        effect = "adds another tensor to them (a residual sum?)"
    return f"{name} in {graph.place(node)} {effect}, which is not supported"


def _type_as(path: NeuronPath, node: Node) -> None:
    """Only the first argument contributes values; the second gives the dtype."""
    if node.args[0] in path.at:
        path.at[node] = path.at[path.source(node)]


def _reshape(path: NeuronPath, node: Node) -> None:
    """view, flatten and similar. A hard-coded number of neurons is found when the model is traced with one fewer."""
    source = path.source(node)
    layout = path.at[source].reshaped(shape_of(source), shape_of(node))
    if layout is None:
        raise path.refusal(node, "rearranges the neurons")
    path.at[node] = layout


def _permute(path: NeuronPath, node: Node) -> None:
    source = path.source(node)
    count = len(shape_of(source))
    order = list(range(count))
    if operation_name(node) == "permute":
        order = [axis % count for axis in argument_of(node, 1, "dims", order)]
    elif operation_name(node) == "transpose":
        a, b = argument_of(node, 1, "dim0", 0) % count, argument_of(node, 2, "dim1", 1) % count
        order[a], order[b] = b, a
    else:  # t, of at most two dimensions
        order.reverse()
    layout = path.at[source]
    path.at[node] = Layout(order.index(layout.axis), layout.outer, layout.inner)


def _batch_norm(path: NeuronPath, node: Node) -> None:
    """One scale, one shift and two running statistics for each entry of dimension 1."""
    source, *tensors = node.args[:5]
    if not isinstance(source, Node) or source not in path.at or path.at[source].axis != 1:
        raise path.refusal(node, "normalises over dimension 1, but the neurons are along another dimension")
    path.at[node] = path.at[source]
    path.add_module(node, nn.modules.batchnorm._BatchNorm, tensors, ["num_features"], path.at[node])


def _prelu(path: NeuronPath, node: Node) -> None:
    """One slope for all neurons, or one for each entry of dimension 1."""
    source, slope = path.source(node), node.args[1]
    layout = path.at[source]
    if not isinstance(slope, Node):
        raise path.refusal(node, "computes its slopes from the neurons")
    if shape_of(slope).numel() > 1:
        if layout.axis != 1:
            raise path.refusal(node, "has a slope for each entry of another dimension")
        path.add_module(node, nn.PReLU, [slope], ["num_parameters"], layout)
    path.at[node] = layout


def _linear(path: NeuronPath, node: Node) -> None:
    """The next layer sums over the neurons, so the path ends."""
    source = _read_source(path, node)
    if path.at[source].axis != len(shape_of(source)) - 1:
        raise path.refusal(node, "sums over another dimension than the neurons'")
    _read(path, node, "in_features", path.at[source])


def _convolution(path: NeuronPath, node: Node) -> None:
    """The next layer, which ends the path; or a depthwise convolution, which filters each channel separately."""
    source = _read_source(path, node)
    channel = len(shape_of(source)) - CONVOLUTIONS[operation_name(node)] - 1
    if path.at[source] != Layout(channel):
        raise path.refusal(node, "reads channels, but the neurons are along another dimension")
    groups, outputs = groups_of(node), shape_of(node)[channel]
    if groups == 1:
        _read(path, node, "in_channels", path.at[source])
        return
    if not groups == shape_of(source)[channel] == outputs:
        raise path.refusal(
            node,
            f"has {groups} groups of channels, which must keep equal sizes; single channels can only be removed from "
            "depthwise convolutions with one filter for each channel",
        )
    tensors = node.args[1], argument_of(node, 2, "bias", None)
    path.add_module(node, nn.modules.conv._ConvNd, tensors, ["in_channels", "out_channels", "groups"], Layout(channel))
    path.at[node] = Layout(channel)


def _read_source(path: NeuronPath, node: Node) -> Node:
    if any(argument in path.at for argument in node.args[1:] if isinstance(argument, Node)):
        raise path.refusal(node, "uses the neurons as its weight or bias")
    return path.source(node)


def _read(path: NeuronPath, node: Node, attribute: str, layout: Layout) -> None:
    graph = path.graph
    name = graph.module(node)
    stored = graph.own(node.args[1], f"weight of {name or 'the next layer'}")
    wanted = nn.Linear if attribute == "in_features" else nn.modules.conv._ConvNd
    if not isinstance(graph.model.get_submodule(name), wanted) or stored != StoredTensor(name, "weight"):
        raise path.refusal(node, f"is a function call that reads {stored.name}; use a module")
    path.slices.append(NeuronSlices(stored, Layout(1, layout.outer, layout.inner)))
    path.counts.append(NeuronCount(name, attribute, layout.entries))
    path.readers.append(node)


def _pooling(path: NeuronPath, node: Node) -> None:
    """Pooling over positions, for each channel separately."""
    source = path.source(node)
    pooled = POOLINGS[operation_name(node).removesuffix("_with_indices")]
    if path.at[source].axis >= len(shape_of(source)) - pooled:
        raise path.refusal(node, "pools over the neurons")
    path.at[node] = path.at[source]


def _getitem(path: NeuronPath, node: Node) -> None:
    """The values of a pooling that also returns indices."""
    if node.args[1] == 0:
        path.at[node] = path.at[path.source(node)]
    elif node.users:
        raise Refusal(f"the indices of the pooling in {path.graph.place(node)} are used")


def _reduction(path: NeuronPath, node: Node) -> None:
    """A mean, sum or maximum over dimensions other than the neurons'."""
    source = path.source(node)
    count, layout = len(shape_of(source)), path.at[source]
    dims = argument_of(node, 1, "dim", None)
    over = {axis % count for axis in ([dims] if isinstance(dims, int) else dims or range(count))}
    if layout.axis in over or (isinstance(dims, list) and not dims):
        raise path.refusal(node, "sums over the neurons")
    kept = argument_of(node, 2, "keepdim", False)
    shift = 0 if kept else sum(axis < layout.axis for axis in over)
    path.at[node] = Layout(layout.axis - shift, layout.outer, layout.inner)


def _mixes_neurons(path: NeuronPath, node: Node) -> None:
    raise path.refusal(
        node,
        "computes each neuron from all of them, so removing one would change the others; use BatchNorm or leave "
        "this layer unpruned",
    )


# Each entry of the result depends only on the same entry of the inputs.
POINTWISE = """
    relu relu6 gelu silu mish tanh sigmoid hardtanh hardswish hardsigmoid leaky_relu elu selu celu softplus
    log_sigmoid threshold hardshrink softshrink abs neg exp expm1 log log1p sqrt rsqrt square reciprocal
    sin cos erf sign pow clamp clamp_min clamp_max add sub rsub mul div maximum minimum
    dropout alpha_dropout feature_dropout to _to_copy contiguous clone detach alias
""".split()  # noqa: SIM905 - a list would be a page long

HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(["layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax"], _mixes_neurons),
    **dict.fromkeys(POOLINGS, _pooling),
    **dict.fromkeys([f"max_pool{n}d_with_indices" for n in (1, 2, 3)], _pooling),
    **dict.fromkeys(["mean", "sum", "amax", "amin"], _reduction),
    **dict.fromkeys(["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"], _reshape),
    **dict.fromkeys(["permute", "transpose", "t"], _permute),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    "getitem": _getitem,
    "type_as": _type_as,
    "_assert_tensor_metadata": lambda path, node: None,  # torch.export's check before a cast; nothing is computed
    "batch_norm": _batch_norm,
    "prelu": _prelu,
    "linear": _linear,
}
