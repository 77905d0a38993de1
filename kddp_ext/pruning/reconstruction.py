"""Expresses removed neurons through the remaining ones: h_p ≈ E[h_p] + A (h_k - E[h_k]).

A is a ridge regression over S samples of the layer's values. It is stored as two factors of rank S or less, because a
wide layer has more neurons than samples. Leave-one-out errors choose the strength of the ridge and decide
whether the regression is better than the mean alone; neurons that cannot be predicted are replaced by their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Candidate ridges, relative to the largest eigenvalue of the samples' Gram matrix.
RIDGES = tuple(10.0**-exponent for exponent in range(9))
# The regression must reduce the error of the mean alone by more than noise can: to this share at most.
_WORTHWHILE = 0.9
# Errors are estimated over this number of random combinations of the removed neurons.
_MIXTURES = 32
_FEWEST_SAMPLES = 16


@dataclass(frozen=True, eq=False, kw_only=True)
class Samples:
    """The latest values of neurons that are read at one place.

    Attributes:
        values: (S, H).
        means: (S, H), what the mean alone predicts for each sample, where that depends on the entry. Default None: the
            mean of the samples.
        constant: whether all layers that read the values can absorb a constant.
        padded: whether a layer that reads them reads zeros beyond a border.
    """

    values: Tensor
    means: Tensor | None = None
    constant: bool = True
    padded: bool = False

    @property
    def are_usable(self) -> bool:
        """Whether they are enough, and finite."""
        return len(self.values) >= _FEWEST_SAMPLES and bool(self.values.isfinite().all())

    def deviations(self, neurons: Tensor) -> Tensor:
        """The values of these neurons less what a constant replaces, (S, number) float64."""
        values = self.values[:, neurons].double()
        if not self.constant:
            return values
        return values - (values.mean(0) if self.means is None else self.means[:, neurons])


@dataclass(frozen=True)
class Reconstruction:
    """The matrix A = left @ right, (P, K), for P removed and K remaining neurons.

    `error` is the leave-one-out squared error of the removed neurons' contribution to the next layer, relative to the
    error of replacing them by their mean (by zero, where the next layer cannot absorb a constant).
    """

    left: Tensor  # (P, R) float64 of a rank R of at most S and K
    right: Tensor  # (R, K) float64; the norms of its rows are at most 1, so float32 is enough for the products
    error: float


def reconstruct(samples: Samples, keep: Tensor, pruned: Tensor, outgoing: Tensor) -> Reconstruction | None:
    """Fit the removed neurons to the remaining ones, by an eigendecomposition; None where their mean is as good.

    Where no constant can be absorbed the fit is h_p ≈ A h_k, so that the remaining neurons also replace the mean. Where
    zeros are read beyond a border it is the same, and the constant is the mean of the residual, because a larger
    constant would be wrong at the border.

    Args:
        samples: of the layer's H neurons.
        keep: (K,) int64, the neurons that remain.
        pruned: (P,) int64, the neurons to be removed.
        outgoing: (H,) float64, ‖W2[:,j]‖₂, the weight of each neuron's error.
    """
    if not len(pruned) or not samples.are_usable:
        return None
    number, removed = len(samples.values), samples.deviations(pruned)
    if samples.padded:
        kept, gone = (samples.values[:, each].double() for each in (keep, pruned))
    else:
        kept, gone = samples.deviations(keep), removed
    eigenvalues, vectors = _principal_components(kept)
    if not len(eigenvalues):
        return None
    highest = float(eigenvalues[-1])
    generator = torch.Generator("cpu").manual_seed(0)
    mixtures = torch.randn(len(pruned), _MIXTURES, generator=generator, dtype=torch.float64, device="cpu")
    weighted = outgoing[pruned, None] * mixtures
    # The leave-one-out error of a mean is the deviation times S / (S - 1).
    of_mean = number / (number - 1) if samples.constant else 1.0
    error_of_mean = float((of_mean * removed @ weighted).square().sum())
    target = gone @ weighted
    mean_leverage = 1 / number if samples.constant and not samples.padded else 0.0
    errors = [_left_out_error(target, eigenvalues, vectors, ridge * highest, mean_leverage) for ridge in RIDGES]
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    if not errors[best] < _WORTHWHILE * error_of_mean:
        return None
    whitened = vectors / (eigenvalues + RIDGES[best] * highest).sqrt()
    return Reconstruction(gone.T @ whitened, whitened.T @ kept, errors[best] / error_of_mean)


def _principal_components(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The positive eigenvalues of matrix @ matrix.T, ascending, and their vectors (rows of matrix, number)."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(matrix.T @ matrix if is_tall else matrix @ matrix.T)
    # Those near the rounding of the largest are noise, and smaller than every ridge.
    used = eigenvalues > eigenvalues[-1] * 1e-13 if float(eigenvalues[-1]) > 0 else torch.zeros_like(eigenvalues).bool()
    eigenvalues, vectors = eigenvalues[used], vectors[:, used]
    return eigenvalues, matrix @ vectors / eigenvalues.sqrt() if is_tall else vectors


def _left_out_error(target: Tensor, eigenvalues: Tensor, vectors: Tensor, ridge: float, mean_leverage: float) -> float:
    """Squared error of predicting each sample from all others (Allen's PRESS), without refitting."""
    shrunk = eigenvalues / (eigenvalues + ridge)
    fitted = vectors @ (shrunk[:, None] * (vectors.T @ target))
    leverage = vectors.square() @ shrunk + mean_leverage
    return float(((target - fitted) / (1 - leverage).clamp(min=1e-9)[:, None]).square().sum())
