"""`kddp export`: a student in formats that need neither this package nor its pruning history."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor, nn

import kddp_ext
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.measure import silent_exporters
from kddp_ext.workflow.networks import logits_of
from kddp_ext.workflow.report import classes_of, input_of, say
from kddp_ext.workflow.saved_models import read_student

Compute = Callable[[Tensor], Tensor]
_IMAGES = 3  # random images of the check, another number than the example's


class _Logits(nn.Module):
    """A network of Transformers with the logits as its only output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images))


def export(
    path: Path,
    console: Console,
    *,
    onnx: Path | None = None,
    torch_export: Path | None = None,
    state_dict: Path | None = None,
    student: str = "",
) -> None:
    """Write the student in the file `path` in each format that has a file, after comparing it on random images.

    Args:
        onnx: an ONNX file; its input "images" takes any number of images.
        torch_export: a program of torch.export (.pt2).
        state_dict: the pruned tensors by name, as .safetensors, or else for torch.load.
        student: MODULE:FUNCTION for a student of the user's own.

    Raises:
        WorkflowError: `path` is no student, it cannot be exported, or the export computes something else.
        OSError: a file cannot be written.
    """
    wanted = [(onnx, _to_onnx), (torch_export, _to_program), (state_dict, _to_state_dict)]
    if not any(file for file, _ in wanted):
        raise WorkflowError("expected --onnx FILE, --torch-export FILE or --state-dict FILE")
    saved = read_student(path)
    info, model = saved.info, saved.load({"student": student}).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, info.channels, info.size, info.size, generator=generator)
    for file, write in wanted:
        if file is not None:
            say(console, f"{file}: {_checked(file, write, model, images)}")
    say(console, f"Input: {input_of(info)}")
    say(console, f"Output: logits of {classes_of(info)}")


def _with_plain_logits(model: nn.Module, images: Tensor) -> nn.Module:
    return model if isinstance(model(images), Tensor) else _Logits(model)


def _checked(
    file: Path, write: Callable[[nn.Module, Path, Tensor], Compute | None], model: nn.Module, images: Tensor
) -> str:
    """Write `file` if what is written computes the same as `model`; returns what was checked."""
    if not file.parent.is_dir():
        raise WorkflowError(f"{file}: the folder {file.parent} does not exist")
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", suffix=".partial", dir=file.parent) as folder:
        temporary = Path(folder, file.name)
        try:
            with silent_exporters():
                compute = write(model, temporary, images)
        except OSError:
            raise
        except Exception as error:  # torch's exporters raise many kinds of errors
            reason = " ".join(str(error).split())
            raise WorkflowError(f"{file}: the student cannot be exported: {reason[:300]}") from error
        size = f"{temporary.stat().st_size / 1024:,.0f} KiB"
        checked = "not checked, because onnxruntime is not installed"
        if compute is not None:
            expected, found = logits_of(model(images)), compute(images)
            difference = float((expected - found).abs().max())
            if not difference <= 1e-3 * max(1.0, float(expected.abs().max())):
                raise WorkflowError(
                    f"{file}: not written: its logits differ from the student's by up to {difference:.2g}"
                )
            checked = (
                f"checked on {_IMAGES} random images: its logits differ from the student's by at most {difference:.1g}"
            )
        os.replace(temporary, file)
    return f"{size}; {checked}"


def _to_onnx(model: nn.Module, path: Path, images: Tensor) -> Compute | None:
    model = _with_plain_logits(model, images)
    kddp_ext.export_onnx(model, path, (images[:2],))
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _to_program(model: nn.Module, path: Path, images: Tensor) -> Compute:
    model = _with_plain_logits(model, images)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model, (images[:2],), dynamic_shapes=shapes), path)
    program: Any = torch.export.load(path).module()
    return lambda images: program(images)


def _to_state_dict(model: nn.Module, path: Path, _images: Tensor) -> Compute:
    state: dict[str, Tensor] = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        path.write_bytes(safetensors.torch.save(state))
        loaded = safetensors.torch.load_file(path)
    else:
        torch.save(state, path)
        loaded = torch.load(path, weights_only=True)
    return lambda images: logits_of(torch.func.functional_call(model, loaded, (images,)))
