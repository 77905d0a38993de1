"""A sweep: its grid, its report, several processes at it, and resuming."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kddp_ext.files import leftovers
from kddp_ext.workflow import teacher_source
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.rebuild import rebuild_report
from kddp_ext.workflow.run import run_workflow
from kddp_ext.workflow.sweep import run_sweep, sweep_points
from kddp_ext.workflow.sweep_config import SweepConfig, load_sweep, points
from kddp_ext.workflow.sweep_results import measure_points

ROOT = Path(__file__).parents[2]
OPTIONS = ["--teacher.channels", "8", "--teacher.epochs", "2", "--student.channels", "4", "--student.epochs", "3"]
OPTIONS += ["--student.width", "32", "--student.batch-size", "128", "--pruning.l1-weight", "0.05"]
OPTIONS += ["--pruning.threshold", "0.2", "--pruning.patience", "1", "--threads", "1", "--device", "cpu"]
OPTIONS += ["--seeds", "0", "1", "--widths", "8", "--l1-weights", "0.02", "--ablations", "no-teacher", "at-the-end"]


@pytest.fixture
def grid(small: RunConfig) -> SweepConfig:
    """Two seeds, two widths, two weights, two ablations."""
    return SweepConfig(small, seeds=(0, 1), widths=(8,), l1_weights=(0.02,), ablations=("no-teacher", "at-the-end"))


@pytest.fixture(scope="session")
def finished_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sweep, finished; tests only read it."""
    runs = tmp_path_factory.mktemp("sweeps")
    assert main(["sweep", *OPTIONS, "--runs-dir", str(runs), "--name", "whole"]) == 0
    return runs / "whole"


def files_of(sweep: Path) -> dict[str, Any]:
    """What a sweep leaves that no clock has touched, by path."""
    content: dict[str, Any] = {name: (sweep / name).read_bytes() for name in ("sweep.json", "report.md", "report.png")}
    for path in sorted(sweep.glob("*/result.json")):
        content[str(path.relative_to(sweep))] = path.read_bytes()
    for path in sorted(sweep.glob("*/checkpoint.pt")):
        state = torch.load(path, weights_only=True)
        content[str(path.relative_to(sweep))] = {key: value.tolist() for key, value in state["model"].items()}
    return content


def test_the_grid(grid: SweepConfig) -> None:
    made = points(grid, {"kddp-l1_0.02-seed_0": 11, "kddp-l1_0.05-seed_1": 5})
    assert [(point.kind, len(point.jobs)) for point in made] == [
        ("scratch", 2),
        ("kd", 2),
        ("kd", 2),
        ("kddp", 2),
        ("kddp", 2),
        ("kd-at-found-width", 1),
        ("kd-at-found-width", 1),
        ("ablation", 2),
        ("ablation", 2),
    ]
    configs = {job.name: job.config for point in made for job in point.jobs}
    assert configs["kd-width_11-seed_0"].student.width == 11
    assert configs["kd-width_5-seed_1"].seed == 1
    assert configs["kddp-l1_0.02-seed_1"].pruning.l1_weight == 0.02
    assert configs["ablation-no-teacher-seed_0"].distillation.alpha == 0
    assert configs["ablation-at-the-end-seed_0"].pruning.when == "at-the-end"
    unchanged = dataclasses.replace(configs["ablation-at-the-end-seed_1"], pruning=grid.run.pruning)
    assert unchanged == dataclasses.replace(grid.run, seed=1)


def test_every_ablation_changes_one_thing(small: RunConfig) -> None:
    from typing import get_args

    from kddp_ext.workflow.config import differences
    from kddp_ext.workflow.sweep_config import Ablation

    sweep = SweepConfig(small, seeds=(0,), widths=(), l1_weights=(), ablations=get_args(Ablation))
    ablations = [point for point in points(sweep, {}) if point.kind == "ablation"]
    changes = [differences(small, point.jobs[0].config) for point in ablations]
    assert all(len(change) == 1 for change in changes)
    assert len({change[0] for change in changes}) == len(get_args(Ablation))


