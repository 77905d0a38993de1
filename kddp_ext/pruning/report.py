"""What a prune did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kddp_ext.pruning.compaction import Removal


@dataclass(frozen=True)
class LayerReport:
    """One layer's part of a check.

    Attributes:
        name: the layer.
        width_before: number of neurons before.
        width_after: number of neurons after.
        pruned: original indices (as before any pruning) of the neurons removed, ascending.
        waiting: neurons inactive at this check, but not yet at `patience` checks in a row.
        kept_by_guards: neurons that would have been removed but for `minimum_width` and `round_to`.
        compensated: tensors that took up what the removed neurons contributed on average.
        uncompensated: layers that read the removed neurons and have neither a bias nor a BatchNorm to take it
            up.
    """

    name: str
    width_before: int
    width_after: int
    pruned: tuple[int, ...]
    waiting: int
    kept_by_guards: int
    compensated: tuple[str, ...]
    uncompensated: tuple[str, ...]

    @classmethod
    def of(cls, removal: Removal, original: Tensor, *, inactive: Tensor, marked: Tensor) -> LayerReport:
        """The report of a removal.

        Args:
            removal: what goes.
            original: (width,) original indices of the layer's present neurons.
            inactive: (width,) bool, inactive at this check.
            marked: (width,) bool, inactive at enough checks.
        """
        pruned, readers = removal.pruned, removal.group.readers
        wanted = removal.means is not None and len(pruned) > 0
        return cls(
            name=removal.group.name,
            width_before=removal.group.width,
            width_after=len(removal.keep),
            pruned=tuple(original[pruned].tolist()),
            waiting=int((inactive & ~marked).sum()),
            kept_by_guards=int(marked.sum()) - len(pruned),
            compensated=tuple(r.shift.name for r in readers if r.shift is not None) if wanted else (),
            uncompensated=tuple(r.module for r in readers if r.shift is None) if wanted else (),
        )


@dataclass(frozen=True)
class PruneReport:
    """What one call of `DynamicPruner.prune` did. `str(report)` is one readable line.

    Attributes:
        layers: one report a layer, in the order of the forward pass.
        parameters_before: parameters of the whole model before.
        parameters_after: and after.
    """

    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int

    @property
    def neurons_pruned(self) -> int:
        """Number of neurons removed."""
        return sum(len(layer.pruned) for layer in self.layers)

    def __str__(self) -> str:
        widths = ", ".join(_widths(layer) for layer in self.layers)
        neurons = f"{self.neurons_pruned} neuron{'s' * (self.neurons_pruned != 1)}"
        parts = [f"pruned {neurons} ({widths})", self._parameters()]
        waiting = sum(layer.waiting for layer in self.layers)
        if waiting:
            parts.append(f"{waiting} inactive for less than patience")
        kept = sum(layer.kept_by_guards for layer in self.layers)
        if kept:
            parts.append(f"{kept} kept by minimum_width or round_to")
        readers = [reader for layer in self.layers for reader in layer.uncompensated]
        if readers:
            parts.append(f"not compensated, for want of a bias: {', '.join(readers)}")
        return "; ".join(parts)

    def _parameters(self) -> str:
        if self.parameters_after == self.parameters_before:
            return f"parameters {self.parameters_after:,}"
        change = self.parameters_after / self.parameters_before - 1
        return f"parameters {self.parameters_before:,} → {self.parameters_after:,} ({change:+.1%})"


def _widths(layer: LayerReport) -> str:
    if layer.width_after == layer.width_before:
        return f"{layer.name}: {layer.width_after}"
    return f"{layer.name}: {layer.width_before} → {layer.width_after}"
