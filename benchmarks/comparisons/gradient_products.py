"""Sums of activations times gradients by sample and channel: this package, the formula in eager PyTorch, a copy."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.settings import Settings
from benchmarks.table import Table, microseconds, times
from benchmarks.timing import Quartiles, in_turns
from kddp_ext import ops

SHAPES = [(256, 64, 32, 32), (256, 512, 4, 4), (256, 4096)]


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds of each implementation by shape. The copy reads and writes as many bytes as the products read."""
    shapes = [(2, *shape[1:]) if settings.smoke else shape for shape in SHAPES]
    return {"shapes": [_measure_shape(shape, settings) for shape in shapes]}


def _measure_shape(shape: tuple[int, ...], settings: Settings) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    activation, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    mean = torch.randn(shape[1], dtype=torch.float64, generator=generator)
    target = torch.empty_like(activation)
    keywords = {"axis": 1, "samples": shape[0]}
    steps = {
        "kddp_ext": lambda: ops.gradient_products(activation, gradient, mean, **keywords),
        "eager": lambda: ops.reference.gradient_products(activation, gradient, mean, **keywords),
        "copy": lambda: target.copy_(activation),
    }
    torch.testing.assert_close(steps["kddp_ext"](), steps["eager"](), rtol=1e-4, atol=1e-3)
    return {"shape": "×".join(map(str, shape)), **in_turns(steps, settings).to_json(base="kddp_ext")}


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    columns = ["shape", "kddp_ext (µs)", "eager (µs)", "copy (µs)", "times eager"]
    rows = [
        [
            shape["shape"],
            *[microseconds(shape["seconds"][name]) for name in ("kddp_ext", "eager", "copy")],
            times(Quartiles(**shape["times_kddp_ext"]["eager"])),
        ]
        for shape in by_heap["default"]["shapes"]
    ]
    return [Table("gradient-products", "Activations times gradients by sample and channel", columns, rows)]
