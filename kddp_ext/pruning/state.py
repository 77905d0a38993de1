"""The state of a pruner between checks: each prune replaces it as a whole, and checkpoints save and restore it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kddp_ext.activations.statistics import NeuronStatistics
from kddp_ext.pruning.history import PruningHistory
from kddp_ext.pruning.selection import LayerDecision, LayerObservation, check_statistics, norms_of_readers
from kddp_ext.pruning.settings import PruningSettings
from kddp_ext.pruning.tracing.groups import NeuronGroup, StoredTensor, count_neurons

STATE_VERSION = 2


@dataclass(frozen=True)
class LayerState:
    """The state of one layer of H neurons."""

    group: NeuronGroup
    statistics: NeuronStatistics  # since the last check, on the device of the activations
    inactive_checks: Tensor  # (H,) int64, the number of consecutive checks at which the neuron was inactive
    first_scales: Tensor | None = None  # (2, H) float64, mean|h_j| and ‖W2[:,j]‖₂ at the first check

    def observe(self, model: nn.Module, kept: Sequence[int], caller: str) -> LayerObservation:
        """Observe the layer, whose neurons have the original indices `kept`; everything is copied to the CPU."""
        check_statistics(self.statistics, self.group.name, caller)
        statistics = copy.deepcopy(self.statistics)
        statistics.to(torch.device("cpu"))
        return LayerObservation(
            self.group,
            statistics,
            *norms_of_readers(model, self.group, caller),
            self.inactive_checks,
            torch.tensor(kept, device="cpu"),
            self.first_scales,
        )

    def after(self, decision: LayerDecision, settings: PruningSettings) -> LayerState:
        """The state after `decision` is applied, with fresh statistics."""
        keep, scales = decision.keep, decision.observation.first_scales
        if scales is None:
            scales = decision.observation.scales
        group = replace(self.group, width=decision.width_after)
        return LayerState(
            group=group,
            statistics=_fresh_statistics(group, self.statistics.values.device, settings),
            inactive_checks=decision.inactive_checks[keep],
            first_scales=scales[:, keep],
        )

    @torch.inference_mode(False)  # the statistics could not be updated
    def restored(self, state: Mapping[str, Any]) -> LayerState:
        """The part of this layer in the result of `PrunerState.to_dict`."""
        name, width = self.group.name, self.group.width
        checks, scales = state["inactive_checks"].get(name), state["first_scales"].get(name)
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else each for each in (checks, scales)]
        if name not in state["statistics"] or shapes not in ([(width,), None], [(width,), (2, width)]):
            raise ValueError(f"state: expected statistics, counters and scales of the {count_neurons(width)} of {name}")
        statistics = copy.deepcopy(self.statistics)
        statistics.load_state_dict(state["statistics"][name])
        return LayerState(
            group=self.group,
            statistics=statistics,
            inactive_checks=checks.to("cpu", torch.int64, copy=True),
            first_scales=None if scales is None else scales.to("cpu", torch.float64, copy=True),
        )


@dataclass(frozen=True)
class PrunerState:
    """Everything in the pruner that a prune changes."""

    layers: tuple[LayerState, ...]  # in the order of the forward pass
    history: PruningHistory
    steps: int = 0  # the number of calls of `step()`

    @classmethod
    def fresh(cls, model: nn.Module, groups: Sequence[NeuronGroup], settings: PruningSettings) -> PrunerState:
        """The state of a pruner before any observation."""
        layers = []
        for group in groups:
            device = StoredTensor(group.name, "weight").of(model).device
            checks = torch.zeros(group.width, dtype=torch.int64, device="cpu")
            layers.append(LayerState(group, _fresh_statistics(group, device, settings), checks))
        return cls(tuple(layers), PruningHistory({group.name: group.width for group in groups}))

    @property
    def groups(self) -> tuple[NeuronGroup, ...]:
        return tuple(layer.group for layer in self.layers)

    @property
    def statistics(self) -> tuple[NeuronStatistics, ...]:
        return tuple(layer.statistics for layer in self.layers)

    @property
    def widths(self) -> dict[str, int]:
        return {group.name: group.width for group in self.groups}

    def observe(self, model: nn.Module, *, caller: str) -> tuple[LayerObservation, ...]:
        """Observe every layer, for the public method `caller`."""
        return tuple(layer.observe(model, self.history.kept(layer.group.name), caller) for layer in self.layers)

    def after(self, decisions: Sequence[LayerDecision], settings: PruningSettings) -> PrunerState:
        """The state after `decisions` are applied."""
        history = self.history.copy()
        history.add_step({decision.group.name: decision.pruned_originals for decision in decisions})
        layers = tuple(layer.after(decision, settings) for layer, decision in zip(self.layers, decisions, strict=True))
        return PrunerState(layers, history, self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The state as plain tensors, numbers and strings."""
        layers = {layer.group.name: layer for layer in self.layers}
        scales = {name: layer.first_scales for name, layer in layers.items()}
        return {
            "version": STATE_VERSION,
            "history": self.history.to_json(),
            "steps": self.steps,
            "statistics": {name: layer.statistics.state_dict() for name, layer in layers.items()},
            "inactive_checks": {name: layer.inactive_checks.clone() for name, layer in layers.items()},
            "first_scales": {name: tensor.clone() for name, tensor in scales.items() if tensor is not None},
        }

    def restored(self, state: Mapping[str, Any]) -> PrunerState:
        """The state that `to_dict` returned, for a model of the same widths; this object is not changed."""
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != STATE_VERSION:
            raise ValueError(f"state: expected the state of a DynamicPruner, version {STATE_VERSION}, got {version!r}")
        missing = {"history", "steps", "statistics", "inactive_checks", "first_scales"} - state.keys()
        if missing:
            raise ValueError(f"state: {', '.join(sorted(missing))} missing")
        history = PruningHistory.from_json(state["history"])
        if history.widths != self.widths:
            raise ValueError(
                f"state: it is of a model with widths {history.widths}, but this one has {self.widths}; replay the "
                "state's history on a fresh model before making the pruner"
            )
        steps = state["steps"]
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"state: expected steps as a whole number of at least 0, got {steps!r}")
        return PrunerState(tuple(layer.restored(state) for layer in self.layers), history, steps)


def _fresh_statistics(group: NeuronGroup, device: torch.device, settings: PruningSettings) -> NeuronStatistics:
    samples = settings.reconstruction_samples if settings.compensate else 0
    return NeuronStatistics(group.width, device, positions=group.positions, samples=samples)
