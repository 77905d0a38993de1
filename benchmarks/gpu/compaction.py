"""Gathering half of a layer on a GPU, by this package and by index_select."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.clocks import Step
from benchmarks.gpu.device import Device
from benchmarks.gpu.timing import in_turns
from benchmarks.roofline.passes import Layer, compaction, compaction_bytes, eager_compaction, make_layer
from benchmarks.settings import Settings
from benchmarks.table import Table, microseconds, times
from benchmarks.timing import Quartiles

LAYER = Layer(4096, 4096)


def measure(settings: Settings, device: Device) -> dict[str, Any]:
    """Times with cold caches, and the needed bytes."""
    layer = Layer(32, 32) if settings.smoke else LAYER
    inputs = make_layer(layer, device.name)
    pairs = zip(compaction(inputs), eager_compaction(inputs), strict=True)
    if not all(torch.equal(gathered, selected) for gathered, selected in pairs):
        raise RuntimeError("the native gather and index_select give different results")
    steps: dict[str, Step] = {
        "kddp_ext": lambda: compaction(inputs),
        "index_select": lambda: eager_compaction(inputs),
    }
    timed = in_turns(steps, device.cold, settings).to_json(base="kddp_ext")
    return {"layer": str(layer), "needed_bytes": compaction_bytes(layer), **timed}


def tables(result: dict[str, Any]) -> list[Table]:
    seconds = result["seconds"]
    ratio = times(Quartiles(**result["times_kddp_ext"]["index_select"]))
    speed = result["needed_bytes"] / seconds["kddp_ext"] / 1e9
    row = [result["layer"], *[microseconds(seconds[n]) for n in ("kddp_ext", "index_select")], ratio, f"{speed:,.0f}"]
    columns = ["layer", "kddp_ext (µs)", "index_select (µs)", "times index_select", "needed GB/s"]
    return [Table("gpu-compaction", "Compaction of a layer on a GPU, each call with cold caches", columns, [row])]
