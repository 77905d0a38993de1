"""Which neurons stay: from what was observed of each layer to what becomes of it.

`decide` is a function of its arguments alone, so that whoever has the same observations comes to the same
decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kddp_ext.pruning.budget import ModelSize, affordable
from kddp_ext.pruning.compaction import Removal
from kddp_ext.pruning.criteria import activities
from kddp_ext.pruning.guards import KeptBy, removable
from kddp_ext.pruning.observation import LayerObservation
from kddp_ext.pruning.reconstruction import reconstruct
from kddp_ext.pruning.settings import PruningSettings
from kddp_ext.pruning.tracing.groups import NeuronGroup, all_but


@dataclass(frozen=True)
class LayerDecision:
    """What becomes of a layer of H neurons.

    Attributes:
        observation: what it rests on.
        activity: (H,) float64, by the criterion.
        inactive: (H,) bool, inactive at this check.
        marked: (H,) bool, inactive at enough checks in a row.
        inactive_checks: (H,) int64, the count with this check.
        pruned: ascending int64 indices of the neurons that go.
        kept_by: how many of the marked stay, and why.
        compensate: whether what they contributed on average is added to the next layer.
        reconstruct: whether what varied in them is taken over by those that stay, where there are samples.
    """

    observation: LayerObservation
    activity: Tensor
    inactive: Tensor
    marked: Tensor
    inactive_checks: Tensor
    pruned: Tensor
    kept_by: KeptBy
    compensate: bool
    reconstruct: bool

    @property
    def group(self) -> NeuronGroup:
        """The neurons."""
        return self.observation.group

    @property
    def keep(self) -> Tensor:
        """Ascending int64 indices of the neurons that stay."""
        return all_but(self.pruned, self.group.width)

    @property
    def width_after(self) -> int:
        """How many stay."""
        return self.group.width - self.pruned.numel()

    @property
    def pruned_originals(self) -> list[int]:
        """Indices of the neurons that go, as before any pruning, ascending."""
        return [int(index) for index in self.observation.original[self.pruned]]

    @cached_property
    def removal(self) -> Removal:
        """What the compaction is to do."""
        if not self.compensate:
            return Removal(self.group, self.keep)
        statistics = self.observation.statistics
        means = statistics.mean if self.group.positions is None else statistics.position_mean
        reconstruction = None
        if self.reconstruct and statistics.ring is not None:
            reconstruction = reconstruct(
                statistics.ring.samples,
                self.keep,
                self.pruned,
                self.observation.outgoing,
                constant=all(reader.shift is not None for reader in self.group.readers),
                padded=any(reader.padded for reader in self.group.readers),
            )
        return Removal(self.group, self.keep, means, reconstruction)


def decide(
    observations: Sequence[LayerObservation], settings: PruningSettings, size: ModelSize
) -> tuple[LayerDecision, ...]:
    """What becomes of each layer.

    Args:
        observations: of every layer, in the order of the forward pass.
        settings: the criterion, its bound and the guards.
        size: the model's size at any widths.

    Raises:
        TypeError, ValueError: the user's criterion returned no activities; the message names the layer.
    """
    decisions, removables = [], []
    for observation in observations:
        decision, weakest_first = _decide_alone(observation, settings)
        decisions.append(decision)
        removables.append(weakest_first)
    counts = _affordable(decisions, removables, settings, size)
    return tuple(
        replace(
            decision,
            pruned=weakest_first[:count].sort().values,
            kept_by=replace(decision.kept_by, budget=len(weakest_first) - count),
        )
        for decision, weakest_first, count in zip(decisions, removables, counts, strict=True)
    )


def _decide_alone(observation: LayerObservation, settings: PruningSettings) -> tuple[LayerDecision, Tensor]:
    """What becomes of a layer without regard to others, and the neurons that go then, weakest first."""
    activity = activities(
        settings.criterion, observation.statistics, observation.outgoing, layer=observation.group.name
    )
    inactive = activity < settings.activity_bound
    inactive_checks = torch.where(inactive, observation.inactive_checks + 1, 0)
    marked = inactive_checks >= settings.patience
    weakest_first, kept_by = removable(
        marked,
        activity,
        minimum_width=settings.minimum_width,
        maximum_share=settings.maximum_share,
        round_to=settings.round_to,
    )
    decision = LayerDecision(
        observation=observation,
        activity=activity,
        inactive=inactive,
        marked=marked,
        inactive_checks=inactive_checks,
        pruned=weakest_first,
        kept_by=kept_by,
        compensate=settings.compensate,
        reconstruct=settings.samples > 0,
    )
    return decision, weakest_first


def _affordable(
    decisions: Sequence[LayerDecision], removables: Sequence[Tensor], settings: PruningSettings, size: ModelSize
) -> list[int]:
    """How many of each layer's removable neurons the budget lets go."""
    if settings.target_parameters is None and settings.target_macs is None:
        return [len(weakest_first) for weakest_first in removables]

    def fits(widths: Sequence[int]) -> bool:
        parameters, macs = settings.target_parameters, settings.target_macs
        return (parameters is None or size.parameters(widths) <= parameters) and (
            macs is None or size.macs(widths) <= macs
        )

    return affordable(
        [decision.activity[weakest_first] for decision, weakest_first in zip(decisions, removables, strict=True)],
        [decision.group.width for decision in decisions],
        settings.round_to,
        fits,
    )
