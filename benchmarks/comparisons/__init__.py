"""The comparisons, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.comparisons import (
    class_counts,
    compaction,
    divergences,
    fused_linear,
    gradient_products,
    loss,
    memory,
    neuron_statistics,
    prune_step,
    pruning,
    saliency_step,
    threads,
)
from benchmarks.settings import Settings
from benchmarks.table import Table


class Comparison(NamedTuple):
    """One comparison.

    Attributes:
        measure: returns the result, which JSON can hold.
        tables: returns the tables for the results by heap.
        heaps: the heaps (`child.HEAPS`) with which it runs.
    """

    measure: Callable[[Settings], dict[str, Any]]
    tables: Callable[[dict[str, dict[str, Any]]], list[Table]]
    heaps: tuple[str, ...] = ("default",)


COMPARISONS = {
    "loss": Comparison(loss.measure, loss.tables, ("default", "warm")),
    "class-counts": Comparison(class_counts.measure, class_counts.tables),
    "threads": Comparison(threads.measure, threads.tables),
    "memory": Comparison(memory.measure, memory.tables),
    "statistics": Comparison(neuron_statistics.measure, neuron_statistics.tables),
    "divergences": Comparison(divergences.measure, divergences.tables),
    "fused-linear": Comparison(fused_linear.measure, fused_linear.tables),
    "gradient-products": Comparison(gradient_products.measure, gradient_products.tables),
    "compaction": Comparison(compaction.measure, compaction.tables, ("default", "warm")),
    "pruning": Comparison(pruning.measure, pruning.tables, ("default", "warm")),
    "prune-step": Comparison(prune_step.measure, prune_step.tables),
    "saliency-step": Comparison(saliency_step.measure, saliency_step.tables, ("warm",)),
}
