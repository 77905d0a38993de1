"""`fisher_loss`: a loss whose gradients measure how much a change of the model changes its distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kddp_ext.loss.settings import check_fraction, check_positive


def fisher_loss(
    logits: Tensor, *, temperature: float = 1.0, alpha: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """A linear function of the logits with random coefficients, for measuring saliency without labels.

    The coefficients v of a row have mean 0 and the covariance

        H = alpha · (diag(q) − q qᵀ) + (1 − alpha) · (diag(p) − p pᵀ)

    with q = softmax(logits / temperature) and p = softmax(logits). H is the second derivative by the logits of the
    distillation loss (`fused_kd_l1_loss`) where the student equals its teacher, and of the cross entropy. So for a
    change Δ of a row's logits the expected square of v · Δ is Δᵀ H Δ, which is twice the increase of the loss to second
    order. The gradients of the loss itself are 0 for a student that is a copy of its teacher.

    Args:
        logits: (N, C) floating point.
        temperature: that of the distillation. Default 1.
        alpha: the share of the distillation, from 0 to 1. Default 1.
        generator: of the random numbers, on the device of the logits. Default: PyTorch's.

    Returns:
        The mean over the rows, 0-dim. Its value means nothing.

    Raises:
        TypeError, ValueError: an argument is not as described.

    For a temperature of 1 it is the Fisher information of the outputs (Martens 2020, arXiv:1412.1193, section 9).
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits: expected (N, C) floating point, got {logits.dtype} of shape {tuple(logits.shape)}")
    check_positive("temperature", temperature)
    check_fraction("alpha", alpha)
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    coefficients = torch.zeros_like(logits)
    for share, divisor in ((alpha, temperature), (1 - alpha, 1.0)):
        probabilities = torch.softmax(logits.detach() / divisor, 1)
        noise = torch.randn(logits.shape, dtype=logits.dtype, device=logits.device, generator=generator)
        weighted = probabilities.sqrt() * noise
        coefficients += math.sqrt(share) * (weighted - probabilities * weighted.sum(1, keepdim=True))
    return (coefficients * logits).sum() / max(len(logits), 1)
