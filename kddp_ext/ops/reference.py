"""The native operations in plain PyTorch: the tests compare with them, and devices without kernels run them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kddp_ext.ops.library import sliced_shape

FORWARD_KL, REVERSE_KL, MIXTURE, DKD, SYMMETRIC_KL = range(5)  # as in csrc/include/kddp/kd_l1_loss.h
_EPSILON = 1e-7  # added to the standard deviation, as Sun et al. do


def kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    class_weights: Tensor | None,
    row_weights: Tensor | None,
    activations: Sequence[Tensor],
    scalars: Sequence[float | Tensor] | Tensor,
    samples: Sequence[int],
    label_smoothing: float,
    ignore_index: int,
    divergence: int,
    mixture_share: float,
    teacher_weight: float,
    student_weight: float,
    dkd_target_weight: float,
    dkd_non_target_weight: float,
    standardize_logits: bool,
    by_row: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kddp_ext.fused_kd_l1_loss` in plain PyTorch, differentiable by autograd.

    The arguments are those of the operator `kddp::kd_l1_loss` and must be valid: each activation is a matrix with a
    weight and a number of samples by which its sum is divided. `scalars` may also be a sequence.

    Returns:
        The loss, 0-dim or (N,) if `by_row`; without gradient (4,) kd, ce, l1, correct, and (2, N) kd and ce of each row
        before the division. All are float32, or float64 if an input is.
    """
    temperature, alpha, normalizer, *l1_weights = scalars
    inputs = [student_logits, *activations] + ([] if teacher_logits is None else [teacher_logits])
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    student = student_logits.to(dtype)
    valid = torch.ones(student.shape[0], dtype=torch.bool, device=student.device)
    soft = labels is not None and labels.is_floating_point()
    if labels is not None and not soft:
        valid = labels != ignore_index
    count = valid.sum().clamp(min=1)
    if row_weights is not None:
        valid = valid & (row_weights != 0).any(0)
    student = torch.where(valid[:, None], student, 0)  # an ignored row has no effect, whatever it contains

    kd = ce = student.new_zeros(student.shape[0])
    correct = student.new_zeros(())
    if teacher_logits is not None:
        teacher = torch.where(valid[:, None], teacher_logits.detach().to(dtype), 0)
        p, q = ((standardized(x) if standardize_logits else x) / temperature for x in (teacher, student))
        if divergence == FORWARD_KL:
            kd = forward_kl(p, q)
        elif divergence == REVERSE_KL:
            kd = reverse_kl(p, q)
        elif divergence == MIXTURE:
            kd = mixture_kl(p, q, mixture_share, teacher_weight, student_weight)
        elif divergence == SYMMETRIC_KL:
            kd = (forward_kl(p, q) + reverse_kl(p, q)) / 2
        else:
            assert labels is not None
            kd = decoupled_kl(p, q, torch.where(valid, labels, 0), dkd_target_weight, dkd_non_target_weight)
        kd = temperature**2 * torch.where(valid, kd, 0)
    if labels is not None:
        options: Any = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
        weights = None if class_weights is None else class_weights.to(dtype)
        targets = torch.where(valid[:, None], labels.to(dtype), 0) if soft else torch.where(valid, labels, ignore_index)
        ce = F.cross_entropy(student, targets, weights, **options)
        predicted = labels.detach().argmax(1) if soft else labels
        correct = ((student.detach().argmax(1) == predicted) & valid).sum().to(dtype)
    if row_weights is not None:
        kd, ce = torch.where(row_weights == 0, 0, row_weights * torch.stack([kd, ce])).to(dtype)
    rows = torch.stack([kd, ce]).detach()
    if not by_row:
        count = divisor(normalizer, count)
        kd, ce = kd.sum() / count, ce.sum() / count
    # A term of weight 0 is left out, because an infinite one would turn the sum into NaN.
    loss = torch.zeros_like(kd)
    if isinstance(alpha, Tensor) or alpha != 0:
        loss = loss + alpha * kd
    if isinstance(alpha, Tensor) or alpha != 1:
        loss = loss + (1 - alpha) * ce
    l1 = student.new_zeros(())
    for activation, weight, of_layer in zip(activations, l1_weights, samples, strict=True):
        penalty = activation.to(dtype).abs().sum() / penalty_divisor(of_layer, student.shape[0], normalizer)
        l1 = l1 + penalty
        if isinstance(weight, Tensor) or weight != 0:
            loss = loss + weight * penalty
    return loss, torch.stack([kd.sum(), ce.sum(), l1, correct]).detach(), rows


