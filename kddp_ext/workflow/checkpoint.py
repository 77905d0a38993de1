"""Checkpoints: written whole or not at all, read without running anything a file says."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kddp_ext.files import atomic_write
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.job import Stage

_VERSION = 1
_FIELDS = {"version", "stage", "architecture", "model", "optimizer", "pruner", "history", "epochs"}


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, made of tensors and plain values, to `path`.

    Raises:
        OSError: the file can't be written, for example on a full disk. The former checkpoint still stands.
    """
    # Serialised in memory first, so that torch.save never sees (and rewords) an error of the disk.
    buffer = io.BytesIO()
    torch.save({"version": _VERSION, **state}, buffer)
    atomic_write(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path, stage: Stage) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote for `stage`, with weights_only=True.

    Raises:
        WorkflowError: the file is damaged, not a checkpoint, or one of another stage or version.
        OSError: it can't be read.
    """
    advice = f"Delete it to train the stage {stage} again; other stages keep what they have."
    if not path.is_file():
        raise WorkflowError(f"{path} is damaged or not a checkpoint (it is no file). {advice}")
    content = path.read_bytes()
    try:
        _require_intact(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive may fail in any way, as any kind of exception
        reason = str(error).strip().split("\n", 1)[0]
        raise WorkflowError(f"{path} is damaged or not a checkpoint ({reason}). {advice}") from error
    if not isinstance(state, dict) or not state.keys() >= _FIELDS:
        raise WorkflowError(f"{path} is not a checkpoint of kddp. {advice}")
    if state["version"] != _VERSION:
        raise WorkflowError(f"{path} has version {state['version']}, this kddp_ext reads {_VERSION}. {advice}")
    if state["stage"] != stage:
        raise WorkflowError(f"{path} belongs to the stage {state['stage']}. {advice}")
    return state


def _require_intact(content: bytes) -> None:
    """Raise unless every record of the archive has the checksum it was written with: torch.load looks at none."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def architecture(model: nn.Module) -> dict[str, list[int]]:
    """Names and shapes of all weights and buffers: what two models must share to exchange them."""
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def check_architecture(path: Path, saved: dict[str, list[int]], model: nn.Module) -> None:
    """Raise WorkflowError, naming the first difference, unless a checkpoint's architecture is `model`'s."""
    expected = architecture(model)
    for name in sorted(saved.keys() | expected.keys()):
        here, there = expected.get(name), saved.get(name)
        if here != there:
            raise WorkflowError(
                f"{path} is a checkpoint of another architecture: {name} has {_shape(there)} in the file, "
                f"{_shape(here)} in the model"
            )


def _shape(shape: list[int] | None) -> str:
    return "no place" if shape is None else f"shape {tuple(shape)}"
