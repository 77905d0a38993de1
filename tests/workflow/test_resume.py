"""A killed run that is resumed ends exactly as an uninterrupted one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_files import differences, ending
from workflow_ranks import KilledError, dies_after

from kddp_ext.workflow import train
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.jobs import STAGES

RunIt = Callable[..., None]


def assert_same_end(run: Path, other: Path) -> None:
    """Weights, optimizer, pruning, history, metrics, report and picture are equal bit for bit."""
    ends = [
        {name.partition("/")[2]: content for name, content in ending(path.parent).items() if name.startswith(path.name)}
        for path in (run, other)
    ]
    assert not differences(*ends)


# 2 epochs of the teacher and 4 of each student: the kills fall into the first, a middle and the last stage.


def test_killed_in_the_middle_of_epochs_again_and_again(
    finished_run: Path, small: RunConfig, run: RunIt, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = finished_run.parent / "killed"
    deaths, step = 0, train._train_step
    while True:
        # An epoch has 7 or 8 steps, so the kill falls into the middle of the second epoch.
        monkeypatch.setattr(train, "_train_step", dies_after(step, 11))
        try:
            run(path, small, resume=True)
            break
        except KilledError:
            deaths += 1
    assert deaths >= 8
    assert_same_end(finished_run, path)


def test_resuming_with_other_settings_names_them(finished_run: Path, small: RunConfig, run: RunIt) -> None:
    other = dataclasses.replace(small, seed=3, student=dataclasses.replace(small.student, width=64))
    with pytest.raises(WorkflowError) as failure:
        run(finished_run, other, resume=True)
    assert "seed: 0 was saved, 3 is wanted; student.width: 48 was saved, 64 is wanted" in str(failure.value)


def test_metrics_that_a_killed_run_did_not_write_are_written(finished_run: Path, small: RunConfig, run: RunIt) -> None:
    metrics = finished_run / "kddp" / "metrics.jsonl"
    complete = metrics.read_text()
    os.unlink(finished_run / "kddp" / "result.json")
    metrics.write_text("".join(complete.splitlines(keepends=True)[:-1]))
    run(finished_run, small, resume=True)
    assert metrics.read_text() == complete


def unfinished(run: Path, stage: str) -> Path:
    """Put the run into the state after the last checkpoint of `stage`; returns the checkpoint."""
    for later in STAGES[STAGES.index(stage) :]:
        os.unlink(run / later / "result.json")
    return RunFolder(run).checkpoint(stage)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pruner": "nonsense"}, "does not fit this run"),
        ({"history": "nonsense"}, "does not fit this run"),
        ({"optimizers": ["nonsense"]}, "does not fit this run"),
        ({"stage": "scratch"}, "belongs to the stage scratch"),
        ({"version": 0}, "has version 0; expected 2"),
        ({"model": {}}, "does not fit this run: .*Missing key"),
        (None, "is not a checkpoint of kddp"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    finished_run: Path, small: RunConfig, run: RunIt, change: dict[str, object] | None, message: str
) -> None:
    path = unfinished(finished_run, "kddp")
    torch.save(None if change is None else {**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(WorkflowError, match=f"{path}.*{message}"):
        run(finished_run, small, resume=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("result.json", "{", "is damaged"),
        ("result.json", '"text"', "expected a JSON object"),
        ("result.json", "{}", "is not the result of a training"),
        ("metrics.jsonl", "{", "is damaged"),
        ("metrics.jsonl", None, "cannot be read"),
    ],
)
def test_a_damaged_result_is_named_with_advice(
    finished_run: Path, small: RunConfig, run: RunIt, name: str, text: str | None, message: str
) -> None:
    path = finished_run / "kd" / name
    complete = path.read_bytes()
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(WorkflowError, match=rf"{path} .*{message}.* Delete .*resume"):
        run(finished_run, small, resume=True)
    (finished_run / "kd" / "result.json").unlink()
    run(finished_run, small, resume=True)
    assert name == "metrics.jsonl" or path.read_bytes() == complete
