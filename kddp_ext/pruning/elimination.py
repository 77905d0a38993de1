"""The order in which the neurons of a layer go, where the remaining neurons take over what a removed one did.

Reconstruction leaves of a removed neuron only what the others cannot express. Two neurons that are alike can each be
removed at no cost, but not both. So neurons are removed one after another, as weights are by the optimal brain surgeon
(Hassibi & Stork 1992) and structures by ZipLM (Kurtic et al. 2023, arXiv:2302.04089).

Let R be the correlation matrix of the remaining neurons. Of the variance of neuron j the share 1 / (R⁻¹)_jj is left
when all others express it. The predicted increase of the loss is that of the mean in place of the neuron, times this
share. Every removed neuron that j helped to express is expressed worse without it, and this increase is added.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WIDEST = 2048  # neurons: the work grows with the cube of their number, and takes some 3 s for so many on one thread
_BLOCK = 128  # removals between two updates of the matrices, which then are products of matrices


def shrunk_correlation(deviations: Tensor) -> Tensor:
    """Correlation matrix of the columns of (S, H), (H, H) float64, shrunk towards the identity as far as noise demands.

    The shrinkage is that of Schäfer & Strimmer (2005) for correlations, the sum of the entries' variances over the sum
    of their squares. A column of zeros correlates with nothing. It needs at least 2 samples.
    """
    samples = len(deviations)
    values = deviations.double()
    scale = values.square().mean(0).sqrt()
    values = torch.where(scale > 0, values / scale, 0.0)
    correlation = values.T @ values / samples
    squares = values.square()
    noise = (squares.T @ squares / samples - correlation.square()) / (samples - 1)
    off_diagonal = correlation.square().sum() - correlation.diagonal().square().sum()
    noise_sum = noise.sum() - noise.diagonal().sum()
    shrinkage = (noise_sum / off_diagonal).clamp(1e-6, 1.0) if off_diagonal > 0 else torch.ones_like(off_diagonal)
    correlation.mul_(1 - shrinkage).fill_diagonal_(1.0)
    return correlation


def eliminate(correlation: Tensor, increases: Tensor) -> tuple[Tensor, Tensor]:
    """Remove all neurons one after another, always the one that costs least.

    Args:
        correlation: (H, H) float64, positive definite, with ones on its diagonal.
        increases: (H,) float64, the predicted increase of the loss if a neuron is replaced by its mean.

    Returns:
        The neurons in the order in which they go, (H,) int64; and what each of them costs then, (H,) float64 in the
        order of the neurons. The costs add up to the sum of `increases`.
    """
    precision = torch.cholesky_inverse(torch.linalg.cholesky(correlation))
    burden = torch.zeros_like(precision)
    remaining, order = torch.arange(len(increases), device="cpu"), list[Tensor]()
    costs = torch.empty_like(increases)
    while len(remaining):
        removals = _remove(min(_BLOCK, len(remaining)), precision, burden, increases[remaining])
        order.append(remaining[removals.gone])
        costs[order[-1]] = removals.costs
        is_left = torch.ones(len(remaining), dtype=torch.bool, device="cpu").index_fill_(0, removals.gone, False)
        left = is_left.nonzero().flatten()
        remaining = remaining[left]
        rows, factors, burdens = (each[:, left] for each in (removals.rows, removals.factors, removals.burdens))
        precision = _square(precision, left).addmm_(rows.T, factors, alpha=-1)
        burden = _square(burden, left).addmm_(burdens.T, factors, alpha=-1).addmm_(factors.T, burdens, alpha=-1)
    return torch.cat(order) if order else remaining, costs


class _Removals(NamedTuple):
    """Some removals, one a row, with their updates of the matrices as factors."""

    gone: Tensor
    costs: Tensor
    rows: Tensor
    factors: Tensor
    burdens: Tensor


def _remove(count: int, precision: Tensor, burden: Tensor, increases: Tensor) -> _Removals:
    """Remove this many neurons, without an update of the matrices.

    The burden T holds what the removed neurons' increases make of a worse expression: if an error e is added to the
    remaining neurons' values, eᵀTe is what it costs through the removed ones. With row θ of the precision matrix Θ, row
    t of T and w = θ / Θ_jj, the removal of neuron j changes

        Θ by -θ wᵀ
        T by -t wᵀ - w tᵀ + (T_jj + increase_j) w wᵀ = -u wᵀ - w uᵀ, where u = t - (T_jj + increase_j) / 2 · w

    because the others express j by the factors -w.
    """
    rows, factors, burdens = (precision.new_zeros(count, len(increases)) for _ in range(3))
    own, carried, candidates = precision.diagonal().clone(), burden.diagonal().clone(), increases.clone()
    gone, costs = list[Tensor](), list[Tensor]()
    for step in range(count):
        cost = (candidates + carried.clamp(min=0)) / own
        neuron = cost.argmin()
        gone.append(neuron)
        costs.append(cost[neuron])
        factor_of, burden_of = factors[:step, neuron], burdens[:step, neuron]
        row = precision[neuron] - factor_of @ rows[:step]
        factor = row / own[neuron]
        shared = burden[neuron] - factor_of @ burdens[:step] - burden_of @ factors[:step]
        shared = shared - (carried[neuron] + increases[neuron]) / 2 * factor
        rows[step], factors[step], burdens[step] = row, factor, shared
        own = (own - row * factor).clamp(min=1e-30)
        carried = carried - 2 * shared * factor
        candidates[neuron] = torch.inf
    return _Removals(torch.stack(gone), torch.stack(costs), rows, factors, burdens)


def _square(matrix: Tensor, indices: Tensor) -> Tensor:
    """The rows and columns with these indices."""
    return matrix.index_select(0, indices).index_select(1, indices)
