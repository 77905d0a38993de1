"""The memory of a step beyond the gradients that it returns."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Inputs, Shape, contenders, fused, make_inputs, step
from benchmarks.comparisons.loss import SHAPES
from benchmarks.moved_bytes import gradient_bytes
from benchmarks.settings import Settings
from benchmarks.table import Table, kibibytes
from kddp_ext import ops


def measure(settings: Settings) -> dict[str, Any]:
    """Peak memory of torch's CPU allocator in a step, minus the gradients.

    Also the memory that this package's pool keeps for the next gradients once those of the step are dropped.
    """
    return {"shapes": [_measure_shape(shape.at(settings), settings) for shape in SHAPES]}


def _measure_shape(shape: Shape, settings: Settings) -> dict[str, Any]:
    inputs = make_inputs(shape)
    beyond = {}
    for name, contender in contenders(inputs, settings).items():
        peak = _peak_bytes(contender, inputs)
        if peak < gradient_bytes(shape):
            raise RuntimeError(f"the profiler saw {peak} bytes, less than the gradients need")
        beyond[name] = peak - gradient_bytes(shape)
    kept = _kept_bytes(inputs)
    return {
        "shape": str(shape),
        "gradient_bytes": gradient_bytes(shape),
        "bytes_beyond": beyond,
        "pool_bytes_kept": kept,
    }


def _peak_bytes(contender: Callable[[], None], inputs: Inputs) -> int:
    """The highest sum of allocated bytes, from the profiler's record of every allocation."""
    for leaf in inputs.leaves:
        leaf.grad = None  # freed before the recording, or the sum would start below zero
    ops.pool.release()  # so that the step allocates its gradients, as the first one of a training does
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contender()
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


def _kept_bytes(inputs: Inputs) -> int:
    ops.pool.release()
    step(fused, inputs)
    for leaf in inputs.leaves:
        leaf.grad = None
    kept = ops.pool.bytes
    ops.pool.release()
    return kept


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    shapes = by_heap["default"]["shapes"]
    names = list(shapes[0]["bytes_beyond"])
    columns = ["rows×classes with activations", "gradients (KiB)", *[f"{name} beyond them (KiB)" for name in names]]
    columns.append("kept between steps (KiB)")
    rows = [
        [
            shape["shape"],
            kibibytes(shape["gradient_bytes"]),
            *[kibibytes(shape["bytes_beyond"][name]) for name in names],
            kibibytes(shape["pool_bytes_kept"]),
        ]
        for shape in shapes
    ]
    return [Table("memory", "Memory beyond the returned gradients, peak of forward and backward", columns, rows)]
