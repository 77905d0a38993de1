"""Saves a student as a safetensors file: its tensors and its pruning history. Reading it runs no code from the file.

The metadata of the file holds the format, its version, the history and the user's own metadata. The constructor of the
model and the file are enough to rebuild the student.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor, nn

from kddp_ext.files import atomic_write, hash_json, hash_tensors, parse_json
from kddp_ext.pruning.history import PruningHistory
from kddp_ext.pruning.tracing.recording import unwrapped
from kddp_ext.pruning.tracing.structure import count_neurons

FORMAT, VERSION = "kddp_ext.student", "1"
_MOST_METADATA = 2**22  # characters of JSON

Path = str | os.PathLike[str]
Student = TypeVar("Student", bound=nn.Module)


class StudentHeader(TypedDict):
    """The result of `read_student_header`, described there."""

    version: str
    history: str
    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    sha256: str | None


def save_student(
    path: Path, model: nn.Module, history: PruningHistory, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a student to `path` atomically.

    Args:
        path: the file, usually `*.safetensors`.
        model: the student in its present state.
        history: `pruner.history`; `PruningHistory({})` for a student that was never pruned.
        metadata: any strings of the user's.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the model does not have the widths of the history.
        OSError: the file could not be written.
    """
    metadata = {} if metadata is None else dict(metadata)
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise TypeError(f"metadata: expected strings by name, got {metadata!r}")
    if not isinstance(history, PruningHistory):
        raise TypeError(f"history: expected a PruningHistory, got {type(history).__name__}")
    state = unwrapped(model).state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"model: {name} in its state_dict is a {type(value).__name__}; only tensors can be saved")
    for layer, width in history.widths.items():
        weight = state.get(f"{layer}.weight")
        # A layer has several rows for each head, and it may have neurons that cannot be pruned.
        if weight is None or max(weight.shape[:2]) < width:
            found = "no such layer" if weight is None else count_neurons(max(weight.shape[:2]))
            raise ValueError(f"history: it ends with {count_neurons(width)} in {layer}, but the model has {found}")
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    header = {"format": FORMAT, "version": VERSION, "history": history.to_json(), "metadata": json.dumps(metadata)}
    header["sha256"] = _hash(header["history"], metadata, tensors)
    content = safetensors.torch.save(tensors, header)
    atomic_write(path, lambda file: file.write(content))


def load_student(
    path: Path,
    constructor: Callable[[], Student],
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
) -> Student:
    """Rebuild a student: construct it at its original widths, replay its pruning, load its tensors.

    Args:
        path: a file that `save_student` wrote.
        constructor: makes the model as it was before any pruning.
        example_inputs: positional arguments for the model's forward, as for `DynamicPruner`.
        example_kwargs: keyword arguments for it. Default: none.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or not a student, or the constructor makes another architecture.
    """
    header = read_student_header(path)
    try:
        saved: dict[str, Tensor] = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: its tensors cannot be read: {error}") from error
    if header["sha256"] not in (None, _hash(header["history"], header["metadata"], saved)):
        raise ValueError(f"{path}: the file is damaged: its content does not match its sha256")
    model = constructor()
    if not isinstance(model, nn.Module):
        raise TypeError(f"constructor: expected it to return a torch.nn.Module, got {type(model).__name__}")
    try:
        PruningHistory.from_json(header["history"]).replay(model, example_inputs, example_kwargs)
    except ValueError as error:
        raise ValueError(f"{path}: the student does not fit the constructor's model: {error}") from error
    made = model.state_dict()
    for name in {**made, **saved}:
        expected, found = (_description(tensors.get(name)) for tensors in (made, saved))
        if expected != found:
            raise ValueError(f"{path}: {name} is {expected} in the constructor's model, but {found} in the file")
    model.load_state_dict(saved, strict=True)
    return model


def read_student_header(path: Path) -> StudentHeader:
    """Read the header of a student's file without its tensors.

    Args:
        path: a file that `save_student` wrote.

    Returns:
        "version" of the format; "history", JSON text for `PruningHistory.from_json`; "metadata", the user's strings;
        "tensors", (dtype, shape) by name, such as ("F32", (128, 784)); "sha256" of all these with the tensors' values,
        which `load_student` checks, or None in files of an earlier version.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or not a student.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would block
        raise ValueError(f"{path}: expected a student's safetensors file, but it is not a regular file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            tensors = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: expected a student's safetensors file, got another or damaged one: {error}"
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a safetensors file of format {FORMAT!r}, got {header.get('format')!r}")
    if header.get("version") != VERSION:
        raise ValueError(f"{path}: expected version {VERSION} of the format, got {header.get('version')!r}")
    try:
        PruningHistory.from_json(header["history"])
        metadata = parse_json(header["metadata"], most=_MOST_METADATA)
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("expected metadata as strings by name")
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: its header is damaged: {error}") from error
    return {
        "version": header["version"],
        "history": header["history"],
        "metadata": metadata,
        "tensors": tensors,
        "sha256": header.get("sha256"),
    }


def _hash(history: str, metadata: dict[str, str], tensors: Mapping[str, Tensor]) -> str:
    return hash_json({"history": history, "metadata": metadata, "tensors": hash_tensors(tensors)})


def _description(value: Tensor | None) -> str:
    return "missing" if value is None else f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
