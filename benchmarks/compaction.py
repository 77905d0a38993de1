"""A prune of half the hidden neurons of a multilayer perceptron with Adam's state, against plain index_select."""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from torch import Tensor

from kddp_ext import ops

SIZES = (3072, 4096, 4096, 10)


def measure(repetitions: int) -> dict[str, float]:
    """Median seconds of taking the kept rows and columns out of each weight, its gradient and its two moments."""
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randperm(size, generator=generator)[: size // 2].sort().values for size in SIZES[1:-1]]
    rows = [*kept, None]
    columns = [None, *kept]
    layers = [
        [torch.randn(out, into, generator=generator) for _ in range(4)] for into, out in itertools.pairwise(SIZES)
    ]
    seconds: dict[str, list[float]] = {"kddp_ext": [], "index_select": []}
    for _ in range(repetitions):
        for name, gather in (("kddp_ext", _native), ("index_select", _index_select)):
            start = time.perf_counter()
            for tensors, keep_rows, keep_columns in zip(layers, rows, columns, strict=True):
                gather(tensors, keep_rows, keep_columns)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(of_name) for name, of_name in seconds.items()}


def _native(tensors: list[Tensor], keep_rows: Tensor | None, keep_columns: Tensor | None) -> list[Tensor]:
    rows, columns = tensors[0].shape
    return ops.gather_slices(tensors, keep_rows, keep_columns, rows=rows, columns=columns)[0]


def _index_select(tensors: list[Tensor], keep_rows: Tensor | None, keep_columns: Tensor | None) -> list[Tensor]:
    smaller = []
    for tensor in tensors:
        part = tensor if keep_rows is None else tensor.index_select(0, keep_rows)
        smaller.append(part if keep_columns is None else part.index_select(1, keep_columns))
    return smaller
