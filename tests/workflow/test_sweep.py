"""A sweep: its list of trainings, its report, several processes that share it, and resuming."""

from __future__ import annotations

import dataclasses
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console
from run_files import differences as file_differences
from run_files import ending

from kddp_ext.workflow import runs
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.config import Ablation, RunConfig, SweepConfig, differences
from kddp_ext.workflow.folder import RunFolder, locked
from kddp_ext.workflow.jobs import points
from kddp_ext.workflow.report import measure_points

ROOT = Path(__file__).parents[2]
OPTIONS = ["--teacher.channels", "8", "--teacher.epochs", "2", "--student.channels", "4", "--student.epochs", "3"]
OPTIONS += ["--student.width", "32", "--student.batch-size", "128", "--pruning.l1-weight", "0.05"]
OPTIONS += ["--pruning.threshold", "0.2", "--pruning.patience", "1", "--threads", "1", "--device", "cpu"]
OPTIONS += ["--seeds", "0", "1", "--widths", "8", "--l1-weights", "0.02", "--ablations", "no-teacher", "at-the-end"]


@pytest.fixture
def grid(small: RunConfig) -> SweepConfig:
    """Two seeds, two widths, two weights, two ablations."""
    return SweepConfig(
        small, seeds=(0, 1), widths=(8,), l1_weights=(0.02,), retrain=True, ablations=("no-teacher", "at-the-end")
    )


@pytest.fixture(scope="session")
def _sweep_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    assert main(["sweep", *OPTIONS, "--runs-dir", str(folder), "--name", "sweep"]) == 0
    return folder


@pytest.fixture
def finished_sweep(_sweep_once: Path) -> Path:
    """The folder of a small finished sweep. Tests only read it."""
    return _sweep_once / "sweep"


