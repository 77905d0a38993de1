"""Class counts that are not a multiple of the vector width, compared with those that are."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from benchmarks.cases import Shape, fused, make_inputs, step
from benchmarks.settings import Settings
from benchmarks.table import Table, times
from benchmarks.timing import Quartiles, in_turns, quartiles

CLASSES = (96, 97, 100, 101, 111, 112)
MULTIPLES = (96, 112)  # of 16, the floats of the widest vector
ELEMENTS = (1024 * 100, 8192 * 100)


def measure(settings: Settings) -> dict[str, Any]:
    """Nanoseconds a logit by class count, with about the same number of logits."""
    return {"batches": [_measure_batch(elements, settings) for elements in ELEMENTS]}


def _measure_batch(elements: int, settings: Settings) -> dict[str, Any]:
    shapes = {str(classes): Shape(round(elements / classes), classes, 0).at(settings) for classes in CLASSES}
    inputs = {name: make_inputs(shape) for name, shape in shapes.items()}
    rounds = in_turns({name: partial(step, fused, i) for name, i in inputs.items()}, settings)
    per_element = {
        name: [seconds * 1e9 / (shape.rows * shape.classes) for seconds in rounds.seconds[name]]
        for name, shape in shapes.items()
    }
    base = [statistics.mean(turn) for turn in zip(*(per_element[str(c)] for c in MULTIPLES), strict=True)]
    return {
        "elements": elements,
        "nanoseconds_per_element": {name: statistics.median(values) for name, values in per_element.items()},
        "times_multiples": {
            name: quartiles([a / b for a, b in zip(values, base, strict=True)])._asdict()
            for name, values in per_element.items()
        },
        **rounds.quality(),
    }


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    batches = by_heap["default"]["batches"]
    columns = ["classes"]
    for batch in batches:
        rows = batch["elements"] // 100
        columns += [f"ns a logit, about {rows:,} rows", f"times the mean of {MULTIPLES[0]} and {MULTIPLES[1]}"]
    rows = []
    for name in batches[0]["nanoseconds_per_element"]:
        cells = [
            (f"{batch['nanoseconds_per_element'][name]:.3f}", times(Quartiles(**batch["times_multiples"][name])))
            for batch in batches
        ]
        rows.append([name, *[cell for pair in cells for cell in pair]])
    return [Table("class-counts", "Class counts beside the vector's multiples", columns, rows)]
