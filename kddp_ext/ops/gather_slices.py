"""`gather_slices`, which copies the kept rows and columns of several tensors, as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kddp_ext.ops import reference
from kddp_ext.ops.library import ELEMENT_TYPES, is_native, library, native, register, sliced_shape

library.define(
    "gather_slices(Tensor[] tensors, Tensor? keep_rows, Tensor? keep_columns, int rows, int columns, "
    "Tensor? pruned_columns, Tensor? pruned_means, bool indices_in_range=False) -> (Tensor[], Tensor)"
)


class _Gather(NamedTuple):
    """The arguments of the operator, which `gather_slices` describes."""

    tensors: Sequence[Tensor]
    keep_rows: Tensor | None
    keep_columns: Tensor | None
    rows: int
    columns: int
    pruned_columns: Tensor | None
    pruned_means: Tensor | None
    indices_in_range: bool = False


def _sliced_outputs(*arguments: Any) -> tuple[list[Tensor], Tensor]:
    """The outputs of the operator, not filled yet; the shift is zero if no columns are pruned."""
    tensors, keep_rows, keep_columns, rows, columns, *_ = _Gather(*arguments)
    kept_rows = rows if keep_rows is None else keep_rows.shape[0]
    kept_columns = columns if keep_columns is None else keep_columns.shape[0]
    shift = tensors[0].new_zeros(kept_rows, dtype=torch.float64)
    shapes = [sliced_shape(t, rows, columns, kept_rows, kept_columns) for t in tensors]
    return [t.new_empty(shape) for t, shape in zip(tensors, shapes, strict=True)], shift


def _gather_slices(*arguments: Any) -> tuple[list[Tensor], Tensor]:
    call = _Gather(*arguments)
    _check(call)
    tensors, keep_rows, keep_columns, rows, columns, pruned_columns, pruned_means, _ = call
    outputs = _sliced_outputs(*call)
    targets, shift = outputs
    # This name keeps copies alive while the kernel uses their addresses.
    sources = [_readable(t, rows) for t in tensors]
    blocks = []
    for source, target in zip(sources, targets, strict=True):
        column_bytes = source.numel() // (rows * columns) * source.element_size()
        row_stride = columns * column_bytes if source.is_contiguous() else source.stride(0) * source.element_size()
        blocks.append((source.data_ptr(), row_stride, column_bytes, target.data_ptr()))
    compensation = (0, 0, 0, 0, 0)
    if pruned_columns is not None and pruned_means is not None:
        pruned = (pruned_columns.data_ptr(), pruned_columns.shape[0], pruned_means.data_ptr())
        compensation = (ELEMENT_TYPES[sources[0].dtype], *pruned, shift.data_ptr())
    module, place = native(tensors[0])
    module.gather_slices(
        blocks,
        columns,
        0 if keep_rows is None else keep_rows.data_ptr(),
        shift.shape[0],
        0 if keep_columns is None else keep_columns.data_ptr(),
        columns if keep_columns is None else keep_columns.shape[0],
        compensation,
        place,
    )
    return outputs


def _readable(tensor: Tensor, rows: int) -> Tensor:
    """The tensor itself if each of its rows is contiguous, else a contiguous copy."""
    if tensor.is_contiguous() or (tensor.shape[0] == rows and tensor[0].is_contiguous()):
        return tensor
    return tensor.contiguous()


_gather_slices_operator = register("gather_slices", _gather_slices, _sliced_outputs)


def gather_slices(
    tensors: Sequence[Tensor],
    keep_rows: Tensor | None,
    keep_columns: Tensor | None,
    *,
    rows: int,
    columns: int,
    pruned_columns: Tensor | None = None,
    pruned_means: Tensor | None = None,
    indices_in_range: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Copy the kept rows and columns of several tensors in one call: a parameter, its gradient, its moments.

    The same pass sums the mean contribution of the pruned columns of the first tensor.

    Args:
        tensors: any dtype, all arguments on one device. Each is a (rows, columns, inner) block with
            inner = numel / (rows · columns).
        keep_rows: int64 indices of the rows to keep, in their new order; None keeps all.
        keep_columns: int64 indices of the columns to keep, in their new order; None keeps all.
        rows: number of rows of each block; the length of a vector.
        columns: number of columns of each block; 1 for a vector.
        pruned_columns: (P,) int64, the columns whose mean contribution is summed. tensors[0] must then be float32,
            float64, bfloat16 or float16.
        pruned_means: (P,) float64, the mean of the values that those columns are multiplied by.
        indices_in_range: the caller knows that all indices are. Default False: their range is checked, for which the
            host waits for the GPU once for each index. True with an index out of range reads foreign memory.

    Returns:
        The smaller tensors, contiguous, with the same number of dimensions; and the shift, (kept rows,) float64:
        Σ_p tensors[0][row, p, :].sum() · pruned_means[p], or zeros without pruned columns. It is summed in float64 and
        does not depend on the number of threads. NaN and infinity in pruned columns follow IEEE 754, so an infinite
        weight with mean 0 gives NaN. Values of kept columns do not affect it.

    Raises:
        ValueError: an index is out of range, a tensor has another number of elements or another device, or
            pruned_means are not as described.
    """
    detached = [t.detach() for t in tensors]
    call = _Gather(detached, keep_rows, keep_columns, rows, columns, pruned_columns, pruned_means, indices_in_range)
    if not tensors or not all(is_native(t.device) for t in tensors):
        _check(call)
        return reference.gather_slices(*call[:-1])
    gathered, shift = _gather_slices_operator(*call)
    return list(gathered), shift


