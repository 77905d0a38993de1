"""The forms of the cross entropy that the kernels do not have yet, in plain PyTorch.

These are labels that are probabilities, and class weights together with label smoothing. The kernels then compute
everything else, so such a call reads the logits more than once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kddp_ext.loss.settings import LossSettings
from kddp_ext.ops import reference


def add_cross_entropy(
    outputs: tuple[Tensor, Tensor, Tensor],
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor | None,
    scalars: Any,
    settings: LossSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its terms and its terms by row, with a cross entropy that `outputs` do not contain.

    Args:
        outputs: loss, (4,) terms and (2, N) terms by row.
        logits: (N, C).
        labels: (N, C) probabilities or (N,) classes.
        row_weights: (2, N) factors of KD and CE, or None.
        scalars: temperature, alpha, normalizer and so on.
        settings: the other settings.
    """
    loss, terms, rows = outputs
    _, alpha, normalizer, *_ = scalars
    class_weights = None if settings.class_weights is None else settings.class_weights.to(loss.dtype)
    valid = (
        torch.ones_like(labels[:, 0], dtype=torch.bool)
        if labels.is_floating_point()
        else labels != settings.ignore_index
    )
    count = valid.sum().clamp(min=1)
    if row_weights is not None:
        valid = valid & (row_weights[1] != 0)
    student = torch.where(valid[:, None], logits.to(loss.dtype), 0)  # an ignored row has no effect
    targets = labels.to(loss.dtype) if labels.is_floating_point() else labels.masked_fill(~valid, settings.ignore_index)
    options: Any = {"ignore_index": settings.ignore_index, "label_smoothing": settings.label_smoothing}
    ce = F.cross_entropy(student, targets, class_weights, reduction="none", **options)
    ce = torch.where(valid, ce if row_weights is None else row_weights[1].to(ce.dtype) * ce, 0)
    correct = terms[3]
    if labels.is_floating_point():
        correct = ((student.argmax(1) == labels.argmax(1)) & valid).sum().to(terms.dtype)
    by_row = settings.reduction == "none"
    rows = torch.stack([rows[0], ce.detach()]) if by_row else rows
    ce = ce if by_row else ce.sum() / reference.divisor(normalizer, count)
    if isinstance(alpha, Tensor) or alpha != 1:  # a term of weight 0 is left out, because it may be infinite
        loss = loss + (1 - alpha) * ce
    return loss, torch.stack([terms[0], ce.detach().sum(), terms[2], correct]), rows
