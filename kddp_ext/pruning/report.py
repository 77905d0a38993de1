"""What a prune did, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from kddp_ext.pruning.budget import ModelSize
from kddp_ext.pruning.guards import KeptBy
from kddp_ext.pruning.rescaling import is_rescaled, scales_relative_to
from kddp_ext.pruning.selection import LayerDecision


@dataclass(frozen=True)
class LayerReport:
    """One layer's part of a check.

    Attributes:
        name: the layer.
        width_before: number of neurons before.
        width_after: number of neurons after.
        pruned: original indices (as before any pruning) of the neurons removed, ascending.
        waiting: neurons inactive at this check, but not yet at `patience` checks in a row.
        kept_by: neurons inactive for long enough that a guard kept, by guard.
        compensated: tensors that took up what the removed neurons contributed on average.
        reconstruction_error: leave-one-out estimate of the squared error of what the removed neurons added to the next
            layer, relative to that of their average alone; None where the average alone was compensated.
        uncompensated: layers that read the removed neurons and have neither a bias nor a BatchNorm to take it
            up.
        activation_scale: Σ mean|h| over the neurons that stay, relative to the same at the first check; None at
            the first check and where they were all dead then.
        outgoing_scale: the norm of the weights that read these neurons, relative to the first check; or None.
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

    @classmethod
    def of(cls, decision: LayerDecision) -> LayerReport:
        """The report of a decision that is carried out."""
        readers, seen = decision.group.readers, decision.observation
        reconstruction = decision.removal.reconstruction
        wanted = decision.compensate and decision.pruned.numel() > 0
        activation_scale, outgoing_scale = scales_relative_to(seen.first_scales, seen.scales, decision.keep)
        return cls(
            name=decision.group.name,
            width_before=decision.group.width,
            width_after=decision.width_after,
            pruned=tuple(decision.pruned_originals),
            waiting=int((decision.inactive & ~decision.marked).sum()),
            kept_by=decision.kept_by,
            compensated=tuple(r.shift.name for r in readers if r.shift is not None) if wanted else (),
            reconstruction_error=None if reconstruction is None else reconstruction.error,
            uncompensated=tuple(r.module for r in readers if r.shift is None) if wanted else (),
            activation_scale=activation_scale,
            outgoing_scale=outgoing_scale,
        )

    @property
    def is_rescaled(self) -> bool:
        """Whether activations shrank while the weights that read them grew, each by more than a factor of 2."""
        return is_rescaled(self.activation_scale, self.outgoing_scale)


@dataclass(frozen=True)
class PruneReport:
    """What one call of `DynamicPruner.prune` did. `str(report)` is one readable line.

    Attributes:
        layers: one report a layer, in the order of the forward pass.
        parameters_before: parameters of the whole model before.
        parameters_after: and after.
        macs_before: multiply-accumulates of the whole model for one sample before.
        macs_after: and after.
    """

    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int

    @classmethod
    def of(cls, decisions: Sequence[LayerDecision], size: ModelSize) -> PruneReport:
        """The report of decisions that are carried out, for a model of `size` before."""
        widths = [decision.width_after for decision in decisions]
        return cls(
            layers=tuple(LayerReport.of(decision) for decision in decisions),
            parameters_before=size.parameters(),
            parameters_after=size.parameters(widths),
            macs_before=size.macs(),
            macs_after=size.macs(widths),
        )

    @property
    def neurons_pruned(self) -> int:
        """Number of neurons removed."""
        return sum(len(layer.pruned) for layer in self.layers)

    def __str__(self) -> str:
        widths = ", ".join(_widths(layer) for layer in self.layers)
        neurons = f"{self.neurons_pruned} neuron{'s' * (self.neurons_pruned != 1)}"
        parts = [f"pruned {neurons} ({widths})", change("parameters", self.parameters_before, self.parameters_after)]
        waiting = sum(layer.waiting for layer in self.layers)
        if waiting:
            parts.append(f"{waiting} inactive for less than patience")
        for guard in fields(KeptBy):
            kept = sum(getattr(layer.kept_by, guard.name) for layer in self.layers)
            if kept:
                parts.append(f"{kept} kept by {guard.name}")
        readers = [reader for layer in self.layers for reader in layer.uncompensated]
        if readers:
            parts.append(f"not compensated, for want of a bias: {', '.join(readers)}")
        parts.extend(_rescaled(layer) for layer in self.layers if layer.is_rescaled)
        return "; ".join(parts)


def change(what: str, before: int, after: int) -> str:
    """A count before and after, with the change in percent."""
    if after == before:
        return f"{what} {after:,}"
    return f"{what} {before:,} → {after:,} ({after / before - 1:+.1%})"


def _widths(layer: LayerReport) -> str:
    if layer.width_after == layer.width_before:
        return f"{layer.name}: {layer.width_after}"
    return f"{layer.name}: {layer.width_before} → {layer.width_after}"


def _rescaled(layer: LayerReport) -> str:
    return (
        f"{layer.name}: activations shrank to {layer.activation_scale:.2g}x while the weights that read them grew "
        f"{layer.outgoing_scale:.2g}x: the penalty is met by rescaling, not by sparsity; weight decay on the next "
        "layer, or a norm without weights of its own in front of it, prevents that"
    )
