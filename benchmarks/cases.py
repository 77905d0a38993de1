"""The losses that are compared, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import kddp_ext
from benchmarks import formulas
from benchmarks.settings import Settings

# Largest relative difference between two correct implementations. It is generous, because eager PyTorch rounds
# intermediate results to the inputs' dtype; a wrong formula differs by more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

# The student's and the teacher's logit of the label in confident rows; those of other classes are normal.
CONFIDENT_LOGITS = (12.0, 15.0)

Loss = Callable[["Inputs"], Tensor]


class Shape(NamedTuple):
    """N rows of C classes, (N, H) activations of one layer (H = 0 for none), and labels.

    Of `labels` with padding, every other one is `ignore_index`. Confident rows have one logit far above all others.
    """

    rows: int
    classes: int
    neurons: int
    dtype: torch.dtype = torch.float32
    labels: Literal["classes", "probabilities", "padding", "confident"] = "classes"

    def __str__(self) -> str:
        activations = f" with {self.rows}×{self.neurons}" if self.neurons else ""
        dtype = "" if self.dtype == torch.float32 else f" {str(self.dtype).removeprefix('torch.')}"
        labels = "" if self.labels == "classes" else f", {self.labels}"
        return f"{self.rows}×{self.classes}{activations}{dtype}{labels}"

    def at(self, settings: Settings) -> Shape:
        """This shape, or a similar tiny one in a smoke run."""
        if not settings.smoke:
            return self
        return self._replace(rows=8, classes=min(self.classes, 100), neurons=min(self.neurons, 16))


class Inputs(NamedTuple):
    """The inputs of a loss. The student's logits and the activations are leaves that require a gradient."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    activations: Sequence[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that get gradients: the student's logits, then the activations."""
        return [self.student, *self.activations]


def make_inputs(shape: Shape, device: str = "cpu") -> Inputs:
    """Standard normal logits, labels, and activations behind a ReLU; the same in every call.

    Classes are uniform; probabilities are the softmax of standard normal numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(columns: int) -> Tensor:
        return torch.randn(shape.rows, columns, generator=generator)

    student, teacher = (normal(shape.classes).to(device, shape.dtype) for _ in range(2))
    labels = torch.randint(0, shape.classes, (shape.rows,), generator=generator).to(device)
    if shape.labels == "padding":
        labels[1::2] = -100
    elif shape.labels == "probabilities":
        labels = normal(shape.classes).softmax(1).to(device, shape.dtype)
    elif shape.labels == "confident":
        for logits, peak in zip((student, teacher), CONFIDENT_LOGITS, strict=True):
            logits.scatter_(1, labels[:, None], peak)
    activations = []
    if shape.neurons:
        activation = torch.relu(normal(shape.neurons))
        activations.append(activation.to(device, shape.dtype).requires_grad_())
    return Inputs(student.requires_grad_(), teacher, labels, activations)


def fused(inputs: Inputs, **settings: Any) -> Tensor:
    """This package's loss."""
    loss: Tensor = kddp_ext.fused_kd_l1_loss(
        *inputs, temperature=formulas.TEMPERATURE, alpha=formulas.ALPHA, l1_weight=formulas.L1_WEIGHT, **settings
    )
    return loss


def contenders(
    inputs: Inputs, settings: Settings, formula: Callable[..., Tensor] = formulas.forward_kl, **keywords: Any
) -> dict[str, Callable[[], None]]:
    """Forward and backward of the loss by implementation, after checking that all implementations agree.

    Args:
        inputs: the inputs of every implementation.
        settings: says whether torch.compile takes part.
        formula: the distillation term in eager PyTorch, from `formulas`.
        keywords: the arguments of `fused_kd_l1_loss` for the same term.
    """
    eager = partial(formulas.loss, formula)
    losses: dict[str, Loss] = {"kddp_ext": lambda i: fused(i, **keywords), "eager": lambda i: eager(*i)}
    if settings.compile:
        torch._dynamo.reset()
        compiled = torch.compile(eager, dynamic=False)
        losses["torch.compile"] = lambda i: compiled(*i)
    require_agreement(losses, inputs)
    return {name: partial(step, loss, inputs) for name, loss in losses.items()}


def step(loss: Loss, inputs: Inputs) -> None:
    """Forward and backward, without gradients of the step before."""
    for leaf in inputs.leaves:
        leaf.grad = None
    loss(inputs).backward()


def require_agreement(losses: Mapping[str, Loss], inputs: Inputs) -> None:
    """Raise a RuntimeError unless all implementations have the value and gradients of the eager one.

    The error is the Euclidean norm of the difference, relative to that of the eager result.
    """
    results = {name: _results(loss, inputs) for name, loss in losses.items()}
    for name, result in results.items():
        for what, tensor, expected in zip(("loss", "logits", "activations"), result, results["eager"], strict=False):
            error = float((tensor - expected).norm() / expected.norm())
            if not error <= TOLERANCE[inputs.student.dtype]:
                raise RuntimeError(f"{name} and eager PyTorch do not compute the same {what}: they differ by {error}")


def _results(loss: Loss, inputs: Inputs) -> list[Tensor]:
    for leaf in inputs.leaves:
        leaf.grad = None
    value = loss(inputs)
    value.backward()
    gradients = [leaf.grad for leaf in inputs.leaves if leaf.grad is not None]
    return [tensor.detach().double().clone() for tensor in (value, *gradients)]
