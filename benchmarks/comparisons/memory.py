"""The memory of a step beyond the gradients that it returns."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Inputs, Shape, contenders, make_inputs
from benchmarks.comparisons.loss import SHAPES
from benchmarks.moved_bytes import gradient_bytes
from benchmarks.settings import Settings
from benchmarks.table import Table, kibibytes


def measure(settings: Settings) -> dict[str, Any]:
    """Peak memory of torch's CPU allocator in a step, minus the gradients."""
    return {"shapes": [_measure_shape(shape.at(settings), settings) for shape in SHAPES]}


def _measure_shape(shape: Shape, settings: Settings) -> dict[str, Any]:
    inputs = make_inputs(shape)
    beyond = {}
    for name, contender in contenders(inputs, settings).items():
        peak = _peak_bytes(contender, inputs)
        if peak < gradient_bytes(shape):
            raise RuntimeError(f"the profiler saw {peak} bytes, less than the gradients need")
        beyond[name] = peak - gradient_bytes(shape)
    return {"shape": str(shape), "gradient_bytes": gradient_bytes(shape), "bytes_beyond": beyond}


def _peak_bytes(contender: Callable[[], None], inputs: Inputs) -> int:
    return allocated_peak(contender, inputs.leaves)


def allocated_peak(step: Callable[[], None], leaves: Sequence[Tensor]) -> int:
    """The highest sum of bytes that a step allocates, from the profiler's record of every allocation.

    The gradients of the leaves are freed before, or the sum would start below zero.
    """
    for leaf in leaves:
        leaf.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    allocations = [event for event in events if event.get("name") == "[memory]"]
    present = peak = 0
    for event in sorted(allocations, key=lambda event: event["ts"]):
        present += event["args"]["Bytes"]
        peak = max(peak, present)
    return peak


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    shapes = by_heap["default"]["shapes"]
    names = list(shapes[0]["bytes_beyond"])
    columns = ["rows×classes with activations", "gradients (KiB)", *[f"{name} beyond them (KiB)" for name in names]]
    rows = [
        [
            shape["shape"],
            kibibytes(shape["gradient_bytes"]),
            *[kibibytes(shape["bytes_beyond"][name]) for name in names],
        ]
        for shape in shapes
    ]
    return [Table("memory", "Memory beyond the returned gradients, peak of forward and backward", columns, rows)]
