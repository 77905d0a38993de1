"""A table of all functions that read files from outside: valid inputs, the reader, and the errors that it may raise."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import resource
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from kddp_ext.pruning.history import PruningHistory
from kddp_ext.saving.student_file import load_student, read_student_header, save_student
from kddp_ext.workflow import datasets, teacher_logits
from kddp_ext.workflow.config import SweepConfig
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import FIGURES, RunFolder, load_checkpoint, save_checkpoint

IMAGES, IMAGE_BYTES = 3, 3072
IDX_SHAPE = (3, 2, 2)


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        name: for messages and test names.
        file: path of the file that it reads, in a folder.
        seeds: valid inputs.
        read: reads the file.
        errors: the only exceptions that it may raise.
        names: words of which the message must have one; empty for the file's name.
        slow: whether an input takes tenths of a second.
        factor, constant: it may allocate factor * size + constant bytes for a file of `size` bytes.
    """

    name: str
    file: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]
    names: tuple[str, ...] = ()
    slow: bool = False
    factor: int = 64
    constant: int = 2**19


def examples(count: int) -> settings:
    """Settings with this number of examples, or KDDP_FUZZ_EXAMPLES if that is set."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    wanted = int(os.environ.get("KDDP_FUZZ_EXAMPLES", "0")) or count
    return settings(max_examples=wanted, deadline=None, suppress_health_check=quiet)


class FoundError(AssertionError):
    """A reader broke a promise of docs/hardening.md."""


def check(target: Target, content: bytes, folder: Path) -> str:
    """Let a target read `content`.

    Returns:
        "read" or "refused".

    Raises:
        FoundError: the target raised another exception than its errors, its message does not name the file or cannot
            be printed, or it allocated too much memory (of Python and NumPy, or of the process).
    """
    path = folder / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        target.read(path)
        outcome, message = "read", path.name
    except target.errors as error:
        outcome, message = "refused", str(error)
    except BaseException as error:
        raise FoundError(f"{target.name} raised {type(error).__name__}: {error}") from error
    finally:
        allocated = tracemalloc.get_traced_memory()[1] - before
        if started:
            tracemalloc.stop()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident)
    bound = target.factor * len(content) + target.constant
    if allocated > bound or grown > bound + 2**27:  # allocators request memory in larger pieces
        raise FoundError(f"{target.name} allocated {allocated} bytes, the process grew by {grown}, bound {bound}")
    message.encode("utf-8")
    if not any(name in message for name in target.names or (path.name,)):
        raise FoundError(f"{target.name} does not name its file: {message}")
    return outcome


# Valid inputs


def batch() -> dict[bytes, Any]:
    pixels = np.arange(IMAGES * IMAGE_BYTES).astype(np.uint8).reshape(IMAGES, IMAGE_BYTES)
    return {b"data": pixels, b"labels": [1, 2, 9], b"filenames": [b"cat.png", b"a\\b.png", b"\xff\n"]}


def pickled_batches() -> list[bytes]:
    return [pickle.dumps(batch(), protocol) for protocol in (3, 4)] + [python_2_batch()]


def python_2_batch() -> bytes:
    """A batch as Python 2 writes it in protocol 2, as the published files are. Python 3 cannot."""
    return (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87R"
        b"q\x06(K\x01K\x03M\x00\x0c\x86cnumpy\ndtype\nq\x07U\x02u1K\x00K\x01\x87Rq\x08"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x24\x00\x00"
        + batch()[b"data"].tobytes()
        + b"tbU\x06labels]q\x09(K\x01K\x02K\x09eu."
    )


def idx() -> bytes:
    values = np.arange(np.prod(IDX_SHAPE), dtype=np.uint8)
    return np.array([0x0800 + len(IDX_SHAPE), *IDX_SHAPE], ">u4").tobytes() + values.tobytes()


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))


def history() -> PruningHistory:
    result = PruningHistory({"0": 4})
    result.add_step({"0": [2]})
    return result


def _written(save: Callable[[Path], object]) -> list[bytes]:
    """The content of the file that `save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed"
        save(path)
        return [path.read_bytes()]


@cache
def students() -> list[bytes]:
    model = make_model()
    history().replay(model, (torch.zeros(2, 2),))
    return _written(lambda path: save_student(path, model, history(), {"stage": "kddp"}))


@cache
def checkpoints() -> list[bytes]:
    state = {"stage": "kd", "model": {"w": torch.zeros(2)}, "optimizers": [{}]}
    return _written(lambda path: save_checkpoint(path, state | {"pruner": None, "history": "", "epochs": []}))


@cache
def cached_logits() -> list[bytes]:
    return _written(lambda path: teacher_logits.write_logits(path, torch.zeros(3, 2)))


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


# Readers


def _pickled_batch(path: Path) -> object:
    with mock.patch.object(datasets, "CIFAR10_BATCH_IMAGES", IMAGES):
        data, labels = datasets.read_pickled_batch(path)
    assert (data.shape, data.dtype, labels.shape) == ((IMAGES, IMAGE_BYTES), np.uint8, (IMAGES,))
    assert 0 <= labels.min() <= labels.max() < 10


def _binary_batch(path: Path) -> object:
    with mock.patch.object(datasets, "CIFAR10_BATCH_IMAGES", 1):
        return datasets.read_binary_batch(path)


def _history(path: Path) -> object:
    found = PruningHistory.from_json(path.read_bytes().decode("utf-8", "surrogateescape"))
    return repr(found), found.copy() == found, PruningHistory.from_json(found.to_json()) == found


def _config(path: Path) -> object:
    config = RunFolder(path.parent).read_config()
    assert SweepConfig.from_json(config.to_json()) == config
    return config


FILE_ERRORS = (WorkflowError,)
TARGETS = {
    target.name: target
    for target in (
        Target("pickled-batch", "data_batch_1", pickled_batches, _pickled_batch, FILE_ERRORS),
        Target("binary-batch", "data_batch_1.bin", lambda: [bytes(3073)], _binary_batch, FILE_ERRORS),
        Target("idx", "images", lambda: [idx()], lambda path: datasets.read_idx(path, IDX_SHAPE), FILE_ERRORS),
        Target(
            "idx-gz",
            "images.gz",
            lambda: [gzip.compress(idx(), mtime=0), gzip.compress(idx()[:9]) + gzip.compress(idx()[9:])],
            lambda path: datasets.read_idx(path, IDX_SHAPE),
            FILE_ERRORS,
        ),
        Target(
            "history",
            "history",
            lambda: [history().to_json().encode()],
            _history,
            (ValueError,),
            names=("text: ", "pruned: ", "original_widths: ", "history"),
        ),
        Target("student-header", "student.safetensors", students, read_student_header, (ValueError,)),
        Target(
            "student",
            "student.safetensors",
            students,
            lambda path: load_student(path, make_model, (torch.zeros(2, 2),)),
            (ValueError,),
            constant=2**22,  # tracing the model
            slow=True,
        ),
        Target("config", "config.json", lambda: [as_json(SweepConfig().to_json())], _config, FILE_ERRORS),
        Target(
            "teacher-cache", "logits", cached_logits, lambda path: teacher_logits.read_logits(path, (3, 2)), ()
        ),  # a damaged file is computed again
        Target(
            "checkpoint", "checkpoint.pt", checkpoints, lambda path: load_checkpoint(path, "kd"), FILE_ERRORS,
            constant=2**22,
        ),
        Target(
            "result",
            "kd/result.json",
            lambda: [as_json({**dict.fromkeys(FIGURES, 0.5), "width": None})],
            lambda path: RunFolder(path.parent.parent).read_result("kd"),
            FILE_ERRORS,
        ),
        Target(
            "metrics",
            "kd/metrics.jsonl",
            lambda: [as_json({"epoch": 1, "loss": 0.5}) + b"\n" + as_json({"epoch": 2, "loss": 0.25}) + b"\n"],
            lambda path: RunFolder(path.parent.parent).read_epochs("kd"),
            FILE_ERRORS,
        ),
    )
}  # fmt: skip


# Known to break readers of JSON. None of them is a config or a history.
HOSTILE_JSON = {
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep but closed": b"[" * 50_000 + b"]" * 50_000,
    "a number of 5000 digits": b"9" * 5000,
    "a number of 5000 digits inside": b'{"version": ' + b"9" * 5000 + b"}",
    "not a number": b"NaN",
    "infinity": b'{"version": -Infinity}',
    "beyond a float": b'{"version": 1e999}',
    "twice": b'{"version": 2, "version": 2}',
    "half a surrogate pair": b'{"version": "\\ud800"}',
    "half a surrogate pair as a key": b'{"\\udfff": 1, "version": 2}',
    "no UTF-8": b'{"version": "\xff"}',
    "UTF-16": '{"version": 2}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "nothing": b"",
    "zeros": bytes(1000),
    "a list": b"[1, 2]",
    "a text": b'"abc"',
    "null": b"null",
}


def hostile_safetensors() -> dict[str, bytes]:
    """Files with false headers."""

    def file(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
        return (len(header) if length is None else length).to_bytes(8, "little") + header + data

    def tensor(shape: list[int], offsets: list[int], dtype: str = "F32", data: bytes = b"") -> bytes:
        return file(as_json({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}), data=data)

    meta = safetensors.torch.save({"a": torch.zeros(2)}, {"format": "kddp_ext.student", "version": "1"})
    return {
        "a header of 2**63 bytes": file(b"{}", 2**63),
        "a header of 99 million bytes": file(b"{}", 99_000_000),
        "a deep header": file(b"[" * 100_000),
        "huge offsets": tensor([2**40], [0, 2**42]),
        "a shape that overflows": tensor([2**62, 2**62], [0, 8], data=bytes(8)),
        "negative": tensor([-1], [0, -4]),
        "nothing, of any width": tensor([2**62, 0], [0, 0]),
        "a foreign dtype": tensor([1], [0, 1], "F8_E8M0", bytes(1)),
        "an unknown dtype": tensor([1], [0, 1], "F3", bytes(1)),
        "no history": meta,
        "empty": b"",
    }
