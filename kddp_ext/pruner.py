"""DynamicPruner: observes a student's neurons while it trains, and removes those that do nothing."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kddp_ext.pruning.compaction import Removal, plan_compaction
from kddp_ext.pruning.criteria import CRITERIA, neurons_to_keep, outgoing_norms
from kddp_ext.pruning.graph import uncompiled
from kddp_ext.pruning.history import PruningHistory
from kddp_ext.pruning.neurons import NeuronGroup, find_neurons
from kddp_ext.pruning.report import LayerReport, PruneReport
from kddp_ext.pruning.taps import Taps
from kddp_ext.pruning.validation import at_least_one, check_model, check_optimizer, choose_layers, share
from kddp_ext.statistics import NeuronStatistics, TrackedActivations

STATE_VERSION = 1


@dataclass(frozen=True)
class _State:
    """All that a prune changes in the pruner, replaced as one."""

    groups: tuple[NeuronGroup, ...]
    statistics: tuple[NeuronStatistics, ...]
    inactive_checks: tuple[Tensor, ...]  # (H,) int64 each: at how many checks in a row the neuron was inactive
    history: PruningHistory


class DynamicPruner:
    """Finds the inactive neurons of a model's hidden Linear layers while it trains, and removes them.

    Pass `activations` to `kddp_ext.fused_kd_l1_loss` at every step, and call `prune()` every so often (once
    an epoch, say). `prune()` makes the layers physically smaller, with their gradients and the optimizer's
    state; parameters keep their identity, so the training loop goes on unchanged.

    Args:
        model: the student. Its layers are found by tracing; nothing of it is changed but for forward hooks.
        optimizer: the optimizer whose state is sliced along; None where there is none.
        example_inputs: positional arguments for the model's forward, as a tuple; two samples are enough.
        criterion: "contribution" (default: what varies in the next layer because of the neuron; blind neither
            to constant neurons nor to rescaling between layers), "mean_activation", "apoz" or "dead".
        threshold: a neuron is inactive at a check when its activity is below this, in (0, 1]. Relative to the
            layer's most active neuron for "contribution" and "mean_activation", a share of the samples for
            "apoz", unused by "dead". Default 0.01.
        patience: a neuron is removed when it was inactive at so many checks in a row. Default 2, so that one
            unlucky interval removes nothing.
        minimum_width: no layer gets narrower than this. Default 1.
        round_to: widths are rounded up to a multiple of this by keeping the most active of the neurons to be
            removed. Default 1; 8 or 16 suit matrix units.
        compensate: add what removed neurons contributed on average to the next layer's bias (or, where it has
            none and a BatchNorm follows, to that). Default True.
        layers: names of the layers to prune; by default all that can be.

    Attributes:
        refused: the reason by layer name, for each Linear that cannot be pruned.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        UnsupportedModelError: (a ValueError) a layer asked for, or every layer, cannot be pruned; the message
            says why for each.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        example_inputs: tuple[Any, ...],
        criterion: str = "contribution",
        threshold: float = 0.01,
        patience: int = 2,
        minimum_width: int = 1,
        round_to: int = 1,
        compensate: bool = True,
        layers: Sequence[str] | None = None,
    ) -> None:
        check_model(model)
        model = uncompiled(model)
        check_optimizer(optimizer, model)
        if not isinstance(example_inputs, tuple):
            raise TypeError(
                "example_inputs: expected a tuple of the forward's positional arguments, such as "
                f"(images[:2],), got {type(example_inputs).__name__}"
            )
        if not isinstance(criterion, str) or criterion not in CRITERIA:
            raise ValueError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
        if not isinstance(compensate, bool):
            raise TypeError(f"compensate: expected True or False, got {compensate!r}")
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.threshold = share("threshold", threshold)
        self.patience = at_least_one("patience", patience)
        self.minimum_width = at_least_one("minimum_width", minimum_width)
        self.round_to = at_least_one("round_to", round_to)
        self.compensate = compensate

        found = find_neurons(model, example_inputs)
        self.refused = found.refused
        groups = choose_layers(model, found.groups, found.refused, layers)
        self._state = _State(
            groups=groups,
            statistics=tuple(NeuronStatistics(group.width, _device(model, group)) for group in groups),
            inactive_checks=tuple(torch.zeros(group.width, dtype=torch.int64) for group in groups),
            history=PruningHistory({group.name: group.width for group in groups}),
        )
        self._taps: Taps | None = Taps(model, groups)
        self._finalizer = weakref.finalize(self, self._taps.remove)

    def __repr__(self) -> str:
        widths = ", ".join(f"{name} {width}" for name, width in self.widths.items())
        return f"DynamicPruner({widths}; criterion={self.criterion!r}, threshold={self.threshold})"

    @property
    def widths(self) -> dict[str, int]:
        """Number of neurons by layer, now."""
        return {group.name: group.width for group in self._state.groups}

    @property
    def history(self) -> PruningHistory:
        """What has been pruned since the model's constructor, or since this pruner was made."""
        return self._state.history

    @property
    def statistics(self) -> dict[str, NeuronStatistics]:
        """The sums since the last check, by layer."""
        return dict(zip(self.widths, self._state.statistics, strict=True))

    @property
    def activations(self) -> TrackedActivations:
        """The neurons' values in the latest forward pass, (samples, neurons) for each layer of `widths`.

        They are what the next Linear reads, taken before a Dropout in front of it, and part of the autograd
        graph. A layer applied along a sequence gives one sample a position.

        Raises:
            RuntimeError: no forward pass since the pruner was made or last pruned, or the pruner is closed.
        """
        if self._taps is None:
            raise RuntimeError("activations: the pruner is closed")
        values = []
        for group, statistics in zip(self._state.groups, self._state.statistics, strict=True):
            value = self._taps.value(group)
            if value is None:
                raise RuntimeError(
                    f"activations: no forward pass has reached {group.name} since the pruner was made or last "
                    "pruned; call the model first (a compiled model must not have been called before the pruner "
                    "was made)"
                )
            if statistics.values.device != value.device:
                statistics.values = statistics.values.to(value.device)  # the model was moved
            values.append(value)
        return TrackedActivations(values, self._state.statistics)

    def prune(self) -> PruneReport:
        """Check every layer, and remove the neurons that were inactive at `patience` checks in a row.

        The statistics start afresh afterwards. Where anything fails, the model, the optimizer and the pruner
        are as they were.

        Returns:
            What was done; `print` it.

        Raises:
            RuntimeError: there are no statistics since the last check, or the pruner is closed.
            ValueError: a layer's statistics or weights are not finite, or a tensor of the model or the
                optimizer does not have the expected shape.
        """
        if self._taps is None:
            raise RuntimeError("prune: the pruner is closed")
        state = self._state
        checks = [
            self._check(*layer) for layer in zip(state.groups, state.statistics, state.inactive_checks, strict=True)
        ]
        removals, reports, inactive_checks = zip(*checks, strict=True)
        history = state.history.copy()
        history.add_step({report.name: report.pruned for report in reports})
        new_state = _State(
            groups=tuple(replace(removal.group, width=len(removal.keep)) for removal in removals),
            statistics=tuple(
                NeuronStatistics(report.width_after, statistics.values.device)
                for report, statistics in zip(reports, state.statistics, strict=True)
            ),
            inactive_checks=inactive_checks,
            history=history,
        )
        plan = plan_compaction(self.model, [r for r in removals if len(r.keep) < r.group.width], self.optimizer)
        parameters_before = _parameter_count(self.model)
        plan.apply(also=[(self, "_state", new_state)])
        self._taps.clear()
        return PruneReport(reports, parameters_before, _parameter_count(self.model))

    def reset(self) -> None:
        """Forget the statistics since the last check."""
        for statistics in self._state.statistics:
            statistics.reset()

    def close(self) -> None:
        """Take the hooks off the model. The history stays readable."""
        self._taps = None
        self._finalizer()

    def state_dict(self) -> dict[str, Any]:
        """Statistics, patience counters and history, as plain tensors, numbers and strings.

        To resume, rebuild the model with `PruningHistory.from_json(state["history"]).replay(...)`, make
        optimizer and pruner for it, and load their states.
        """
        state = self._state
        return {
            "version": STATE_VERSION,
            "history": state.history.to_json(),
            "statistics": {g.name: s.state_dict() for g, s in zip(state.groups, state.statistics, strict=True)},
            "inactive_checks": {g.name: c.clone() for g, c in zip(state.groups, state.inactive_checks, strict=True)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, for a model of the same widths.

        Raises:
            ValueError: the state is of another version, of other layers or of other widths. Nothing is
                changed then.
        """
        if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
            raise ValueError(f"state: expected the state of a DynamicPruner, version {STATE_VERSION}")
        missing = {"history", "statistics", "inactive_checks"} - state.keys()
        if missing:
            raise ValueError(f"state: {', '.join(sorted(missing))} missing")
        history = PruningHistory.from_json(state["history"])
        if history.widths != self.widths:
            raise ValueError(
                f"state: it is of a model with widths {history.widths}, and this one has {self.widths}; "
                "replay the state's history on a fresh model before making the pruner"
            )
        statistics, inactive_checks = [], []
        for group, present in zip(self._state.groups, self._state.statistics, strict=True):
            loaded = NeuronStatistics(group.width, present.values.device)
            checks = state["inactive_checks"].get(group.name)
            if (
                group.name not in state["statistics"]
                or not isinstance(checks, Tensor)
                or checks.shape != (group.width,)
            ):
                raise ValueError(
                    f"state: expected statistics and counters of the {group.width} neurons of {group.name}"
                )
            loaded.load_state_dict(state["statistics"][group.name])
            statistics.append(loaded)
            inactive_checks.append(checks.to("cpu", torch.int64, copy=True))
        self._state = replace(
            self._state, statistics=tuple(statistics), inactive_checks=tuple(inactive_checks), history=history
        )

    def _check(
        self, group: NeuronGroup, statistics: NeuronStatistics, inactive_checks: Tensor
    ) -> tuple[Removal, LayerReport, Tensor]:
        """What a check removes of one layer, its report, and the counters of the neurons that stay."""
        activity = self._activity(group, statistics)
        inactive = activity < (1.0 if self.criterion == "dead" else self.threshold)
        inactive_checks = torch.where(inactive, inactive_checks + 1, 0)
        marked = inactive_checks >= self.patience
        keep = neurons_to_keep(marked, activity, minimum_width=self.minimum_width, round_to=self.round_to)
        removal = Removal(group, keep, statistics.mean.cpu() if self.compensate else None)
        original = torch.tensor(self._state.history.kept(group.name))
        report = LayerReport.of(removal, original, inactive=inactive, marked=marked)
        return removal, report, inactive_checks[keep]

    def _activity(self, group: NeuronGroup, statistics: NeuronStatistics) -> Tensor:
        """The criterion's activity of each neuron, (width,) float64 on the CPU."""
        if statistics.rows == 0:
            raise RuntimeError(
                f"prune: there are no statistics of {group.name} since the last check; pass "
                "pruner.activations to fused_kd_l1_loss at each step, or call pruner.activations.observe()"
            )
        weights = [self.model.get_submodule(reader.module).weight for reader in group.readers]
        outgoing = outgoing_norms([weight for weight in weights if isinstance(weight, Tensor)])
        if not bool(statistics.values.isfinite().all()):
            raise ValueError(
                f"prune: the activations of {group.name} were infinite or NaN in some sample since the last "
                "check; pruner.reset() forgets them"
            )
        if not bool(outgoing.isfinite().all()):
            raise ValueError(f"prune: the weights that read {group.name} are infinite or NaN")
        return CRITERIA[self.criterion](statistics, outgoing.to(statistics.values.device)).cpu()


def _device(model: nn.Module, group: NeuronGroup) -> torch.device:
    weight = model.get_submodule(group.name).weight
    assert isinstance(weight, Tensor)
    return weight.device


def _parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
