"""The native operations in plain PyTorch: what they are tested against, and what runs where there is no kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kddp_ext.ops import divergences
from kddp_ext.ops.divergences import standardized


def kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor],
    *,
    temperature: float,
    alpha: float,
    l1_weights: Sequence[float],
    samples: Sequence[float],
    label_smoothing: float,
    ignore_index: int,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    dkd_target_weight: float = 1.0,
    dkd_non_target_weight: float = 8.0,
    standardize_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """`kddp_ext.fused_kd_l1_loss` in plain PyTorch, differentiable by autograd.

    Arguments are those of the fused loss, already validated: activations are matrices, with a weight each and a number
    of samples that its sum is divided by.

    Returns:
        The loss (0-dim), and (4,) detached: kd, ce, l1, correct. Both are float32, or float64 where an
        input is.
    """
    inputs = [student_logits, *activations] + ([] if teacher_logits is None else [teacher_logits])
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    student = student_logits.to(dtype)
    rows = student.shape[0]
    valid = torch.ones(rows, dtype=torch.bool, device=student.device)
    if labels is not None:
        valid = labels != ignore_index
    count = valid.sum().clamp(min=1)
    student = torch.where(valid[:, None], student, 0)  # whatever an ignored row holds, it has no effect

    kd = ce = l1 = correct = loss = student.new_zeros(())
    if teacher_logits is not None:
        teacher = torch.where(valid[:, None], teacher_logits.detach().to(dtype), 0)
        sides = [standardized(x) if standardize_logits else x for x in (teacher, student)]
        p, q = (x / temperature for x in sides)
        if divergence == "forward_kl":
            of_rows = divergences.forward_kl(p, q)
        elif divergence == "reverse_kl":
            of_rows = divergences.reverse_kl(p, q)
        elif divergence == "jsd":
            of_rows = divergences.jensen_shannon(p, q, jsd_beta)
        else:
            assert labels is not None
            target = torch.where(valid, labels, 0)
            of_rows = divergences.decoupled_kl(p, q, target, dkd_target_weight, dkd_non_target_weight)
        kd = temperature**2 * torch.where(valid, of_rows, 0).sum() / count
    if labels is not None:
        ce = F.cross_entropy(
            student, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
        )
        ce = ce / count
        correct = ((student.detach().argmax(1) == labels) & valid).sum().to(dtype)
    # A term of weight 0 is left out, for an infinite one would turn the sum to NaN.
    if alpha != 0:
        loss = loss + alpha * kd
    if alpha != 1:
        loss = loss + (1 - alpha) * ce
    for activation, weight, count_of_neuron in zip(activations, l1_weights, samples, strict=True):
        penalty = activation.to(dtype).abs().sum() / count_of_neuron
        l1 = l1 + penalty
        if weight != 0:
            loss = loss + weight * penalty
    return loss, torch.stack([kd, ce, l1, correct]).detach()


def neuron_statistics(activation: Tensor) -> Tensor:
    """Sums over the samples of `activation`, (N, H): (5, H) float64, rows as `statistics.STATISTICS` names them."""
    a = activation.detach().to(torch.float64)
    magnitude = a.abs()
    highest = magnitude.amax(0) if len(a) else a.new_zeros(a.shape[1])
    return torch.stack([magnitude.sum(0), a.sum(0), a.square().sum(0), (a != 0).sum(0).to(a), highest])


def gather_slices(
    tensors: Sequence[Tensor],
    keep_rows: Tensor | None,
    keep_columns: Tensor | None,
    *,
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


def sliced_shape(tensor: Tensor, rows: int, columns: int, kept_rows: int, kept_columns: int) -> tuple[int, ...]:
    """Shape of `tensor`, seen as (rows, columns, inner), after rows and columns have been taken from it.

    The columns of a matrix behind a flatten are blocks of its second dimension, so that dimension shrinks in
    proportion.
    """
    if tensor.dim() <= 1:
        return (tensor.numel() // (rows * columns) * kept_rows * kept_columns,)
    return (kept_rows, tensor.shape[1] // columns * kept_columns, *tensor.shape[2:])
