"""Finding neurons: which slices of which tensors belong to each output unit of a layer.

A neuron is a row of its layer's weight, an entry of the bias and of every BatchNorm on the way, and a column
of the weight of every layer that reads it; a channel of a convolution likewise. `find_neurons` proves that from the
graph of the forward pass, or says why it cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from kddp_ext.pruning.tracing.follow import follow, is_layer, layer_name
from kddp_ext.pruning.tracing.graph import OperationGraph, Refusal
from kddp_ext.pruning.tracing.groups import NeuronGroup
from kddp_ext.pruning.tracing.operations import shape_of
from kddp_ext.pruning.tracing.verify import difference, one_neuron_fewer


class UnsupportedModelError(ValueError):
    """A model, or a layer asked for by name, whose neurons cannot be proven prunable."""


@dataclass(frozen=True)
class TracedNeurons:
    """What `find_neurons` found.

    Attributes:
        groups: by layer name, in the order of the forward pass.
        refused: reason by layer name, for every other Linear and convolution.
        positions: of each weight of a Linear or convolution, by its name in the state_dict, at how many positions of
            a sample it is applied: the layer's multiplications a sample are its elements times this.
    """

    groups: dict[str, NeuronGroup]
    refused: dict[str, str]
    positions: Mapping[str, float]


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
    refuted = _refuted(graphs, example_inputs, [group for group in groups.values() if group.width > 1])
    for name, why in refuted.items():
        refused.update(dict.fromkeys(groups[name].producers, why))
    groups = {name: group for name, group in groups.items() if name not in refuted}
    pruned = {module for group in groups.values() for module in group.modules}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and name not in pruned:
            refused.setdefault(name, f"the forward pass does not reach it as a {_kind(module)}")
    refused = {name: why for name, why in refused.items() if name not in pruned}
    return TracedNeurons(groups, refused, _positions(graphs[1], example_inputs))


def _kind(module: nn.Module) -> str:
    return "Linear" if isinstance(module, nn.Linear) else "convolution"


def _positions(graph: OperationGraph, example_inputs: tuple[Any, ...]) -> dict[str, float]:
    samples = next((value.shape[0] for value in example_inputs if isinstance(value, Tensor) and value.dim()), 1)
    applied: Counter[str] = Counter()
    for node in graph.nodes:
        stored = graph.stored(node.args[1]) if is_layer(node) else None
        if stored is not None:
            applied[stored.name] += shape_of(node).numel() // graph.tensor(stored).shape[0]
    return {name: count / max(samples, 1) for name, count in applied.items()}


_Agreed = tuple[dict[str, NeuronGroup], dict[str, str]]


def _agreed(training: _Agreed, evaluation: _Agreed) -> _Agreed:
    """The groups that are the same in both modes, and why the others are refused."""
    groups: dict[str, NeuronGroup] = {}
    refused = {**training[1]}
    for name, reason in evaluation[1].items():
        refused.setdefault(name, f"{reason} (in evaluation mode)")
    for name, group in training[0].items():
        if evaluation[0].get(name) == group:
            groups[name] = group
        else:
            for producer in group.producers:
                refused.setdefault(producer, "the model uses it differently in training and in evaluation")
    for name in evaluation[0].keys() - training[0].keys():
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
    for graph in graphs:
        try:
            with one_neuron_fewer(graph.model, groups):
                narrow = OperationGraph(graph.model, example_inputs, training=graph.training)
                found = _trace(narrow)[0]
        except Refusal as refusal:
            return f"with one neuron fewer, {refusal}"
        changed = difference(graph, narrow)
        if changed is not None:
            return f"with one neuron fewer, {changed}: the model depends on their number"
        if any(found.get(group.name) != replace(group, width=group.width - 1) for group in groups):
            return "with one neuron fewer, the model uses it differently"
    return None


def _trace(graph: OperationGraph) -> _Agreed:
    """Every Linear and convolution of one graph."""
    groups: dict[str, NeuronGroup] = {}
    refused: dict[str, str] = {}
    for node in graph.nodes:
        name = layer_name(graph, node) if is_layer(node) else ""
        if not is_layer(node) or any(name in group.producers[1:] for group in groups.values()):
            continue
        try:
            groups[name] = follow(graph, node)
        except Refusal as refusal:
            refused.setdefault(name, str(refusal))
    return {name: group for name, group in groups.items() if name not in refused}, refused
