"""Finding neurons: which slices of which tensors belong to each output unit of a layer.

A neuron is a row of its layer's weight, an entry of the bias and of every BatchNorm on the way, and a column
of the weight of every layer that reads it. `find_neurons` proves that from the graph of the forward pass, or
says why it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.fx import Node

from kddp_ext.pruning.graph import OperationGraph, Refusal, StoredTensor
from kddp_ext.pruning.narrowing import difference, one_neuron_fewer
from kddp_ext.pruning.operations import NeuronPath, operation_name, shape_of


class UnsupportedModelError(ValueError):
    """A model, or a layer asked for by name, whose neurons cannot be proven prunable."""


@dataclass(frozen=True)
class Reader:
    """A Linear that reads the neurons.

    Attributes:
        module: its name.
        shift: what takes up the average contribution of pruned neurons: the Linear's own bias, or the running
            mean of the BatchNorm behind a Linear without bias. None where there is neither.
    """

    module: str
    shift: StoredTensor | None

    @property
    def weight(self) -> StoredTensor:
        """The (outputs, neurons) weight."""
        return StoredTensor(self.module, "weight")


@dataclass(frozen=True)
class NeuronGroup:
    """The neurons of one layer, with everything that belongs to them.

    Attributes:
        name: the layer whose outputs they are.
        width: how many there are now.
        slices: stored tensors with one slice a neuron, and the dimension along which the slices lie.
        sizes: (module, attribute) pairs that hold the width.
        readers: the Linear layers that read them, all the same value.
        dropouts: nn.Dropout modules directly before the first reader: the value is observed before these.
    """

    name: str
    width: int
    slices: tuple[tuple[StoredTensor, int], ...]
    sizes: tuple[tuple[str, str], ...]
    readers: tuple[Reader, ...]
    dropouts: tuple[str, ...] = field(compare=False)

    def reader(self, stored: StoredTensor) -> Reader | None:
        """The reader whose weight `stored` is."""
        return next((reader for reader in self.readers if reader.weight == stored), None)


@dataclass(frozen=True)
class TracedNeurons:
    """What `find_neurons` found.

    Attributes:
        groups: by layer name, in the order of the forward pass.
        refused: reason by layer name, for every other Linear.
    """

    groups: dict[str, NeuronGroup]
    refused: dict[str, str]


def find_neurons(model: nn.Module, example_inputs: tuple[Any, ...]) -> TracedNeurons:
    """Trace the model in training and in evaluation mode; a layer is accepted where both agree.

    What was found is proven by tracing the model again with one neuron fewer in each layer: see `narrowing`.

    Args:
        model: the model; nothing of it is changed.
        example_inputs: positional arguments for its forward; a BatchNorm needs at least two samples.

    Raises:
        UnsupportedModelError: the forward pass cannot be traced.
    """
    try:
        graphs = [OperationGraph(model, example_inputs, training=mode) for mode in (True, False)]
    except Refusal as refusal:
        raise UnsupportedModelError(str(refusal)) from refusal
    groups, refused = _agreed(*[_trace(graph) for graph in graphs])
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in groups:
            refused.setdefault(name, "the forward pass does not reach it as a Linear")

    refuted = _refuted(graphs, example_inputs, [group for group in groups.values() if group.width > 1])
    refused.update(refuted)
    return TracedNeurons({name: group for name, group in groups.items() if name not in refuted}, refused)


def _agreed(training: TracedNeurons, evaluation: TracedNeurons) -> tuple[dict[str, NeuronGroup], dict[str, str]]:
    """The groups that are the same in both modes, and why the others are refused."""
    groups: dict[str, NeuronGroup] = {}
    refused = {**training.refused}
    for name, reason in evaluation.refused.items():
        refused.setdefault(name, f"{reason} (in evaluation mode)")
    for name, group in training.groups.items():
        if evaluation.groups.get(name) == group:
            groups[name] = group
        else:
            refused.setdefault(name, "the model uses it differently in training and in evaluation")
    for name in evaluation.groups.keys() - training.groups.keys():
        refused.setdefault(name, "the model uses it in evaluation only")
    return groups, refused


def _refuted(
    graphs: list[OperationGraph], example_inputs: tuple[Any, ...], groups: list[NeuronGroup]
) -> dict[str, str]:
    """Why some of the groups are refused after all: the model depends on how many neurons they have."""
    reason = _dependence(graphs, example_inputs, groups)
    if reason is None:
        return {}
    alone = {group.name: _dependence(graphs, example_inputs, [group]) for group in groups}
    refuted = {name: why for name, why in alone.items() if why is not None}
    return refuted or {group.name: reason for group in groups}


def _dependence(graphs: list[OperationGraph], example_inputs: tuple[Any, ...], groups: list[NeuronGroup]) -> str | None:
    if not groups:
        return None
    slices = [each for group in groups for each in group.slices]
    sizes = [each for group in groups for each in group.sizes]
    for graph in graphs:
        try:
            with one_neuron_fewer(graph.model, slices, sizes):
                narrow = OperationGraph(graph.model, example_inputs, training=graph.training)
                found = _trace(narrow).groups
        except Refusal as refusal:
            return f"with one neuron fewer, {refusal}"
        changed = difference(graph, narrow)
        if changed is not None:
            return f"with one neuron fewer, {changed}: the model depends on their number"
        if any(found.get(group.name) != replace(group, width=group.width - 1) for group in groups):
            return "with one neuron fewer, the model uses it differently"
    return None


def _trace(graph: OperationGraph) -> TracedNeurons:
    """Every Linear of one graph."""
    groups: dict[str, NeuronGroup] = {}
    refused: dict[str, str] = {}
    for node in graph.nodes:
        if operation_name(node) != "linear":
            continue
        name = _layer_name(graph, node)
        try:
            groups[name] = _follow(graph, node)
        except Refusal as refusal:
            refused.setdefault(name, str(refusal))
    return TracedNeurons({name: group for name, group in groups.items() if name not in refused}, refused)


def _layer_name(graph: OperationGraph, node: Node) -> str:
    stored, caller = graph.stored(node.args[1]), graph.module(node)
    if stored is None or isinstance(graph.model.get_submodule(caller), nn.Linear):
        return caller
    return stored.module if isinstance(graph.model.get_submodule(stored.module), nn.Linear) else stored.name


def _follow(graph: OperationGraph, linear: Node) -> NeuronGroup:
    """The group of the neurons that `linear` computes."""
    path = NeuronPath(graph)
    weight = path.add_slice(linear.args[1], "weight", 0)
    assert weight is not None
    if not isinstance(graph.model.get_submodule(weight.module), nn.Linear) or weight.attribute != "weight":
        raise Refusal(f"the weight {weight.name} belongs to no nn.Linear; make it one")
    path.add_slice(linear.args[2] if len(linear.args) > 2 else None, "bias", 0)
    path.sizes.append((weight.module, "out_features"))
    if len(shape_of(linear)) < 2:
        raise Refusal("it is called on a single sample without a batch dimension")
    path.axis[linear] = len(shape_of(linear)) - 1
    for node in graph.nodes:
        if any(source in path.axis for source in node.all_input_nodes):
            path.step(node)
    if not path.readers:
        raise Refusal("nothing reads its neurons")

    # Statistics are of one value, so all readers must read the same (each through a dropout of its own, if
    # any).
    sources = [_before_dropout(graph, reader) for reader in path.readers]
    if len({source for source, _ in sources}) > 1:
        names = " and ".join(graph.module(reader) for reader in path.readers)
        raise Refusal(f"{names} read different functions of its neurons; only one common value can be observed")
    return NeuronGroup(
        name=weight.module,
        width=graph.tensor(weight).shape[0],
        slices=tuple(path.slices),
        sizes=tuple(path.sizes),
        readers=tuple(Reader(graph.module(reader), _shift(graph, reader)) for reader in path.readers),
        dropouts=tuple(sources[0][1]),
    )


def _before_dropout(graph: OperationGraph, reader: Node) -> tuple[Node, list[str]]:
    """The value that `reader` reads, before nn.Dropout modules directly in front of it, and their names."""
    source, names = reader.args[0], []
    assert isinstance(source, Node)
    while operation_name(source) == "dropout":
        name = graph.module(source)
        module = graph.model.get_submodule(name)
        # An in-place dropout overwrites the value; a functional one offers nothing to hook.
        if not isinstance(module, nn.Dropout) or module.inplace:
            break
        names.append(name)
        source = source.args[0]
        assert isinstance(source, Node)
    return source, names


def _shift(graph: OperationGraph, reader: Node) -> StoredTensor | None:
    """What a constant added to the output of `reader` can be folded into."""
    candidate = reader.args[2] if len(reader.args) > 2 else None
    users = list(reader.users)
    if candidate is None and len(users) == 1 and operation_name(users[0]) == "batch_norm":
        candidate = users[0].args[3] if users[0].args[0] is reader else None
    if candidate is None:
        return None
    try:
        return graph.own(candidate, "shift")
    except Refusal:
        return None
