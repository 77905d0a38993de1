"""Taking kept rows and columns out of tensors as an operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kddp_ext import reference
from kddp_ext.ops.library import core, is_native, library

library.define(
    "gather_slices(Tensor[] tensors, Tensor? keep_rows, Tensor? keep_columns, int rows, int columns, "
    "Tensor? pruned_columns, Tensor? pruned_means) -> (Tensor[], Tensor)"
)


def _sliced_outputs(
    tensors: Sequence[Tensor],
    keep_rows: Tensor | None,
    keep_columns: Tensor | None,
    rows: int,
    columns: int,
    pruned_columns: Tensor | None,
    pruned_means: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Outputs of `gather_slices`, not yet filled."""
    kept_rows = rows if keep_rows is None else keep_rows.shape[0]
    kept_columns = columns if keep_columns is None else keep_columns.shape[0]
    shift = tensors[0].new_zeros(kept_rows, dtype=torch.float64)
    shapes = [reference.sliced_shape(t, rows, columns, kept_rows, kept_columns) for t in tensors]
    return [t.new_empty(shape) for t, shape in zip(tensors, shapes, strict=True)], shift


def _gather_slices(
    tensors: Sequence[Tensor],
    keep_rows: Tensor | None,
    keep_columns: Tensor | None,
    rows: int,
    columns: int,
    pruned_columns: Tensor | None,
    pruned_means: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    outputs = _sliced_outputs(tensors, keep_rows, keep_columns, rows, columns, pruned_columns, pruned_means)
    targets, shift = outputs
    sources = [t.contiguous() for t in tensors]
    blocks = [
        (source.data_ptr(), target.data_ptr(), source.numel() // (rows * columns), source.element_size())
        for source, target in zip(sources, targets, strict=True)
    ]
    kept_columns = columns if keep_columns is None else keep_columns.shape[0]
    rows_address = 0 if keep_rows is None else keep_rows.data_ptr()
    columns_address = 0 if keep_columns is None else keep_columns.data_ptr()
    core.gather_slices(
        blocks,
        rows,
        columns,
        rows_address,
        shift.shape[0],
        columns_address,
        kept_columns,
        torch.get_num_threads(),
    )
    if pruned_columns is not None and pruned_means is not None:
        weight = sources[0] if sources[0].dtype == torch.float64 else sources[0].float()
        core.pruned_contribution(
            weight.data_ptr(), weight.dtype == torch.float64, columns, blocks[0][2], rows_address, shift.shape[0],
            pruned_columns.data_ptr(), pruned_columns.shape[0], pruned_means.data_ptr(), shift.data_ptr(),
        )  # fmt: skip
    return outputs


library.impl("gather_slices", _gather_slices, "CPU")
torch.library.register_fake("kddp::gather_slices", _sliced_outputs, lib=library)

_gather_slices_operator = torch.ops.kddp.gather_slices.default


def gather_slices(
    tensors: Sequence[Tensor],
    keep_rows: Tensor | None,
    keep_columns: Tensor | None,
    *,
    rows: int,
    columns: int,
    pruned_columns: Tensor | None = None,
    pruned_means: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Take the kept rows and columns out of several tensors in one call: a parameter, its gradient, its moments.

    Args:
        tensors: each is seen as a (rows, columns, inner) block with inner = numel / (rows · columns); any dtype.
        keep_rows: int64 indices of the rows to keep, in their new order; None keeps all.
        keep_columns: the same of the columns.
        rows: rows of each block; for a vector its length.
        columns: columns of each block; for a vector 1.
        pruned_columns: (P,) int64, columns whose mean contribution is wanted.
        pruned_means: (P,) float64, the mean of what those columns are multiplied by.

    Returns:
        The smaller tensors, contiguous, with as many dimensions as before; and (kept rows,) float64:
        Σ_p tensors[0][row, p, :].sum() · pruned_means[p], or zeros.

    Raises:
        ValueError: an index is outside its range, or a tensor is no such block.
    """
    for number, tensor in enumerate(tensors):
        if rows * columns == 0 or tensor.numel() % (rows * columns):
            raise ValueError(
                f"tensors[{number}]: expected a multiple of {rows} x {columns} elements, got shape "
                f"{tuple(tensor.shape)}"
            )
    for name, index, size in [
        ("keep_rows", keep_rows, rows),
        ("keep_columns", keep_columns, columns),
        ("pruned_columns", pruned_columns, columns),
    ]:
        _check_index(name, index, size)
    native = all(is_native(t.device) for t in tensors)
    if not native or not tensors:
        return reference.gather_slices(
            tensors, keep_rows, keep_columns, rows=rows, columns=columns,
            pruned_columns=pruned_columns, pruned_means=pruned_means,
        )  # fmt: skip
    gathered, shift = _gather_slices_operator(
        [t.detach() for t in tensors], keep_rows, keep_columns, rows, columns, pruned_columns, pruned_means
    )
    return list(gathered), shift


def _check_index(name: str, index: Tensor | None, size: int) -> None:
    if index is None:
        return
    if index.dtype != torch.int64 or index.dim() != 1 or not index.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous vector of int64, got {index.dtype} of shape {tuple(index.shape)}"
        )
    lowest, highest = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
    if lowest < 0 or highest >= size:
        raise ValueError(f"{name}: expected indices from 0 to {size - 1}, got {lowest} to {highest}")
