"""Single launches of the CUDA kernels on the emulator, for which every buffer is declared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from backends import Emulated
from torch import Tensor

from kddp_ext import LossSettings
from kddp_ext.ops.library import ELEMENT_TYPES

ABSENT = (0, 0, 0)


def aligned(shape: tuple[int, ...], dtype: torch.dtype, *, fill: float | None = None) -> Tensor:
    """A tensor at a multiple of 256 bytes, as on a GPU. Without `fill`, its bytes are 0xFF, which is NaN."""
    size = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    memory = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
    start = -memory.data_ptr() % 256
    tensor = memory[start : start + size].view(dtype).view(shape)
    return tensor if fill is None else tensor.fill_(fill)


def filled(values: Tensor) -> Tensor:
    """The same values at a multiple of 256 bytes."""
    return aligned(tuple(values.shape), values.dtype).copy_(values)


def expected_gradient(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """The gradient of `loss_launch`'s default loss with respect to the student's logits, by PyTorch in float64."""
    ignored, valid = labels == -100, (labels >= 0) & (labels < student.shape[1])
    leaf = student.double().requires_grad_()
    p = (teacher.double() / temperature).softmax(1)
    divergences = torch.nn.functional.kl_div((leaf / temperature).log_softmax(1), p, reduction="none").sum(1)
    kd = temperature**2 * divergences[valid].sum()
    ce = torch.nn.functional.cross_entropy(leaf[valid], labels[valid], reduction="sum")
    (gradient,) = torch.autograd.grad((0.9 * kd + 0.1 * ce) / max(1, int((~ignored).sum())), leaf)
    gradient[~ignored & ~valid] = torch.nan
    return gradient


def extent(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


@dataclass
class Launch:
    """One call of the module: its arguments, and its buffers, all of which the emulator must see accessed."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    arguments: tuple[Any, ...]
    operation: str
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    """For inputs that are read in part or are not contiguous: the contiguous parts that are read."""

    @property
    def read(self) -> list[Tensor]:
        return [part for name, tensor in self.inputs.items() for part in self.parts.get(name, [tensor])]

    @property
    def needed_bytes(self) -> int:
        """Bytes that are read and written, each counted once."""
        return sum(x.numel() * x.element_size() for x in (*self.read, *self.outputs.values()))

    @property
    def needed_sector_bytes(self) -> int:
        """Bytes of the sectors that contain the needed bytes."""
        sectors = 0
        for tensors in (self.read, self.outputs.values()):
            touched = set()
            for x in tensors:
                touched.update(range(x.data_ptr() // 32, (x.data_ptr() + x.numel() * x.element_size() - 1) // 32 + 1))
            sectors += len(touched)
        return 32 * sectors

    def run(self, emulated: Emulated) -> dict[str, Any]:
        """Runs the call, with all inputs and outputs needed and nothing else allowed.

        Returns the report of the call's last kernel. Before the loss's, one sets counters to 0 and counts labels.

        Raises:
            RuntimeError: The emulator found a fault.
        """
        emulator = emulated.emulator
        kernel = "kd_l1_loss_by_rows" if self.operation == "kd_l1_loss" else ""
        emulator.last_error()  # resets the error of another test
        emulator.clear()
        emulator.allow_everything()
        for name, tensor in self.inputs.items():
            emulator.allow(tensor, writable=False, name=name, size=extent(tensor))
        for name, tensor in self.outputs.items():
            emulator.allow(tensor, writable=True, name=name)
        for tensor in self.read:
            emulator.needs(tensor, is_store=False, kernel=kernel)
        for tensor in self.outputs.values():
            emulator.needs(tensor, is_store=True, kernel=kernel)

        def allocate(size: int) -> Tensor:
            workspace = aligned((size,), torch.uint8)
            if size:
                emulator.allow(workspace, writable=True, name="workspace")
            return workspace

        last = (allocate,) if kernel else ()
        try:
            getattr(emulated.module, self.operation)(*self.arguments, *last, emulated.place())
        finally:
            emulator.allow_everything()
        *_, report = emulator.reports()
        return report


def _matrix(matrix: Tensor | None) -> tuple[int, int, int]:
    return ABSENT if matrix is None else (matrix.data_ptr(), ELEMENT_TYPES[matrix.dtype], matrix.stride(0))


def loss_launch(
    student: Tensor | None,
    teacher: Tensor | None,
    labels: Tensor | None,
    activations: list[Tensor],
    *,
    statistics: bool = False,
    **settings: Any,
) -> Launch:
    """The fused loss as in training, with gradients, and these settings of `LossSettings`.

    Without a student: the activations alone.
    """
    given = {"student": student, "teacher": teacher, "labels": labels}
    soft = labels is not None and labels.is_floating_point()
    inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
    inputs |= {f"activation {i}": tensor for i, tensor in enumerate(activations)}
    outputs = {"loss": aligned((), torch.float32)}
    if student is not None:
        outputs["terms"] = aligned((4,), torch.float32)
        outputs["logits gradient"] = aligned(tuple(student.shape), student.dtype)
    layers = []
    for i, activation in enumerate(activations):
        outputs[f"activation gradient {i}"] = aligned(tuple(activation.shape), activation.dtype)
        if statistics:
            outputs[f"statistics {i}"] = aligned((5, activation.shape[1]), torch.float64)
        of = (
            outputs[f"activation gradient {i}"].data_ptr(),
            outputs[f"statistics {i}"].data_ptr() if statistics else 0,
        )
        samples, neurons = activation.shape
        layers.append((_matrix(activation), samples, neurons, float(max(samples, 1)), 1e-4, *of))
    rows = (student if student is not None else activations[0]).shape[0]
    arguments = (
        rows, 0 if student is None else student.shape[1], _matrix(student), _matrix(teacher),
        0 if labels is None or soft else labels.data_ptr(), _matrix(labels) if soft else ABSENT, 0, 0,
        layers, activations[0].shape[1] if activations else 0,
        4.0, 0.9, 0.0, *LossSettings(**settings).constants()[:-1], False,
        0 if student is None else outputs["logits gradient"].data_ptr(),
        ELEMENT_TYPES[torch.float32], outputs["loss"].data_ptr(),
        0 if student is None else outputs["terms"].data_ptr(), 0,
    )  # fmt: skip
    parts = {name: list(x) for name, x in inputs.items() if not x.is_contiguous()}
    return Launch(inputs, outputs, arguments, "kd_l1_loss", parts)


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Starts and ends of the runs of consecutive indices."""
    starts = [i for k, i in enumerate(indices) if k == 0 or i != indices[k - 1] + 1]
    ends = [i + 1 for k, i in enumerate(indices) if k == len(indices) - 1 or i + 1 != indices[k + 1]]
    return list(zip(starts, ends, strict=True))


def compaction_launch(tensors: list[Tensor], keep_rows: Tensor | None, keep_columns: Tensor | None) -> Launch:
    """The gather of matrices of one shape."""
    rows, columns = tensors[0].shape
    kept_rows = list(range(rows)) if keep_rows is None else keep_rows.tolist()
    kept_columns = list(range(columns)) if keep_columns is None else keep_columns.tolist()
    kept = len(kept_rows), len(kept_columns)
    indices = {"keep_rows": keep_rows, "keep_columns": keep_columns}
    inputs = {name: index for name, index in indices.items() if index is not None}
    inputs |= {f"matrix {i}": tensor for i, tensor in enumerate(tensors)}
    outputs = {f"gathered {i}": aligned(kept, tensor.dtype) for i, tensor in enumerate(tensors)}
    parts = {
        f"matrix {i}": [tensor[row, start:end] for row in kept_rows for start, end in _runs(kept_columns)]
        for i, tensor in enumerate(tensors)
    }
    blocks = [
        (source.data_ptr(), columns * source.element_size(), source.element_size(), target.data_ptr())
        for source, target in zip(tensors, outputs.values(), strict=True)
    ]
    row_address, column_address = (0 if index is None else index.data_ptr() for index in indices.values())
    arguments = (blocks, columns, row_address, kept[0], column_address, kept[1], (0, 0, 0, 0, 0))
    return Launch(inputs, outputs, arguments, "gather_slices", parts)


def scale_launch(gradients: list[Tensor], factor: float) -> Launch:
    """Every gradient times a scalar."""
    inputs = {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}
    outputs = {f"scaled {i}": aligned(tuple(x.shape), x.dtype) for i, x in enumerate(gradients)}
    tensors = [
        (source.data_ptr(), target.data_ptr(), source.numel(), ELEMENT_TYPES[source.dtype], 1.0)
        for source, target in zip(gradients, outputs.values(), strict=True)
    ]
    inputs["scalar"] = aligned((), torch.float32, fill=factor)
    arguments = (tensors, inputs["scalar"].data_ptr(), ELEMENT_TYPES[torch.float32])
    return Launch(inputs, outputs, arguments, "scale")


def products_launch(activation: Tensor, gradient: Tensor, mean: Tensor) -> Launch:
    """The gradient products of contiguous tensors (samples, runs, entries, elements)."""
    inputs = {"activation": activation, "gradient": gradient, "mean": mean}
    samples, runs, entries, after = activation.shape
    products = aligned((samples, entries), torch.float32)
    addresses = (activation.data_ptr(), gradient.data_ptr(), ELEMENT_TYPES[activation.dtype], mean.data_ptr())
    arguments = (*addresses, products.data_ptr(), samples, runs, entries, after)
    return Launch(inputs, {"products": products}, arguments, "gradient_products")
