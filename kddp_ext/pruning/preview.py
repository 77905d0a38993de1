"""What a prune would do at a threshold, and how much the model's outputs would feel it; nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kddp_ext.pruning.budget import ModelSize
from kddp_ext.pruning.guards import KeptBy
from kddp_ext.pruning.report import change
from kddp_ext.pruning.selection import LayerDecision


@dataclass(frozen=True)
class LayerPreview:
    """One layer's part of a preview.

    Attributes:
        name: the layer.
        width: number of neurons now.
        inactive: how many of them are inactive by the statistics since the last check.
        width_after: number of neurons that a prune at patience 1 would leave.
        kept_by: how many of the inactive ones a guard would keep, by guard.
        output_change: predicted change of what the layer's readers compute, root mean square over the samples,
            relative to how much that varies now. inf where it does not vary, and would change.
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

    Attributes:
        threshold: below this a neuron counts as inactive.
        layers: one entry a layer, in the order of the forward pass.
        parameters_before: parameters of the whole model now.
        parameters_after: and after.
        macs_before: multiply-accumulates of the whole model for one sample now.
        macs_after: and after.
    """

    threshold: float
    layers: tuple[LayerPreview, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int

    @classmethod
    def of(cls, decisions: Sequence[LayerDecision], size: ModelSize, threshold: float) -> Preview:
        """The preview of decisions made at `threshold` and patience 1, for a model of `size` now."""
        widths = [decision.width_after for decision in decisions]
        return cls(
            threshold=threshold,
            layers=tuple(_layer(decision) for decision in decisions),
            parameters_before=size.parameters(),
            parameters_after=size.parameters(widths),
            macs_before=size.macs(),
            macs_after=size.macs(widths),
        )

    def __str__(self) -> str:
        rows = [("layer", "neurons", "inactive", "kept", "left", "output change")]
        rows += [
            (
                layer.name,
                str(layer.width),
                str(layer.inactive),
                str(layer.kept_by.total),
                str(layer.width_after),
                f"{layer.output_change:.2%}" if math.isfinite(layer.output_change) else "inf",
            )
            for layer in self.layers
        ]
        lengths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join([row[0].ljust(lengths[0]), *map(str.rjust, row[1:], lengths[1:])]).rstrip() for row in rows]
        parameters = change("parameters", self.parameters_before, self.parameters_after)
        macs = change("MACs", self.macs_before, self.macs_after)
        last = f"{parameters}; {macs}; changes predicted for uncorrelated neurons"
        return "\n".join([f"a prune at threshold {self.threshold:g}, patience 1:", *table, last])


def output_change(decision: LayerDecision) -> float:
    """The relative change of what the layer's readers compute, predicted from the statistics alone.

    With neurons taken as uncorrelated, contributions add up as squares: of a neuron whose average is
    compensated, what varies is lost, ‖W2[:,j]‖² · var(h_j), else all of it, ‖W2[:,j]‖² · E[h_j²]. Relative to
    Σ ‖W2[:,j]‖² · var(h_j) over all neurons; the root of the quotient.
    """
    seen, pruned = decision.observation, decision.pruned
    variances = (seen.outgoing * seen.statistics.std).square()
    not_compensated = seen.outgoing_unshifted if decision.compensate else seen.outgoing
    averages = (not_compensated * seen.statistics.mean).square()
    lost, whole = float((variances + averages)[pruned].sum()), float(variances.sum())
    if lost == 0:
        return 0.0
    return math.sqrt(lost / whole) if whole > 0 else math.inf


def _layer(decision: LayerDecision) -> LayerPreview:
    return LayerPreview(
        name=decision.group.name,
        width=decision.group.width,
        inactive=int(decision.inactive.sum()),
        width_after=decision.width_after,
        kept_by=decision.kept_by,
        output_change=output_change(decision),
    )
