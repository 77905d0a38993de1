"""The native operations as PyTorch operators: the only file that sees an address.

Every operator allocates its outputs and its workspace with torch, hands their addresses to `_core`, and changes
none of its inputs. The shapes of the outputs follow from those of the inputs alone, so the operators trace under
torch.compile and torch.export.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch  # before _core: the OpenMP runtime that torch has loaded then serves both
from torch import Tensor

from kddp_ext import reference

try:
    from kddp_ext import _core
except ImportError as error:
    raise ImportError(
        "kddp_ext: the native module _core cannot be imported. Install the package (pip install .), and start Python "
        "outside of its source folder, which has no compiled module and would be found first"
    ) from error

# Codes of csrc/include/kddp/types.h.
ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STATISTICS_ROWS = 5
_ABSENT = (0, 0, 0)

_library = torch.library.Library("kddp", "DEF")
_library.define(
    "kd_l1_loss(Tensor student_logits, Tensor? teacher_logits, Tensor? labels, Tensor[] activations, "
    "float temperature, float alpha, float[] l1_weights, float label_smoothing, int ignore_index, "
    "bool logits_gradient, bool activation_gradients, bool scaled_gradients, bool statistics) "
    "-> (Tensor loss, Tensor terms, Tensor statistics, Tensor logits_gradient, Tensor[] activation_gradients)"
)
_library.define("neuron_statistics(Tensor activation) -> Tensor")
_library.define(
    "gather_slices(Tensor[] tensors, Tensor? keep_rows, Tensor? keep_columns, int rows, int columns, "
    "Tensor? pruned_columns, Tensor? pruned_means) -> (Tensor[], Tensor)"
)

LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]


def _rows_side_by_side(matrix: Tensor) -> Tensor:
    """The matrix itself where the kernels can read it (any stride between rows), else a contiguous copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def _matrix(matrix: Tensor) -> tuple[int, int, int]:
    return (matrix.data_ptr(), ELEMENT_TYPES[matrix.dtype], matrix.stride(0))


def _workspace(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _loss_outputs(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    _labels: Tensor | None,
    activations: Sequence[Tensor],
    *settings: Any,
) -> LossOutputs:
    """Outputs of `kd_l1_loss` for its arguments, not yet filled. What is not wanted is empty."""
    logits_gradient, activation_gradients, _, statistics = settings[-4:]
    dtypes = [x.dtype for x in (student_logits, teacher_logits, *activations) if x is not None]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    device = student_logits.device
    sums = (_STATISTICS_ROWS, sum([a.shape[1] for a in activations])) if statistics else (0,)
    return (
        torch.empty((), dtype=dtype, device=device),
        torch.empty(4, dtype=dtype, device=device),
        torch.empty(sums, dtype=torch.float64, device=device),
        _contiguous_like(student_logits) if logits_gradient else student_logits.new_empty(0),
        [_contiguous_like(a) for a in activations] if activation_gradients else [],
    )


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor],
    temperature: float,
    alpha: float,
    l1_weights: Sequence[float],
    label_smoothing: float,
    ignore_index: int,
    logits_gradient: bool,
    activation_gradients: bool,
    scaled_gradients: bool,
    statistics: bool,
) -> LossOutputs:
    flags = (logits_gradient, activation_gradients, scaled_gradients, statistics)
    outputs = _loss_outputs(student_logits, teacher_logits, labels, activations, *flags)
    loss, terms, gathered, gradient, of_activations = outputs
    # Bound to names, for a copy must outlive the call that is given its address.
    student = _rows_side_by_side(student_logits)
    teacher = None if teacher_logits is None else _rows_side_by_side(teacher_logits)
    labels = None if labels is None else labels.contiguous()
    readable = [_rows_side_by_side(a) for a in activations]
    _core.kd_l1_loss(
        student.shape[0],
        student.shape[1],
        _matrix(student),
        _ABSENT if teacher is None else _matrix(teacher),
        0 if labels is None else labels.data_ptr(),
        _layers(readable, l1_weights, of_activations, gathered if statistics else None),
        gathered.shape[-1],
        temperature,
        alpha,
        label_smoothing,
        ignore_index,
        scaled_gradients,
        gradient.data_ptr() if logits_gradient else 0,
        ELEMENT_TYPES[loss.dtype],
        loss.data_ptr(),
        terms.data_ptr(),
        _workspace,
        torch.get_num_threads(),
    )
    return outputs


