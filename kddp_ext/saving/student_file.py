"""A student on disk: its tensors, what was pruned of it, and nothing that runs code when it is read.

The file is a safetensors file. Its metadata holds the format, its version, the pruning history and the user's
own metadata, so that a constructor and the file are enough to rebuild the student.
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
from kddp_ext.pruning.tracing.graph import unwrapped

FORMAT, VERSION = "kddp_ext.student", "1"
_MOST_METADATA = 2**22  # characters of JSON

Path = str | os.PathLike[str]
Student = TypeVar("Student", bound=nn.Module)


class StudentHeader(TypedDict):
    """What `read_student_header` returns, which says more of it."""

    version: str
    history: str
    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    sha256: str | None


def save_student(
    path: Path, model: nn.Module, history: PruningHistory, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a student to `path`, whole or not at all.

    Args:
        path: the file, by custom `*.safetensors`.
        model: the student as it is now.
        history: `pruner.history`; `PruningHistory({})` for a student that was never pruned.
        metadata: anything of the user's, as strings.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the model is not of the widths that the history leads to.
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
        if weight is None or weight.shape[0] != width:
            found = "no such layer" if weight is None else f"{weight.shape[0]} neurons"
            raise ValueError(f"history: it leads to {width} neurons in {layer}, and the model has {found}")
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "history": history.to_json(),
        "metadata": json.dumps(metadata),
    }
    header["sha256"] = _digest(header["history"], metadata, tensors)
    content = safetensors.torch.save(tensors, header)
    atomic_write(path, lambda file: file.write(content))


def load_student(path: Path, constructor: Callable[[], Student], example_inputs: tuple[Any, ...]) -> Student:
    """Rebuild a student: construct it at its original widths, prune it as it was pruned, load its tensors.

    Args:
        path: a file that `save_student` wrote.
        constructor: makes the model as it was before any pruning.
        example_inputs: positional arguments for the model's forward, as for `DynamicPruner`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no student, or the constructor makes another architecture.
    """
    header = read_student_header(path)
    saved = _tensors(path)
    if header["sha256"] not in (None, _digest(header["history"], header["metadata"], saved)):
        raise ValueError(f"{path}: the file is damaged: its content does not match its sha256")
    model = constructor()
    if not isinstance(model, nn.Module):
        raise TypeError(f"constructor: expected it to return a torch.nn.Module, got {type(model).__name__}")
    try:
        PruningHistory.from_json(header["history"]).replay(model, example_inputs)
    except ValueError as error:
        raise ValueError(f"{path}: the student does not fit the constructor's model: {error}") from error
    made = model.state_dict()
    for name in {**made, **saved}:
        if _description(made.get(name)) != _description(saved.get(name)):
            raise ValueError(
                f"{path}: the constructor's model has {_description(made.get(name))} as {name}, the file has "
                f"{_description(saved.get(name))}"
            )
    model.load_state_dict(saved, strict=True)
    return model


def read_student_header(path: Path) -> StudentHeader:
    """What a student's file says of itself, without reading its tensors.

    Args:
        path: a file that `save_student` wrote.

    Returns:
        The format's "version"; the "history", JSON text for `PruningHistory.from_json`; the "metadata", the user's
        strings; the "tensors", (dtype, shape) by name, such as ("F32", (128, 784)); the "sha256" of all these with the
        tensors' values, which `load_student` compares, None in a file of an earlier version.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no student.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError(f"{path}: expected a student's safetensors file, and it is no regular file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            tensors = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: expected a student's safetensors file, and it is none or is damaged: {error}"
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a safetensors file of format {FORMAT!r}, got {header.get('format')!r}")
    if header.get("version") != VERSION:
        raise ValueError(f"{path}: expected version {VERSION} of the format, got {header.get('version')!r}")
    try:
        PruningHistory.from_json(header["history"])
        metadata = parse_json(header["metadata"], most=_MOST_METADATA)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: its header is damaged: {error}") from error
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{path}: its header is damaged: expected metadata as strings by name")
    return {
        "version": header["version"],
        "history": header["history"],
        "metadata": metadata,
        "tensors": tensors,
        "sha256": header.get("sha256"),
    }


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: its tensors cannot be read: {error}") from error
    return tensors


def _digest(history: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    return hash_json({"history": history, "metadata": dict(metadata), "tensors": hash_tensors(tensors)})


def _description(value: Tensor | None) -> str:
    if value is None:
        return "nothing"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