def result_of(sweep: Path, job: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((sweep / job / "result.json").read_text())
    return result


def test_the_list_of_trainings(grid: SweepConfig) -> None:
    made = points(grid, {"kddp-l1_0.02": 11, "kddp-seed_1": 5})
    assert [(point.label, [job.name for job in point.jobs]) for point in made] == [
        ("teacher", ["teacher"]),
        ("scratch", ["scratch", "scratch-seed_1"]),
        ("kd, width 8", ["kd-width_8", "kd-width_8-seed_1"]),
        ("kd, width 48", ["kd", "kd-seed_1"]),
        ("kddp, l1-weight 0.02", ["kddp-l1_0.02", "kddp-l1_0.02-seed_1"]),
        ("kddp, l1-weight 0.05", ["kddp", "kddp-seed_1"]),
        ("kd at the width of kddp, l1-weight 0.02", ["kd-width_11"]),
        ("kd at the width of kddp, l1-weight 0.05", ["kd-width_5-seed_1"]),
        ("kddp, no-teacher", ["kddp-no-teacher", "kddp-no-teacher-seed_1"]),
        ("kddp, at-the-end", ["kddp-at-the-end", "kddp-at-the-end-seed_1"]),
    ]
    configs = {job.name: job.config for point in made for job in point.jobs}
    assert configs["kd-width_11"].student.width == 11
    assert configs["kd-width_5-seed_1"].seed == 1
    assert configs["kddp-l1_0.02-seed_1"].pruning.l1_weight == 0.02
    assert configs["kddp-no-teacher"].distillation.alpha == 0
    unchanged = dataclasses.replace(configs["kddp-at-the-end-seed_1"], pruning=grid.run.pruning)
    assert unchanged == dataclasses.replace(grid.run, seed=1)


def test_a_run_is_a_sweep_of_one_seed(small: RunConfig) -> None:
    made = points(SweepConfig.single(dataclasses.replace(small, seed=4)), {})
    assert [[job.name for job in point.jobs] for point in made] == [["teacher"], ["scratch"], ["kd"], ["kddp"]]
    assert {job.config.seed for point in made for job in point.jobs} == {4}


def test_every_ablation_changes_one_thing(small: RunConfig) -> None:
    sweep = SweepConfig(small, ablations=get_args(Ablation))
    ablations = [point for point in points(sweep, {}) if point.kind == "ablation"]
    changes = [differences(small.options(), point.jobs[0].config.options()) for point in ablations]
    assert all(len(change) == 1 for change in changes)
    assert len({change[0] for change in changes}) == len(get_args(Ablation))


def test_the_report_has_every_point_with_its_spread(finished_sweep: Path) -> None:
    folder = RunFolder(finished_sweep)
    measured = measure_points(folder, folder.points(folder.read_config()))
    assert {len(each.results) for each in measured} == {1, 2}
    report = folder.report.read_text()
    for label in ("scratch", "kd, width 8", "kd, width 32", "kddp, l1-weight 0.02", "kddp, no-teacher"):
        row = next(line for line in report.splitlines() if line.startswith(f"| {label} | 2 |"))
        assert " ± " in row
    assert "## same-width" in report
    assert next(each for each in measured if each.point.kind == "kddp").mean("width") < 32
    assert (finished_sweep / "report.png").read_bytes().startswith(b"\x89PNG")


def test_students_are_compared_with_kd_at_the_full_width(finished_sweep: Path) -> None:
    kddp, kd = ([result_of(finished_sweep, f"{name}{seed}") for seed in ("", "-seed_1")] for name in ("kddp", "kd"))
    gains = [100 * (ours["test_accuracy"] - theirs["test_accuracy"]) for ours, theirs in zip(kddp, kd, strict=True)]
    sizes = [sum(result["parameters"] for result in each) for each in (kd, kddp)]
    rows = [line.strip("| ").split(" | ") for line in RunFolder(finished_sweep).report.read_text().splitlines()]
    gain, smaller = next(row for row in rows if row[0] == "kddp, l1-weight 0.05")[-2:]
    assert float(gain.split(" ± ")[0]) == pytest.approx(statistics.fmean(gains), abs=0.0051)
    assert float(gain.split(" ± ")[1]) == pytest.approx(statistics.stdev(gains), abs=0.0051)
    assert smaller == f"{sizes[0] / sizes[1]:.2f}x"


def test_a_page_takes_the_tables_of_sweeps(
    finished_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import study

    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    marks = ("students", "same-width", "ablations", "beyond-students")
    page.write_text("Above.\n" + "".join(f"<!-- table {name} -->\n<!-- end -->\n" for name in marks) + "Below.\n")
    sweep = str(finished_sweep)
    arguments = ["study", str(page), "--sweep", sweep, "--beyond", sweep, "--json", str(figures)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert study.main() == 0

    text = page.read_text()
    assert (text[:7], text[-7:]) == ("Above.\n", "Below.\n")
    assert text.count("| kddp, l1-weight 0.05 | 2 |") == 3  # in both tables of students, and the base of the ablations
    trainings = json.loads(figures.read_text())["cnn5"]["kddp, l1-weight 0.02"]
    assert [training["seed"] for training in trainings] == [0, 1]
    assert all(training["widths"][-1] == training["width"] for training in trainings)


def test_two_processes_share_the_work_and_survive_the_loss_of_one(finished_sweep: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kddp_ext", "sweep", *OPTIONS, "--runs-dir", str(tmp_path), "--name", "sweep"]
    first, second = (
        subprocess.Popen([*command, *more], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for more in ([], ["--resume"])
    )
    while not list(tmp_path.glob("sweep/*/student.safetensors")):
        assert second.poll() is None or first.poll() is None
    first.send_signal(signal.SIGKILL)
    output, _ = (process.communicate(timeout=120)[0] for process in (second, first))
    assert second.returncode == 0, output
    assert not file_differences(ending(tmp_path), ending(finished_sweep.parent))


def test_a_training_of_another_process_is_waited_for(
    finished_run: Path, small: RunConfig, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished_run / "kddp" / "result.json").rename(finished_run / "kept")
    waits = []
    with locked(finished_run / "kddp"):

        def finish_elsewhere(seconds: float) -> None:
            waits.append(seconds)
            (finished_run / "kept").rename(finished_run / "kddp" / "result.json")

        monkeypatch.setattr(runs.time, "sleep", finish_elsewhere)
        run(finished_run, small, resume=True)
    assert len(waits) == 1


def test_a_finished_run_can_be_enlarged_to_a_sweep(
    finished_run: Path, small: RunConfig, run: Callable[..., None], quiet: Console
) -> None:
    before = (finished_run / "scratch" / "result.json").stat().st_mtime_ns
    run(finished_run, SweepConfig(small, widths=(8,)), resume=True)
    assert (finished_run / "kd-width_8" / "result.json").is_file()
    assert (finished_run / "scratch" / "result.json").stat().st_mtime_ns == before
    assert "kd, width 8" in quiet.file.getvalue()  # type: ignore[attr-defined]
