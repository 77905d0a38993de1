"""Follows the neurons of one layer through the graph to the layers that read them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.fx import Node

from kddp_ext.activations.layout import Layout
from kddp_ext.pruning.tracing.graph import OperationGraph, Refusal
from kddp_ext.pruning.tracing.groups import NeuronCount, NeuronGroup, Reader, StoredTensor
from kddp_ext.pruning.tracing.operations import (
    CONVOLUTIONS,
    POINTWISE,
    POOLINGS,
    NeuronPath,
    argument_of,
    foreign_operand,
    groups_of,
    operation_name,
    shape_of,
)

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# A constant added to a channel passes unchanged through a maximum, and through a mean without padding.
_SHIFT_PASSES = tuple(name for name in POOLINGS if not name.startswith("avg"))


def is_layer(node: Node) -> bool:
    """True for a Linear layer or a convolution, depthwise or not."""
    return operation_name(node) == "linear" or operation_name(node) in CONVOLUTIONS


def is_grouped(node: Node) -> bool:
    """True for a convolution with several groups of channels."""
    return operation_name(node) in CONVOLUTIONS and groups_of(node) > 1


def layer_name(graph: OperationGraph, node: Node) -> str:
    """Name of the module whose weight `node` applies."""
    stored, caller = graph.stored(node.args[1]), graph.module(node)
    if stored is None or isinstance(graph.model.get_submodule(caller), _LAYERS):
        return caller
    return stored.module if isinstance(graph.model.get_submodule(stored.module), _LAYERS) else stored.name


def follow(graph: OperationGraph, layer: Node) -> NeuronGroup:
    """The group of the neurons that `layer` and the layers that gate it compute."""
    producers = [layer]
    path = _walk(graph, producers)
    while path.factors:
        gates = {producer for factor in path.factors for producer in _producers_behind(graph, factor)}
        if gates <= set(producers):
            factor = path.factors[0]
            raise Refusal(foreign_operand(graph, next(user for user in factor.users if user in path.at)))
        producers = [node for node in graph.nodes if node in gates.union(producers)]
        path = _walk(graph, producers)
    if not path.readers:
        raise Refusal("nothing reads its neurons")
    return _group(path, producers)


def _walk(graph: OperationGraph, producers: list[Node]) -> NeuronPath:
    path = NeuronPath(graph)
    for producer in producers:
        _start(path, producer)
    for node in graph.nodes:
        if any(source in path.at for source in node.all_input_nodes):
            path.step(node)
    path.factors = [factor for factor in path.factors if factor not in path.at]
    return path


def _start(path: NeuronPath, layer: Node) -> None:
    graph, shape = path.graph, shape_of(layer)
    weight = path.add_slices(layer.args[1], "weight", Layout(0))
    assert weight is not None
    if not isinstance(graph.model.get_submodule(weight.module), _LAYERS) or weight.attribute != "weight":
        raise Refusal(f"the weight {weight.name} belongs to no nn.Linear or convolution; make it one")
    if is_grouped(layer):
        raise Refusal(
            f"its {groups_of(layer)} groups of channels must keep equal sizes; a depthwise convolution is pruned with "
            "the layer in front of it, where that is possible"
        )
    path.add_slices(argument_of(layer, 2, "bias", None), "bias", Layout(0))
    linear = operation_name(layer) == "linear"
    path.counts.append(NeuronCount(weight.module, "out_features" if linear else "out_channels"))
    axis = len(shape) - 1 if linear else len(shape) - 1 - CONVOLUTIONS[operation_name(layer)]
    if axis < 1:
        raise Refusal("it is called on a single sample without a batch dimension")
    path.at[layer] = Layout(axis)


def _producers_behind(graph: OperationGraph, factor: Node) -> set[Node]:
    """The layers that compute `factor`, through elementwise operations only."""
    if is_layer(factor) and not is_grouped(factor):
        return {factor}
    passes = operation_name(factor) in (*POINTWISE, "batch_norm", "prelu") or is_grouped(factor)
    sources = [node for node in factor.all_input_nodes if graph.stored(node) is None]
    if not passes or not sources or any(shape_of(source) != shape_of(factor) for source in sources):
        raise Refusal(
            f"they are multiplied by the result of {operation_name(factor)} in {graph.place(factor)}, which is not an "
            "elementwise function of the outputs of a Linear layer or convolution"
        )
    return {producer for source in sources for producer in _producers_behind(graph, source)}


def _group(path: NeuronPath, producers: list[Node]) -> NeuronGroup:
    graph = path.graph
    # Statistics are of one value, so all readers must read the same one, each possibly through its own dropout.
    sources = [_before_dropout(graph, reader) for reader in path.readers]
    value, dropouts = sources[0]
    if any(source is not value for source, _ in sources):
        readers = " and ".join(graph.module(reader) for reader in path.readers)
        raise Refusal(f"{readers} read different functions of its neurons, and only one value can be observed")
    names = tuple(layer_name(graph, producer) for producer in producers)
    read = {slices.stored: slices.layout for slices in path.slices if slices.layout.axis == 1}
    width = shape_of(producers[0])[path.at[producers[0]].axis]
    if any(shape_of(producer)[path.at[producer].axis] != width for producer in producers):
        raise Refusal(f"the outputs of {' and '.join(names)} are multiplied and have different numbers of neurons")
    return NeuronGroup(
        name=names[0],
        producers=names,
        width=width,
        slices=tuple(path.slices),
        counts=tuple(path.counts),
        readers=tuple(
            Reader(module, read[StoredTensor(module, "weight")], _shift(graph, reader), _is_padded(reader))
            for module, reader in zip(map(graph.module, path.readers), path.readers, strict=True)
        ),
        value=path.at[value],
        dimensions=len(shape_of(value)),
        dropouts=tuple(dropouts),
    )


def _before_dropout(graph: OperationGraph, reader: Node) -> tuple[Node, list[str]]:
    """The value that `reader` reads, taken before the nn.Dropout modules directly in front of it; and their names."""
    source, names = reader.args[0], []
    assert isinstance(source, Node)
    while operation_name(source) in ("dropout", "feature_dropout"):
        name = graph.module(source)
        module = graph.model.get_submodule(name)
        # An in-place dropout overwrites the value, and a function call has no module to hook.
        if not isinstance(module, _DROPOUTS) or module.inplace:
            break
        names.append(name)
        source = source.args[0]
        assert isinstance(source, Node)
    return source, names


def _shift(graph: OperationGraph, reader: Node) -> StoredTensor | None:
    """The tensor that can absorb a constant added to the output of `reader`."""
    candidate = argument_of(reader, 2, "bias", None)
    if candidate is None:
        norm = _norm_behind(reader)
        if norm is None:
            return None
        candidate = norm.args[3]
    try:
        return graph.own(candidate, "shift")
    except Refusal:
        return None


def _is_padded(reader: Node) -> bool:
    if operation_name(reader) not in CONVOLUTIONS:
        return False
    padding = argument_of(reader, 4, "padding", 0)  # sizes, "valid" or "same"
    if isinstance(padding, str):
        return padding == "same"
    return any(padding) if isinstance(padding, Sequence) else bool(padding)


def _norm_behind(reader: Node) -> Node | None:
    """The BatchNorm that is the only user of the output of `reader`, directly or through pooling."""
    value = reader
    while len(value.users) == 1:
        user = next(iter(value.users))
        if user.args[0] is not value:
            return None
        if operation_name(user) == "batch_norm":
            return user
        if operation_name(user) not in _SHIFT_PASSES:
            return None
        value = user
    return None
