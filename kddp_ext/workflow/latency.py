"""How fast finished students answer on a processor, side by side: in PyTorch and, exported, in ONNX Runtime."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kddp_ext
from kddp_ext.workflow.datasets import INFO
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.inspect import SavedModel, find_models
from kddp_ext.workflow.measure import count_macs, count_parameters, median_seconds, one_thread
from kddp_ext.workflow.runtime import Runtime

# Of the largest logit, or of 1 where all are smaller: float32 sums in another order differ by some 1e-6.
TOLERANCE = 1e-3

Answer = Callable[[], object]


@dataclass
class _Student:
    """A finished network and what is to be measured of it.

    Attributes:
        saved: what it was loaded from.
        model: in evaluation mode.
        inputs: by batch size, (batch, C, S, S), channels last.
        session: of ONNX Runtime, or None without it.
        onnx_bytes: size of its ONNX file.
        largest_difference: between the logits of the two, over all batches.
        seconds: of a call, by engine and batch size, round by round.
    """

    saved: SavedModel
    model: nn.Module
    inputs: dict[int, Tensor]
    session: Any = None
    onnx_bytes: int | None = None
    largest_difference: float | None = None
    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)


def missing_packages() -> list[str]:
    """What has to be installed before ONNX Runtime can be measured; empty where all is there."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]


def compare_latencies(
    paths: Sequence[Path], batches: Sequence[int] = (1, 128), *, rounds: int = 9, seconds: float = 0.05
) -> list[dict[str, Any]]:
    """Time the students at `paths` on one thread, in float32, each in every round.

    What else the machine does changes from one second to the next. In each round therefore every student is
    timed once with each engine and at each batch size, in an order that rotates, and ratios are made within a
    round.

    Args:
        paths: student files, or folders of runs, of which every finished network counts. The first is what
            the others are compared with.
        batches: images in a call.
        rounds: turns that each gets (odd, so that the median is one of them).
        seconds: of a turn, in which it is called again and again, at least five times.

    Returns:
        For each student, as plain values: "path", "stage", "parameters", "macs" (of one image), "file_bytes"
        (None for a teacher, whose file holds its optimizer too), "onnx_bytes" and "largest_difference" (the
        largest absolute difference of a logit between PyTorch and ONNX Runtime; both None without ONNX
        Runtime), and "latency": by engine ("pytorch", "onnxruntime" where it is installed) and by batch size
        as text, the median "ms" of a call, "ratio", the time over the first student's with the same engine
        and batch ("median", "low" and "high" over the rounds), and "rounds_ms".

    Raises:
        WorkflowError: a path is no student or run, an argument is out of its range, or what ONNX Runtime
            computes of a student is not what PyTorch does.
    """
    _check(paths, batches, rounds, seconds)
    runtime = Runtime("cpu", "float32")
    with tempfile.TemporaryDirectory() as folder, one_thread(), torch.inference_mode():
        students = [_prepare(saved, batches) for path in paths for saved in find_models(path)]
        for student in students:
            if not missing_packages():
                _export(student, Path(folder) / "student.onnx")
            # The layout that the workflow trains in. ONNX Runtime has one of its own.
            runtime.place(student.model)
        for batch in batches:
            _take_turns(_contenders(students, batch), rounds, seconds)
        return [_summary(student, students[0]) for student in students]


def _check(paths: Sequence[Path], batches: Sequence[int], rounds: int, seconds: float) -> None:
    if not paths:
        raise WorkflowError("latency: expected at least one student's file, got none")
    if not batches or min(batches) < 1:
        raise WorkflowError(f"batches: expected one or more positive numbers, got {list(batches)}")
    if rounds < 1:
        raise WorkflowError(f"rounds: expected at least 1, got {rounds}")
    if not seconds > 0:
        raise WorkflowError(f"seconds: expected more than 0, got {seconds}")


def _prepare(saved: SavedModel, batches: Sequence[int]) -> _Student:
    info = INFO[saved.config.dataset]
    random = torch.Generator().manual_seed(0)
    images = torch.randn(max(2, *batches), info.channels, info.size, info.size, generator=random)
    with torch.inference_mode(False):
        model = saved.load(images[:2].clone()).eval().requires_grad_(False)
    inputs = {batch: images[:batch].contiguous(memory_format=torch.channels_last) for batch in batches}
    return _Student(saved, model, inputs)


def _export(student: _Student, path: Path) -> None:
    """Make the student's ONNX Runtime session, and see that it computes what the model does."""
    import onnxruntime

    images = next(iter(student.inputs.values()))
    with torch.inference_mode(False):
        kddp_ext.export_onnx(student.model, path, (torch.zeros(2, *images.shape[1:]),))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    student.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    student.onnx_bytes = path.stat().st_size
    student.largest_difference = max(_difference(student, images) for images in student.inputs.values())


def _difference(student: _Student, images: Tensor) -> float:
    expected = student.model(images)
    found = torch.from_numpy(_call_onnx(student.session, images)())
    difference = float((found - expected).abs().max())
    # The comparison this way round, so that NaN is refused.
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise WorkflowError(
            f"{student.saved.path}: ONNX Runtime's logits differ from PyTorch's by up to {difference:.3g} "
            f"at batch {len(images)}"
        )
    return difference


def _call_onnx(session: Any, images: Tensor) -> Callable[[], Any]:
    inputs = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return lambda: session.run(None, inputs)[0]


def _contenders(students: list[_Student], batch: int) -> list[tuple[list[float], Answer]]:
    """Each with the list that its seconds go to."""
    contenders: list[tuple[list[float], Answer]] = []
    for student in students:
        images = student.inputs[batch]
        answers: dict[str, Answer] = {"pytorch": partial(student.model, images)}
        if student.session is not None:
            answers["onnxruntime"] = _call_onnx(student.session, images)
        for engine, answer in answers.items():
            contenders.append((student.seconds.setdefault((engine, batch), []), answer))
    return contenders


def _take_turns(contenders: list[tuple[list[float], Answer]], rounds: int, seconds: float) -> None:
    for _, answer in contenders:
        median_seconds(answer, seconds / 2)  # to warm up
    for number in range(rounds):
        first = number % len(contenders)
        for times, answer in contenders[first:] + contenders[:first]:
            times.append(median_seconds(answer, seconds))


def _summary(student: _Student, first: _Student) -> dict[str, Any]:
    path, image = student.saved.path, next(iter(student.inputs.values()))[:1]
    latencies: dict[str, dict[str, Any]] = {}
    for (engine, batch), seconds in student.seconds.items():
        ratios = [own / base for own, base in zip(seconds, first.seconds[engine, batch], strict=True)]
        latencies.setdefault(engine, {})[str(batch)] = {
            "ms": 1000 * statistics.median(seconds),
            "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
            "rounds_ms": [1000 * value for value in seconds],
        }
    return {
        "path": str(path),
        "stage": student.saved.stage,
        "parameters": count_parameters(student.model),
        "macs": count_macs(student.model, image),
        "file_bytes": path.stat().st_size if student.saved.history is not None else None,
        "onnx_bytes": student.onnx_bytes,
        "largest_difference": student.largest_difference,
        "latency": latencies,
    }
