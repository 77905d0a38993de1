"""Forward and backward of the loss: this package, PyTorch's own functions, and those compiled by torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

import kddp_ext

TEMPERATURE, ALPHA, L1_WEIGHT = 4.0, 0.9, 1e-4


class Shape(NamedTuple):
    rows: int
    classes: int
    neurons: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        activations = f", {self.rows}×{self.neurons}" if self.neurons else ""
        return f"{self.rows}×{self.classes}{activations} {str(self.dtype).removeprefix('torch.')}"


SHAPES = [
    Shape(128, 10, 1024),
    Shape(1024, 100, 512),
    Shape(4096, 1000, 1024),
    Shape(512, 32000, 1024),
    Shape(64, 128256, 0, torch.bfloat16),
]

Loss = Callable[[Tensor, Tensor, Tensor, list[Tensor]], Tensor]


class Row(NamedTuple):
    """Seconds a step (median), and the bytes that a perfect implementation moves."""

    shape: str
    seconds: dict[str, float]
    bytes: int


def fused(student: Tensor, teacher: Tensor, labels: Tensor, activations: list[Tensor]) -> Tensor:
    loss: Tensor = kddp_ext.fused_kd_l1_loss(
        student, teacher, labels, activations, temperature=TEMPERATURE, alpha=ALPHA, l1_weight=L1_WEIGHT
    )
    return loss


def eager(student: Tensor, teacher: Tensor, labels: Tensor, activations: list[Tensor]) -> Tensor:
    """The loss as one writes it with PyTorch's own functions."""
    log_q = F.log_softmax(student / TEMPERATURE, dim=1)
    p = F.softmax(teacher / TEMPERATURE, dim=1)
    loss = ALPHA * TEMPERATURE**2 * F.kl_div(log_q, p, reduction="batchmean")
    loss = loss + (1 - ALPHA) * F.cross_entropy(student, labels)
    for activation in activations:
        loss = loss + L1_WEIGHT * activation.abs().sum() / activation.shape[0]
    return loss


def measure(shapes: list[Shape], threads: int, seconds: float, compiled: bool) -> Iterator[Row]:
    """Medians of all implementations at each shape, measured in turns so that a drift of the machine hits all."""
    for shape in shapes:
        inputs = _inputs(shape)
        losses: dict[str, Loss] = {"kddp_ext": fused, "eager": eager}
        if compiled:
            torch._dynamo.reset()
            losses["torch.compile"] = torch.compile(eager)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            for loss in losses.values():
                _step(loss, inputs)
        samples: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(3):
            for name, loss in losses.items():
                timer = Timer(
                    "step(loss, inputs)", globals={"step": _step, "loss": loss, "inputs": inputs}, num_threads=threads
                )
                samples[name].append(timer.blocked_autorange(min_run_time=seconds / 3).median)
        yield Row(str(shape), {name: sorted(of_loss)[1] for name, of_loss in samples.items()}, _needed_bytes(shape))


def copy_bandwidth(threads: int) -> float:
    """Bytes a second that a copy between two large tensors moves, both counted: the ceiling for any kernel."""
    source, target = torch.ones(2, 32 << 20).unbind()
    timer = Timer("target.copy_(source)", globals={"source": source, "target": target}, num_threads=threads)
    return 2 * source.nbytes / timer.blocked_autorange(min_run_time=1).median


def _inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, shape.rows, shape.classes, generator=generator).to(shape.dtype)
    labels = torch.randint(0, shape.classes, (shape.rows,), generator=generator)
    activations = []
    if shape.neurons:
        activation = torch.relu(torch.randn(shape.rows, shape.neurons, generator=generator))
        activations.append(activation.to(shape.dtype).requires_grad_())
    return student.clone().requires_grad_(), teacher.clone(), labels, activations


def _step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor, list[Tensor]]) -> None:
    student, _, _, activations = inputs
    for leaf in (student, *activations):
        leaf.grad = None
    loss(*inputs).backward()


def _needed_bytes(shape: Shape) -> int:
    """Each logit read once, each gradient written once; each activation read once and its gradient written once."""
    return (3 * shape.rows * shape.classes + 2 * shape.rows * shape.neurons) * shape.dtype.itemsize
