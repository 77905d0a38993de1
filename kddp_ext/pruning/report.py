"""Reports of what a prune did, and previews of what it would do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from kddp_ext.pruning.model_size import ModelSize
from kddp_ext.pruning.ranking import RankedStep
from kddp_ext.pruning.selection import Decision, KeptBy, LayerDecision
from kddp_ext.pruning.tracing.structure import count_neurons


@dataclass(frozen=True)
class LayerReport:
    """One layer's part of a prune.

    Attributes:
        name: the layer.
        width_before: number of neurons before.
        width_after: number of neurons after.
        pruned: original indices (before any pruning) of the removed neurons, ascending.
        waiting: number of neurons that were inactive at this check, but not yet at `patience` consecutive checks.
        kept_by: number of neurons that were inactive for long enough and kept by a limit, for each limit.
        compensated: tensors that absorbed the mean contribution of the removed neurons.
        reconstruction_error: leave-one-out estimate of the squared error of replacing the removed neurons by the
            remaining ones, relative to replacing them by their mean; the largest where they are read at several places;
            None where only the mean was compensated.
        uncompensated: layers that read the removed neurons and have neither a bias nor a BatchNorm to absorb the mean.
        activation_scale: Σ mean|h| over the remaining neurons, relative to the same at the first check; None at the
            first check, and where they were all dead then.
        outgoing_scale: the norm of the weights that read these neurons, relative to the first check; or None.
        collapsed: True if every activation was exactly zero since the last check, or every neuron was inactive at this
            one. The layer then passes on nothing or almost nothing, see `PruneReport.warnings`.
    """

    name: str
    width_before: int
    width_after: int
    pruned: tuple[int, ...]
    waiting: int
    kept_by: KeptBy
    compensated: tuple[str, ...]
    reconstruction_error: float | None
    uncompensated: tuple[str, ...]
    activation_scale: float | None = None
    outgoing_scale: float | None = None
    collapsed: bool = False

    @classmethod
    def of(cls, decision: Decision, layer: LayerDecision) -> LayerReport:
        """One layer's part of a decision that is applied."""
        observation, group = decision.observation, layer.group
        neurons, read = observation.neurons, observation.neurons.readers_of(group)
        compensated = decision.compensate and layer.pruned.numel() > 0
        keep = decision.keep[group.numbers]
        first = None if observation.first_scales is None else observation.first_scales[:, group.numbers][:, keep]
        activation_scale, outgoing_scale = _relative_scales(first, observation.scales[:, group.numbers][:, keep])
        errors = [
            reconstruction.error
            for value, reconstruction in enumerate(decision.reconstructions)
            if reconstruction is not None and neurons.units_of(value, group)[0].numel() and layer.pruned.numel()
        ]
        return cls(
            name=group.name,
            width_before=group.width,
            width_after=layer.width_after,
            pruned=tuple(decision.pruned_originals(layer)),
            waiting=int((layer.inactive & ~layer.marked).sum()),
            kept_by=layer.kept_by,
            compensated=tuple(r.shift.name for r in read if r.shift is not None) if compensated else (),
            reconstruction_error=max(errors, default=None),
            uncompensated=tuple(r.module for r in read if r.shift is None) if compensated else (),
            activation_scale=activation_scale,
            outgoing_scale=outgoing_scale,
            collapsed=decision.collapsed(layer),
        )

    @property
    def is_rescaled(self) -> bool:
        """True if activations shrank and the weights that read them grew since the first check, both more than 2x.

        A network that becomes sparse has smaller activations too, but no larger weights.
        """
        if self.activation_scale is None or self.outgoing_scale is None:
            return False
        return self.activation_scale < 0.5 and self.outgoing_scale > 2.0


