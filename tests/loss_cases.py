"""Drawn inputs of the loss, and what its results are held against."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor

import kddp_ext

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("contiguous", "transposed", "every other row", "inner columns", "one row for all")


@dataclass
class Case:
    """One call of the loss."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    activations: list[Tensor]
    settings: dict[str, float] = field(default_factory=dict)


@dataclass
class Result:
    """Loss, its terms, and the gradients with respect to the student's logits and the activations."""

    loss: Tensor
    terms: Tensor
    gradients: list[Tensor]


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """The same numbers (of the first row, for "one row for all") with other strides."""
    rows, columns = matrix.shape
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "every other row":
        return matrix.repeat_interleave(2, 0)[::2]
    if layout == "inner columns":
        return F.pad(matrix, (3, 2))[:, 3 : 3 + columns]
    if layout == "one row for all":
        return matrix[:1].expand(rows, columns)
    return matrix.contiguous()


@st.composite
def cases(draw, dtypes=tuple(DTYPES), rows=300, classes=2000, largest_logit=1e4):
    """Inputs of any shape, layout, magnitude and setting."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, c, h = draw(st.integers(1, rows)), draw(st.integers(1, classes)), draw(st.integers(1, 70))
    student_type, teacher_type = DTYPES[draw(st.sampled_from(dtypes))], DTYPES[draw(st.sampled_from(dtypes))]
    scale = draw(st.sampled_from([0.1, 1.0, 10.0, 100.0, largest_logit]))

    def logits(dtype):
        values = torch.randn(n, c, generator=generator).clamp(-3, 3) * scale / 3
        return laid_out(values.to(dtype), draw(st.sampled_from(LAYOUTS)))

    labels = torch.randint(0, c, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    activation = torch.relu(torch.randn(n, h, generator=generator)).to(student_type)
    return Case(
        logits(student_type),
        logits(teacher_type),
        labels,
        [laid_out(activation, draw(st.sampled_from(LAYOUTS)))],
        {
            "temperature": draw(st.sampled_from([1.0, 2.0, 4.0]) | st.floats(0.5, 20)),
            "alpha": draw(st.sampled_from([0.0, 0.9, 1.0]) | st.floats(0, 1)),
            "l1_weight": draw(st.sampled_from([0.0, 1e-4, 0.1])),
            "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        },
    )


def evaluate(case: Case, function, dtype: torch.dtype | None = None) -> Result:
    """Loss and gradients of `function`, after converting every input to `dtype` where one is given."""

    def leaf(x: Tensor) -> Tensor:
        # A view of the same layout: converting or detaching a leaf must not hide its strides from the loss.
        return (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_()

    student, activations = leaf(case.student), [leaf(a) for a in case.activations]
    teacher = case.teacher if dtype is None else case.teacher.to(dtype)
    loss, terms = function(student, teacher, case.labels, activations, **case.settings)
    inputs = [student, *activations]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    return Result(loss.detach(), torch.stack(list(terms)).detach(), filled)


def fused(student, teacher, labels, activations, **settings):
    return kddp_ext.fused_kd_l1_loss(
        student, teacher, labels, activations, return_terms=True, backend="native", **settings
    )


def reference(student, teacher, labels, activations, **settings):
    return kddp_ext.fused_kd_l1_loss(
        student, teacher, labels, activations, return_terms=True, backend="reference", **settings
    )


def composite(student, teacher, labels, activations, *, temperature, alpha, l1_weight, label_smoothing):
    """What one writes with PyTorch's own functions, each in the dtype of its input."""
    valid = labels != -100
    count = valid.sum().clamp(min=1)
    log_q, log_p = F.log_softmax(student / temperature, 1), F.log_softmax(teacher.to(student.dtype) / temperature, 1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    kd = temperature**2 * divergence[valid].sum() / count
    ce = F.cross_entropy(student, labels, label_smoothing=label_smoothing, reduction="sum") / count
    l1 = sum(a.abs().sum() / a.shape[0] for a in activations)
    correct = ((student.argmax(1) == labels) & valid).sum()
    loss = alpha * kd + (1 - alpha) * ce + l1_weight * l1
    return loss, (kd, ce, l1, correct.to(loss.dtype))


def largest_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; equal infinities differ by nothing."""
    value, truth = value.to(torch.float64), truth.to(torch.float64)
    return float(torch.where(value == truth, 0, value - truth).abs().amax()) if value.numel() else 0.0
