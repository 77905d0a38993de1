"""A whole run: what it leaves behind, and that KDDP's student is the smaller one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import kddp_ext
from kddp_ext.workflow.config import RunConfig, load_config
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import INFO
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.inspect import describe, evaluate
from kddp_ext.workflow.job import STAGES
from kddp_ext.workflow.models import build_student
from kddp_ext.workflow.run import run_workflow


def output(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_leaves_config_metrics_checkpoints_students_and_a_report(finished_run: Path, small: RunConfig) -> None:
    folder = RunFolder(finished_run)
    assert load_config(folder.config) == small
    for stage in STAGES:
        epochs = folder.read_epochs(stage)
        assert [epoch["epoch"] for epoch in epochs] == list(range(1, len(epochs) + 1))
        result = folder.read_result(stage)
        assert result is not None
        assert 0.1 < result["test_accuracy"] <= 1
        state = torch.load(folder.checkpoint(stage), weights_only=True)
        assert state["stage"] == stage
    report = folder.report.read_text()
    assert all(f"| {stage} |" in report for stage in STAGES)
    assert (finished_run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_kddp_ends_smaller_than_kd_and_its_file_rebuilds_it(finished_run: Path, small: RunConfig) -> None:
    folder = RunFolder(finished_run)
    kd, kddp = folder.read_result("kd"), folder.read_result("kddp")
    assert kd is not None
    assert kddp is not None
    assert kd["width"] == small.student.width > kddp["width"]
    assert kddp["parameters"] < kd["parameters"]
    assert kddp["macs"] < kd["macs"]

    info = INFO["digits"]
    student = kddp_ext.load_student(
        folder.student("kddp"), lambda: build_student(small, info), (torch.zeros(2, 1, 8, 8),)
    )
    assert sum(parameter.numel() for parameter in student.parameters()) == kddp["parameters"]
    saved = torch.load(folder.checkpoint("kddp"), weights_only=True)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in student.state_dict().items())


def test_the_teachers_logits_are_computed_once_for_kd_and_kddp(finished_run: Path) -> None:
    # Without augmentation every epoch sees the same images: one file.
    assert len(list(RunFolder(finished_run).teacher_logits.iterdir())) == 1


def test_evaluate_agrees_with_the_report(finished_run: Path, quiet: Console) -> None:
    evaluate(finished_run, None, "cpu", quiet)
    lines = output(quiet).splitlines()
    folder = RunFolder(finished_run)
    for stage, line in zip(STAGES, lines, strict=True):
        result = folder.read_result(stage)
        assert result is not None
        assert line.startswith(stage)
        assert f"{result['test_accuracy']:.2%}" in line


def test_students_are_rebuilt_from_examples_on_the_cpu(
    finished_run: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the images lie there, and a student that is traced with them does not yet."""
    example = ImageData.example

    def on_a_gpu(data: ImageData, count: int = 1) -> SimpleNamespace:
        return SimpleNamespace(cpu=lambda: example(data, count))

    monkeypatch.setattr(ImageData, "example", on_a_gpu)
    evaluate(finished_run, None, "cpu", quiet)
    assert len(output(quiet).splitlines()) == len(STAGES)


def test_info_of_a_student_file_tells_what_was_pruned(finished_run: Path, quiet: Console) -> None:
    folder = RunFolder(finished_run)
    describe(folder.student("kddp"), quiet)
    width = (folder.read_result("kddp") or {})["width"]
    assert f"48 neurons at the start, {width} now" in output(quiet)
    assert "pruning.l1_weight = 0.05" in output(quiet)


def test_a_run_that_is_there_is_not_overwritten(finished_run: Path, small: RunConfig, quiet: Console) -> None:
    before = (finished_run / "config.json").read_bytes()
    with pytest.raises(WorkflowError, match=r"holds a run already.*--resume"):
        run_workflow(finished_run, small, quiet)
    assert (finished_run / "config.json").read_bytes() == before


def test_resuming_a_finished_run_prints_its_table_and_changes_nothing(
    finished_run: Path, small: RunConfig, quiet: Console
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}
    run_workflow(finished_run, small, quiet, resume=True)
    assert "kddp" in output(quiet)
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path, small: RunConfig, quiet: Console) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(WorkflowError, match="is not a run of kddp"):
        run_workflow(tmp_path, small, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_metrics_hold_every_term_and_the_time_of_every_phase(finished_run: Path) -> None:
    line = (finished_run / "kddp" / "metrics.jsonl").read_text().splitlines()[0]
    metrics = json.loads(line)
    assert metrics["loss"] == pytest.approx(
        0.9 * metrics["kd"] + 0.1 * metrics["cross_entropy"] + 0.05 * metrics["l1"], rel=1e-5
    )
    seconds = metrics["seconds"]
    assert {"data", "teacher", "student", "loss", "prune", "validation", "epoch"} == seconds.keys()
    assert sum(seconds.values()) - seconds["epoch"] <= seconds["epoch"] + 0.01
