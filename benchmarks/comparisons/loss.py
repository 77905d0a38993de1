"""Forward and backward of the loss: this package, eager PyTorch, torch.compile."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import formulas
from benchmarks.cases import Shape, contenders, make_inputs
from benchmarks.moved_bytes import copy_bandwidth, needed_bytes
from benchmarks.settings import Settings
from benchmarks.table import Table, microseconds, times
from benchmarks.timing import Quartiles, in_turns

SHAPES = [
    Shape(128, 10, 1024),
    Shape(1024, 100, 512),
    Shape(4096, 1000, 1024),
    Shape(512, 32000, 1024),
    Shape(64, 128256, 0, torch.bfloat16),
]
# Labels of another kind: mixup's probabilities, and the padding of a language model's (8, 512, 32000) logits.
OTHER_LABELS = [
    Shape(4096, 1000, 0, labels="probabilities"),
    Shape(4096, 1000, 0, torch.bfloat16, labels="probabilities"),
    Shape(8 * 512, 32000, 0, torch.bfloat16, labels="padding"),
]

_FAULT_STEPS = 5
_TITLES = {"default": "a default heap", "warm": "a warm heap"}


def measure(settings: Settings) -> dict[str, Any]:
    """Times, ratios, bytes and page faults at each shape, and the better copy bandwidth of before and after."""
    bandwidths = [copy_bandwidth(settings)]
    rows = [_measure_shape(shape.at(settings), settings) for shape in (*SHAPES, *OTHER_LABELS)]
    bandwidths.append(copy_bandwidth(settings))
    return {"copy_bytes_per_second": max(bandwidths), "shapes": rows}


def _measure_shape(shape: Shape, settings: Settings) -> dict[str, Any]:
    formula = formulas.forward_kl_of_tokens if shape.labels == "padding" else formulas.forward_kl
    steps = contenders(make_inputs(shape), settings, formula)
    timed = in_turns(steps, settings).to_json(base="kddp_ext")
    faults = {name: _page_faults(step) for name, step in steps.items()}
    return {"shape": str(shape), "needed_bytes": needed_bytes(shape), **timed, "page_faults": faults}


def _page_faults(step: Callable[[], None]) -> float:
    """Page faults a step, caused by memory that the C library had returned to the system."""
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(_FAULT_STEPS):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / _FAULT_STEPS


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    return [*[_times(heap, result) for heap, result in by_heap.items()], _faults(by_heap)]


def _times(heap: str, result: dict[str, Any]) -> Table:
    others = [name for name in result["shapes"][0]["seconds"] if name != "kddp_ext"]
    columns = ["rows×classes with activations", *[f"{name} (µs)" for name in ("kddp_ext", *others)]]
    columns += [*[f"times {name}" for name in others], "of copy bandwidth"]
    rows = [
        [
            shape["shape"],
            *[microseconds(shape["seconds"][name]) for name in ("kddp_ext", *others)],
            *[times(Quartiles(**shape["times_kddp_ext"][name])) for name in others],
            f"{share_of_bandwidth(shape, result):.0%}",
        ]
        for shape in result["shapes"]
    ]
    note = f"A copy moves {result['copy_bytes_per_second'] / 1e9:.1f} GB/s, both sides counted."
    return Table(f"loss-{heap}", f"Loss, forward + backward, with {_TITLES[heap]}", columns, rows, note)


def share_of_bandwidth(shape: dict[str, Any], result: dict[str, Any]) -> float:
    """Needed bytes a second of this package at a shape, relative to the copy bandwidth of the same run."""
    share: float = shape["needed_bytes"] / shape["seconds"]["kddp_ext"] / result["copy_bytes_per_second"]
    return share


def _faults(by_heap: dict[str, dict[str, Any]]) -> Table:
    shapes = list(zip(*(result["shapes"] for result in by_heap.values()), strict=True))
    names = list(shapes[0][0]["page_faults"])
    columns = ["rows×classes with activations", *[f"{heap}: {name}" for heap in by_heap for name in names]]
    rows = [
        [in_heaps[0]["shape"], *[f"{shape['page_faults'][name]:,.0f}" for shape in in_heaps for name in names]]
        for in_heaps in shapes
    ]
    return Table("page-faults", "Page faults of a step", columns, rows)
