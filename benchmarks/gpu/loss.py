"""Forward and backward of the loss on a GPU: time, share of the copy bandwidth, memory."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import Shape, make_inputs
from benchmarks.comparisons.loss import SHAPES, share_of_bandwidth
from benchmarks.gpu.contenders import GRAPH, all_contenders
from benchmarks.gpu.device import Device
from benchmarks.gpu.timing import in_turns
from benchmarks.moved_bytes import gradient_bytes, needed_bytes
from benchmarks.settings import Settings
from benchmarks.table import Table, kibibytes, microseconds, times
from benchmarks.timing import Quartiles

SHAPES_ON_GPU = [*SHAPES, Shape(512, 32000, 1024, labels="confident")]
COPY_BYTES = 1 << 30  # per array: many times the second-level cache
COPIES = 20


def measure(settings: Settings, device: Device) -> dict[str, Any]:
    """Times by both clocks, ratios, bytes and memory for each shape, and the copy bandwidth before and after."""
    bandwidths = [copy_bandwidth(settings, device)]
    shapes = [_measure_shape(shape.at(settings), settings, device) for shape in SHAPES_ON_GPU]
    bandwidths.append(copy_bandwidth(settings, device))
    return {"copy_bytes_per_second": max(bandwidths), "shapes": shapes}


def copy_bandwidth(settings: Settings, device: Device) -> float:
    """Bytes per second of `target.copy_(source)`, counting those read and those written."""
    size = 1 << 16 if settings.smoke else COPY_BYTES
    source, target = torch.ones(2, size // 4, device=device.name).unbind()
    device.cold.seconds(lambda: target.copy_(source), 1)
    return 2 * source.nbytes / device.cold.seconds(lambda: target.copy_(source), COPIES)


def _measure_shape(shape: Shape, settings: Settings, device: Device) -> dict[str, Any]:
    inputs = make_inputs(shape, device.name)
    steps, missing = all_contenders(inputs, settings, device)
    timed = in_turns(steps, device.cold, settings).to_json(base="kddp_ext")
    repeated = in_turns(steps, device.repeated, settings).to_json(base="kddp_ext")
    beyond = {
        name: device.peak_bytes(step, inputs) - gradient_bytes(shape)
        for name, step in steps.items()
        if not name.endswith(GRAPH)  # a graph has allocated its memory at the capture
    }
    return {
        "shape": str(shape),
        "needed_bytes": needed_bytes(shape),
        **timed,
        "repeated": repeated,
        "bytes_beyond": beyond,
        "missing": missing,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Times with cold caches, times of consecutive calls, memory."""
    return [_cold(result), _repeated(result), _memory(result)]


def _names(result: dict[str, Any]) -> list[str]:
    """All contenders, this package first, including those that are missing for some shapes."""
    names = [name for shape in result["shapes"] for name in (*shape["seconds"], *shape["missing"])]
    return list(dict.fromkeys(["kddp_ext", *names]))


def _cell(shape: dict[str, Any], name: str, written: str | None) -> str:
    """The text of a contender's cell, or in a word why it is missing."""
    return written if written is not None else shape["missing"].get(name, "–").partition(":")[0]


def _time_columns(shape: dict[str, Any], timed: dict[str, Any], names: list[str]) -> list[str]:
    seconds, ratios = timed["seconds"], timed["times_kddp_ext"]
    cells = [_cell(shape, name, microseconds(seconds[name]) if name in seconds else None) for name in names]
    others = [_cell(shape, name, times(Quartiles(**ratios[name])) if name in ratios else None) for name in names[1:]]
    return cells + others


def _head(names: list[str]) -> list[str]:
    return ["rows×classes with activations", *[f"{n} (µs)" for n in names], *[f"times {n}" for n in names[1:]]]


def _cold(result: dict[str, Any]) -> Table:
    names = _names(result)
    rows = [
        [shape["shape"], *_time_columns(shape, shape, names), f"{share_of_bandwidth(shape, result):.0%}"]
        for shape in result["shapes"]
    ]
    note = f"A copy moves {result['copy_bytes_per_second'] / 1e9:,.0f} GB/s, both sides counted."
    reasons = {f"{n}: {reason}" for s in result["shapes"] for n, reason in s["missing"].items() if ":" in reason}
    note = " ".join([note, *sorted(reasons)])
    title = "Loss on a GPU, forward + backward, each call with cold caches"
    return Table("gpu-loss", title, [*_head(names), "of copy bandwidth"], rows, note)


def _repeated(result: dict[str, Any]) -> Table:
    names = _names(result)
    rows = [[shape["shape"], *_time_columns(shape, shape["repeated"], names)] for shape in result["shapes"]]
    return Table("gpu-loss-repeated", "Loss on a GPU, consecutive calls, host's clock", _head(names), rows)


def _memory(result: dict[str, Any]) -> Table:
    names = [name for name in _names(result) if not name.endswith(GRAPH)]
    columns = ["rows×classes with activations", *[f"{name} (KiB)" for name in names]]
    rows = []
    for shape in result["shapes"]:
        beyond = shape["bytes_beyond"]
        cells = [_cell(shape, name, kibibytes(beyond[name]) if name in beyond else None) for name in names]
        rows.append([shape["shape"], *cells])
    return Table("gpu-memory", "Memory on a GPU beyond the returned gradients, peak of a step", columns, rows)