def test_config_survives_json(grid: SweepConfig) -> None:
    assert SweepConfig.from_json(json.loads(json.dumps(grid.to_json()))) == grid


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0", "0"], "--seeds: expected different values, got (0, 0)"),
        (["--seeds"], "--seeds: expected one or more numbers of at least 0, got ()"),
        (["--widths", "0"], "--widths: expected a positive number, got 0"),
        (["--l1-weights", "nan"], "--l1-weights: expected a positive number, got nan"),
        (["--teacher-from", "nowhere"], "--teacher-from: expected a run or sweep with a finished teacher, got nowhere"),
    ],
)
def test_a_bad_value_names_its_option(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *arguments, "--runs-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"kddp sweep: {message}\n"


def test_the_report_has_every_point_with_its_spread(finished_sweep: Path) -> None:
    sweep, folder = load_sweep(finished_sweep / "sweep.json"), RunFolder(finished_sweep)
    measured = measure_points(folder, sweep_points(folder, sweep))
    assert {len(each.results) for each in measured} == {2}
    report = folder.report.read_text()
    for label in ("scratch", "KD, width 8", "KD, width 32", "KDDP, l1_weight 0.02", "no-teacher", "at-the-end"):
        row = next(line for line in report.splitlines() if line.startswith(f"| {label} | 2 |"))
        assert " ± " in row
    kddp = next(each for each in measured if each.point.kind == "kddp")
    assert kddp.mean("width") < 32
    assert (finished_sweep / "report.png").read_bytes().startswith(b"\x89PNG")


def test_students_are_compared_with_kd_at_the_full_width(finished_sweep: Path) -> None:
    def results(name: str) -> list[dict[str, Any]]:
        return [json.loads((finished_sweep / f"{name}-seed_{seed}" / "result.json").read_text()) for seed in (0, 1)]

    kddp, kd = results("kddp-l1_0.05"), results("kd-width_32")
    gains = [100 * (ours["test_accuracy"] - theirs["test_accuracy"]) for ours, theirs in zip(kddp, kd, strict=True)]
    sizes = [sum(result["linear_parameters"] for result in each) for each in (kd, kddp)]
    rows = [line.strip("| ").split(" | ") for line in RunFolder(finished_sweep).report.read_text().splitlines()]
    gain, fewer = next(row for row in rows if row[0] == "KDDP, l1_weight 0.05")[-2:]
    assert float(gain.split(" ± ")[0]) == pytest.approx(statistics.fmean(gains), abs=0.0051)
    assert float(gain.split(" ± ")[1]) == pytest.approx(statistics.stdev(gains), abs=0.0051)
    assert fewer == f"{sizes[0] / sizes[1]:.1f}x"


def test_a_page_takes_the_tables_and_pictures_of_sweeps(
    finished_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import study

    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    (tmp_path / "images").mkdir()
    marks = ("students", "same-width", "ablations", "beyond-students", "search")
    page.write_text("Above.\n" + "".join(f"<!-- table {name} -->\n<!-- end -->\n" for name in marks) + "Below.\n")
    search = tmp_path / "search.json"
    search.write_text(json.dumps({"kddp pruning.l1_weight=0.02": {"validation_accuracy": 0.5, "width": 7}}))
    sweep = str(finished_sweep)
    arguments = ["study", str(page), "--sweep", sweep, "--beyond", sweep, "--search", str(search)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(figures)])
    assert study.main() == 0

    text = page.read_text()
    assert (text[:7], text[-7:]) == ("Above.\n", "Below.\n")
    assert text.count("| KDDP, l1_weight 0.05 | 2 |") == 3  # among the students, the ablations' base, and beyond
    assert "| kddp | l1_weight=0.02 | 50.00 | 7 |" in text
    pictures = [(tmp_path / "images" / f"cifar10-study-{name}.png").read_bytes() for name in ("cnn5", "beyond")]
    assert pictures == [(finished_sweep / "report.png").read_bytes()] * 2
    trainings = json.loads(figures.read_text())["cnn5"]["KDDP, l1_weight 0.02"]
    assert [training["seed"] for training in trainings] == [0, 1]
    assert all(training["widths"][-1] == training["width"] for training in trainings)


def test_kd_was_trained_at_each_width_that_kddp_found(finished_sweep: Path) -> None:
    found = {
        (json.loads(path.read_text())["width"], path.parent.name[-1])
        for path in finished_sweep.glob("kddp-*/result.json")
    }
    trained = {
        (json.loads(path.read_text())["width"], path.parent.name[-1])
        for path in finished_sweep.glob("kd-*/result.json")
    }
    assert found <= trained


def test_report_rebuilds_the_same_files(finished_sweep: Path, quiet: Console) -> None:
    before = files_of(finished_sweep)
    for name in ("report.md", "report.png"):
        (finished_sweep / name).unlink()
    rebuild_report(finished_sweep, quiet)
    assert files_of(finished_sweep) == before


def test_what_killed_processes_left_is_removed(finished_sweep: Path, tmp_path: Path, quiet: Console) -> None:
    sweep = tmp_path / "whole"
    shutil.copytree(finished_sweep, sweep)
    left = sweep / ".report.md.x.partial"
    left.write_text("half a re")
    rebuild_report(sweep, quiet)
    assert not left.exists()
    left.write_text("half a re")
    (sweep / ".teacher.x.partial").mkdir()
    assert main(["sweep", *OPTIONS, "--runs-dir", str(tmp_path), "--name", "whole", "--resume"]) == 0
    assert not leftovers(sweep)
    assert files_of(sweep) == files_of(finished_sweep)


def test_report_of_a_run(finished_run: Path, quiet: Console) -> None:
    before = (finished_run / "report.md").read_bytes()
    (finished_run / "report.md").unlink()
    rebuild_report(finished_run, quiet)
    assert (finished_run / "report.md").read_bytes() == before
    with pytest.raises(WorkflowError, match="is not a run of kddp"):
        rebuild_report(finished_run / "kd", quiet)


def test_two_processes_share_the_work_and_survive_the_loss_of_one(finished_sweep: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kddp_ext", "sweep", *OPTIONS, "--runs-dir", str(tmp_path), "--name", "whole"]
    first, second = (
        subprocess.Popen([*command, *more], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for more in ([], ["--resume"])
    )
    while not list(tmp_path.glob("whole/*/student.safetensors")):
        assert second.poll() is None or first.poll() is None
    first.send_signal(signal.SIGKILL)
    outputs = [process.communicate(timeout=120)[0] for process in (second, first)]
    if second.returncode == 2:  # it came before the first had begun, or found its folder half made
        pytest.fail(outputs[0])
    assert second.returncode == 0, outputs[0]
    assert files_of(tmp_path / "whole") == files_of(finished_sweep)


def test_a_finished_sweep_can_be_enlarged_and_not_changed(grid: SweepConfig, tmp_path: Path, quiet: Console) -> None:
    path = tmp_path / "grown"
    small = dataclasses.replace(grid, seeds=(0,), widths=(), l1_weights=(), ablations=(), retrain=False)
    run_sweep(path, small, quiet, device="cpu")
    before = (path / "scratch-seed_0" / "result.json").stat().st_mtime_ns
    with pytest.raises(WorkflowError, match="holds a sweep already"):
        run_sweep(path, small, quiet, device="cpu")
    other = dataclasses.replace(small, run=dataclasses.replace(small.run, data_seed=4))
    with pytest.raises(WorkflowError, match="data_seed: 0 was saved, 4 is wanted"):
        run_sweep(path, other, quiet, device="cpu", resume=True)
    run_sweep(path, dataclasses.replace(small, widths=(8,)), quiet, device="cpu", resume=True)
    assert (path / "kd-width_8-seed_0" / "result.json").is_file()
    assert (path / "scratch-seed_0" / "result.json").stat().st_mtime_ns == before


def test_a_teacher_serves_another_run(finished_run: Path, small: RunConfig, tmp_path: Path, quiet: Console) -> None:
    again = dataclasses.replace(small, seed=7)
    run_workflow(tmp_path / "again", again, quiet, device="cpu", teacher_from=finished_run)
    checkpoints = [(path / "teacher" / "checkpoint.pt").read_bytes() for path in (tmp_path / "again", finished_run)]
    assert checkpoints[0] == checkpoints[1]
    other = dataclasses.replace(small, teacher=dataclasses.replace(small.teacher, epochs=9))
    with pytest.raises(WorkflowError, match=r"was trained otherwise: teacher\.epochs: 2 was saved, 9 is wanted"):
        run_workflow(tmp_path / "other", other, quiet, device="cpu", teacher_from=finished_run)


def test_a_teacher_that_cannot_be_copied_leaves_nothing(
    finished_run: Path, small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(_source: Path, target: Path, **_options: object) -> None:
        Path(target).mkdir(exist_ok=True)
        (Path(target) / "checkpoint.pt").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_source.shutil, "copytree", fill_the_disk)
    folder = tmp_path / "new"
    folder.mkdir()
    with pytest.raises(OSError, match="No space left"):
        teacher_source.take_teacher(RunFolder(folder), finished_run, small)
    assert list(folder.iterdir()) == []
