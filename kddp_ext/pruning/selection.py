"""Decides which neurons are removed: how active each one is, which limits apply, and what the model's size allows.

A decision depends on its arguments only, so processes with the same observations come to the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from kddp_ext.activations.statistics import NeuronStatistics
from kddp_ext.pruning.elimination import WIDEST, eliminate, shrunk_correlation
from kddp_ext.pruning.model_size import ModelSize, RemainingSize
from kddp_ext.pruning.ranking import RankedStep, rank
from kddp_ext.pruning.reconstruction import Reconstruction, Samples
from kddp_ext.pruning.saliency import Saliency
from kddp_ext.pruning.settings import DEFAULT_LOSS_BUDGET, Criterion, PruningSettings
from kddp_ext.pruning.tracing.structure import NeuronGroup, PrunableNeurons, Reader, ReadValue, count_neurons

# --- What is observed


@dataclass(frozen=True, eq=False)
class NeuronRecord:
    """What a pruner knows of its model's neurons between and at checks; N is the number of all neurons."""

    neurons: PrunableNeurons
    statistics: tuple[NeuronStatistics, ...]  # of each value since the last check
    inactive_checks: Tensor  # (N,) int64, the number of consecutive checks at which the neuron was inactive
    first_scales: Tensor | None  # (2, N) float64, `Observation.scales` at the first check; None before it
    saliency: Saliency  # of all neurons since the last check
    original_size: tuple[int, int]  # parameters and multiply-accumulates before any pruning
    checks: int = 0  # the number of prunes, those that removed nothing included
    predicted: tuple[float, float] | None = None  # the loss before the latest prune, and the predicted increase
    lowest_loss: float | None = None  # of all checks; None where no loss was seen


@dataclass(frozen=True, eq=False, kw_only=True)
class Observation(NeuronRecord):
    """Everything that a decision depends on: the record before a check. All tensors are on the CPU."""

    outgoing: tuple[Tensor, ...]  # of each reader: ‖W2[:,j]‖₂ for each unit of the value that it reads, float64
    original: tuple[Tensor, ...]  # of each group: its neurons' indices before any pruning, int64

    @property
    def reference_loss(self) -> float | None:
        """The lowest mean loss at a check, this one included; None where no loss was seen."""
        seen = [loss for loss in (self.lowest_loss, self.saliency.mean_loss) if loss is not None]
        return min(seen, default=None)

    @cached_property
    def mean_abs(self) -> Tensor:
        """Mean |h_j|, (N,) float64; the largest where a neuron is read at several places."""
        return self.largest([statistics.mean_abs for statistics in self.statistics])

    @cached_property
    def norms(self) -> Tensor:
        """‖W2[:,j]‖₂ over all layers that read neuron j, (N,) float64."""
        return self.root_of_squares(list(self.outgoing))

    @cached_property
    def scales(self) -> Tensor:
        """`mean_abs` and `norms`, (2, N) float64; used to notice a penalty that is met by rescaling."""
        return torch.stack([self.mean_abs, self.norms])

    def largest(self, by_value: Sequence[Tensor]) -> Tensor:
        """(N,) float64: for each neuron the largest entry over its units in all values."""
        result = torch.zeros(self.neurons.number, dtype=torch.float64, device="cpu")
        for value, entries in zip(self.neurons.values, by_value, strict=True):
            read = value.neurons >= 0
            result.scatter_reduce_(0, value.neurons[read], entries[read].double(), "amax")
        return result

    def root_of_squares(self, by_reader: Sequence[Tensor]) -> Tensor:
        """(N,) float64: for each neuron √Σ of squares over its units and all layers that read it."""
        result = torch.zeros(self.neurons.number, dtype=torch.float64, device="cpu")
        for reader, entries in zip(self.neurons.readers, by_reader, strict=True):
            value = self.neurons.values[reader.value]
            read = value.neurons >= 0
            result.index_add_(0, value.neurons[read], entries[read].square())
        return result.sqrt()

    def times_outgoing(self, by_value: Sequence[Tensor], *, without_shift: bool = False) -> Tensor:
        """`root_of_squares` of a value's entries times the norms of the weights that read them.

        `without_shift` counts only the readers that cannot absorb a constant.
        """
        products = [
            norms * by_value[reader.value] if reader.shift is None or not without_shift else torch.zeros_like(norms)
            for reader, norms in zip(self.neurons.readers, self.outgoing, strict=True)
        ]
        return self.root_of_squares(products)

    @cached_property
    def elimination(self) -> tuple[Tensor, Tensor]:
        """By saliency: what each neuron costs the loss when it goes, and when in its group it goes; (N,) float64."""
        costs, order = self.saliency.increase.clone(), self.saliency.increase.clone()
        for group in self.neurons.groups:
            correlation = correlation_of(self, group)
            if correlation is not None:
                gone, costs[group.numbers] = eliminate(correlation, costs[group.numbers])
                order[group.numbers] = gone.argsort().double()
        return costs, order

    def samples_of(self, value: int) -> Samples | None:
        """The latest values of a value's units; None where the layers that read them take over nothing."""
        statistics, readers = self.statistics[value], self.readers_of(value)
        ring, means = statistics.ring, None
        if ring is None or any(reader.groups > 1 or reader.computed for reader in readers):
            return None
        if self.neurons.values[value].positions is not None:
            means = statistics.position_mean[:, ring.entries[: ring.filled]].T
        return Samples(
            values=ring.samples,
            means=means,
            constant=all(reader.shift is not None for reader in readers),
            padded=any(reader.padded for reader in readers),
        )

    def readers_of(self, value: int) -> list[Reader]:
        """The layers that read a value."""
        return [reader for reader in self.neurons.readers if reader.value == value]

    def outgoing_of(self, value: int) -> Tensor:
        """‖W2[:,j]‖₂ for each unit of a value, over all layers that read it, float64."""
        norms = [n for reader, n in zip(self.neurons.readers, self.outgoing, strict=True) if reader.value == value]
        return torch.stack(norms).square().sum(0).sqrt()


