"""Decides which neurons are removed: what is observed, how active each neuron is, what limits apply, who goes.

`decide` depends on its arguments only, so processes with the same observations come to the same decisions.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn

from kddp_ext.activations.statistics import NeuronStatistics
from kddp_ext.pruning.reconstruction import Reconstruction
from kddp_ext.pruning.settings import Criterion, PruningSettings
from kddp_ext.pruning.tracing.groups import NeuronGroup, NeuronSlices, Reader, StoredTensor, all_but, count_neurons

# --- What is observed


@dataclass(frozen=True)
class LayerObservation:
    """Everything that the decision about a layer of H neurons depends on. All tensors are on the CPU."""

    group: NeuronGroup
    statistics: NeuronStatistics  # since the last check
    outgoing: Tensor  # (H,) float64, ‖W2[:,j]‖₂ over all layers that read neuron j
    outgoing_unshifted: Tensor  # (H,) float64, the same over the layers that cannot absorb a mean
    inactive_checks: Tensor  # (H,) int64, consecutive checks before this one at which the neuron was inactive
    original: Tensor  # (H,) int64, the neurons' indices before any pruning
    first_scales: Tensor | None  # (2, H) float64, `scales` at the first check; None at that check

    @property
    def scales(self) -> Tensor:
        """mean|h_j| and ‖W2[:,j]‖₂ of each neuron, (2, H) float64; used to notice a penalty met by rescaling."""
        return torch.stack([self.statistics.mean_abs, self.outgoing])


def check_statistics(statistics: NeuronStatistics, layer: str, caller: str) -> None:
    """Raise where a layer's statistics are missing or not finite; the message names `caller`, a public method."""
    if statistics.rows == 0:
        raise RuntimeError(
            f"{caller}: there are no statistics of {layer} since the last check; pass pruner.activations to "
            "fused_kd_l1_loss at each step, or call pruner.activations.observe()"
        )
    if not bool(statistics.values.isfinite().all()):
        raise ValueError(
            f"{caller}: some activations of {layer} were infinite or NaN since the last check; pruner.reset() discards "
            "these statistics"
        )


def norms_of_readers(model: nn.Module, group: NeuronGroup, caller: str) -> tuple[Tensor, Tensor]:
    """`outgoing` and `outgoing_unshifted` of a `LayerObservation`; a ValueError where a weight is not finite."""
    weights = [_columns(model, group, reader) for reader in group.readers]
    outgoing = outgoing_norms(weights)
    if not bool(outgoing.isfinite().all()):
        raise ValueError(f"{caller}: the weights that read {group.name} are infinite or NaN")
    unshifted = [weight for weight, reader in zip(weights, group.readers, strict=True) if reader.shift is None]
    return outgoing, outgoing_norms(unshifted) if unshifted else torch.zeros_like(outgoing)


def _columns(model: nn.Module, group: NeuronGroup, reader: Reader) -> Tensor:
    """The weights that read the neurons, with one column for each neuron: (rows, width)."""
    weight = NeuronSlices(reader.weight, reader.layout).tensor(model, group).detach()
    if weight.dim() == 2 and reader.layout.entries == 1:
        return weight
    return weight.reshape(len(weight), reader.layout.outer, group.width, -1).movedim(2, -1).flatten(0, -2)


def outgoing_norms(weights: Sequence[Tensor]) -> Tensor:
    """‖W2[:,j]‖₂ over all layers that read neuron j, (H,) float64 on the CPU; each of `weights` is (outputs, H)."""
    # In blocks of a few rows: torch converts and sums a large matrix along its rows an order of magnitude slower.
    blocks = [[rows.double().square().sum(0) for rows in weight.detach().split(64)] for weight in weights]
    return torch.stack([torch.stack(sums).sum(0).cpu() for sums in blocks]).sum(0).sqrt()


# --- How active each neuron is


def contribution(statistics: NeuronStatistics, outgoing: Tensor) -> Tensor:
    """‖W2[:,j]‖₂ · std(h_j), relative to the layer's largest: how much the next layer's input varies with neuron j.

    Scaling W1 down and W2 up does not change it. A constant neuron contributes nothing; the next bias can replace it.
    """
    return _relative(outgoing * statistics.std)


def mean_activation(statistics: NeuronStatistics, outgoing: Tensor) -> Tensor:
    """mean|h_j|, relative to the layer's largest."""
    return _relative(statistics.mean_abs)


def apoz(statistics: NeuronStatistics, outgoing: Tensor) -> Tensor:
    """1 - APoZ: the share of samples in which h_j is not exactly zero (Hu et al., 2016, arXiv:1607.03250)."""
    return statistics.active_fraction