_Layer = tuple[tuple[int, int, int], int, float, int, int]


def _layers(
    activations: Sequence[Tensor],
    l1_weights: Sequence[float],
    gradients: Sequence[Tensor],
    statistics: Tensor | None,
) -> list[_Layer]:
    """What `_core` wants to know of each layer; its statistics are columns of the one block `statistics`."""
    layers = []
    column = 0
    for index, activation in enumerate(activations):
        neurons = activation.shape[1]
        gradient = gradients[index].data_ptr() if gradients else 0
        block = 0 if statistics is None else statistics.data_ptr() + column * statistics.element_size()
        layers.append((_matrix(activation), neurons, l1_weights[index], gradient, block))
        column += neurons
    return layers


def _neuron_statistics(activation: Tensor) -> Tensor:
    readable = _rows_side_by_side(activation)
    statistics = activation.new_empty((_STATISTICS_ROWS, activation.shape[1]), dtype=torch.float64)
    unused = torch.empty(5, dtype=torch.float64)  # the loss of nothing
    _core.kd_l1_loss(
        activation.shape[0], 0, _ABSENT, _ABSENT, 0, _layers([readable], [0.0], [], statistics), activation.shape[1],
        1.0, 0.0, 0.0, 0, False, 0, ELEMENT_TYPES[unused.dtype], unused.data_ptr(), unused[1:].data_ptr(), _workspace,
        torch.get_num_threads(),
    )  # fmt: skip
    return statistics


def _neuron_statistics_fake(activation: Tensor) -> Tensor:
    return activation.new_empty((_STATISTICS_ROWS, activation.shape[1]), dtype=torch.float64)


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
    _core.gather_slices(
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
        _core.pruned_contribution(
            weight.data_ptr(), weight.dtype == torch.float64, columns, blocks[0][2], rows_address, shift.shape[0],
            pruned_columns.data_ptr(), pruned_columns.shape[0], pruned_means.data_ptr(), shift.data_ptr(),
        )  # fmt: skip
    return outputs


_library.impl("kd_l1_loss", _kd_l1_loss, "CPU")
_library.impl("neuron_statistics", _neuron_statistics, "CPU")
_library.impl("gather_slices", _gather_slices, "CPU")
torch.library.register_fake("kddp::kd_l1_loss", _loss_outputs, lib=_library)
torch.library.register_fake("kddp::neuron_statistics", _neuron_statistics_fake, lib=_library)
torch.library.register_fake("kddp::gather_slices", _sliced_outputs, lib=_library)

# Bound once: looking an operator up by its name costs more than a small batch's loss.
kd_l1_loss = torch.ops.kddp.kd_l1_loss.default
_neuron_statistics_operator = torch.ops.kddp.neuron_statistics.default
_gather_slices_operator = torch.ops.kddp.gather_slices.default


def is_native(device: torch.device) -> bool:
    """Whether this build has kernels for tensors on `device`."""
    return device.type == "cpu"


def build_info() -> dict[str, object]:
    """What was built and what serves this process.

    Returns:
        cpu: the instruction set in use (set the environment variable KDDP_CPU_ISA before the first call to choose
        another), cuda: whether the CUDA kernels were built, compiler: what built the native module.
    """
    return {"cpu": _core.instruction_set(), "cuda": False, "compiler": _core.compiler}


def neuron_statistics(activation: Tensor) -> Tensor:
    """Sums over the samples of an activation, a column each neuron.

    Args:
        activation: (N, H) float32, float64, bfloat16 or float16, with any strides.

    Returns:
        (5, H) float64: Σ|a|, Σa, Σa², the count of nonzeros, max|a|.
    """
    if not is_native(activation.device):
        return reference.neuron_statistics(activation)
    statistics: Tensor = _neuron_statistics_operator(activation.detach())
    return statistics


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
