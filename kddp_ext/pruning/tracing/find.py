"""Finds neurons: the slices of tensors that belong to each output of a layer.

A neuron is a row of its layer's weight, an entry of the bias and of every BatchNorm that follows, and a column of the
weight of every layer that reads it. The same holds for a channel of a convolution. `find_neurons` proves this from the
graph of the forward pass, or says why it cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from kddp_ext.pruning.tracing.follow import follow, is_layer, layer_name
from kddp_ext.pruning.tracing.graph import OperationGraph, Refusal, unchanged_modules
from kddp_ext.pruning.tracing.groups import NeuronGroup
from kddp_ext.pruning.tracing.operations import CONVOLUTIONS, groups_of, operation_name, shape_of

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
    (groups, refused), (groups_there, refused_there) = training, evaluation
    same = {name: group for name, group in groups.items() if groups_there.get(name) == group}
    different = {
        producer: "the model uses it differently in training and in evaluation"
        for group in [*groups.values(), *groups_there.values()]
        if group.name not in same
        for producer in group.producers
    }
    in_evaluation = {name: f"{reason} (in evaluation mode)" for name, reason in refused_there.items()}
    return same, {**different, **in_evaluation, **refused}


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
            with unchanged_modules(graph.model):
                _narrow(graph.model, groups)
                narrow = OperationGraph(graph.model, inputs, training=graph.training)
                found, _ = _follow_all(narrow)
        except Refusal as refusal:
            return f"with one neuron fewer, {refusal}"
        changed = _difference(graph, narrow)
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


# --- One neuron fewer
#
# A graph holds the numbers that Python computed, so it cannot tell a constant from a number that depends on the width
# (1/sqrt(width), an asserted size). Comparing it with the graph of the narrowed model can.


def _narrow(model: nn.Module, groups: Sequence[NeuronGroup]) -> None:
    """Take one neuron from every tensor and size of `groups`."""
    for group in groups:
        for slices in group.slices:
            module, attribute = model.get_submodule(slices.stored.module), slices.stored.attribute
            tensor, axis = getattr(module, attribute), slices.layout.axis
            # Only the shape matters, so a view is enough.
            shorter = tensor.detach().narrow(axis, 0, tensor.shape[axis] - slices.layout.entries)
            parameter = attribute in module._parameters
            setattr(module, attribute, nn.Parameter(shorter, tensor.requires_grad) if parameter else shorter)
        for count in group.counts:
            module = model.get_submodule(count.module)
            setattr(module, count.attribute, getattr(module, count.attribute) - count.entries)


def _difference(wide: OperationGraph, narrow: OperationGraph) -> str | None:
    """The first difference between two graphs, other than the shapes of their tensors; None where there is none."""
    for before, after in zip_longest(wide.nodes, narrow.nodes):
        if before is None or after is None:
            return "it runs more or fewer operations"
        if before.target != after.target:
            return f"{operation_name(before)} in {wide.place(before)} becomes {operation_name(after)}"
        if _numbers(before) != _numbers(after):
            return f"{operation_name(before)} in {wide.place(before)} computes with another number"
    for name, value in wide.constants.items():
        other = narrow.constants.get(name)
        same = type(value) is type(other)
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            same = torch.equal(value, other)
        if not same:
            return f"it computes with another constant tensor, {name}"
    return None


def _numbers(node: Node) -> str:
    name, arguments = operation_name(node), node.args
    if name in ("view", "reshape"):  # these sizes were checked when the neurons were followed
        return ""
    if name in CONVOLUTIONS and groups_of(node) == shape_of(node)[-1 - CONVOLUTIONS[name]]:
        arguments = arguments[:6]  # without `groups`, which is the number of channels of a depthwise convolution
    return repr((arguments, node.kwargs))