def dead(statistics: NeuronStatistics, outgoing: Tensor) -> Tensor:
    """1 where h_j was nonzero in any sample, else 0."""
    return (statistics.nonzero > 0).to(torch.float64)


# By the names in settings.CRITERIA.
_FUNCTIONS: dict[str, Criterion] = {each.__name__: each for each in (contribution, mean_activation, apoz, dead)}


def _relative(activity: Tensor) -> Tensor:
    highest = activity.max()
    return activity / highest if highest > 0 else torch.ones_like(activity)  # no neuron is less active than the others


def activities(criterion: str | Criterion, statistics: NeuronStatistics, outgoing: Tensor, *, layer: str) -> Tensor:
    """The activities of a layer's neurons, (H,) float64; those of the user's own criterion are checked."""
    if isinstance(criterion, str):
        return _FUNCTIONS[criterion](statistics, outgoing)
    width = statistics.width
    with torch.no_grad():  # the function gets copies, so that it cannot change the decision in another way
        activity = criterion(statistics.select(torch.arange(width, device="cpu")), outgoing.clone())
    if not isinstance(activity, Tensor):
        raise TypeError(f"criterion: expected a tensor of activities for {layer}, got {type(activity).__name__}")
    if activity.shape != (width,) or activity.is_complex():
        raise ValueError(
            f"criterion: expected one real activity for each of the {count_neurons(width)} of {layer}, got "
            f"{activity.dtype} of shape {tuple(activity.shape)}"
        )
    activity = activity.detach().to("cpu", torch.float64, copy=True)
    wrong = ~activity.isfinite() | (activity < 0)
    if bool(wrong.any()):
        raise ValueError(
            f"criterion: expected finite activities of at least 0 for {layer}, got {float(activity[wrong][0])}"
        )
    return activity


# --- What limits the removal


@dataclass(frozen=True)
class KeptBy:
    """How many neurons that were inactive for long enough are kept, by the limit that keeps them.

    The limits apply in this order; each counts the neurons that the limits before it would remove.

    Attributes:
        minimum_width: the layer would become narrower than this.
        maximum_share: more than this share of the layer would go in one prune.
        round_to: the remaining width would not be a multiple of this.
        budget: the model is small enough without them, by `target_parameters` and `target_macs`.
    """

    minimum_width: int = 0
    maximum_share: int = 0
    round_to: int = 0
    budget: int = 0

    @property
    def total(self) -> int:
        """By all limits together."""
        return int(sum(astuple(self)))


