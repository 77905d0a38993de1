"""Gathering half of the neurons of a perceptron's weights, gradients and Adam moments: this package, index_select."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.settings import Settings
from benchmarks.table import Table, milliseconds, times
from benchmarks.timing import Quartiles, Stopwatch, stages_in_turns
from kddp_ext import ops

SIZES = (3072, 4096, 4096, 10)
COPIES = 4  # of each weight: itself, its gradient, its two moments


def sizes(settings: Settings) -> tuple[int, ...]:
    """Widths of the perceptron, from the input to the output."""
    return (24, 32, 32, 10) if settings.smoke else SIZES


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths with ReLUs in between."""
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds for all layers together."""
    generator = torch.Generator().manual_seed(0)
    widths = sizes(settings)
    kept = [torch.randperm(width, generator=generator)[: width // 2].sort().values for width in widths[1:-1]]
    layers = [
        [torch.randn(out, into, generator=generator) for _ in range(COPIES)] for into, out in itertools.pairwise(widths)
    ]
    keep_rows, keep_columns = [*kept, None], [None, *kept]

    def gather_all(gather: Any) -> Any:
        def run(stopwatch: Stopwatch) -> None:
            with stopwatch("gather"):
                for tensors, rows, columns in zip(layers, keep_rows, keep_columns, strict=True):
                    gather(tensors, rows, columns)

        return run

    _require_same(layers[1], kept[1], kept[0])
    runs = {"kddp_ext": gather_all(_native), "index_select": gather_all(_index_select)}
    timed = stages_in_turns(runs, settings)["gather"].to_json(base="kddp_ext")
    return {"sizes": widths, "copies": COPIES, **timed}


def _native(tensors: list[Tensor], keep_rows: Tensor | None, keep_columns: Tensor | None) -> list[Tensor]:
    rows, columns = tensors[0].shape
    return ops.gather_slices(tensors, keep_rows, keep_columns, rows=rows, columns=columns)[0]


def _index_select(tensors: list[Tensor], keep_rows: Tensor | None, keep_columns: Tensor | None) -> list[Tensor]:
    smaller = []
    for tensor in tensors:
        part = tensor if keep_rows is None else tensor.index_select(0, keep_rows)
        smaller.append(part if keep_columns is None else part.index_select(1, keep_columns))
    return smaller


def _require_same(tensors: list[Tensor], keep_rows: Tensor, keep_columns: Tensor) -> None:
    both = zip(_native(tensors, keep_rows, keep_columns), _index_select(tensors, keep_rows, keep_columns), strict=True)
    if not all(torch.equal(native, selected) for native, selected in both):
        raise RuntimeError("the native gather and index_select do not give the same")


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    columns = ["heap", "kddp_ext (ms)", "index_select (ms)", "times index_select"]
    rows = [
        [
            heap,
            *[milliseconds(timed["seconds"][name]) for name in ("kddp_ext", "index_select")],
            times(Quartiles(**timed["times_kddp_ext"]["index_select"])),
        ]
        for heap, timed in by_heap.items()
    ]
    name = "-".join(map(str, by_heap["default"]["sizes"]))
    title = f"Gather of half the neurons of {name}: weights, gradients, two moments"
    return [Table("compaction", title, columns, rows)]
