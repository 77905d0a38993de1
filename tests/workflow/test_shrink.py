"""`kddp shrink`: a trained network becomes smaller, resumes exactly, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from run_files import differences, ending
from workflow_ranks import KilledError, dies_after

import kddp_ext
from kddp_ext.workflow import shrink, train
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.config import ShrinkConfig
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.saved_models import find_model
from kddp_ext.workflow.shrink import run_shrink, settings_of

SMALL = ShrinkConfig(target_macs=0.5, epochs=3, checks=2, shift=1, learning_rate=5e-3)


@pytest.fixture
def without_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report lacks latencies, which cost two exports to ONNX."""
    monkeypatch.setattr(shrink, "latencies", lambda models, images: [{} for _ in models])


def result_of(path: Path) -> dict[str, object]:
    """The figures of a finished shrink."""
    result: dict[str, object] = json.loads((path / "student" / "result.json").read_text())
    return result


def test_a_teacher_and_then_its_student_are_shrunk(finished_run: Path, quiet: Console) -> None:
    first, second = finished_run.parent / "first", finished_run.parent / "second"
    run_shrink(finished_run / "teacher", first, SMALL, quiet)
    result = result_of(first)
    before, after = result["before"], result["after"]
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert after["macs"] <= 0.5 * before["macs"]
    assert after["accuracy"] > 0.3  # the teacher is small, and is trained for seconds
    report = (first / "report.md").read_text()
    assert f"{before['macs']:,} | {after['macs']:,}" in report
    assert (first / "report.png").stat().st_size > 1000
    student = first / "student" / "student.safetensors"
    run_shrink(student, second, ShrinkConfig(target_macs=0.8, epochs=1, checks=1, shift=1), quiet)
    history = kddp_ext.PruningHistory.from_json(
        kddp_ext.read_student_header(second / "student" / "student.safetensors")["history"]
    )
    assert history.original_widths == {layer: widths[0] for layer, widths in result["widths"].items()}  # type: ignore[attr-defined]
    assert main(["evaluate", str(student)]) == 0
    assert main(["info", str(second / "student" / "student.safetensors")]) == 0


@pytest.mark.usefixtures("without_latencies")
@pytest.mark.parametrize("stage", ["kd", "kddp"])
def test_a_student_of_which_other_layers_or_none_were_pruned_is_shrunk(
    finished_run: Path, quiet: Console, tmp_path: Path, stage: str
) -> None:
    for source in (finished_run / stage, finished_run / stage / "student.safetensors"):
        path = tmp_path / source.name
        run_shrink(source, path, ShrinkConfig(target_macs=0.5, calibrate=300), quiet)
        assert main(["evaluate", str(path / "student" / "student.safetensors")]) == 0


@pytest.mark.parametrize(
    ("options", "rate"),
    [({"target_macs": 0.5}, 0.015), ({"target_parameters": 0.5}, 0.015), ({}, 0.0),
     ({"target_macs": 0.5, "loss_budget": 0.1}, 0.0)],
)  # fmt: skip
def test_muon_does_not_raise_a_loss_that_has_a_budget(
    finished_run: Path, options: dict[str, float], rate: float
) -> None:
    saved = find_model(finished_run / "teacher")
    assert settings_of(ShrinkConfig(**options), saved, 200).student.muon_learning_rate == rate  # type: ignore[arg-type]


@pytest.mark.usefixtures("without_latencies")
def test_killed_again_and_again_it_ends_as_without(
    finished_run: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = finished_run.parent / "whole", finished_run.parent / "killed-shrink"
    run_shrink(finished_run / "teacher", whole, SMALL, quiet)
    deaths, step = 0, train._train_step
    while True:
        monkeypatch.setattr(train, "_train_step", dies_after(step, 12))  # a pass has 9 steps
        try:
            run_shrink(finished_run / "teacher", killed, SMALL, quiet, resume=deaths > 0)
            break
        except KilledError:
            deaths += 1
    assert deaths == 2
    ends = [{name: each for name, each in ending(path).items() if "result" not in name} for path in (whole, killed)]
    assert not differences(*ends)


@pytest.mark.usefixtures("without_latencies")
@pytest.mark.parametrize("option", ["target_macs", "target_parameters"])
def test_calibration_trains_nothing(finished_run: Path, quiet: Console, option: str) -> None:
    path = finished_run.parent / f"calibrated-{option}"
    run_shrink(finished_run / "teacher", path, ShrinkConfig(**{option: 0.9}, calibrate=500), quiet)  # type: ignore[arg-type]
    result = result_of(path)
    share = option.removeprefix("target_")
    assert result["after"][share] <= 0.9 * result["before"][share]  # type: ignore[index]
    assert result["after"]["accuracy"] > 0.3  # type: ignore[index]
    assert "500 images, no training" in (path / "report.md").read_text()


@pytest.mark.usefixtures("without_latencies")
def test_widths_are_rounded(finished_run: Path, quiet: Console, tmp_path: Path) -> None:
    run_shrink(
        finished_run / "teacher", tmp_path / "r", ShrinkConfig(target_macs=0.7, calibrate=300, round_to=4), quiet
    )
    widths = result_of(tmp_path / "r")["widths"].values()  # type: ignore[attr-defined]
    assert all(after % 4 == 0 or after == before for before, after in widths)
    assert any(after < before for before, after in widths)


@pytest.mark.usefixtures("without_latencies")
def test_what_cannot_be_shrunk_is_named(finished_run: Path, quiet: Console, tmp_path: Path) -> None:
    with pytest.raises(WorkflowError, match="expected the folder of one training, such as"):
        run_shrink(finished_run, tmp_path / "a", SMALL, quiet)
    with pytest.raises(WorkflowError, match="no such file or folder"):
        run_shrink(tmp_path / "missing", tmp_path / "a", SMALL, quiet)
    path = finished_run.parent / "twice"
    run_shrink(finished_run / "teacher", path, ShrinkConfig(target_macs=0.9, calibrate=300), quiet)
    with pytest.raises(WorkflowError, match="continue it with --resume"):
        run_shrink(finished_run / "teacher", path, SMALL, quiet)
    with pytest.raises(WorkflowError, match=r"target_macs: 0\.9 was saved, 0\.5 is wanted"):
        run_shrink(finished_run / "teacher", path, SMALL, quiet, resume=True)
