"""Hypothesis strategies for the inputs of the loss, and the computations that its results are compared with."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kddp_ext

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "dkd", "skew_kl", "skew_reverse_kl", "symmetric_kl")
LAYOUTS = ("contiguous", "transposed", "every other row", "inner columns", "one row expanded")

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
# Each divergence, with and without standardised logits, as arguments of the loss.
each_form = pytest.mark.parametrize(
    "form",
    [{"divergence": divergence, "standardize_logits": flag} for flag in (False, True) for divergence in DIVERGENCES],
    ids=lambda form: form["divergence"] + ", standardized" * form["standardize_logits"],
)


@dataclass
class Case:
    """One call of the loss."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    activations: list[Tensor]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """The loss, its terms, and the gradients for the student's logits and the activations."""

    loss: Tensor
    terms: Tensor
    gradients: list[Tensor]


def with_layout(matrix: Tensor, layout: str) -> Tensor:
    """The same values with other strides; "one row expanded" repeats the first row."""
    rows, columns = matrix.shape
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "every other row":
        return matrix.repeat_interleave(2, 0)[::2]
    if layout == "inner columns":
        return F.pad(matrix, (3, 2))[:, 3 : 3 + columns]
    if layout == "one row expanded":
        return matrix[:1].expand(rows, columns)
    return matrix.contiguous()


@st.composite
def cases(draw, dtypes=tuple(DTYPES), rows=300, classes=2000, largest_logit=1e4, **fixed):
    """Inputs of any shape, layout and magnitude with any settings; `fixed` overrides drawn settings."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, c, h = draw(st.integers(1, rows)), draw(st.integers(1, classes)), draw(st.integers(1, 70))
    student_type, teacher_type = DTYPES[draw(st.sampled_from(dtypes))], DTYPES[draw(st.sampled_from(dtypes))]
    scale = draw(st.sampled_from([0.1, 1.0, 10.0, 100.0, largest_logit]))
    # Some rows have two classes far above the others.
    peak, peaks = draw(st.sampled_from([0.0, 0.0, 10.0, 39.0])), torch.randint(0, c, (n, 2), generator=generator)

    def logits(dtype):
        values = torch.randn(n, c, generator=generator).clamp(-3, 3) * scale / 3
        values = values.scatter_add(1, peaks, torch.full(peaks.shape, peak))
        return with_layout(values.to(dtype), draw(st.sampled_from(LAYOUTS)))

    settings = draw(settings_of_loss()) | fixed
    labels = torch.randint(0, c, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    if settings["divergence"] != "dkd" and draw(st.booleans()):
        sharpness = draw(st.sampled_from([0.0, 1.0, 30.0]))
        probabilities = (sharpness * torch.randn(n, c, generator=generator)).softmax(1)
        labels = with_layout(probabilities.to(DTYPES[draw(st.sampled_from(dtypes))]), draw(st.sampled_from(LAYOUTS)))
    if draw(st.booleans()):
        settings["class_weights"] = torch.rand(c, generator=generator)
    activation = torch.relu(torch.randn(n, h, generator=generator)).to(student_type)
    return Case(
        logits(student_type),
        logits(teacher_type),
        labels,
        [with_layout(activation, draw(st.sampled_from(LAYOUTS)))],
        settings,
    )


@st.composite
def settings_of_loss(draw):
    weights = st.sampled_from([0.0, 1.0, 8.0]) | st.floats(0, 10)
    return {
        "temperature": draw(st.sampled_from([1.0, 2.0, 4.0]) | st.floats(0.5, 20)),
        "alpha": draw(st.sampled_from([0.0, 0.9, 1.0]) | st.floats(0, 1)),
        "l1_weight": draw(st.sampled_from([0.0, 1e-4, 0.1])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "divergence": draw(st.sampled_from(DIVERGENCES)),
        "jsd_beta": draw(st.sampled_from([0.5]) | st.floats(0.01, 0.99)),
        "skew": draw(st.sampled_from([0.1]) | st.floats(0.01, 0.99)),
        "dkd_target_weight": draw(weights),
        "dkd_non_target_weight": draw(weights),
        "standardize_logits": draw(st.booleans()),
    }


def evaluate(case: Case, function, dtype: torch.dtype | None = None) -> Result:
    """The loss and gradients of `function`, with every input converted to `dtype` if one is given."""

    def leaf(x: Tensor) -> Tensor:
        return (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_()  # keeps the strides

    student, activations = leaf(case.student), [leaf(a) for a in case.activations]
    teacher = case.teacher if dtype is None else case.teacher.to(dtype)
    loss, terms = function(student, teacher, case.labels, activations, **case.settings)
    inputs = [student, *activations]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    return Result(loss.detach(), torch.stack(list(terms)).detach(), filled)


fused = functools.partial(kddp_ext.fused_kd_l1_loss, return_terms=True, backend="native")
reference = functools.partial(kddp_ext.fused_kd_l1_loss, return_terms=True, backend="reference")


def loss_and_gradient(student, teacher, labels, activations=(), **settings):
    """The loss and its gradient for the student's logits."""
    leaf = student.detach().clone().requires_grad_()
    loss = kddp_ext.fused_kd_l1_loss(leaf, teacher, labels, activations, **settings)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def classes_of(case: Case) -> Tensor:
    """(N,) classes: the labels, or the most probable ones; -100 for ignored rows."""
    return case.labels.argmax(1) if case.labels.is_floating_point() else case.labels