def _check(call: _Gather) -> None:
    tensors, rows, columns = call.tensors, call.rows, call.columns
    for number, tensor in enumerate(tensors):
        _check_device(f"tensors[{number}]", tensor, tensors)
        if rows * columns == 0 or tensor.numel() % (rows * columns):
            raise ValueError(
                f"tensors[{number}]: expected a multiple of {rows} x {columns} elements, got shape "
                f"{tuple(tensor.shape)}"
            )
    for name, index, size in (
        ("keep_rows", call.keep_rows, rows),
        ("keep_columns", call.keep_columns, columns),
        ("pruned_columns", call.pruned_columns, columns),
    ):
        if index is not None:
            _check_vector(name, index, torch.int64)
            if not call.indices_in_range and not index.is_meta:  # a meta tensor has no values
                lowest, highest = map(int, index.aminmax()) if index.numel() else (0, 0)
                if lowest < 0 or highest >= size:
                    raise ValueError(f"{name}: expected indices from 0 to {size - 1}, got {lowest} to {highest}")
            _check_device(name, index, tensors)
    if (call.pruned_columns is None) != (call.pruned_means is None):
        raise ValueError("pruned_columns, pruned_means: expected both or neither")
    if call.pruned_columns is not None and call.pruned_means is not None:
        _check_vector("pruned_means", call.pruned_means, torch.float64, call.pruned_columns.shape)
        _check_device("pruned_means", call.pruned_means, tensors)
        if tensors and tensors[0].dtype not in ELEMENT_TYPES:
            names = ", ".join(str(dtype) for dtype in ELEMENT_TYPES)
            raise ValueError(f"tensors[0]: expected one of {names} with pruned_means, got {tensors[0].dtype}")


def _check_device(name: str, tensor: Tensor, tensors: Sequence[Tensor]) -> None:
    """The kernels get addresses, and would read one of another device as if it were on theirs."""
    if tensors and tensor.device != tensors[0].device:
        raise ValueError(f"{name}: expected device {tensors[0].device} as tensors[0], got {tensor.device}")


def _check_vector(name: str, vector: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> None:
    wrong_shape = vector.dim() != 1 if shape is None else vector.shape != shape
    if vector.dtype != dtype or wrong_shape or not vector.is_contiguous():
        length = "" if shape is None else f"{shape[0]} "
        raise ValueError(
            f"{name}: expected a contiguous vector of {length}{str(dtype).removeprefix('torch.')}, got {vector.dtype} "
            f"of shape {tuple(vector.shape)}"
        )
