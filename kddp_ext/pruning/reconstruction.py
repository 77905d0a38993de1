"""What pruned neurons computed, expressed through those that stay: h_p ≈ E[h_p] + A (h_k - E[h_k]).

A is the ridge regression over some samples of the layer's values. With S samples of K kept neurons it is kept as two
factors of rank S, for a wide layer has more neurons than samples. How much ridge there is, and whether the regression
is worth anything beyond the mean, leave-one-out errors decide: neurons that cannot be predicted from the others are
replaced by their mean alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Ridges that are tried, relative to the largest eigenvalue of the samples' Gram matrix.
RIDGES = tuple(10.0**-exponent for exponent in range(9))
# Of the error of the mean alone: above this nothing is gained that noise could not give.
_WORTHWHILE = 0.9
# Errors are estimated over so many random mixtures of the pruned neurons.
_MIXTURES = 32
_FEWEST_SAMPLES = 16


@dataclass(frozen=True)
class Reconstruction:
    """A = left @ right, (P, K).

    Attributes:
        left: (P, S) float64.
        right: (S, K) float64, its rows no longer than 1, so that both can be multiplied in float32.
        error: leave-one-out squared error of what the pruned neurons add to the next layer, relative to that of their
            mean (of nothing, where the next layer cannot take up a constant).
    """

    left: Tensor
    right: Tensor
    error: float


def reconstruct(
    samples: Tensor, keep: Tensor, pruned: Tensor, outgoing: Tensor, *, constant: bool = True, padded: bool = False
) -> Reconstruction | None:
    """How the pruned neurons follow from the others; None where their mean does as well.

    Args:
        samples: (S, H), values of the layer's neurons.
        keep: (K,) int64, neurons that stay.
        pruned: (P,) int64, neurons that go.
        outgoing: (H,) float64, ‖W2[:,j]‖₂: the errors of each neuron weigh as much.
        constant: whether the next layer can take up a constant. Where not, the neurons that stay must make up for the
            mean as well: h_p ≈ A h_k.
        padded: whether the next layer reads zeros beyond a border, which a constant would not know of; then it is also
            h_p ≈ A h_k, and the constant what that leaves on average.
    """
    if not len(pruned) or len(samples) < _FEWEST_SAMPLES or not bool(samples.isfinite().all()):
        return None
    values = samples.double()
    centred = values - values.mean(0)
    fitted = centred if constant and not padded else values
    kept, gone = fitted[:, keep], fitted[:, pruned]
    eigenvalues, vectors = torch.linalg.eigh(kept @ kept.T)
    eigenvalues = eigenvalues.clamp(min=0)
    highest = float(eigenvalues[-1])
    if highest == 0:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    mixtures = torch.randn(len(pruned), _MIXTURES, generator=generator, dtype=torch.float64, device="cpu")
    weighted = outgoing[pruned, None] * mixtures
    without = (centred[:, pruned] * (len(samples) / (len(samples) - 1)) if constant else gone) @ weighted
    of_mean = float(without.square().sum())
    target = gone @ weighted
    share = 1 / len(samples) if fitted is centred else 0.0  # of each sample in the mean
    errors = [_left_out_error(target, eigenvalues, vectors, ridge * highest, share) for ridge in RIDGES]
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    if not errors[best] < _WORTHWHILE * of_mean:
        return None
    whitened = vectors / (eigenvalues + RIDGES[best] * highest).sqrt()
    return Reconstruction(gone.T @ whitened, whitened.T @ kept, errors[best] / of_mean)


def _left_out_error(target: Tensor, eigenvalues: Tensor, vectors: Tensor, ridge: float, share: float) -> float:
    """Squared error of the regression of each sample from all others (Allen's PRESS), without refitting."""
    shrunk = eigenvalues / (eigenvalues + ridge)
    fitted = vectors @ (shrunk[:, None] * (vectors.T @ target))
    leverage = vectors.square() @ shrunk + share
    return float(((target - fitted) / (1 - leverage).clamp(min=1e-9)[:, None]).square().sum())
