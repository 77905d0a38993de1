"""The passes that are modelled, each as this package's operators and as eager PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import formulas
from benchmarks.cases import Inputs, Shape, fused
from benchmarks.moved_bytes import gradient_bytes, needed_bytes
from kddp_ext import ops

Run = Callable[[], object]


def forward_bytes(shape: Shape) -> int:
    """What a forward that computes the gradients has to move: a step's share of that, and the labels."""
    return needed_bytes(shape) + 8 * shape.rows


def backward_bytes(shape: Shape) -> int:
    """What scaling the gradients has to move: each is read and written."""
    return 2 * gradient_bytes(shape)


def loss_passes(inputs: Inputs) -> tuple[Run, Run, Run]:
    """Forward, a backward under a loss scale, and the usual one, of this package; to be called one after the other."""
    return _passes(inputs, lambda: fused(inputs))


def eager_passes(inputs: Inputs) -> tuple[Run, Run, Run]:
    """The same in PyTorch's own functions."""
    return _passes(inputs, lambda: formulas.loss(formulas.forward_kl, *inputs))


def _passes(inputs: Inputs, loss: Callable[[], Tensor]) -> tuple[Run, Run, Run]:
    values: list[Tensor] = []

    def backward(scale: float, retain_graph: bool) -> object:
        value = values[0]
        return torch.autograd.grad(value, inputs.leaves, torch.full_like(value, scale), retain_graph=retain_graph)

    return lambda: values.append(loss()), lambda: backward(2.0, True), lambda: backward(1.0, False)


class Layer(NamedTuple):
    """A linear layer that loses half of its neurons and of its inputs, with its gradient and two moments."""

    rows: int
    columns: int
    tensors: int = 4
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.rows}×{self.columns}, half of both, {self.tensors} tensors"


def compaction_bytes(layer: Layer) -> int:
    """What taking the kept half of both sides has to move: kept elements read and written, and their indices."""
    rows, columns = layer.rows // 2, layer.columns // 2
    return 2 * layer.tensors * rows * columns * layer.dtype.itemsize + 8 * (rows + columns)


class LayerInputs(NamedTuple):
    """Tensors of a layer and what of them is kept."""

    tensors: Sequence[Tensor]
    keep_rows: Tensor
    keep_columns: Tensor


def make_layer(layer: Layer, device: str = "cpu") -> LayerInputs:
    """Tensors of no particular value, and random halves; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.randperm(size, generator=generator)[: size // 2].sort().values.to(device)
        for size in (layer.rows, layer.columns)
    )
    shape = (layer.rows, layer.columns)
    return LayerInputs(
        [torch.ones(shape, dtype=layer.dtype, device=device) for _ in range(layer.tensors)], rows, columns
    )


def compaction(inputs: LayerInputs) -> list[Tensor]:
    """By this package, in one call."""
    rows, columns = inputs.tensors[0].shape
    return ops.gather_slices(inputs.tensors, inputs.keep_rows, inputs.keep_columns, rows=rows, columns=columns)[0]


def eager_compaction(inputs: LayerInputs) -> list[Tensor]:
    """By PyTorch: rows, then columns, of each tensor."""
    return [t.index_select(0, inputs.keep_rows).index_select(1, inputs.keep_columns) for t in inputs.tensors]