def divisor(normalizer: Any, rows: Any) -> Any:
    """`normalizer`, or `rows` if it is 0, which a tensor may be as well."""
    if isinstance(normalizer, Tensor):
        return torch.where(normalizer == 0, rows * torch.ones_like(normalizer), normalizer)
    return normalizer if normalizer != 0 else rows


def penalty_divisor(samples: int, rows: int, normalizer: Any) -> Any:
    """What the sum of an activation is divided by: the samples, or the normalizer times the samples of a row."""
    if not isinstance(normalizer, Tensor) and normalizer == 0:
        return max(samples, 1)
    return divisor(normalizer, max(rows, 1)) * max(samples, 1) / max(rows, 1)


# The divergences take logits that are divided by the temperature, (N, C), the teacher's first, and return (N,). With p
# the teacher's softmax and q the student's, a class whose probability is 0 in the weighting distribution contributes 0,
# whatever its logarithm. Gradients are finite wherever the softmax exists. docs/losses.md has the formulas.


def standardized(logits: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-7) of each row, with std divided by C - 1. Sun et al. 2024 (arXiv:2403.01427).

    The result is 0 if all logits of a row are equal; the derivative of std is 0 there, as in PyTorch.
    """
    # Shifting and scaling into [-1, 0] does not change the result. It keeps equal logits equal and squares finite.
    highest, lowest = (f(logits.detach(), 1, keepdim=True) for f in (torch.amax, torch.amin))
    scale = torch.where(highest == lowest, 1, highest - lowest)
    scaled = (logits - highest) / scale
    centered = scaled - scaled.mean(1, keepdim=True)
    variance = centered.square().sum(1, keepdim=True) / max(logits.shape[1] - 1, 1)
    constant = variance == 0  # the square root has no derivative at 0
    deviation = torch.where(constant, 0, torch.where(constant, 1, variance).sqrt())
    return centered / (deviation + _EPSILON / scale)


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p ‖ q). Hinton, Vinyals and Dean 2015 (arXiv:1503.02531)."""
    return _kl(F.log_softmax(teacher, 1), F.log_softmax(student, 1))


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(q ‖ p). Gu et al. 2024 (arXiv:2306.08543).

    It is infinite if only the teacher excludes a class. No gradient exists there; this returns 0 as the gradient.
    """
    log_p, log_q = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
    excluded = (log_p == -torch.inf) & (log_q.exp() > 0)
    divergence = _kl(log_q, torch.where(excluded, 0, log_p))
    return torch.where(excluded.any(1), torch.inf, divergence)


def mixture_kl(teacher: Tensor, student: Tensor, share: float, teacher_weight: float, student_weight: float) -> Tensor:
    """teacher_weight · KL(p ‖ m) + student_weight · KL(q ‖ m) with m = share · p + (1 - share) · q.

    Agarwal et al. 2024 (arXiv:2306.13649), with all three equal to β or 1 - β; Ko et al. 2024 (arXiv:2402.03898), with
    one of the two KLs.
    """
    log_p, log_q = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
    mixture = share * log_p.exp() + (1 - share) * log_q.exp()
    log_m = torch.where(mixture == 0, 1, mixture).log()
    return teacher_weight * _kl(log_p, log_m) + student_weight * _kl(log_q, log_m)


def decoupled_kl(
    teacher: Tensor, student: Tensor, labels: Tensor, target_weight: float, non_target_weight: float
) -> Tensor:
    """target_weight · KL((p_y, 1 - p_y) ‖ (q_y, 1 - q_y)) + non_target_weight · KL over the other classes.

    Zhao et al. 2022 (arXiv:2203.08679). The result is 0 if there is no other class, or if both sides exclude all other
    classes. A part of weight 0 is left out, because it may be infinite.
    """
    target = F.one_hot(labels, teacher.shape[1]).bool()
    others = [torch.where(target, -torch.inf, x) for x in (teacher, student)]
    no_others = torch.stack([x.amax(1) == -torch.inf for x in others]).all(0)
    others = [torch.where(no_others[:, None], 0, x) for x in others]
    divergence = torch.where(torch.zeros_like(no_others), student[:, 0], 0)  # 0, but differentiable
    if target_weight != 0:
        divergence = divergence + target_weight * _kl(*map(_binary, (teacher, student), others, (labels, labels)))
    if non_target_weight != 0:
        divergence = divergence + non_target_weight * forward_kl(*others)
    return torch.where(no_others, 0, divergence)


def _binary(logits: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """(N, 2) log-probabilities of the label's class and of all others. `others` are the logits without the label's."""
    margin = logits.gather(1, labels[:, None]) - torch.logsumexp(others, 1, keepdim=True)
    return torch.cat([F.logsigmoid(margin), F.logsigmoid(-margin)], 1)


def _kl(log_x: Tensor, log_y: Tensor) -> Tensor:
    """Σ x (log x - log y), where x = 0 contributes 0, also to the derivative."""
    x = log_x.exp()
    is_zero = x == 0
    ratio = torch.where(is_zero, 0, log_x) - torch.where(is_zero, 0, log_y)
    return torch.where(is_zero, 0, x * ratio).sum(1)


def neuron_statistics(activation: Tensor) -> Tensor:
    """Sums over the samples of `activation`, (N, H): (5, H) float64, rows as `STATISTICS` names them."""
    a = activation.detach().to(torch.float64)
    magnitude = a.abs()
    highest = magnitude.amax(0) if len(a) else a.new_zeros(a.shape[1])
    return torch.stack([magnitude.sum(0), a.sum(0), a.square().sum(0), (a != 0).sum(0).to(a), highest])


def gather_slices(
    tensors: Sequence[Tensor],
    keep_rows: Tensor | None,
    keep_columns: Tensor | None,
    rows: int,
    columns: int,
    pruned_columns: Tensor | None = None,
    pruned_means: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """`kddp_ext.ops.gather_slices` in plain PyTorch."""
    gathered = []
    blocks = [tensor.detach().reshape(rows, columns, -1) for tensor in tensors]
    for tensor, block in zip(tensors, blocks, strict=True):
        part = block if keep_rows is None else block.index_select(0, keep_rows)
        part = part if keep_columns is None else part.index_select(1, keep_columns)
        gathered.append(part.clone().reshape(sliced_shape(tensor, rows, columns, part.shape[0], part.shape[1])))
    device = tensors[0].device if tensors else "cpu"
    shift = torch.zeros(rows if keep_rows is None else keep_rows.numel(), dtype=torch.float64, device=device)
    if pruned_columns is not None and pruned_means is not None:
        block = blocks[0] if keep_rows is None else blocks[0].index_select(0, keep_rows)
        shift = block.index_select(1, pruned_columns).to(torch.float64).sum(2) @ pruned_means
    return gathered, shift


def gradient_products(
    activation: Tensor, gradient: Tensor, mean: Tensor | None = None, *, axis: int, samples: int
) -> Tensor:
    """`kddp_ext.ops.gradient_products` in plain PyTorch."""
    dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    entries, after = activation.shape[axis], math.prod(activation.shape[axis + 1 :])
    before = math.prod(activation.shape[:axis]) // max(samples, 1)
    values = activation.to(dtype).reshape(samples, before, entries, after)
    if mean is not None:
        values = values - mean.to(dtype)[:, None]
    return (values * gradient.to(dtype).reshape(values.shape)).sum((1, 3))