@dataclass(frozen=True)
class PruneReport:
    """What one call of `DynamicPruner.prune` did. `str(report)` is one readable line.

    Attributes:
        layers: one report for each layer, in the order of the forward pass.
        parameters_before: parameters of the whole model before the prune.
        parameters_after: parameters of the whole model after it.
        macs_before: multiply-accumulates of the whole model for one sample, before it.
        macs_after: multiply-accumulates after it.
        loss: the mean loss of a sample since the last check, without the penalty; None where no loss was seen, which
            only criterion "saliency" looks at.
        predicted_increase: the increase of this loss that the saliency of the removed neurons predicts, after their
            reconstruction and before any further training; None with another criterion.
        latest_predicted: the increase that was predicted at the latest check before this one, or None.
        latest_measured: by how much the loss has changed since that check, or None. The training in between lowers it.
    """

    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    loss: float | None = None
    predicted_increase: float | None = None
    latest_predicted: float | None = None
    latest_measured: float | None = None

    @classmethod
    def of(cls, decision: Decision, size: ModelSize) -> PruneReport:
        """The report of a decision that is applied, for a model of `size` before."""
        layers = tuple(LayerReport.of(decision, layer) for layer in decision.layers)
        loss, latest = decision.observation.saliency.mean_loss, decision.observation.predicted
        latest_loss, latest_predicted = latest or (None, None)
        measured = None if loss is None or latest_loss is None else loss - latest_loss
        return cls(layers, *_sizes(decision, size), loss, decision.predicted_increase, latest_predicted, measured)

    @property
    def neurons_pruned(self) -> int:
        """Number of removed neurons."""
        return sum(len(layer.pruned) for layer in self.layers)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Names of the layers that have collapsed: they pass on nothing or almost nothing."""
        return tuple(layer.name for layer in self.layers if layer.collapsed)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each layer that has collapsed or meets the L1 penalty by rescaling, with what to do."""
        collapsed = [
            f"layer {name} has collapsed: all of its activations are zero or below the threshold, most likely because "
            "l1_weight or the learning rate is too high; lower them and restart from before the collapse"
            for name in self.collapsed
        ]
        rescaled = [
            f"the L1 penalty on {layer.name} is met by rescaling instead of sparsity: activations shrank to "
            f"{layer.activation_scale:.2g}x while the weights that read them grew {layer.outgoing_scale:.2g}x; use "
            "weight decay on the next layer, or a norm without weights in front of it"
            for layer in self.layers
            if layer.is_rescaled
        ]
        return (*collapsed, *rescaled)

    def __str__(self) -> str:
        widths = ", ".join(
            f"{layer.name}: {f'{layer.width_before} → ' if layer.pruned else ''}{layer.width_after}"
            for layer in self.layers
        )
        parts = [
            f"pruned {count_neurons(self.neurons_pruned)} ({widths})",
            _change("parameters", self.parameters_before, self.parameters_after),
        ]
        if self.predicted_increase is not None:
            loss = "" if self.loss is None else f" of {self.loss:.4g}"
            parts.append(f"predicted increase of the loss{loss}: {self.predicted_increase:.3g}")
        if self.latest_predicted is not None and self.latest_measured is not None:
            parts.append(
                f"the prune before: predicted {self.latest_predicted:.3g}, measured {self.latest_measured:+.3g}"
            )
        waiting = sum(layer.waiting for layer in self.layers)
        if waiting:
            parts.append(f"{waiting} inactive for less than patience")
        for limit in fields(KeptBy):
            kept = sum(getattr(layer.kept_by, limit.name) for layer in self.layers)
            if kept:
                parts.append(f"{kept} kept by {limit.name}")
        readers = [reader for layer in self.layers for reader in layer.uncompensated]
        if readers:
            parts.append(f"not compensated, because they have no bias: {', '.join(readers)}")
        return "; ".join([*parts, *(f"warning: {warning}" for warning in self.warnings)])


@dataclass(frozen=True)
class LayerPreview:
    """One layer's part of a preview.

    Attributes:
        name: the layer.
        width: present number of neurons.
        inactive: number of neurons that are inactive by the statistics since the last check.
        width_after: number of neurons that a prune at patience 1 would leave.
        kept_by: number of inactive neurons that a limit would keep, for each limit.
        output_change: predicted change of the outputs of the layers that read the neurons, root mean square over the
            samples, relative to their present standard deviation. inf where they are constant and would change.
    """

    name: str
    width: int
    inactive: int
    width_after: int
    kept_by: KeptBy
    output_change: float


