"""Exports a student to ONNX."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from kddp_ext.files import atomic_write
from kddp_ext.pruning.tracing.recording import check_example_inputs, unchanged_modules, unwrapped

LARGEST_FILE = 2**31 - 1  # bytes: an ONNX file is one protobuf message


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: tuple[Any, ...],
    *,
    dynamic_batch: bool = True,
) -> None:
    """Write a student, pruned or not, as one ONNX file.

    The file has the model's evaluation mode (no dropout, running statistics) at its present widths. The model's mode,
    hooks and tensors stay as they are. The hooks of a pruner do not appear in the file.

    Args:
        model: the student.
        path: the file, usually `*.onnx`; its folder must exist.
        example_inputs: positional arguments for the model's forward, as for `DynamicPruner`.
        dynamic_batch: True (default): the first dimension of every input tensor is the batch, and may have any size
            when the file is run. False: all sizes are fixed to those of the example.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
        TypeError, ValueError: an argument is wrong, or the student is too large for one file (2 GiB).
        torch.onnx.ONNXProgramError: (or another error of torch) the model cannot be exported.
        OSError: the file could not be written. After any error, the previous file at `path` is intact.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"export_onnx: {' and '.join(missing)} missing; install with: pip install 'kddp_ext[onnx]'", name=missing[0]
        )
    model = unwrapped(model)
    check_example_inputs(example_inputs)
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if size > LARGEST_FILE:
        raise ValueError(f"model: its tensors take {size:,} bytes, but an ONNX file holds at most {LARGEST_FILE:,}")
    shapes = None
    if dynamic_batch:
        example_inputs, shapes = _dynamic(example_inputs)
    with unchanged_modules(model), torch.no_grad():
        model.eval()
        program = torch.onnx.export(model, example_inputs, dynamo=True, verbose=False, dynamic_shapes=shapes)
    assert program is not None  # torch returns a program where it is given no file
    content = program.model_proto.SerializeToString()
    atomic_write(path, lambda file: file.write(content))


def _dynamic(example_inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The inputs with at least two samples, because torch.export treats a size of 1 as a constant; and their shapes."""
    batch, batched = torch.export.Dim("batch"), [isinstance(each, Tensor) and each.dim() > 0 for each in example_inputs]
    inputs = [
        torch.cat([each, each]) if is_batch and len(each) == 1 else each
        for each, is_batch in zip(example_inputs, batched, strict=True)
    ]
    return tuple(inputs), tuple({0: batch} if is_batch else None for is_batch in batched)
