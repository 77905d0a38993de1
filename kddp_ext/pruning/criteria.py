"""Which neurons are inactive: one activity per neuron, and the bound below which it counts as none.

Every criterion reads sums over all samples since the last check. They differ in what "active" means;
docs/pruning.md compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kddp_ext.activations.statistics import NeuronStatistics

Criterion = Callable[[NeuronStatistics, Tensor], Tensor]
"""What gives each of a layer's H neurons an activity, (H,), finite and not negative.

The higher, the more there is to lose. It gets the sums over the samples since the last check, and ‖W2[:,j]‖₂ of the
weights that read each neuron, (H,) float64; both are on the CPU. The built-in ones give activities in [0, 1].
"""


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


def activities(criterion: str | Criterion, statistics: NeuronStatistics, outgoing: Tensor, *, layer: str) -> Tensor:
    """The activities of a layer's neurons by a criterion of `CRITERIA` or by the user's own, (H,) float64.

    Raises:
        TypeError, ValueError: the user's criterion returned something else; the message names `layer`.
    """
    if isinstance(criterion, str):
        return CRITERIA[criterion](statistics, outgoing)
    width = statistics.width
    with torch.no_grad():  # copies, for what it does to them must not reach the decision by another way
        activity = criterion(statistics.select(torch.arange(width, device="cpu")), outgoing.clone())
    if not isinstance(activity, Tensor):
        raise TypeError(f"criterion: expected a tensor of activities for {layer}, got {type(activity).__name__}")
    if activity.shape != (width,) or activity.is_complex():
        raise ValueError(
            f"criterion: expected one real activity for each of the {width} neurons of {layer}, got "
            f"{activity.dtype} of shape {tuple(activity.shape)}"
        )
    activity = activity.detach().to("cpu", torch.float64, copy=True)
    if not bool(activity.isfinite().all()) or bool((activity < 0).any()):
        worst = activity[~activity.isfinite() | (activity < 0)][0]
        raise ValueError(f"criterion: expected finite activities of at least 0 for {layer}, got {float(worst)}")
    return activity


def outgoing_norms(weights: Sequence[Tensor]) -> Tensor:
    """‖W2[:,j]‖₂ over all layers that read neuron j, float64 (H,); `weights` are (outputs, H)."""
    # By a few rows at a time: torch converts and sums along the rows of a large matrix an order of magnitude slower.
    blocks = [rows.double().square().sum(0) for weight in weights for rows in weight.detach().split(64)]
    return torch.stack(blocks).sum(0).sqrt()


def _relative(activity: Tensor) -> Tensor:
    # Where nothing in the layer is active, nothing is less active than the rest.
    highest = activity.max()
    return activity / highest if highest > 0 else torch.ones_like(activity)
