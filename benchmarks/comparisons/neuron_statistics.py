"""The penalty's pass with and without the statistics that pruning needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Inputs, Shape, fused, make_inputs, step
from benchmarks.settings import Settings
from benchmarks.table import Table, microseconds, times
from benchmarks.timing import Quartiles, in_turns
from kddp_ext import NeuronStatistics, TrackedActivations

# With a single class, almost all of the time is the penalty's pass.
SHAPES = [Shape(4096, 1, 1024), Shape(4096, 1000, 1024), Shape(4096, 1, 1024, torch.bfloat16)]


def measure(settings: Settings) -> dict[str, Any]:
    """Forward and backward with the activations as a list, and as a pruner hands them over."""
    return {"shapes": [_measure_shape(shape.at(settings), settings) for shape in SHAPES]}


def _measure_shape(shape: Shape, settings: Settings) -> dict[str, Any]:
    inputs = make_inputs(shape)
    statistics = [NeuronStatistics(shape.neurons)]

    def tracked(inputs: Inputs) -> Tensor:
        return fused(inputs._replace(activations=TrackedActivations(inputs.activations, statistics)))

    steps = {"without": lambda: step(fused, inputs), "with": lambda: step(tracked, inputs)}
    return {"shape": str(shape), **in_turns(steps, settings).to_json(base="without")}


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    columns = ["rows×classes with activations", "without (µs)", "with statistics (µs)", "times as long"]
    rows = [
        [
            shape["shape"],
            *[microseconds(shape["seconds"][name]) for name in ("without", "with")],
            times(Quartiles(**shape["times_without"]["with"])),
        ]
        for shape in by_heap["default"]["shapes"]
    ]
    return [Table("statistics", "Neuron statistics in the penalty's pass, forward + backward", columns, rows)]
