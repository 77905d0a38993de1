"""Is the penalty met by rescaling? Small activations under large weights make nothing sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from kddp_ext.activations.statistics import NeuronStatistics

# Both together: a network that turns sparse has smaller activations too, but does not need larger weights for it.
SHRUNK, GROWN = 0.5, 2.0


def scales(statistics: NeuronStatistics, outgoing: Tensor) -> Tensor:
    """mean|h_j| and ‖W2[:,j]‖₂ of each neuron, (2, H) float64."""
    return torch.stack([statistics.mean_abs, outgoing])


def scales_relative_to(first: Tensor | None, now: Tensor, keep: Tensor) -> tuple[float | None, float | None]:
    """By what factor both changed over the neurons `keep`: sum of mean|h| and rms norm, now over then.

    None where there is nothing to compare with, or it was 0.
    """
    if first is None:
        return None, None
    then_activation, then_outgoing = first[0, keep].sum(), first[1, keep].square().sum().sqrt()
    now_activation, now_outgoing = now[0, keep].sum(), now[1, keep].square().sum().sqrt()
    return (
        float(now_activation / then_activation) if then_activation > 0 else None,
        float(now_outgoing / then_outgoing) if then_outgoing > 0 else None,
    )


def is_rescaled(activation_scale: float | None, outgoing_scale: float | None) -> bool:
    """Whether activations shrank and the weights that read them grew, each by more than a factor of 2."""
    if activation_scale is None or outgoing_scale is None:
        return False
    return activation_scale < SHRUNK and outgoing_scale > GROWN
