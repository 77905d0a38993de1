"""Finds the prunable neurons of a model, and proves them by narrowing the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kddp_ext.pruning.attention import with_removable_heads
from kddp_ext.pruning.settings import Streams
from kddp_ext.pruning.tracing.analysis import Analysis
from kddp_ext.pruning.tracing.recording import Recorder, tensors_in
from kddp_ext.pruning.tracing.structure import NeuronGroup, PrunableNeurons, StoredTensor
from kddp_ext.pruning.tracing.verify import Failure, verified


@dataclass(frozen=True)
class TracedNeurons:
    """The result of `find_neurons`.

    `positions` are, by the weight of a layer, the number of positions of a sample to which it is applied. The layer's
    MACs for one sample are the weight's elements times this number.
    """

    neurons: PrunableNeurons
    refused: dict[str, str]  # by layer name, the reason why any other layer cannot be pruned
    positions: Mapping[StoredTensor, float]

    @property
    def groups(self) -> dict[str, NeuronGroup]:
        """The groups by name, in the order of the forward pass."""
        return {group.name: group for group in self.neurons.groups}


@torch.inference_mode(False)  # tensors made in inference mode have no versions
def find_neurons(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    streams: Streams = "exact",
) -> TracedNeurons:
    """Find all neurons that can be removed from the model.

    The model is not changed, but its nn.MultiheadAttention modules get a class that can lose heads.

    Args:
        model: in any mode; it is traced in training and in evaluation mode.
        example_inputs: positional arguments for its forward.
        example_kwargs: keyword arguments for it.
        streams: "exact" refuses neurons that are normalised together, because removing one would change the others.

    Raises:
        UnsupportedModelError: the forward pass cannot be traced.
    """
    with with_removable_heads(model):
        recorder = Recorder(model, example_inputs, example_kwargs or {})
        recordings = [recorder.record(training=mode) for mode in (True, False)]

        ties: list[tuple[Tensor, Tensor]] = []

        def analyse(choices: dict[Hashable, int]) -> Analysis:
            return Analysis(model, recordings, choices, keep_norm_statistics=streams == "exact", ties=ties)

        proven: list[PrunableNeurons] = []

        def prove(analysis: Analysis) -> _Found:
            proven.append(analysis.neurons)
            return _Found(analysis, *verified(recorder, analysis))

        analysis, choices = _best(analyse)
        best = prove(analysis)
        ties += best.ties()
        if ties:
            analysis = analyse(choices)
            tied = prove(analysis)
            if tied.removable > best.removable:
                best = tied
            else:
                ties.clear()
        options = {kind: count for flow in analysis.flows for kind, count in flow.proof_options.items()}
        if best.refuted:
            options = {kind: count for flow in analysis.flows for kind, count in flow.options.items()} | options
        for kind, count in options.items():
            for option in range(count):
                if option == choices.get(kind, 0):
                    continue
                analysis = analyse({**choices, kind: option})
                if analysis.removable(analysis.neurons) <= best.removable or any(map(analysis.neurons.same, proven)):
                    continue
                other = prove(analysis)
                if other.removable > best.removable:
                    best, choices = other, {**choices, kind: option}
        samples = next((each.shape[0] for each in tensors_in((example_inputs, example_kwargs)) if each.dim()), 1)
        applied = best.analysis.flows[1].applied
        positions = {stored: count / max(samples, 1) for stored, count in applied.items()}
        return TracedNeurons(best.neurons, best.refused, positions)


@dataclass(frozen=True, eq=False)
class _Found:
    analysis: Analysis
    neurons: PrunableNeurons
    refuted: dict[str, Failure]

    def ties(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of labels that could be equal: of groups that fail alone, because the number of one follows the other.

        Where attention reshapes its heads to the width of a stream, a head goes with its part of the stream.
        """
        alone = [group for group in self.analysis.neurons.groups if group.name in self.refuted]
        alone.sort(key=lambda group: -group.width)
        ties = []
        while alone:
            wide, *alone = alone
            tied = [
                group
                for group in alone
                if wide.width % group.width == 0
                and self.analysis.reaches(wide, next(iter(self.refuted[group.name].modules), ""))
            ]
            ties += [self.analysis.tie(wide, group) for group in tied]
            alone = [group for group in alone if group not in tied]
        return ties

    @property
    def removable(self) -> float:
        return self.analysis.removable(self.neurons)

    @property
    def refused(self) -> dict[str, str]:
        """By the name of each layer that is not pruned, the reason."""
        refused = dict(self.analysis.refused)
        for group in self.analysis.neurons.groups:
            if group.name in self.refuted:
                refused.update(dict.fromkeys(group.producers, self.refuted[group.name].reason))
        for name, module in self.analysis.model.named_modules():  # depthwise convolutions produce none
            filtered = self.analysis.neurons.group_of(name) if isinstance(module, nn.modules.conv._ConvNd) else None
            if filtered is not None and filtered.name in self.refuted:
                refused.setdefault(name, self.refuted[filtered.name].reason)
        return refused


def _best(analyse: Callable[[dict[Hashable, int]], Analysis]) -> tuple[Analysis, dict[Hashable, int]]:
    """The analysis whose choices let most parameters be removed, and its choices."""
    choices: dict[Hashable, int] = {}
    best = analyse(choices)
    tried: set[Hashable] = set()
    while True:
        options = {kind: count for flow in best.flows for kind, count in flow.options.items() if kind not in tried}
        if not options:
            return best, choices
        for kind, count in options.items():
            tried.add(kind)
            for option in range(1, count):
                other = analyse({**choices, kind: option})
                if other.removable(other.neurons) > best.removable(best.neurons) * (1 + 1e-9):
                    best, choices = other, {**choices, kind: option}