def removable(
    marked: Tensor, activity: Tensor, *, minimum_width: int = 1, maximum_share: float = 1.0, round_to: int = 1
) -> tuple[Tensor, KeptBy]:
    """The marked neurons that the layer's own limits let go, weakest first; and what keeps the other marked neurons.

    The most active of the marked neurons stay, the first among equals.
    """
    width = marked.numel()
    candidates = marked.nonzero().flatten().flip(0)
    weakest_first = candidates[activity[candidates].argsort(stable=True)]
    by_width = min(len(candidates), max(0, width - minimum_width))
    # 0.29 · 100 is 28.999999999999996 in floating point and must count as 29.
    by_share = min(by_width, math.floor(maximum_share * width + 1e-9))
    rounded_up = -(-(width - by_share) // round_to) * round_to
    by_rounding = width - min(width, rounded_up)
    kept_by = KeptBy(len(candidates) - by_width, by_width - by_share, by_share - by_rounding)
    return weakest_first[:by_rounding], kept_by


class ModelSize:
    """Parameters and multiply-accumulates of a model at any widths of its groups.

    A tensor shrinks in proportion to the width of each group that slices it. `positions` is that of `TracedNeurons`;
    weights that are missing there count as parameters only.
    """

    def __init__(self, model: nn.Module, groups: Sequence[NeuronGroup], positions: Mapping[str, float]) -> None:
        self._widths = [group.width for group in groups]
        slicing: dict[int, list[int]] = {}  # by the id of a tensor, the indices of the groups that slice it
        for index, group in enumerate(groups):
            for slices in group.slices:
                slicing.setdefault(id(slices.tensor(model, group)), []).append(index)
        # (elements, positions, groups) of each tensor
        self._parameters = [(each.numel(), 1, slicing.get(id(each), [])) for each in model.parameters()]
        weights = [(StoredTensor.named(name).of(model), count) for name, count in positions.items()]
        self._weights = [(each.numel(), count, slicing.get(id(each), [])) for each, count in weights]

    def at(self, widths: Sequence[int]) -> tuple[int, int]:
        """Parameters of the whole model, and multiply-accumulates of one sample, where the groups have `widths`."""
        return self._total(self._parameters, widths), self._total(self._weights, widths)

    def _total(self, tensors: Sequence[tuple[int, float, list[int]]], widths: Sequence[int]) -> int:
        total = 0.0
        for elements, count, groups in tensors:
            whole = math.prod(self._widths[group] for group in groups)
            total += elements * math.prod(widths[group] for group in groups) // whole * count
        return round(total)


def affordable(
    activities: Sequence[Tensor], widths: Sequence[int], round_to: int, fits: Callable[[list[int]], bool]
) -> list[int]:
    """How many removable neurons of each layer go until the model `fits` at the remaining widths: as few as possible.

    `activities` are those of each layer's removable neurons, ascending. The neurons of all layers are ranked by
    activity; among equals, the first layer and the lowest index stay. With `round_to` above 1, as many neurons go at
    once as it takes to reach the next multiple, ranked by the strongest.
    """
    steps = []
    for layer, (activity, width) in enumerate(zip(activities, widths, strict=True)):
        gone = 0
        for count in range(width % round_to or round_to, len(activity) + 1, round_to):
            steps.append((float(activity[count - 1]), -layer, count, count - gone))
            gone = count
    steps.sort()

    def counts(number: int) -> list[int]:
        gone = [0] * len(widths)
        for _, layer, _, size in steps[:number]:
            gone[-layer] += size
        return gone

    def enough(number: int) -> bool:
        return fits([width - gone for width, gone in zip(widths, counts(number), strict=True)])

    return counts(bisect_left(range(len(steps)), True, key=enough))


# --- The decision


@dataclass(frozen=True)
class LayerDecision:
    """The decision about a layer of H neurons."""

    observation: LayerObservation
    activity: Tensor  # (H,) float64, by the criterion
    inactive: Tensor  # (H,) bool, at this check
    marked: Tensor  # (H,) bool, inactive at `patience` consecutive checks
    inactive_checks: Tensor  # (H,) int64, the number of consecutive checks, including this one
    pruned: Tensor  # ascending int64 indices of the neurons to be removed
    kept_by: KeptBy
    compensate: bool  # whether the mean contribution of the removed neurons is added to the next layer
    reconstruction: Reconstruction | None = None

    @property
    def group(self) -> NeuronGroup:
        return self.observation.group

    @property
    def keep(self) -> Tensor:
        """Ascending int64 indices of the neurons that stay."""
        return all_but(self.pruned, self.group.width)

    @property
    def width_after(self) -> int:
        return self.group.width - self.pruned.numel()

    @property
    def pruned_originals(self) -> list[int]:
        """Indices before any pruning of the neurons to be removed, ascending."""
        return [int(index) for index in self.observation.original[self.pruned]]

    @property
    def collapsed(self) -> bool:
        """True if all activations were exactly zero since the last check, or every neuron was inactive at it."""
        return not bool(self.observation.statistics.max_abs.any()) or bool(self.inactive.all())


def decide(
    observations: Sequence[LayerObservation], settings: PruningSettings, size: ModelSize
) -> tuple[LayerDecision, ...]:
    """Decide about each layer, in the order of the forward pass."""
    alone = [_decide_alone(observation, settings) for observation in observations]
    counts = [len(weakest_first) for _, weakest_first in alone]
    if settings.target_parameters is not None or settings.target_macs is not None:

        def fits(widths: Sequence[int]) -> bool:
            parameters, macs = size.at(widths)
            return parameters <= (settings.target_parameters or math.inf) and macs <= (settings.target_macs or math.inf)

        counts = affordable(
            [decision.activity[weakest_first] for decision, weakest_first in alone],
            [decision.group.width for decision, _ in alone],
            settings.round_to,
            fits,
        )
    return tuple(
        replace(
            decision,
            pruned=weakest_first[:count].sort().values,
            kept_by=replace(decision.kept_by, budget=len(weakest_first) - count),
        )
        for (decision, weakest_first), count in zip(alone, counts, strict=True)
    )


def _decide_alone(observation: LayerObservation, settings: PruningSettings) -> tuple[LayerDecision, Tensor]:
    """The decision about one layer without a budget, and the neurons that it removes, weakest first."""
    layer = observation.group.name
    activity = activities(settings.criterion, observation.statistics, observation.outgoing, layer=layer)
    inactive = activity < (1.0 if settings.criterion == "dead" else settings.threshold)
    inactive_checks = torch.where(inactive, observation.inactive_checks + 1, 0)
    marked = inactive_checks >= settings.patience
    limits = {name: getattr(settings, name) for name in ("minimum_width", "maximum_share", "round_to")}
    weakest_first, kept_by = removable(marked, activity, **limits)
    decision = LayerDecision(
        observation, activity, inactive, marked, inactive_checks, weakest_first, kept_by, settings.compensate
    )
    return decision, weakest_first
