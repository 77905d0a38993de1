"""A run that was killed, at an epoch's end or in its middle, ends as the one that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console

import kddp_ext
from kddp_ext.workflow import train
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder, locked
from kddp_ext.workflow.job import STAGES
from kddp_ext.workflow.run import run_workflow


def assert_same_end(run: Path, other: Path) -> None:
    """Weights, optimizer, pruning, history, metrics and report equal bit for bit; only the clock may differ."""
    for stage in STAGES:
        ends = [torch.load(RunFolder(path).checkpoint(stage), weights_only=True) for path in (run, other)]
        for end in ends:
            for epoch in end["epochs"]:
                del epoch["seconds"]
        assert_equal(*ends)
        results = [RunFolder(path).read_result(stage) for path in (run, other)]
        assert all(result is not None for result in results)
        assert results[0] == results[1]
    assert (run / "report.md").read_bytes() == (other / "report.md").read_bytes()
    assert (run / "report.png").read_bytes() == (other / "report.png").read_bytes()
    for stage in STAGES[1:]:
        files = [RunFolder(path).student(stage) for path in (run, other)]
        assert_equal(*(safetensors.torch.load_file(file) for file in files))
        assert_equal(*(kddp_ext.read_student_header(file) for file in files))


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


class Killed(BaseException):
    """Stands in for a process that ends."""


def dies_after(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    left = calls

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return function(*args, **kwargs)

    return call


# 2 epochs of the teacher and 4 of each student: deaths in the first, a middle and the last stage.
@pytest.mark.parametrize("epochs", [1, 4, 12])
def test_killed_between_epochs(
    finished_run: Path,
    tmp_path: Path,
    small: RunConfig,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
    epochs: int,
) -> None:
    path = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", dies_after(train.train_epoch, epochs))
        with pytest.raises(Killed):
            run_workflow(path, small, quiet, device="cpu")
    run_workflow(path, small, quiet, device="cpu", resume=True)
    assert_same_end(finished_run, path)


def test_killed_in_the_middle_of_epochs_again_and_again(
    finished_run: Path, tmp_path: Path, small: RunConfig, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "killed"
    deaths = 0
    with monkeypatch.context() as patch:
        loss = train.kddp_ext.fused_kd_l1_loss
        while True:
            # 7 or 8 steps an epoch: 11 steps end in the middle of the second one.
            patch.setattr(train.kddp_ext, "fused_kd_l1_loss", dies_after(loss, 11))
            try:
                run_workflow(path, small, quiet, device="cpu", resume=True)
                break
            except Killed:
                deaths += 1
    assert deaths >= 8
    assert_same_end(finished_run, path)


def test_sigkill(tmp_path: Path) -> None:
    options = ["--teacher.channels", "8", "--teacher.epochs", "3", "--student.channels", "4", "--student.epochs", "6"]
    options += ["--student.width", "48", "--pruning.l1-weight", "0.005", "--pruning.threshold", "0.1"]
    options += ["--threads", "1", "--device", "cpu", "--runs-dir", str(tmp_path)]
    assert main(["run", "--name", "whole", *options]) == 0

    process = subprocess.Popen(
        [sys.executable, "-m", "kddp_ext", "run", "--name", "killed", *options],
        cwd=tmp_path,  # not the source folder, whose package has no compiled module
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "killed" / "kddp" / "checkpoint.pt", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    assert main(["run", "--name", "killed", *options, "--resume"]) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    options = ["--runs-dir", str(tmp_path), "--name", "mine", "--teacher.epochs", "1000", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kddp_ext", "run", *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Or it would ignore Ctrl-C where these tests were started in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(tmp_path / "mine" / "teacher" / "checkpoint.pt", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines() == [
        f"Interrupted. What is done is kept; continue with: kddp run {' '.join(options)} --resume"
    ]


def wait_for(path: Path, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the run ended too soon"
        assert time.monotonic() < end, "the run takes too long"
        time.sleep(0.01)


def test_resuming_with_other_settings_names_them(finished_run: Path, small: RunConfig, quiet: Console) -> None:
    other = dataclasses.replace(small, seed=3, student=dataclasses.replace(small.student, width=64))
    with pytest.raises(WorkflowError) as failure:
        run_workflow(finished_run, other, quiet, resume=True)
    assert "seed: 0 was saved, 3 is wanted; student.width: 48 was saved, 64 is wanted" in str(failure.value)


def test_two_processes_do_not_share_a_run(finished_run: Path, small: RunConfig, quiet: Console) -> None:
    with locked(finished_run), pytest.raises(WorkflowError, match="in use by another"):
        run_workflow(finished_run, small, quiet, resume=True)


def test_a_run_that_another_process_begins_keeps_its_config(tmp_path: Path, small: RunConfig, quiet: Console) -> None:
    path = tmp_path / "run"
    path.mkdir()
    with locked(path), pytest.raises(WorkflowError, match="in use by another"):
        run_workflow(path, small, quiet)
    assert not list(path.iterdir())


def test_metrics_that_a_killed_run_did_not_come_to_are_written(
    finished_run: Path, small: RunConfig, quiet: Console
) -> None:
    metrics = finished_run / "kddp" / "metrics.jsonl"
    whole = metrics.read_text()
    os.unlink(finished_run / "kddp" / "result.json")
    os.unlink(finished_run / "report.md")
    metrics.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    run_workflow(finished_run, small, quiet, device="cpu", resume=True)
    assert metrics.read_text() == whole


def unfinished(run: Path, stage: str) -> Path:
    """The run as it was when `stage` had saved its last epoch and nothing after."""
    for later in STAGES[STAGES.index(stage) :]:
        os.unlink(run / later / "result.json")
    return RunFolder(run).checkpoint(stage)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "is damaged or not a checkpoint"),
        (lambda content: b"", "is damaged or not a checkpoint"),
        (lambda content: b"hello" * 100, "is damaged or not a checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    finished_run: Path,
    small: RunConfig,
    quiet: Console,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    path = unfinished(finished_run, "kddp")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WorkflowError, match=message) as failure:
        run_workflow(finished_run, small, quiet, resume=True)
    assert str(path) in str(failure.value)
    assert "Delete it" in str(failure.value)


def test_a_checkpoint_of_another_architecture_is_named(finished_run: Path, small: RunConfig, quiet: Console) -> None:
    path = unfinished(finished_run, "kd")
    state = torch.load(path, weights_only=True)
    state["architecture"]["hidden.weight"] = [7, 32]
    torch.save(state, path)
    with pytest.raises(WorkflowError, match=r"another architecture: hidden\.weight has shape") as failure:
        run_workflow(finished_run, small, quiet, resume=True)
    assert str(path) in str(failure.value)


@pytest.mark.parametrize("part", ["pruner", "history", "optimizer"])
def test_a_checkpoint_with_a_part_that_does_not_fit_is_named(
    finished_run: Path, small: RunConfig, quiet: Console, part: str
) -> None:
    path = unfinished(finished_run, "kddp")
    state = torch.load(path, weights_only=True)
    state[part] = "nonsense"
    torch.save(state, path)
    with pytest.raises(WorkflowError, match="does not fit this run") as failure:
        run_workflow(finished_run, small, quiet, resume=True)
    assert str(path) in str(failure.value)


def test_a_checkpoint_of_another_stage_is_named(finished_run: Path, small: RunConfig, quiet: Console) -> None:
    path = unfinished(finished_run, "kd")
    path.write_bytes(RunFolder(finished_run).checkpoint("scratch").read_bytes())
    with pytest.raises(WorkflowError, match="belongs to the stage scratch"):
        run_workflow(finished_run, small, quiet, resume=True)


def test_a_damaged_config_is_named(finished_run: Path, small: RunConfig, quiet: Console) -> None:
    config = finished_run / "config.json"
    for text in ("{", "[]", json.dumps({"version": 99}), json.dumps({"version": 2, "dataset": "digits"})):
        config.write_text(text)
        with pytest.raises(WorkflowError, match=r"config\.json is not the config of a run"):
            run_workflow(finished_run, small, quiet, resume=True)
