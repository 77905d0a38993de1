"""The divergences to distil with, row by row, in plain PyTorch: what the native loss is tested against.

Each takes tempered logits, the teacher's first, (N, C) of one dtype, and returns (N,). With p the teacher's softmax and
q the student's, a class of which the weighting distribution has nothing (p or q is 0) contributes 0, whatever its
logarithm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order of csrc/include/kddp/kd_l1_loss.h.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "dkd")


def standardized(logits: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-7) of each row; 0 where all its logits are equal. Sun et al. 2024 (arXiv:2403.01427)."""
    centered = logits - logits.mean(1, keepdim=True)
    squares = centered.square().sum(1, keepdim=True)
    spread = squares != 0  # the root of 0 has no derivative
    deviation = torch.where(spread, torch.where(spread, squares, 1) / max(logits.shape[1] - 1, 1), 0)
    deviation = torch.where(spread, torch.where(spread, deviation, 1).sqrt(), 0)
    return centered / (deviation + 1e-7)


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p ‖ q). Hinton, Vinyals and Dean 2015 (arXiv:1503.02531)."""
    return _kl(F.log_softmax(teacher, 1), F.log_softmax(student, 1))


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(q ‖ p). Gu et al. 2024 (arXiv:2306.08543)."""
    return _kl(F.log_softmax(student, 1), F.log_softmax(teacher, 1))


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q. Agarwal et al. 2024 (arXiv:2306.13649)."""
    log_p, log_q = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
    mixture = beta * log_p.exp() + (1 - beta) * log_q.exp()
    log_m = torch.where(mixture == 0, 0, torch.where(mixture == 0, 1, mixture).log())
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def decoupled_kl(
    teacher: Tensor, student: Tensor, labels: Tensor, target_weight: float, non_target_weight: float
) -> Tensor:
    """target_weight · KL((p_y, 1 - p_y) ‖ (q_y, 1 - q_y)) + non_target_weight · KL over the other classes.

    Zhao et al. 2022 (arXiv:2203.08679). 0 where there is no other class, or all others are excluded on both sides.
    """
    target = F.one_hot(labels, teacher.shape[1]).bool()
    others = [torch.where(target, -torch.inf, x) for x in (teacher, student)]
    alone = torch.stack([x.amax(1) == -torch.inf for x in others]).all(0)
    others = [torch.where(alone[:, None], 0, x) for x in others]
    binary = []
    for logits, rest in zip((teacher, student), others, strict=True):
        at_label = logits.gather(1, labels[:, None])[:, 0]
        margin = torch.where(alone, 0, at_label - torch.logsumexp(rest, 1))
        binary.append(torch.stack([F.logsigmoid(margin), F.logsigmoid(-margin)], 1))
    of_rows = target_weight * _kl(*binary) + non_target_weight * forward_kl(*others)
    return torch.where(alone, 0, of_rows)


def _kl(log_x: Tensor, log_y: Tensor) -> Tensor:
    """Σ x (log x - log y), where x = 0 contributes 0, to the derivative as well."""
    x = log_x.exp()
    nothing = x == 0
    ratio = torch.where(nothing, 0, log_x) - torch.where(nothing, 0, log_y)
    return torch.where(nothing, 0, x * ratio).sum(1)
