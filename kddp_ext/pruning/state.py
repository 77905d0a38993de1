"""The state of a pruner between checks: each prune replaces it as a whole, and checkpoints save and restore it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from kddp_ext.activations.statistics import NeuronStatistics
from kddp_ext.pruning.history import PruningHistory
from kddp_ext.pruning.saliency import Saliency
from kddp_ext.pruning.selection import Decision, NeuronRecord, Observation, norms_of_reader
from kddp_ext.pruning.settings import PruningSettings, Streams
from kddp_ext.pruning.tracing.structure import PrunableNeurons, ReadValue, count_neurons
from kddp_ext.pruning.transfers import copied_to

STATE_VERSION = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class PrunerState(NeuronRecord):
    """Everything in the pruner that a prune changes. The statistics are on the device of the activations."""

    history: PruningHistory
    steps: int = 0  # the number of calls of `step()`

    @classmethod
    def fresh(
        cls,
        model: nn.Module,
        neurons: PrunableNeurons,
        settings: PruningSettings,
        streams: Streams,
        size: tuple[int, int],
        history: PruningHistory | None = None,
    ) -> PrunerState:
        """The state of a pruner before any observation, for a model that was pruned as `history` says."""
        devices = {reader.value: reader.weight.of(model).device for reader in neurons.readers}
        statistics = tuple(
            _fresh_statistics(value, devices[index], settings) for index, value in enumerate(neurons.values)
        )
        widths = {group.name: group.width for group in neurons.groups}
        if history is None:
            history = PruningHistory(widths, streams=streams)
        elif history.streams != streams or not history.widths.items() <= widths.items():
            raise ValueError(
                f"history: it ends with widths {history.widths} and streams={history.streams!r}, but the pruner has "
                f"{widths} and {streams!r}"
            )
        checks = torch.zeros(neurons.number, dtype=torch.int64, device="cpu")
        history = history.extended(widths)
        return cls(neurons, statistics, checks, None, Saliency(neurons.number), size, history=history)

    @property
    def widths(self) -> dict[str, int]:
        return {group.name: group.width for group in self.neurons.groups}

    def observe(self, model: nn.Module, *, caller: str) -> Observation:
        """Observe everything that a decision depends on, for the public method `caller`; it is copied to the CPU."""
        neurons = self.neurons
        for name, each in zip(neurons.value_names, self.statistics, strict=True):
            if each.rows == 0:
                raise RuntimeError(
                    f"{caller}: there are no statistics of {name} since the last check; pass pruner.activations to "
                    "fused_kd_l1_loss at each step, or call pruner.activations.observe()"
                )
        neurons.tensors(model)  # raises where one has another shape
        outgoing = tuple(norms_of_reader(model, neurons, reader) for reader in neurons.readers)
        statistics, outgoing, saliency = copied_to((self.statistics, outgoing, self.saliency), "cpu")
        for name, each in zip(neurons.value_names, statistics, strict=True):
            if not bool(each.values.isfinite().all()):
                raise ValueError(
                    f"{caller}: some activations of {name} were infinite or NaN since the last check; pruner.reset() "
                    "discards these statistics"
                )
        for reader, norms in zip(neurons.readers, outgoing, strict=True):
            if not bool(norms.isfinite().all()):
                names = " and ".join(group.name for group in neurons.groups if reader in neurons.readers_of(group))
                raise ValueError(f"{caller}: the weights that read {names} are infinite or NaN")
        original = tuple(torch.tensor(self.history.kept(group.name), device="cpu") for group in neurons.groups)
        record = {field.name: getattr(self, field.name) for field in fields(NeuronRecord)}
        record.update(statistics=statistics, saliency=saliency)
        return Observation(**record, outgoing=outgoing, original=original)

    def after(self, decision: Decision, settings: PruningSettings) -> PrunerState:
        """The state after `decision` is applied, with fresh statistics."""
        history, keep, observation = self.history.copy(), decision.keep, decision.observation
        history.add_step({layer.group.name: decision.pruned_originals(layer) for layer in decision.layers})
        neurons = self.neurons.after(keep)
        scales = observation.scales if observation.first_scales is None else observation.first_scales
        statistics = tuple(
            _fresh_statistics(value, each.values.device, settings)
            for value, each in zip(neurons.values, self.statistics, strict=True)
        )
        checks = torch.cat([layer.inactive_checks for layer in decision.layers])[keep]
        loss, predicted = observation.saliency.mean_loss, decision.predicted_increase
        return replace(
            self,
            neurons=neurons,
            statistics=statistics,
            inactive_checks=checks,
            history=history,
            first_scales=scales[:, keep],
            saliency=Saliency(neurons.number, self.saliency.squares.device),
            checks=self.checks + 1,
            predicted=None if loss is None or predicted is None else (loss, predicted),
            lowest_loss=observation.reference_loss,
        )

    def to_dict(self) -> dict[str, Any]:
        """The state as plain tensors, numbers and strings."""
        state = {
            "version": STATE_VERSION,
            "history": self.history.to_json(),
            "steps": self.steps,
            "checks": self.checks,
            "original_size": list(self.original_size),
            "predicted": None if self.predicted is None else list(self.predicted),
            "lowest_loss": self.lowest_loss,
            "saliency": self.saliency.state_dict(),
            "statistics": {
                name: each.state_dict() for name, each in zip(self.neurons.value_names, self.statistics, strict=True)
            },
            "inactive_checks": {g.name: self.inactive_checks[g.numbers].clone() for g in self.neurons.groups},
            "first_scales": {},
        }
        if self.first_scales is not None:
            state["first_scales"] = {g.name: self.first_scales[:, g.numbers].clone() for g in self.neurons.groups}
        return state

    @torch.inference_mode(False)  # the statistics could not be updated
    def restored(self, state: Mapping[str, Any]) -> PrunerState:
        """The state that `to_dict` returned, for a model of the same widths; this object is not changed."""
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != STATE_VERSION:
            raise ValueError(f"state: expected the state of a DynamicPruner, version {STATE_VERSION}, got {version!r}")
        missing = self.to_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"state: {', '.join(sorted(missing))} missing")
        history = PruningHistory.from_json(state["history"])
        if (history.widths, history.streams) != (self.widths, self.history.streams):
            raise ValueError(
                f"state: it is of a model with widths {history.widths} and streams={history.streams!r}, but this one "
                f"has {self.widths} and {self.history.streams!r}; replay the state's history on a fresh model before "
                "making the pruner"
            )
        for name in ("steps", "checks"):
            if not isinstance(state[name], int) or state[name] < 0:
                raise ValueError(f"state: expected {name} as a whole number of at least 0, got {state[name]!r}")
        checks = [self._saved(state, "inactive_checks", group.name, (group.width,)) for group in self.neurons.groups]
        scales = None
        if state["first_scales"]:
            parts = [self._saved(state, "first_scales", g.name, (2, g.width)) for g in self.neurons.groups]
            scales = torch.cat(parts, 1).to("cpu", torch.float64, copy=True)
        statistics = []
        for name, each in zip(self.neurons.value_names, self.statistics, strict=True):
            if name not in state["statistics"]:
                raise ValueError(f"state: the statistics of {name} are missing")
            statistics.append(copy.deepcopy(each))
            statistics[-1].load_state_dict(state["statistics"][name])
        parameters, macs = state["original_size"]
        return replace(
            self,
            statistics=tuple(statistics),
            inactive_checks=torch.cat(checks).to("cpu", torch.int64, copy=True),
            history=history,
            first_scales=scales,
            saliency=self.saliency.restored(state["saliency"]),
            original_size=(int(parameters), int(macs)),
            predicted=None if state["predicted"] is None else tuple(state["predicted"]),
            **{name: state[name] for name in ("checks", "lowest_loss", "steps")},
        )

    @staticmethod
    def _saved(state: Mapping[str, Any], key: str, layer: str, shape: tuple[int, ...]) -> Tensor:
        saved = state[key].get(layer)
        if not isinstance(saved, Tensor) or tuple(saved.shape) != shape:
            got = tuple(saved.shape) if isinstance(saved, Tensor) else saved
            raise ValueError(f"state: expected {key} of the {count_neurons(shape[-1])} of {layer}, got {got}")
        return saved


def _fresh_statistics(value: ReadValue, device: torch.device, settings: PruningSettings) -> NeuronStatistics:
    samples = settings.reconstruction_samples if settings.compensate else 0
    return NeuronStatistics(value.units, device, positions=value.positions, samples=samples)
