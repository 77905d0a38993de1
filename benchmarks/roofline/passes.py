"""The modelled passes, by this package and by eager PyTorch, on any device."""

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
    """The needed bytes of a forward that computes the gradients, including the labels."""
    return needed_bytes(shape) + 8 * shape.rows


def backward_bytes(shape: Shape) -> int:
    """The needed bytes of scaling the gradients: each is read and written."""
    return 2 * gradient_bytes(shape)


def loss_passes(inputs: Inputs) -> tuple[Run, Run, Run]:
    """Forward, backward with a loss scale, and the usual backward of this package, to be called in this order."""
    return _passes(inputs, lambda: fused(inputs))


def eager_passes(inputs: Inputs) -> tuple[Run, Run, Run]:
    """The same passes in plain PyTorch."""
    return _passes(inputs, lambda: formulas.loss(formulas.forward_kl, *inputs))


def _passes(inputs: Inputs, loss: Callable[[], Tensor]) -> tuple[Run, Run, Run]:
    values: list[Tensor] = []

    def backward(scale: float, retain_graph: bool) -> object:
        value = values[0]
        return torch.autograd.grad(value, inputs.leaves, torch.full_like(value, scale), retain_graph=retain_graph)

    return lambda: values.append(loss()), lambda: backward(2.0, True), lambda: backward(1.0, False)


class Layer(NamedTuple):
    """A linear layer, with its gradient and two moments, that loses half of its neurons and inputs."""

    rows: int
    columns: int
    tensors: int = 4
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.rows}×{self.columns}, half of both, {self.tensors} tensors"


def compaction_bytes(layer: Layer) -> int:
    """The needed bytes of gathering half of the rows and columns: elements read and written, and indices."""
    rows, columns = layer.rows // 2, layer.columns // 2
    return 2 * layer.tensors * rows * columns * layer.dtype.itemsize + 8 * (rows + columns)


class LayerInputs(NamedTuple):
    """The tensors of a layer, and the rows and columns to keep."""

    tensors: Sequence[Tensor]
    keep_rows: Tensor
    keep_columns: Tensor


def make_layer(layer: Layer, device: str = "cpu") -> LayerInputs:
    """Tensors of ones, and random halves that are the same at every call."""
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
    """Gathers all tensors by this package, in one call, as a prune does."""
    rows, columns = inputs.tensors[0].shape
    keeps = inputs.keep_rows, inputs.keep_columns
    return ops.gather_slices(inputs.tensors, *keeps, rows=rows, columns=columns, indices_in_range=True)[0]


def eager_compaction(inputs: LayerInputs) -> list[Tensor]:
    """Gathers rows, then columns, of each tensor by PyTorch."""
    return [t.index_select(0, inputs.keep_rows).index_select(1, inputs.keep_columns) for t in inputs.tensors]
