"""What a pruner knows between checks: replaced as one by each prune, saved and restored whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kddp_ext.activations.statistics import NeuronStatistics
from kddp_ext.pruning.history import PruningHistory
from kddp_ext.pruning.observation import LayerObservation, observe_layer
from kddp_ext.pruning.selection import LayerDecision
from kddp_ext.pruning.tracing.groups import NeuronGroup

# Version 1 had neither steps nor first scales: one that is loaded has seen 0 steps and compares from its next check.
STATE_VERSION, LOADABLE_VERSIONS = 2, (1, 2)


@dataclass(frozen=True)
class LayerState:
    """What a pruner knows of one layer of H neurons.

    Attributes:
        group: the neurons.
        statistics: the sums since the last check, where the activations are.
        inactive_checks: (H,) int64, at how many checks in a row the neuron was inactive.
        first_scales: (2, H) float64, mean|h_j| and ‖W2[:,j]‖₂ at the first check; None before it.
    """

    group: NeuronGroup
    statistics: NeuronStatistics
    inactive_checks: Tensor
    first_scales: Tensor | None = None

    @property
    def samples(self) -> int:
        """How many values of each neuron are kept beside the sums."""
        return 0 if self.statistics.ring is None else self.statistics.ring.values.shape[0]

    def after(self, decision: LayerDecision, samples: int) -> LayerState:
        """What is known once `decision` is carried out; the statistics start afresh, with room for so many samples."""
        keep, seen = decision.keep, decision.observation
        group = replace(self.group, width=decision.width_after)
        return LayerState(
            group=group,
            statistics=_no_statistics(group, self.statistics.values.device, samples),
            inactive_checks=decision.inactive_checks[keep],
            first_scales=(seen.scales if seen.first_scales is None else seen.first_scales)[:, keep],
        )

    def restored(self, state: Mapping[str, Any]) -> LayerState:
        """This layer's part of what `PrunerState.to_dict` saved."""
        name, width = self.group.name, self.group.width
        checks = state["inactive_checks"].get(name)
        if name not in state["statistics"] or not isinstance(checks, Tensor) or checks.shape != (width,):
            raise ValueError(f"state: expected statistics and counters of the {width} neurons of {name}")
        statistics = _no_statistics(self.group, self.statistics.values.device, self.samples)
        statistics.load_state_dict(state["statistics"][name])
        first_scales = state.get("first_scales", {}).get(name)
        if first_scales is not None:
            if not isinstance(first_scales, Tensor) or first_scales.shape != (2, width):
                raise ValueError(f"state: expected two first scales of each of the {width} neurons of {name}")
            first_scales = first_scales.to("cpu", torch.float64, copy=True)
        return LayerState(self.group, statistics, checks.to("cpu", torch.int64, copy=True), first_scales)


@dataclass(frozen=True)
class PrunerState:
    """All that a prune changes in the pruner.

    Attributes:
        layers: in the order of the forward pass.
        history: what was pruned.
        steps: how often `step()` was called.
    """

    layers: tuple[LayerState, ...]
    history: PruningHistory
    steps: int = 0

    @classmethod
    def fresh(cls, model: nn.Module, groups: Sequence[NeuronGroup], samples: int) -> PrunerState:
        """The state of a pruner that has seen nothing; of each layer it is to keep so many samples."""
        layers = tuple(
            LayerState(
                group,
                _no_statistics(group, _device(model, group), samples),
                torch.zeros(group.width, dtype=torch.int64, device="cpu"),
            )
            for group in groups
        )
        return cls(layers, PruningHistory({group.name: group.width for group in groups}))

    @property
    def groups(self) -> tuple[NeuronGroup, ...]:
        """The neurons of each layer."""
        return tuple(layer.group for layer in self.layers)

    @property
    def statistics(self) -> tuple[NeuronStatistics, ...]:
        """The sums of each layer since the last check."""
        return tuple(layer.statistics for layer in self.layers)

    @property
    def widths(self) -> dict[str, int]:
        """Number of neurons by layer."""
        return {group.name: group.width for group in self.groups}

    def observe(self, model: nn.Module, *, caller: str) -> tuple[LayerObservation, ...]:
        """What a check looks at, layer by layer; see `observe_layer` for its errors."""
        return tuple(
            observe_layer(
                model,
                layer.group,
                layer.statistics,
                inactive_checks=layer.inactive_checks,
                original=torch.tensor(self.history.kept(layer.group.name), device="cpu"),
                first_scales=layer.first_scales,
                caller=caller,
            )
            for layer in self.layers
        )

    def after(self, decisions: Sequence[LayerDecision], samples: int) -> PrunerState:
        """The state once `decisions` are carried out, with room for so many samples of each layer."""
        history = self.history.copy()
        history.add_step({decision.group.name: decision.pruned_originals for decision in decisions})
        layers = tuple(layer.after(decision, samples) for layer, decision in zip(self.layers, decisions, strict=True))
        return PrunerState(layers, history, self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The state as plain tensors, numbers and strings."""
        layers = {layer.group.name: layer for layer in self.layers}
        return {
            "version": STATE_VERSION,
            "history": self.history.to_json(),
            "steps": self.steps,
            "statistics": {name: layer.statistics.state_dict() for name, layer in layers.items()},
            "inactive_checks": {name: layer.inactive_checks.clone() for name, layer in layers.items()},
            "first_scales": {
                name: layer.first_scales.clone() for name, layer in layers.items() if layer.first_scales is not None
            },
        }

    def restored(self, state: Mapping[str, Any]) -> PrunerState:
        """What `to_dict` saved, for a model of the same widths; this state is not changed.

        Raises:
            ValueError: it is of another version, of other layers or of other widths.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if version not in LOADABLE_VERSIONS:
            versions = " or ".join(map(str, LOADABLE_VERSIONS))
            raise ValueError(f"state: expected the state of a DynamicPruner, version {versions}, got {version!r}")
        expected = {"history", "statistics", "inactive_checks"} | ({"steps", "first_scales"} if version > 1 else set())
        missing = expected - state.keys()
        if missing:
            raise ValueError(f"state: {', '.join(sorted(missing))} missing")
        history = PruningHistory.from_json(state["history"])
        if history.widths != self.widths:
            raise ValueError(
                f"state: it is of a model with widths {history.widths}, and this one has {self.widths}; "
                "replay the state's history on a fresh model before making the pruner"
            )
        steps = state.get("steps", 0)
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"state: expected steps as a whole number of at least 0, got {steps!r}")
        return PrunerState(tuple(layer.restored(state) for layer in self.layers), history, steps)


def _no_statistics(group: NeuronGroup, device: torch.device, samples: int) -> NeuronStatistics:
    return NeuronStatistics(group.width, device, positions=group.positions, samples=samples)


def _device(model: nn.Module, group: NeuronGroup) -> torch.device:
    weight = model.get_submodule(group.name).weight
    assert isinstance(weight, Tensor)
    return weight.device
