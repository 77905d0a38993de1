"""Finds neurons: the slices of tensors that belong to each output of a layer.

A neuron is a row of its layer's weight, an entry of the bias and of every BatchNorm that follows, and a column of the
weight of every layer that reads it. The same holds for a channel of a convolution. `find_neurons` proves this from the
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

_FoundAndRefused = tuple[dict[str, NeuronGroup], dict[str, str]]  # both by layer name


class UnsupportedModelError(ValueError):
    """A model or a requested layer cannot be proven prunable."""


@dataclass(frozen=True)
class TracedNeurons:
    """The result of `find_neurons`.

    `positions` are, by the name of a layer's weight in the state_dict, the number of positions of a sample to which the
    weight is applied. The layer's MACs for one sample are the weight's elements times this number.
    """

    groups: dict[str, NeuronGroup]  # by layer name, in the order of the forward pass
    refused: dict[str, str]  # by layer name, the reason why any other Linear layer or convolution cannot be pruned
    positions: Mapping[str, float]


def find_neurons(model: nn.Module, example_inputs: tuple[Any, ...]) -> TracedNeurons:
    """Trace the model in training and in evaluation mode, and return the groups that are the same in both.

    Each group is then verified by tracing the model with one neuron fewer. The model is not changed. An
    `UnsupportedModelError` is raised where the forward pass cannot be traced.
    """
    try:
        graphs = [OperationGraph(model, example_inputs, training=mode) for mode in (True, False)]
    except Refusal as refusal:
        raise UnsupportedModelError(str(refusal)) from refusal
    groups, refused = _same_in_both(*[_follow_all(graph) for graph in graphs])
    refuted = _refute(graphs, example_inputs, [group for group in groups.values() if group.width > 1])
    for name, reason in refuted.items():
        refused.update(dict.fromkeys(groups[name].producers, reason))
    groups = {name: group for name, group in groups.items() if name not in refuted}
    pruned = {module for group in groups.values() for module in group.modules}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            kind = "Linear layer" if isinstance(module, nn.Linear) else "convolution"
            refused.setdefault(name, f"the forward pass does not reach it as a {kind}")
    refused = {name: reason for name, reason in refused.items() if name not in pruned}
    return TracedNeurons(groups, refused, _positions(graphs[1], example_inputs))


def _follow_all(graph: OperationGraph) -> _FoundAndRefused:
    groups: dict[str, NeuronGroup] = {}
    refused: dict[str, str] = {}
    for node in filter(is_layer, graph.nodes):
        name = layer_name(graph, node)
        if any(name in group.producers[1:] for group in groups.values()):
            continue
        try:
            groups[name] = follow(graph, node)
        except Refusal as refusal:
            refused.setdefault(name, str(refusal))
    return {name: group for name, group in groups.items() if name not in refused}, refused


def _same_in_both(training: _FoundAndRefused, evaluation: _FoundAndRefused) -> _FoundAndRefused:
    """The groups that are the same in both modes, and the reasons against the others."""
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


def _refute(graphs: list[OperationGraph], inputs: tuple[Any, ...], groups: list[NeuronGroup]) -> dict[str, str]:
    """By group name, the reason why the model depends on the number of its neurons; empty for most models."""
    reason = _dependence(graphs, inputs, groups)
    if reason is None:
        return {}
    alone = {group.name: _dependence(graphs, inputs, [group]) for group in groups}
    refuted = {name: why for name, why in alone.items() if why is not None}
    return refuted or {group.name: reason for group in groups}


def _dependence(graphs: list[OperationGraph], inputs: tuple[Any, ...], groups: list[NeuronGroup]) -> str | None:
    """What changes in the forward pass with one neuron fewer in each of `groups`; None where nothing does."""
    if not groups:
        return None
    for graph in graphs:
        try:
            with one_neuron_fewer(graph.model, groups):
                narrow = OperationGraph(graph.model, inputs, training=graph.training)
                found, _ = _follow_all(narrow)
        except Refusal as refusal:
            return f"with one neuron fewer, {refusal}"
        changed = difference(graph, narrow)
        if changed is not None:
            return f"with one neuron fewer, {changed}: the model depends on their number"
        if any(found.get(group.name) != replace(group, width=group.width - 1) for group in groups):
            return "with one neuron fewer, the model uses it differently"
    return None


def _positions(graph: OperationGraph, example_inputs: tuple[Any, ...]) -> dict[str, float]:
    samples = next((value.shape[0] for value in example_inputs if isinstance(value, Tensor) and value.dim()), 1)
    applied: Counter[str] = Counter()
    for node in filter(is_layer, graph.nodes):
        stored = graph.stored(node.args[1])
        if stored is not None:
            applied[stored.name] += shape_of(node).numel() // stored.of(graph.model).shape[0]
    return {name: count / max(samples, 1) for name, count in applied.items()}
