"""A file that has changed since it was written is found out, whatever byte it is; nothing is trained on it."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_preparations import stop_after_an_epoch
from fault_runs import comparable, differences, ending, shorten, start
from torch import nn

import kddp_ext
from kddp_ext.files import hash_tensors
from kddp_ext.workflow import teacher_logits
from kddp_ext.workflow.checkpoint import load_checkpoint, save_checkpoint
from kddp_ext.workflow.config import load_config
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.timing import read_timing

Read = Callable[[Path], Any]


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunFolder:
    """A finished run, to be damaged."""
    return RunFolder(shutil.copytree(whole, tmp_path / "runs") / "run")


def found_and_harmless(path: Path, read: Read, step: int = 1) -> tuple[int, int]:
    """Flip a bit in every `step`-th byte of a file in turn; how often it was found, and how often it changed nothing.

    Anything else fails.
    """
    content, expected = path.read_bytes(), comparable(read(path))
    found = harmless = 0
    for place in range(0, len(content), step):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            content_now, error = comparable(read(path)), None
        except ValueError as caught:  # a WorkflowError is one
            error = caught
        if error is None:
            assert content_now == expected, f"byte {place}: the damage is not seen"
            harmless += 1
        else:
            assert str(path) in str(error)
            found += 1
    path.write_bytes(content)
    return found, harmless


def shortened(path: Path, read: Read) -> None:
    """Cut the file at many lengths, to nothing at last; each must be found."""
    content = path.read_bytes()
    for length in [len(content) * part // 40 for part in range(40)]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"damaged|not the config"):
            read(path)
    path.write_bytes(content)


def small_checkpoint(path: Path) -> Path:
    fields = {"architecture": {}, "model": {"w": torch.arange(300.0)}, "optimizer": {"lr": 0.1}}
    save_checkpoint(path, {"stage": "kd", **fields, "pruner": None, "history": None, "epochs": [{"loss": 0.5}]})
    return path


def test_damage_anywhere_in_a_checkpoint(tmp_path: Path) -> None:
    path = small_checkpoint(tmp_path / "checkpoint.pt")
    read = partial(load_checkpoint, stage="kd")
    found, harmless = found_and_harmless(path, read, step=3)
    # 1200 bytes are tensors; of the container's own many are padding, dates and the like.
    assert found > 400 + harmless / 10
    shortened(path, read)


def test_torch_load_alone_does_not_see_it(tmp_path: Path) -> None:
    """Or the checksums would be looked at twice."""
    path = small_checkpoint(tmp_path / "checkpoint.pt")
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor(7.0).numpy().tobytes())] ^= 1
    state = torch.load(io.BytesIO(bytes(content)), weights_only=True)
    assert not torch.equal(state["model"]["w"], torch.arange(300.0))
    path.write_bytes(content)
    with pytest.raises(WorkflowError, match=r"the checksum of checkpoint/data/0|the checksum of .*data/0 is wrong"):
        load_checkpoint(path, "kd")


def test_a_folder_in_the_place_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(WorkflowError, match=r"checkpoint\.pt is damaged .*it is no file.*Delete it to train the stage"):
        load_checkpoint(tmp_path / "checkpoint.pt", "kd")


def test_damage_anywhere_in_the_text_files(run: RunFolder) -> None:
    figures = run.read_result("kddp") or {}
    for path, read in {
        run.config: lambda path: load_config(path).options(),
        run.result("kddp"): lambda _: {key: (run.read_result("kddp") or {})[key] for key in figures},
        run.timing: lambda _: {key: read_timing(run)[key] for key in ("latency_ms", "seconds", "notes")},
    }.items():
        found, harmless = found_and_harmless(path, read, step=2)
        assert found > 20 * harmless, path  # the name of the digest, without which a file is as of an earlier version
        shortened(path, read)

    def metrics(_path: Path) -> list[dict[str, Any]]:
        return [{key: each for key, each in epoch.items() if key != "seconds"} for epoch in run.read_epochs("kddp")]

    found, harmless = found_and_harmless(run.job("kddp") / "metrics.jsonl", metrics)
    assert found > harmless  # nothing vouches for the seconds
    shortened(run.job("kddp") / "metrics.jsonl", metrics)


def test_results_and_students_in_the_place_of_others(run: RunFolder) -> None:
    shutil.copy(run.result("scratch"), run.result("kd"))
    with pytest.raises(WorkflowError, match=r"kd/result\.json belongs to the training scratch"):
        run.read_result("kd")
    shutil.copy(run.job("scratch") / "metrics.jsonl", run.job("kddp") / "metrics.jsonl")
    with pytest.raises(WorkflowError, match=r"metrics\.jsonl is damaged: its content does not match .*Delete"):
        run.read_epochs("kddp")


def test_damage_anywhere_in_a_student(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    kddp_ext.save_student(path, model, kddp_ext.PruningHistory({}), {"a": "b"})

    def read(path: Path) -> tuple[str, dict[str, Any]]:
        student = kddp_ext.load_student(path, lambda: nn.Linear(3, 2), (torch.zeros(1, 3),))
        header = kddp_ext.read_student_header(path)
        return hash_tensors(student.state_dict()), {key: header[key] for key in ("history", "metadata")}

    found, harmless = found_and_harmless(path, read, step=3)
    assert found > 20 * harmless
    shortened(path, read)


def test_damage_anywhere_in_the_teachers_logits(tmp_path: Path) -> None:
    path, logits = tmp_path / "logits.safetensors", torch.randn(5, 3)
    teacher_logits._write(path, logits, 1.0)

    def read(path: Path) -> torch.Tensor:
        answer = teacher_logits._read(path, (5, 3))
        if answer is None:
            raise ValueError(f"{path} is damaged")
        return answer[0]

    found, harmless = found_and_harmless(path, read, step=2)
    assert found > 5 * harmless
    shortened(path, read)


def resume(run: RunFolder) -> Any:
    return start(run.path.parent, "--resume", prepare=shorten).wait()


def unfinish(run: RunFolder, *stages: str) -> None:
    for path in (run.report, run.timing, *map(run.result, stages)):
        path.unlink()


def test_a_damaged_checkpoint_ends_the_run_and_its_advice_mends_it(run: RunFolder, expected: dict[str, Any]) -> None:
    unfinish(run, "kd", "kddp")
    path = run.checkpoint("kd")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    ended = resume(run)
    assert ended.code == 2
    assert ended.err.startswith(f"kddp run: {path} is damaged or not a checkpoint (the checksum of ")
    assert ended.err.endswith("Delete it to train the stage kd again; other stages keep what they have.\n")
    assert path.read_bytes() == content
    path.unlink()
    assert resume(run).code == 0
    assert not differences(ending(run.path.parent), expected)


@pytest.mark.parametrize("earlier", [True, False])
def test_a_finished_teacher_without_its_last_checkpoint_is_not_taken_for_one(
    run: RunFolder, expected: dict[str, Any], earlier: bool
) -> None:
    unfinish(run, "kddp")
    path = run.checkpoint("teacher")
    path.unlink()
    if earlier:  # a copy of the state after the first epoch
        once = start(run.path.parent / "teacher_logits", prepare=partial(stop_after_an_epoch, path)).wait()
        assert once.code == 3, once.err
        shutil.rmtree(run.path.parent / "teacher_logits" / "run")
        for name in ("stdout", "stderr"):
            (run.path.parent / "teacher_logits" / name).unlink()
    ended = resume(run)
    assert ended.code == 0, ended.err
    assert not differences(ending(run.path.parent), expected)


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says what it thinks of a damaged pickle
        yield
