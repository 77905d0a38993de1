"""A run: what it leaves, how its networks compare, what is shown of it, and that a collapse is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import kddp_ext
from kddp_ext.workflow.config import RunConfig, SweepConfig
from kddp_ext.workflow.datasets import INFO
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.inspect import describe, evaluate
from kddp_ext.workflow.jobs import STAGES, Job
from kddp_ext.workflow.models import build_student
from kddp_ext.workflow.report import rebuild_report
from kddp_ext.workflow.runs import collapse_warnings

RunIt = Callable[..., None]


def output(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_leaves_config_metrics_checkpoints_students_and_a_report(finished_run: Path, small: RunConfig) -> None:
    folder = RunFolder(finished_run)
    assert folder.read_config() == SweepConfig.single(small)
    for stage in STAGES:
        epochs = folder.read_epochs(stage)
        assert [epoch["epoch"] for epoch in epochs] == list(range(1, len(epochs) + 1))
        result = folder.read_result(stage)
        assert result is not None
        assert 0.1 < result["test_accuracy"] <= 1
        assert torch.load(folder.checkpoint(stage), weights_only=True)["stage"] == stage
    report = folder.report.read_text()
    assert all(f"| {stage} |" in report for stage in STAGES)
    assert "student.width = 48" in report
    assert folder.picture.read_bytes().startswith(b"\x89PNG")
    assert all(f"| {stage} |" in folder.timing.read_text() for stage in STAGES)
    # Without augmentation every epoch sees the same images, so kd and kddp share one file of logits.
    assert len(list(folder.teacher_logits.iterdir())) == 1


@pytest.mark.parametrize(
    ("architecture", "channels"),
    [("cnn", (8, 16)), ("vgg11", (8, 8, 16, 16, 16, 16, 16, 16)), ("resnet20", (4, 8, 8)), ("fast", (8, 16))],
)
def test_saliency_prunes_all_layers_to_a_target(
    small: RunConfig, run: RunIt, tmp_path: Path, architecture: str, channels: tuple[int, ...]
) -> None:
    """Every group of channels and the hidden layer may become narrower, residual streams too."""
    student = dataclasses.replace(small.student, architecture=architecture, channels=channels, epochs=2)
    pruning = dataclasses.replace(
        small.pruning, layers="all", criterion="saliency", target_macs=0.5, steps=4, start=0.1, until=0.8, l1_weight=0.0
    )
    config = dataclasses.replace(small, student=student, pruning=pruning)
    run(tmp_path / architecture, config)
    folder = RunFolder(tmp_path / architecture)
    kd, kddp = folder.read_result("kd"), folder.read_result("kddp")
    assert kd is not None
    assert kddp is not None
    assert kddp["macs"] <= 0.5 * kd["macs"]
    original = kddp_ext.PruningHistory.from_json(
        kddp_ext.read_student_header(folder.student("kddp"))["history"]
    ).original_widths
    narrower = [layer for layer, width in kddp["widths"].items() if width < original[layer]]
    assert len(narrower) >= len(original) // 2


def test_kddp_ends_smaller_than_kd_and_its_file_rebuilds_it(finished_run: Path, small: RunConfig) -> None:
    folder = RunFolder(finished_run)
    kd, kddp = folder.read_result("kd"), folder.read_result("kddp")
    assert kd is not None
    assert kddp is not None
    assert kd["width"] == small.student.width > kddp["width"]
    assert kddp["parameters"] < kd["parameters"]
    assert kddp["macs"] < kd["macs"]

    example = torch.zeros(2, 1, 8, 8)
    student = kddp_ext.load_student(folder.student("kddp"), lambda: build_student(small, INFO["digits"]), (example,))
    assert sum(parameter.numel() for parameter in student.parameters()) == kddp["parameters"]
    saved = torch.load(folder.checkpoint("kddp"), weights_only=True)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in student.state_dict().items())


def test_evaluate_agrees_with_the_report(finished_run: Path, quiet: Console) -> None:
    evaluate(finished_run, None, "cpu", quiet)
    folder = RunFolder(finished_run)
    *lines, last = output(quiet).splitlines()
    assert last == "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    for stage, line in zip(STAGES, lines, strict=True):
        result = folder.read_result(stage)
        assert result is not None
        assert line.startswith(stage)
        assert f"{result['test_accuracy']:.2%}" in line


@pytest.mark.parametrize("name", [".", "kddp/student.safetensors"])
def test_info_prints_one_page(finished_run: Path, quiet: Console, name: str) -> None:
    describe(finished_run / name, quiet)
    result = RunFolder(finished_run).read_result("kddp") or {}
    text = output(quiet)
    assert f"kddp: hidden: 48 neurons at the start, {result['width']} now; removed " in text
    assert f"{result['parameters']:,}" in text
    assert "pruning.l1_weight = 0.05" in text
    assert 10 < len(text.splitlines()) <= 40


def test_info_of_a_run_without_a_finished_training(finished_run: Path, quiet: Console) -> None:
    for stage in STAGES:
        (finished_run / stage / "result.json").unlink()
    with pytest.raises(WorkflowError, match="no training of this run is finished"):
        describe(finished_run, quiet)


def test_a_run_is_not_overwritten(finished_run: Path, small: RunConfig, run: RunIt) -> None:
    before = (finished_run / "config.json").read_bytes()
    with pytest.raises(WorkflowError, match=r"holds a run already.*--resume"):
        run(finished_run, small)
    assert (finished_run / "config.json").read_bytes() == before


def test_resuming_a_finished_run_prints_its_table_and_trains_nothing(
    finished_run: Path, small: RunConfig, run: RunIt, quiet: Console
) -> None:
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    changed = {path: path.stat().st_mtime_ns for path in finished_run.glob("*/*")}
    run(finished_run, small, resume=True)
    assert "kddp" in output(quiet)
    assert {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()} == before
    assert {path: path.stat().st_mtime_ns for path in finished_run.glob("*/*")} == changed


def test_report_writes_the_same_files_again(finished_run: Path, quiet: Console) -> None:
    paths = [finished_run / name for name in ("report.md", "report.html", "report.png")]
    before = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    left = finished_run / ".report.md.x.partial"
    left.write_text("half a re")
    rebuild_report(finished_run, quiet)
    assert [path.read_bytes() for path in paths] == before
    assert not left.exists()
    with pytest.raises(WorkflowError, match="is not a run of kddp"):
        rebuild_report(finished_run / "kd", quiet)


def test_a_folder_of_something_else_is_refused(tmp_path: Path, small: RunConfig, run: RunIt) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(WorkflowError, match="is not a run of kddp"):
            run(path, small)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_metrics_hold_every_term_and_the_time_of_every_phase(finished_run: Path) -> None:
    metrics = json.loads((finished_run / "kddp" / "metrics.jsonl").read_text().splitlines()[0])
    loss = 0.9 * metrics["kd"] + 0.1 * metrics["cross_entropy"] + 0.05 * metrics["l1"]
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    seconds = metrics["seconds"]
    assert {"data", "teacher", "student", "loss", "prune", "validation", "epoch"} == seconds.keys()
    assert sum(seconds.values()) - seconds["epoch"] <= seconds["epoch"] + 0.01


def test_a_teacher_serves_another_run(finished_run: Path, small: RunConfig, run: RunIt, tmp_path: Path) -> None:
    run(tmp_path / "again", dataclasses.replace(small, seed=7), teacher_from=finished_run)
    checkpoints = [(path / "teacher" / "checkpoint.pt").read_bytes() for path in (tmp_path / "again", finished_run)]
    assert checkpoints[0] == checkpoints[1]
    assert (tmp_path / "again" / "teacher" / "result.json").is_file()
    other = dataclasses.replace(small, teacher=dataclasses.replace(small.teacher, epochs=9))
    with pytest.raises(WorkflowError, match=r"with other settings: teacher\.epochs: 2 was saved, 9 is wanted"):
        run(tmp_path / "other", other, teacher_from=finished_run)


def test_a_penalty_that_silences_the_hidden_layer_is_said(
    small: RunConfig, run: RunIt, quiet: Console, tmp_path: Path
) -> None:
    config = dataclasses.replace(small, pruning=dataclasses.replace(small.pruning, l1_weight=10.0))
    run(tmp_path / "run", config)
    warning = "kddp: every activation of the layer hidden is zero"
    assert f"warning: {warning}" in output(quiet)
    assert f"> **Warning.** {warning}" in (tmp_path / "run" / "report.md").read_text()
    assert "try a smaller --pruning.l1-weight (now 10)" in output(quiet)


def test_the_rule_for_an_accuracy_no_better_than_guessing(small: RunConfig) -> None:
    def warnings(stage: str, accuracy: float) -> list[str]:
        result = {"test_accuracy": accuracy, "active": 3}
        return collapse_warnings(Job(stage, stage, small), result, [{}], 10, 900)  # type: ignore[arg-type]

    # 1/10 and two standard errors of 900 images: 0.1 + 2 * 0.01.
    assert warnings("kd", 0.121) == []
    (kd,) = warnings("kd", 0.1199)
    assert "12.0% is no better than guessing (10.0% ± 2.0%)" in kd
    assert "--student.learning-rate (now 0.01)" in kd
    assert "--teacher.learning-rate (now 0.4)" in warnings("teacher", 0.05)[0]
    assert "--pruning.l1-weight (now 0.05)" in warnings("kddp", 0.05)[0]
