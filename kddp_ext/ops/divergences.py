"""The divergences to distil with, row by row, in plain PyTorch: what the native loss is tested against.

Each takes tempered logits, the teacher's first, (N, C) of one dtype, and returns (N,). With p the teacher's softmax and
q the student's, a class of which the weighting distribution has nothing (p or q is 0) contributes 0, whatever its
logarithm. Autograd gives numbers wherever the logits have a softmax. docs/losses.md has the formulas and their limits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order of csrc/include/kddp/kd_l1_loss.h.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "dkd")

_EPSILON = 1e-7  # Sun et al.'s


def standardized(logits: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-7) of each row, std divided by C - 1. Sun et al. 2024 (arXiv:2403.01427).

    0 where all logits of a row are equal; the derivative of std is 0 there, as in PyTorch.
    """
    # Shifted and scaled into [-1, 0], which changes nothing but keeps equal logits equal and squares from overflowing.
    highest, lowest = (f(logits.detach(), 1, keepdim=True) for f in (torch.amax, torch.amin))
    scale = torch.where(highest == lowest, 1, highest - lowest)
    scaled = (logits - highest) / scale
    centered = scaled - scaled.mean(1, keepdim=True)
    variance = centered.square().sum(1, keepdim=True) / max(logits.shape[1] - 1, 1)
    constant = variance == 0  # the root of 0 has no derivative
    deviation = torch.where(constant, 0, torch.where(constant, 1, variance).sqrt())
    return centered / (deviation + _EPSILON / scale)


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p ‖ q). Hinton, Vinyals and Dean 2015 (arXiv:1503.02531)."""
    return _kl(F.log_softmax(teacher, 1), F.log_softmax(student, 1))


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(q ‖ p). Gu et al. 2024 (arXiv:2306.08543).

    Infinite where the teacher alone excludes a class. No gradient exists there; it is 0.
    """
    log_p, log_q = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
    excluded = (log_p == -torch.inf) & (log_q.exp() > 0)
    divergence = _kl(log_q, torch.where(excluded, 0, log_p))
    return torch.where(excluded.any(1), torch.inf, divergence)


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q. Agarwal et al. 2024 (arXiv:2306.13649)."""
    log_p, log_q = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
    mixture = beta * log_p.exp() + (1 - beta) * log_q.exp()
    log_m = torch.where(mixture == 0, 1, mixture).log()
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def decoupled_kl(
    teacher: Tensor, student: Tensor, labels: Tensor, target_weight: float, non_target_weight: float
) -> Tensor:
    """target_weight · KL((p_y, 1 - p_y) ‖ (q_y, 1 - q_y)) + non_target_weight · KL over the other classes.

    Zhao et al. 2022 (arXiv:2203.08679). 0 where there is no other class, or all others are excluded on both sides. A
    part of weight 0 is left out, for it may be infinite.
    """
    target = F.one_hot(labels, teacher.shape[1]).bool()
    others = [torch.where(target, -torch.inf, x) for x in (teacher, student)]
    alone = torch.stack([x.amax(1) == -torch.inf for x in others]).all(0)
    others = [torch.where(alone[:, None], 0, x) for x in others]
    divergence = torch.where(torch.zeros_like(alone), student[:, 0], 0)  # 0, but differentiable
    if target_weight != 0:
        divergence = divergence + target_weight * _kl(*map(_binary, (teacher, student), others, (labels, labels)))
    if non_target_weight != 0:
        divergence = divergence + non_target_weight * forward_kl(*others)
    return torch.where(alone, 0, divergence)


def _binary(logits: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """(N, 2): log-probabilities of the label's class and of not being it. `others` are the logits without it."""
    margin = logits.gather(1, labels[:, None]) - torch.logsumexp(others, 1, keepdim=True)
    return torch.cat([F.logsigmoid(margin), F.logsigmoid(-margin)], 1)


def _kl(log_x: Tensor, log_y: Tensor) -> Tensor:
    """Σ x (log x - log y), where x = 0 contributes 0, to the derivative as well."""
    x = log_x.exp()
    nothing = x == 0
    ratio = torch.where(nothing, 0, log_x) - torch.where(nothing, 0, log_y)
    return torch.where(nothing, 0, x * ratio).sum(1)