def norms_of_reader(model: nn.Module, neurons: PrunableNeurons, reader: Reader) -> Tensor:
    """One of the `outgoing` of an `Observation`, on the weight's device."""
    return outgoing_norms(_columns(reader.weight.of(model).detach(), reader, neurons.values[reader.value]))


def _columns(weight: Tensor, reader: Reader, value: ReadValue) -> Tensor:
    """The weights that read a value, with one column for each of its units: (rows, units)."""
    weight = weight.transpose(0, 1) if reader.axis == 0 else weight
    if weight.dim() == 2 and value.layout.entries == 1:
        return weight
    if reader.groups > 1:  # each group of outputs reads its own part of the value
        weight = weight.reshape(reader.groups, len(weight) // reader.groups, weight.shape[1], -1)
        weight = weight.permute(1, 0, 2, 3).flatten(1, 2)
    return weight.reshape(len(weight), value.layout.outer, value.units, -1).movedim(2, -1).flatten(0, -2)


def outgoing_norms(weight: Tensor) -> Tensor:
    """‖W2[:,j]‖₂ of an (outputs, H) weight, (H,) float64."""
    # In blocks of a few rows: torch converts and sums a large matrix along its rows an order of magnitude slower.
    return torch.stack([rows.double().square().sum(0) for rows in weight.split(64)]).sum(0).sqrt()


# --- How active each neuron is


def contribution(observation: Observation) -> Tensor:
    """‖W2[:,j]‖₂ · std(h_j) over all layers that read neuron j: how much their inputs vary with it.

    Scaling W1 down and W2 up does not change it. A constant neuron contributes nothing; the next bias can replace it.
    """
    return observation.times_outgoing([statistics.std for statistics in observation.statistics])


def mean_activation(observation: Observation) -> Tensor:
    """mean|h_j|."""
    return observation.mean_abs


def apoz(observation: Observation) -> Tensor:
    """1 - APoZ: the share of samples in which h_j is not exactly zero (Hu et al., 2016, arXiv:1607.03250)."""
    return observation.largest([statistics.active_fraction for statistics in observation.statistics])


def dead(observation: Observation) -> Tensor:
    """1 where h_j was nonzero in any sample, else 0."""
    return observation.largest([(statistics.nonzero > 0).double() for statistics in observation.statistics])


def saliency(observation: Observation) -> Tensor:
    """The predicted increase of the loss if h_j is replaced by its mean (kddp_ext/pruning/saliency.py)."""
    if observation.saliency.samples == 0:
        raise RuntimeError(
            "prune: no gradients of the activations were seen since the last check, which criterion 'saliency' needs; "
            "call backward() on a loss after each forward pass. The first pass after a check measures only the means"
        )
    return observation.saliency.increase


# By the names in settings.CRITERIA.
_FUNCTIONS: dict[str, Callable[[Observation], Tensor]] = {
    each.__name__: each for each in (contribution, mean_activation, apoz, dead, saliency)
}
# Their activities are relative to the most active neuron of a layer.
_RELATIVE = ("contribution", "mean_activation")


def _relative(activity: Tensor) -> Tensor:
    highest = activity.max()
    return activity / highest if highest > 0 else torch.ones_like(activity)  # no neuron is less active than the others


def activities(criterion: str | Criterion, observation: Observation) -> Tensor:
    """The activities of all neurons, (N,) float64; those of the user's own criterion are checked."""
    if not isinstance(criterion, str):
        return _users_activities(criterion, observation)
    activity = _FUNCTIONS[criterion](observation)
    if criterion in _RELATIVE:
        activity = torch.cat([_relative(activity[group.numbers]) for group in observation.neurons.groups])
    return activity


def _users_activities(criterion: Criterion, observation: Observation) -> Tensor:
    """The user's criterion is asked about each layer's neurons in each value; the highest of the answers counts."""
    neurons = observation.neurons
    result = torch.zeros(neurons.number, dtype=torch.float64, device="cpu")
    for index, statistics in enumerate(observation.statistics):
        outgoing = observation.outgoing_of(index)
        for group in neurons.groups:
            units, members = neurons.units_of(index, group)
            if not units.numel():
                continue
            with torch.no_grad():  # it gets copies, so that it cannot change the decision in another way
                activity = criterion(statistics.select(units), outgoing[units])
            checked = _checked(activity, units.numel(), group.name)
            result.scatter_reduce_(0, members + group.start, checked, "amax")
    return result


def _checked(activity: Tensor, width: int, layer: str) -> Tensor:
    """What a user's criterion returned for a layer, as float64 on the CPU."""
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


# --- The decision


@dataclass(frozen=True, eq=False)
class LayerDecision:
    """The decision about a layer of H neurons."""

    group: NeuronGroup
    activity: Tensor  # (H,) float64, by the criterion
    inactive: Tensor  # (H,) bool, at this check
    marked: Tensor  # (H,) bool, inactive at `patience` consecutive checks
    inactive_checks: Tensor  # (H,) int64, the number of consecutive checks, including this one
    pruned: Tensor  # ascending int64 indices of the neurons to be removed
    kept_by: KeptBy

    @property
    def width_after(self) -> int:
        return self.group.width - self.pruned.numel()


@dataclass(frozen=True, eq=False)
class Decision:
    """The decision about all layers, in the order of the forward pass."""

    observation: Observation
    layers: tuple[LayerDecision, ...]
    compensate: bool  # whether the mean contribution of removed neurons is added to the next layers
    predicted_increase: float | None = None  # of the loss, by the removed neurons' saliency; None: another criterion
    reconstructions: tuple[Reconstruction | None, ...] = ()  # of each value

    @cached_property
    def keep(self) -> Tensor:
        """A mask of the neurons that stay, (N,)."""
        keep = torch.ones(self.observation.neurons.number, dtype=torch.bool, device="cpu")
        for layer in self.layers:
            keep[layer.group.numbers][layer.pruned] = False
        return keep

    def pruned_originals(self, layer: LayerDecision) -> list[int]:
        """Indices before any pruning of a layer's neurons to be removed, ascending."""
        original = self.observation.original[self.layers.index(layer)]
        return [int(index) for index in original[layer.pruned]]

    def collapsed(self, layer: LayerDecision) -> bool:
        """True if all activations were exactly zero since the last check, or every neuron was inactive at it."""
        return not bool(self._largest[layer.group.numbers].any()) or bool(layer.inactive.all())

    @cached_property
    def _largest(self) -> Tensor:
        """max|h_j| since the last check, (N,) float64."""
        return self.observation.largest([each.max_abs for each in self.observation.statistics])


def decide(observation: Observation, settings: PruningSettings, size: ModelSize) -> Decision:
    """Decide about each layer."""
    alone = _decide_alone(observation, settings)
    orders = [weakest_first for _, weakest_first in alone]
    counts, predicted = [len(each) for each in orders], None
    is_saliency = settings.criterion == "saliency"
    if is_saliency or settings.target_parameters is not None or settings.target_macs is not None:
        remaining = size.removing(orders)
        budget = _budget(observation, settings) if is_saliency else math.inf
        steps = _ranked(alone, remaining, settings, _goal(observation, settings), budget)
        counts, predicted = remaining.gone, steps[-1].activity if is_saliency else None
    layers = []
    for (decision, weakest_first), count in zip(alone, counts, strict=True):
        pruned = weakest_first[:count].sort().values
        if is_saliency:
            marked = torch.zeros_like(decision.marked)
            marked[pruned] = True
            layers.append(replace(decision, inactive=marked, marked=marked, pruned=pruned, kept_by=KeptBy()))
        else:
            kept_by = replace(decision.kept_by, budget=len(weakest_first) - count)
            layers.append(replace(decision, pruned=pruned, kept_by=kept_by))
    return Decision(observation, tuple(layers), settings.compensate, predicted_increase=predicted)


def curve(observation: Observation, settings: PruningSettings, size: ModelSize) -> list[RankedStep]:
    """What is left, and the predicted increase of the loss, along the whole ranking."""
    alone = _decide_alone(observation, settings)
    return _ranked(alone, size.removing([order for _, order in alone]), settings)


def _ranked(
    alone: Sequence[tuple[LayerDecision, Tensor]],
    remaining: RemainingSize,
    settings: PruningSettings,
    goal: tuple[float, float] = (0, 0),
    budget: float = math.inf,
) -> list[RankedStep]:
    """Take neurons from `remaining`, by rank over all layers, until the goal or the budget is reached."""
    return rank(
        [decision.activity[order] for decision, order in alone],
        remaining,
        settings.round_to,
        settings.resource or ("macs" if settings.criterion == "saliency" else None),
        lambda left: left.parameters <= goal[0] and left.macs <= goal[1],
        budget,
    )


def _goal(observation: Observation, settings: PruningSettings) -> tuple[float, float]:
    """The parameters and multiply-accumulates at which this check stops; 0 without any target.

    With several `target_steps`, each check takes away the same share of what is there.
    """
    targets = settings.target_parameters, settings.target_macs
    if targets == (None, None):
        return 0, 0
    share_of_way = min(1.0, (observation.checks + 1) / settings.target_steps)
    goal = []
    for target, original in zip(targets, observation.original_size, strict=True):
        final = math.inf
        if target is not None:
            final = target * original if isinstance(target, float) else target
            if final < original:
                final = original * (final / original) ** share_of_way
        goal.append(final)
    return goal[0], goal[1]


def _budget(observation: Observation, settings: PruningSettings) -> float:
    """The increase of the loss that this check may predict: what is left of the budget at the present loss."""
    share, loss, reference = settings.loss_budget, observation.saliency.mean_loss, observation.reference_loss
    if share is None:
        if settings.target_parameters is not None or settings.target_macs is not None:
            return math.inf
        share = DEFAULT_LOSS_BUDGET
    if loss is None or reference is None:
        raise RuntimeError(
            "prune: loss_budget needs the loss, and the loss is not known; compute it by fused_kd_l1_loss with "
            "pruner.activations, or pass your own to pruner.activations.observe(loss)"
        )
    # The prediction is too low for large changes. A loss that has risen too far has to fall before more is removed.
    return max(0.0, reference * (1 + share) - loss)


def _decide_alone(observation: Observation, settings: PruningSettings) -> list[tuple[LayerDecision, Tensor]]:
    """The decision about each layer without a ranking over all layers, and the neurons that may go, weakest first."""
    activity = order = activities(settings.criterion, observation)
    if settings.criterion == "saliency":  # any neuron may go; the ranking decides
        if settings.compensate and settings.reconstruction_samples:
            activity, order = observation.elimination
        inactive = marked = torch.ones_like(activity, dtype=torch.bool)
        inactive_checks = torch.zeros_like(observation.inactive_checks)
    else:
        inactive = activity < (1.0 if settings.criterion == "dead" else settings.threshold)
        inactive_checks = torch.where(inactive, observation.inactive_checks + 1, 0)
        marked = inactive_checks >= settings.patience
    limits = {name: getattr(settings, name) for name in ("minimum_width", "maximum_share", "round_to")}
    decisions = []
    for group in observation.neurons.groups:
        own, idle, due, checks = (each[group.numbers] for each in (activity, inactive, marked, inactive_checks))
        weakest_first, kept_by = removable(due, order[group.numbers], **limits)
        decisions.append((LayerDecision(group, own, idle, due, checks, weakest_first, kept_by), weakest_first))
    return decisions


def correlation_of(observation: Observation, group: NeuronGroup) -> Tensor | None:
    """The correlation matrix of a group's neurons, (width, width); None where no neuron can express another.

    It is averaged over the values that have the neurons. They correlate with nothing in a value that cannot be
    reconstructed. None also where the group is wider than `WIDEST`.
    """
    neurons, found = observation.neurons, list[Tensor | None]()
    if group.width > WIDEST:
        return None
    for index in range(len(neurons.values)):
        units, owners = neurons.units_of(index, group)
        if not len(units):
            continue
        samples = observation.samples_of(index) if len(units) == len(owners.unique()) else None
        if samples is None or not samples.are_usable:
            found.append(None)
        else:
            found.append(shrunk_correlation(samples.deviations(units[owners.argsort()])))
    if all(each is None for each in found):
        return None
    identity = torch.eye(group.width, dtype=torch.float64, device="cpu")
    return torch.stack([identity if each is None else each for each in found]).mean(0)
