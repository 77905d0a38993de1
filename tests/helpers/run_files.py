"""What a run leaves on disk, in a form that == compares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from kddp_ext.files import leftovers
from kddp_ext.saving.student_file import read_student_header


def ending(folder: Path) -> dict[str, Any]:
    """The content of every file in the folders of `folder` by path, without times and what processes printed."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    return {
        str(path.relative_to(folder)): content_of(path)
        for path in files
        if path.name != "timing.md" and not path.parent.name.startswith("output")
    }


def content_of(path: Path) -> Any:
    """The content of one file, without times."""
    if path.name == "metrics.jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "checkpoint.pt":
        state = torch.load(path, weights_only=True)
        return comparable({**state, "epochs": [without_times(epoch) for epoch in state["epochs"]]})
    if path.name in ("student.safetensors", "best.safetensors"):
        return (comparable(safetensors.torch.load_file(path)), read_student_header(path))
    if path.suffix == ".safetensors":
        return comparable(safetensors.torch.load_file(path))
    return path.read_bytes()


def without_times(epoch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in epoch.items() if key != "seconds"}


def comparable(value: Any) -> Any:
    """Replace tensors by dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return (str(value.dtype), tuple(value.shape), flat.numpy().tobytes())
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(item) for item in value]
    return value


def differences(left: dict[str, Any], expected: dict[str, Any]) -> Sequence[str]:
    """The names of the entries that differ."""
    return [name for name in expected.keys() | left.keys() if left.get(name) != expected.get(name)]


def unfinished_files(folder: Path) -> list[Path]:
    """Files and folders that were not renamed into place."""
    return [left for each in (folder, *folder.rglob("*")) if each.is_dir() for left in leftovers(each)]