@dataclass(frozen=True)
class Preview:
    """What a prune now would do at patience 1. `str(preview)` is a table.

    With criterion "saliency" it also tells what removing more or less would cost.

    Attributes:
        threshold: a neuron below it counts as inactive.
        layers: one entry for each layer, in the order of the forward pass.
        parameters_before: parameters of the whole model now.
        parameters_after: parameters of the whole model after the prune.
        macs_before: multiply-accumulates of the whole model for one sample, now.
        macs_after: multiply-accumulates after the prune.
        curve: what is left along the ranking of all neurons, without targets and budget, from all neurons to none that
            may go; `activity` is the predicted increase of the loss. Empty with another criterion.
    """

    threshold: float
    layers: tuple[LayerPreview, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    curve: tuple[RankedStep, ...] = ()

    @classmethod
    def of(cls, decision: Decision, size: ModelSize, threshold: float, curve: Sequence[RankedStep] = ()) -> Preview:
        """The preview of a decision made at `threshold` and patience 1, for a model of `size` now."""
        layers = tuple(
            LayerPreview(
                name=layer.group.name,
                width=layer.group.width,
                inactive=int(layer.inactive.sum()),
                width_after=layer.width_after,
                kept_by=layer.kept_by,
                output_change=_output_change(decision, layer),
            )
            for layer in decision.layers
        )
        return cls(threshold, layers, *_sizes(decision, size), tuple(curve))

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "neurons", "inactive", "kept", "left", "output change")]
        for layer in self.layers:
            counts = (layer.width, layer.inactive, layer.kept_by.total, layer.width_after)
            change = f"{layer.output_change:.2%}" if math.isfinite(layer.output_change) else "inf"
            rows.append((layer.name, *map(str, counts), change))
        lengths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join([row[0].ljust(lengths[0]), *map(str.rjust, row[1:], lengths[1:])]).rstrip() for row in rows]
        parameters = _change("parameters", self.parameters_before, self.parameters_after)
        macs = _change("MACs", self.macs_before, self.macs_after)
        last = f"{parameters}; {macs}; output changes are predicted for uncorrelated neurons"
        if not self.curve:
            return "\n".join([f"a prune at threshold {self.threshold:g}, patience 1:", *table, last])
        return "\n".join(["a prune by saliency:", *table, last, *self._curve_lines()])

    def _curve_lines(self) -> Iterator[str]:
        """The predicted increase of the loss at tenths of the MACs."""
        yield "MACs left and the predicted increase of the loss, without targets and budget:"
        for tenth in range(9, 0, -1):
            step = next((each for each in self.curve if each.macs <= tenth / 10 * self.macs_before), None)
            if step is not None:
                yield f"  {tenth}0%  {step.activity:.3g}"


def _output_change(decision: Decision, layer: LayerDecision) -> float:
    """The relative change of the outputs of the layer's readers, predicted from the statistics alone.

    The contributions of uncorrelated neurons add up as squares. A removed neuron loses ‖W2[:,j]‖² · var(h_j) where its
    mean is compensated, else ‖W2[:,j]‖² · E[h_j²]. The result is the root of this sum relative to the sum of
    ‖W2[:,j]‖² · var(h_j) over all neurons.
    """
    observation, numbers = decision.observation, layer.group.numbers
    variances = observation.times_outgoing([each.std for each in observation.statistics])[numbers].square()
    means = observation.times_outgoing(
        [each.mean for each in observation.statistics], without_shift=decision.compensate
    )[numbers].square()
    lost, whole = float((variances + means)[layer.pruned].sum()), float(variances.sum())
    if lost == 0:
        return 0.0
    return math.sqrt(lost / whole) if whole > 0 else math.inf


def _relative_scales(first: Tensor | None, now: Tensor) -> tuple[float | None, float | None]:
    """Σ mean|h| and the norm of the outgoing weights over some neurons, now relative to the first check.

    None at the first check, and where the first value was 0.
    """
    if first is None:
        return None, None
    (before_abs, before_norm), (abs_, norm) = (
        (scales[0].sum(), scales[1].square().sum().sqrt()) for scales in (first, now)
    )
    return float(abs_ / before_abs) if before_abs > 0 else None, float(norm / before_norm) if before_norm > 0 else None


def _sizes(decision: Decision, size: ModelSize) -> tuple[int, int, int, int]:
    """Parameters before and after, MACs before and after."""
    (parameters, macs), (parameters_after, macs_after) = size.at(), size.at(decision.keep)
    return parameters, parameters_after, macs, macs_after


def _change(what: str, before: int, after: int) -> str:
    """A count before and after, with the change in percent."""
    if after == before:
        return f"{what} {after:,}"
    return f"{what} {before:,} → {after:,} ({after / before - 1:+.1%})"
