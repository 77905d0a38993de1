"""What a check looks at: the statistics and weights that decisions depend on, gathered on the CPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kddp_ext.activations.statistics import NeuronStatistics
from kddp_ext.pruning.criteria import outgoing_norms
from kddp_ext.pruning.rescaling import scales
from kddp_ext.pruning.tracing.groups import NeuronGroup, Reader


@dataclass(frozen=True)
class LayerObservation:
    """All that a decision about a layer of H neurons depends on. Tensors are on the CPU.

    Attributes:
        group: the neurons.
        statistics: the sums over the samples since the last check.
        outgoing: (H,) float64, ‖W2[:,j]‖₂ over all layers that read neuron j.
        outgoing_unshifted: (H,) float64, the same over those of them that cannot take up a mean.
        inactive_checks: (H,) int64, at how many checks in a row before this one the neuron was inactive.
        original: (H,) int64, the neurons' indices as before any pruning.
        first_scales: (2, H) float64, `scales` at the first check; None at the first.
    """

    group: NeuronGroup
    statistics: NeuronStatistics
    outgoing: Tensor
    outgoing_unshifted: Tensor
    inactive_checks: Tensor
    original: Tensor
    first_scales: Tensor | None

    @property
    def scales(self) -> Tensor:
        """mean|h_j| and ‖W2[:,j]‖₂ at this check, (2, H) float64."""
        return scales(self.statistics, self.outgoing)


def observe_layer(
    model: nn.Module,
    group: NeuronGroup,
    statistics: NeuronStatistics,
    *,
    inactive_checks: Tensor,
    original: Tensor,
    first_scales: Tensor | None,
    caller: str,
) -> LayerObservation:
    """What a check looks at in one layer: copies, on the CPU.

    Args:
        model: the model that the group was traced from.
        group, statistics, inactive_checks, original, first_scales: as in `LayerObservation`.
        caller: the method that asks, for the messages.

    Raises:
        RuntimeError: there are no statistics since the last check.
        ValueError: the statistics or the weights that read the layer are not finite, or not of its width.
    """
    if statistics.rows == 0:
        raise RuntimeError(
            f"{caller}: there are no statistics of {group.name} since the last check; pass "
            "pruner.activations to fused_kd_l1_loss at each step, or call pruner.activations.observe()"
        )
    if not bool(statistics.values.isfinite().all()):
        raise ValueError(
            f"{caller}: the activations of {group.name} were infinite or NaN in some sample since the last "
            "check; pruner.reset() forgets them"
        )
    norms = {reader: outgoing_norms([_columns(model, group, reader)]).cpu() for reader in group.readers}
    outgoing = _together(list(norms.values()), group.width)
    if not bool(outgoing.isfinite().all()):
        raise ValueError(f"{caller}: the weights that read {group.name} are infinite or NaN")
    seen = copy.deepcopy(statistics)
    seen.to(torch.device("cpu"))
    return LayerObservation(
        group=group,
        statistics=seen,
        outgoing=outgoing,
        outgoing_unshifted=_together([norm for reader, norm in norms.items() if reader.shift is None], group.width),
        inactive_checks=inactive_checks,
        original=original,
        first_scales=first_scales,
    )


def _columns(model: nn.Module, group: NeuronGroup, reader: Reader) -> Tensor:
    """The weights that read the neurons, one column a neuron: (rows, width)."""
    weight, width = getattr(model.get_submodule(reader.module), "weight", None), group.width
    if not isinstance(weight, Tensor) or weight.dim() < 2 or weight.shape[1] != width * reader.layout.entries:
        raise ValueError(
            f"model: {reader.weight.name} was traced with {width} neurons of {group.name} along dimension 1, "
            f"and is now {getattr(weight, 'shape', weight)}; make a new pruner after changing the model"
        )
    weight = weight.detach()
    if weight.dim() == 2 and reader.layout.entries == 1:
        return weight
    return weight.reshape(len(weight), reader.layout.outer, width, -1).movedim(2, -1).flatten(0, -2)


def _together(norms: list[Tensor], width: int) -> Tensor:
    """The norms of stacked columns, from those of each part."""
    if not norms:
        return torch.zeros(width, dtype=torch.float64, device="cpu")
    return norms[0] if len(norms) == 1 else torch.stack(norms).square().sum(0).sqrt()
