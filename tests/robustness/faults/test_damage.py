"""A bit that changes in a file of tensors is detected, wherever it is, and nothing is trained on a damaged file."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_preparations import stop_after_an_epoch
from fault_runs import shorten, start
from run_files import comparable, differences, ending
from torch import nn

import kddp_ext
from kddp_ext.files import hash_tensors
from kddp_ext.workflow import teacher_logits
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder, load_checkpoint, save_checkpoint

Read = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a damaged pickle
        yield


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunFolder:
    """A finished run that the test may damage."""
    return RunFolder(shutil.copytree(whole, tmp_path / "runs") / "run")


def flip_bits(path: Path, read: Read, step: int) -> tuple[int, int]:
    """Flip a bit in every `step`-th byte in turn, and cut the file at 40 lengths.

    Each change must be detected, with the path in the message, or leave the content equal.

    Returns:
        How many flipped bits were detected, and how many changed nothing.
    """
    content, expected = path.read_bytes(), comparable(read(path))
    detected = harmless = 0
    for place in range(0, len(content), step):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        found, message = None, None
        try:
            found = comparable(read(path))
        except ValueError as error:  # a WorkflowError is one
            message = str(error)
        assert found == expected if message is None else str(path) in message, f"byte {place}: {message}"
        detected, harmless = detected + (message is not None), harmless + (message is None)
    for length in [len(content) * part // 40 for part in range(40)]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="damaged"):
            read(path)
    path.write_bytes(content)
    return detected, harmless


def small_checkpoint(path: Path) -> Path:
    fields = {"model": {"w": torch.arange(300.0)}, "optimizers": [{"lr": 0.1}]}
    save_checkpoint(path, {"stage": "kd", **fields, "pruner": None, "history": None, "epochs": [{"loss": 0.5}]})
    return path


def test_damage_anywhere_in_a_checkpoint(tmp_path: Path) -> None:
    path = small_checkpoint(tmp_path / "checkpoint.pt")
    detected, harmless = flip_bits(path, partial(load_checkpoint, stage="kd"), step=3)
    # 1200 bytes are tensors; many others are the archive's padding and dates.
    assert detected > 400 + harmless / 10
    path.unlink()
    path.mkdir()
    with pytest.raises(WorkflowError, match=r"checkpoint\.pt is not a file\. Delete it to train the stage kd again"):
        load_checkpoint(path, "kd")


def test_damage_anywhere_in_a_student(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    torch.manual_seed(0)
    kddp_ext.save_student(path, nn.Linear(3, 2), kddp_ext.PruningHistory({}), {"a": "b"})

    def read(path: Path) -> tuple[str, dict[str, Any]]:
        student = kddp_ext.load_student(path, lambda: nn.Linear(3, 2), (torch.zeros(1, 3),))
        header = kddp_ext.read_student_header(path)
        return hash_tensors(student.state_dict()), {key: header[key] for key in ("history", "metadata")}

    detected, harmless = flip_bits(path, read, step=3)
    assert detected > 20 * harmless


def test_damage_anywhere_in_the_teachers_logits(tmp_path: Path) -> None:
    path = tmp_path / "logits.safetensors"
    teacher_logits.write_logits(path, torch.randn(5, 3))

    def read(path: Path) -> torch.Tensor:
        logits = teacher_logits.read_logits(path, (5, 3))
        if logits is None:
            raise ValueError(f"{path} is damaged")
        return logits

    detected, harmless = flip_bits(path, read, step=2)
    assert detected > 5 * harmless


def resume(run: RunFolder) -> Any:
    return start(run.path.parent, "--resume", prepare=shorten).wait()


def unfinish(run: RunFolder, *stages: str) -> None:
    for path in (run.report, *map(run.result, stages)):
        path.unlink()


def test_the_advice_for_a_damaged_checkpoint_repairs_the_run(run: RunFolder, expected: dict[str, Any]) -> None:
    unfinish(run, "kd", "kddp")
    path = run.checkpoint("kd")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    ended = resume(run)
    assert ended.code == 2
    assert ended.err.startswith(f"kddp run: {path} is damaged or not a checkpoint (the checksum of ")
    assert ended.err.endswith("Delete it to train the stage kd again; other stages are not affected.\n")
    assert path.read_bytes() == content
    path.unlink()
    assert resume(run).code == 0
    assert not differences(ending(run.path.parent), expected)


@pytest.mark.parametrize("earlier", [True, False])
def test_a_finished_teacher_without_its_last_checkpoint_is_trained_again(
    run: RunFolder, expected: dict[str, Any], tmp_path: Path, earlier: bool
) -> None:
    unfinish(run, "kddp")
    path = run.checkpoint("teacher")
    path.unlink()
    if earlier:  # a copy of the checkpoint after the first epoch
        (tmp_path / "other").mkdir()
        once = start(tmp_path / "other", prepare=partial(stop_after_an_epoch, path)).wait()
        assert once.code == 3, once.err
    ended = resume(run)
    assert ended.code == 0, ended.err
    assert not differences(ending(run.path.parent), expected)
