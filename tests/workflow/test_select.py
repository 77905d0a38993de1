"""The epoch with the best validation accuracy: it is kept, `--select best` takes it, and patience ends a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_files import comparable, content_of, differences, ending
from safetensors.torch import load_file
from workflow_ranks import KilledError, dies_after

import kddp_ext
from kddp_ext.workflow import train
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder

RunIt = Callable[..., None]
STUDENTS = ("scratch", "kd", "kddp")


@pytest.fixture
def best_is_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation accuracies whose best is that of the second epoch."""
    epoch_of = train.train_epoch

    def scripted(*arguments: Any) -> dict[str, Any]:
        return {**epoch_of(*arguments), "validation_accuracy": (0.3, 0.5, 0.4, 0.5)[arguments[-1]]}

    monkeypatch.setattr(train, "train_epoch", scripted)


def test_the_best_epoch_is_measured_and_saved_also_after_kills(
    finished_run: Path, small: RunConfig, run: RunIt, best_is_the_second: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = dataclasses.replace(small.student, select="best", patience=1)
    config, folder = dataclasses.replace(small, student=student), RunFolder(finished_run.parent / "whole")
    run(folder.path, config, teacher_from=finished_run)
    for stage in STUDENTS:
        epochs, result = folder.read_epochs(stage), folder.read_result(stage)
        assert result is not None
        assert (len(epochs), result["epoch"]) == (3, 2)  # patience ended the training after three of four epochs
        assert result["parameters"] == epochs[1]["parameters"]
        assert content_of(folder.student(stage)) == content_of(folder.best(stage))
    assert epochs[1]["width"] < small.student.width
    history = kddp_ext.read_student_header(folder.student("kddp"))["history"]
    assert sum(kddp_ext.PruningHistory.from_json(history).widths.values()) == epochs[1]["width"]
    assert (
        "best validation accuracy (of the teacher: the last one): scratch 2, kd 2, kddp 2," in folder.report.read_text()
    )

    killed, step, deaths = finished_run.parent / "killed", train._train_step, 0
    while True:
        monkeypatch.setattr(train, "_train_step", dies_after(step, 11))
        try:
            run(killed, config, teacher_from=finished_run, resume=True)
            break
        except KilledError:
            deaths += 1
    assert deaths >= 4
    files = ending(finished_run.parent)
    ends = [
        {name.partition("/")[2]: content for name, content in files.items() if name.startswith(path)}
        for path in ("killed", "whole")
    ]
    assert not differences(*ends)


def test_without_the_option_the_last_epoch_counts_and_the_best_is_kept(finished_run: Path) -> None:
    folder = RunFolder(finished_run)
    for stage in STUDENTS:
        epochs, result = folder.read_epochs(stage), folder.read_result(stage)
        assert result is not None
        assert (len(epochs), result["epoch"]) == (4, 4)
        assert result["validation_accuracy"] == epochs[-1]["validation_accuracy"]
        same = comparable(load_file(folder.best(stage))) == comparable(load_file(folder.student(stage)))
        assert same == (train.best_epoch(epochs) == 4)
    assert not folder.best("teacher").exists()
    assert "with the weights of the last epoch,\n" in folder.report.read_text()


@pytest.mark.parametrize("student", [{"select": "best"}, {"patience": 2}])
def test_without_validation_images_both_options_are_refused(
    small: RunConfig, run: RunIt, tmp_path: Path, student: dict[str, Any]
) -> None:
    config = dataclasses.replace(small, validation=0, student=dataclasses.replace(small.student, **student))
    with pytest.raises(WorkflowError, match=r"--validation: expected images for --select best or .*, got 0"):
        run(tmp_path / "run", config)
