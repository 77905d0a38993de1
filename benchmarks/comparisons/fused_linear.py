"""The loss of two last layers in chunks of rows, compared with the loss of all logits: time, memory and errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kddp_ext
from benchmarks import formulas
from benchmarks.comparisons.memory import allocated_peak
from benchmarks.settings import Settings
from benchmarks.table import Table
from benchmarks.timing import Stopwatch, stages_in_turns
from kddp_ext.loss.fused_linear import CHUNK_BYTES

ROWS, FEATURES, CLASSES = 4096, 512, 32000
CHUNKS = {"16 MiB": CHUNK_BYTES // 4, "32 MiB": CHUNK_BYTES // 2, "64 MiB (default)": CHUNK_BYTES}
DEFAULT = "64 MiB (default)"
UNFUSED = "all logits"


class Inputs(NamedTuple):
    """The hidden states, the last layers' weights and the labels. The student's require a gradient."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype."""
        *tensors, labels = [tensor.detach() for tensor in self]
        student_hidden, student_weight, *teacher = [tensor.to(dtype) for tensor in tensors]
        return Inputs(student_hidden.requires_grad_(), student_weight.requires_grad_(), *teacher, labels)


Loss = Callable[[Inputs], Tensor]


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds of each round, peak memory beyond the gradients, and the errors of the gradients."""
    rows, features, classes = (40, 16, 100) if settings.smoke else (ROWS, FEATURES, CLASSES)
    generator = torch.Generator().manual_seed(0)
    student_hidden, teacher_hidden = torch.randn(2, rows, features, generator=generator)
    student_weight, teacher_weight = torch.randn(2, classes, features, generator=generator) / features**0.5
    labels = torch.randint(0, classes, (rows,), generator=generator)
    inputs = Inputs(student_hidden, student_weight, teacher_hidden, teacher_weight, labels).to(torch.float32)
    losses: dict[str, Loss] = {UNFUSED: all_logits}
    losses |= {name: partial(fused, chunk_rows=max(1, size // (4 * classes))) for name, size in CHUNKS.items()}
    runs = {name: partial(_timed, loss, inputs) for name, loss in losses.items()}
    timed = stages_in_turns(runs, settings)["step"]
    logits_bytes = rows * classes * 4
    gradient_bytes = 4 * (inputs.student_hidden.numel() + inputs.student_weight.numel())
    peaks = {name: allocated_peak(partial(_step, loss, inputs), inputs[:2]) for name, loss in losses.items()}
    return {
        "shape": f"{rows}×{features}, {classes} classes",
        "seconds": {name: min(seconds) for name, seconds in timed.seconds.items()},
        "rounds": timed.seconds,
        **timed.quality(),
        "materialised_bytes": 3 * logits_bytes,
        "bytes_beyond": {name: peak - gradient_bytes for name, peak in peaks.items()},
        "errors": _errors(inputs),
    }


def all_logits(inputs: Inputs) -> Tensor:
    """The layers multiplied out, and this package's loss."""
    teacher_logits = F.linear(*inputs[2:4])
    loss: Tensor = kddp_ext.fused_kd_l1_loss(
        *(F.linear(*inputs[:2]), teacher_logits, inputs.labels),
        temperature=formulas.TEMPERATURE,
        alpha=formulas.ALPHA,
    )
    return loss


def fused(inputs: Inputs, chunk_rows: int | None = None) -> Tensor:
    """This package's loss in chunks of rows."""
    loss: Tensor = kddp_ext.fused_linear_kd_loss(
        *inputs, temperature=formulas.TEMPERATURE, alpha=formulas.ALPHA, chunk_rows=chunk_rows
    )
    return loss


def eager(inputs: Inputs) -> Tensor:
    """PyTorch's own functions."""
    return formulas.loss(formulas.forward_kl, F.linear(*inputs[:2]), F.linear(*inputs[2:4]), inputs.labels, [])


def _step(loss: Loss, inputs: Inputs) -> None:
    for leaf in inputs[:2]:
        leaf.grad = None
    loss(inputs).backward()


def _timed(loss: Loss, inputs: Inputs, stopwatch: Stopwatch) -> None:
    with stopwatch("step"):
        _step(loss, inputs)


def _errors(inputs: Inputs) -> dict[str, dict[str, float]]:
    """The largest errors against eager PyTorch in float64, relative to the largest value."""
    in_double = inputs.to(torch.float64)
    truth = _results(eager, in_double)
    cases = {"kddp_ext": (fused, inputs), "eager": (eager, inputs), "kddp_ext in float64": (fused, in_double)}
    return {name: _compare(_results(loss, of), truth) for name, (loss, of) in cases.items()}


def _results(loss: Loss, inputs: Inputs) -> list[Tensor]:
    value = loss(inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs[:2])]


def _compare(results: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
    names = ("loss", "hidden", "weight")
    errors = [float((x - t).abs().max() / t.abs().max()) for x, t in zip(results, truth, strict=True)]
    return dict(zip(names, errors, strict=True))


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    result = by_heap["default"]
    base, logits = result["seconds"][UNFUSED], result["materialised_bytes"]
    rows = [
        [
            name,
            f"{seconds:,.3f}",
            f"{seconds / base:.2f}",
            f"{result['bytes_beyond'][name] / 2**20:,.1f}",
            f"{result['bytes_beyond'][name] / logits:.3f}",
        ]
        for name, seconds in result["seconds"].items()
    ]
    columns = ["logits at a time", "seconds", "times all logits", "beyond gradients (MiB)", "of three times all logits"]
    title = f"Loss of two last layers, {result['shape']}: forward + backward, fastest of {result['round_count']} rounds"
    of_errors = [[name, *[f"{error:.1e}" for error in errors.values()]] for name, errors in result["errors"].items()]
    return [
        Table("fused-linear", title, columns, rows),
        Table(
            "fused-linear-errors",
            "Its largest errors against eager PyTorch in float64, relative to the largest value",
            ["implementation", "loss", "gradient of the hidden states", "gradient of the weight"],
            of_errors,
        ),
    ]
