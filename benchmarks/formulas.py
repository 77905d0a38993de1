"""The loss in PyTorch's own functions, written so that torch.compile handles it well."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE, ALPHA, L1_WEIGHT = 4.0, 0.9, 1e-4
JSD_BETA = 0.3  # the teacher's share of the mixture; with 0.5 the two could be swapped unnoticed
SKEW = 0.1
DKD_TARGET_WEIGHT, DKD_NON_TARGET_WEIGHT = 1.0, 8.0

# The distillation term for student logits / T, teacher logits / T and labels, averaged over the rows.
Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]


def loss(
    divergence: Divergence, student: Tensor, teacher: Tensor, labels: Tensor, activations: Sequence[Tensor]
) -> Tensor:
    """alpha · T² · divergence + (1 - alpha) · CE + l1_weight · Σ|a| / N."""
    value = ALPHA * TEMPERATURE**2 * divergence(student / TEMPERATURE, teacher / TEMPERATURE, labels)
    value = value + (1 - ALPHA) * F.cross_entropy(student, labels)
    for activation in activations:
        value = value + L1_WEIGHT * activation.abs().sum() / activation.shape[0]
    return value


def forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher ‖ student): Hinton, Vinyals and Dean 2015, arXiv:1503.02531."""
    return F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="batchmean")


def forward_kl_of_tokens(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher ‖ student), averaged over the rows that are not padding."""
    of_rows = F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="none").sum(dim=1)
    mask = labels != -100
    return (of_rows * mask).sum() / mask.sum()


def reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(student ‖ teacher): Gu et al. 2024, arXiv:2306.08543."""
    log_q, log_p = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    return (log_q.exp() * (log_q - log_p)).sum(dim=1).mean()


def jsd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """β KL(teacher ‖ m) + (1 - β) KL(student ‖ m), m = β p + (1 - β) q: Agarwal et al. 2024, arXiv:2306.13649."""
    log_q, log_p = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    log_m = (
        JSD_BETA * log_p.exp() + (1 - JSD_BETA) * log_q.exp()
    ).log()  # with logaddexp torch.compile's code is three times slower
    of_teacher = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    of_student = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return JSD_BETA * of_teacher + (1 - JSD_BETA) * of_student


def skew_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher ‖ λ teacher + (1 - λ) student): Ko et al. 2024, arXiv:2402.03898."""
    q, p = F.softmax(student, dim=1), F.softmax(teacher, dim=1)
    return F.kl_div((SKEW * p + (1 - SKEW) * q).log(), p, reduction="batchmean")


def symmetric_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The mean of KL(teacher ‖ student) and KL(student ‖ teacher)."""
    log_q, log_p = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=1).mean() / 2


def dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Separate terms for target and other classes: Zhao et al. 2022, arXiv:2203.08679."""
    label = labels[:, None]
    q, p = (F.softmax(logits, dim=1).gather(1, label) for logits in (student, teacher))
    binary_q, binary_p = torch.cat([q, 1 - q], 1), torch.cat([p, 1 - p], 1)
    of_target = F.kl_div(binary_q.log(), binary_p, reduction="batchmean")
    # As in the paper's code: subtract so much that the target's probability is 0.
    target = torch.zeros_like(student).scatter(1, label, 1000.0)
    of_others = F.kl_div(
        F.log_softmax(student - target, dim=1), F.softmax(teacher - target, dim=1), reduction="batchmean"
    )
    return DKD_TARGET_WEIGHT * of_target + DKD_NON_TARGET_WEIGHT * of_others


def standardized_forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher ‖ student) of standardised logits: Sun et al. 2024, arXiv:2403.01427."""
    return forward_kl(_standardized(student), _standardized(teacher), labels)


def _standardized(tempered: Tensor) -> Tensor:
    logits = tempered * TEMPERATURE
    deviation = logits.std(dim=1, keepdim=True)
    return (logits - logits.mean(dim=1, keepdim=True)) / (1e-7 + deviation) / TEMPERATURE
