"""Which neurons are inactive: one activity per neuron, and the bound below which it counts as none.

Every criterion reads sums over all samples since the last check. They differ in what "active" means;
docs/pruning.md compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kddp_ext.statistics import NeuronStatistics

# A criterion maps the statistics (H neurons) and the norms of the outgoing weights (H,) to an activity in [0,
# 1], (H,).
Criterion = Callable[[NeuronStatistics, Tensor], Tensor]


def contribution(statistics: NeuronStatistics, outgoing: Tensor) -> Tensor:
    """c_j = ‖W2[:,j]‖₂ · std(h_j), relative to the layer's largest.

    What varies in the next layer's input because of neuron j. Scaling W1 down and W2 up leaves it as it is,
    and a neuron that is constant contributes nothing that the next bias could not.
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


CRITERIA: dict[str, Criterion] = {
    "contribution": contribution,
    "mean_activation": mean_activation,
    "apoz": apoz,
    "dead": dead,
}


def outgoing_norms(weights: Sequence[Tensor]) -> Tensor:
    """‖W2[:,j]‖₂ over all layers that read neuron j, float64 (H,); `weights` are (outputs, H)."""
    # By a few rows at a time: torch converts and sums along the rows of a large matrix an order of magnitude slower.
    blocks = [rows.double().square().sum(0) for weight in weights for rows in weight.detach().split(64)]
    return torch.stack(blocks).sum(0).sqrt()


def neurons_to_keep(marked: Tensor, activity: Tensor, *, minimum_width: int, round_to: int) -> Tensor:
    """Indices that stay once the marked neurons go, as far as the guards allow.

    The width left is at least `minimum_width` and a multiple of `round_to` (or the present width). Where that
    keeps some of the marked, it keeps the most active of them, the first among equals.

    Args:
        marked: (H,) bool.
        activity: (H,) float64.

    Returns:
        Ascending int64 indices.
    """
    width = marked.numel()
    wanted = max(minimum_width, width - int(marked.sum()))
    target = min(width, -(-wanted // round_to) * round_to)
    candidates = marked.nonzero().flatten()
    by_activity = candidates[activity[candidates].argsort(descending=True, stable=True)]
    keep = ~marked
    keep[by_activity[: target - int(keep.sum())]] = True
    return keep.nonzero().flatten()


def _relative(activity: Tensor) -> Tensor:
    # Where nothing in the layer is active, nothing is less active than the rest.
    highest = activity.max()
    return activity / highest if highest > 0 else torch.ones_like(activity)