def composite(student, teacher, labels, activations, *, temperature, alpha, l1_weight, label_smoothing, **settings):
    """The loss written with PyTorch's functions, each in the dtype of its input."""
    soft, class_weights = labels.is_floating_point(), settings.pop("class_weights", None)
    targets, labels = (labels.to(student.dtype), labels.argmax(1)) if soft else (labels, labels)
    valid = labels != -100
    count = valid.sum().clamp(min=1)
    sides = [student, teacher.to(student.dtype)]
    if settings.pop("standardize_logits", False):
        correction = min(1, student.shape[1] - 1)  # the sample deviation of a single class is undefined
        sides = [(x - x.mean(1, keepdim=True)) / (x.std(1, correction=correction, keepdim=True) + 1e-7) for x in sides]
    tempered = [x / temperature for x in sides]
    divergence = divergence_of_rows(*tempered, labels.clamp(min=0), **settings)
    kd = temperature**2 * divergence[valid].sum() / count
    weights = None if class_weights is None else class_weights.to(student.dtype)
    ce = F.cross_entropy(student, targets, weights, label_smoothing=label_smoothing, reduction="sum")
    ce = ce / (count if soft or weights is None or not valid.any() else weights[labels[valid]].sum())
    l1 = sum(a.abs().sum() / a.shape[0] for a in activations)
    correct = ((student.argmax(1) == labels) & valid).sum()
    loss = alpha * kd + (1 - alpha) * ce + l1_weight * l1
    return loss, (kd, ce, l1, correct.to(loss.dtype))


def divergence_of_rows(
    student,
    teacher,
    labels,
    divergence="forward_kl",
    jsd_beta=0.5,
    skew=0.1,
    dkd_target_weight=1.0,
    dkd_non_target_weight=8.0,
):
    """The divergence of each row of tempered logits, by PyTorch's `kl_div`."""
    log_q, log_p = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    if divergence == "forward_kl":
        return kl(log_p, log_q)
    if divergence == "reverse_kl":
        return kl(log_q, log_p)
    if divergence == "jsd":
        log_m = mixed(log_p, log_q, jsd_beta)
        return jsd_beta * kl(log_p, log_m) + (1 - jsd_beta) * kl(log_q, log_m)
    if divergence == "skew_kl":
        return kl(log_p, mixed(log_p, log_q, skew))
    if divergence == "skew_reverse_kl":
        return kl(log_q, mixed(log_q, log_p, skew))
    if divergence == "symmetric_kl":
        return (kl(log_p, log_q) + kl(log_q, log_p)) / 2
    target = F.one_hot(labels, student.shape[1]).bool()
    binary = [torch.stack([x[target], x.masked_fill(target, -torch.inf).logsumexp(1)], 1) for x in (log_p, log_q)]
    others = [x[~target].view(len(x), x.shape[1] - 1).log_softmax(1) for x in (teacher, student)]
    return dkd_target_weight * kl(*binary) + dkd_non_target_weight * kl(*others)


def mixed(log_x, log_y, share):
    """The logarithm of share · x + (1 - share) · y."""
    return torch.stack([log_x + math.log(share), log_y + math.log1p(-share)]).logsumexp(0)


def kl(log_x, log_y):
    return F.kl_div(log_y, log_x, reduction="none", log_target=True).sum(1)


def reverse_source(log_q: Tensor, log_p: Tensor) -> Tensor:
    """The scale of the rounding errors in each row of the reverse gradient q (log(q / p) - D).

    For a class with q near 1, D and log(q / p) nearly cancel: only the contribution of the other classes remains.
    """
    q = log_q.exp()
    distance = torch.where(q == 0, 0, log_p.abs())
    others = (q * distance).sum(1, keepdim=True) - q * distance
    remainder = q * ((1 - q) * distance + others)
    return (remainder + torch.minimum(q * distance, remainder / torch.finfo(torch.float32).eps)).amax(1)


def largest_error(value: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; equal infinities have difference 0."""
    value, truth = value.to(torch.float64), truth.to(torch.float64)
    return float(torch.where(value == truth, 0, value - truth).abs().amax()) if value.numel() else 0.0
