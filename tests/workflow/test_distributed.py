"""Several processes train what one process trains, end with the same bits, and fail together."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankProcesses
from torch import nn
from workflow_ranks import ask_teacher, run_share, run_share_with_own_seed

import kddp_ext
from kddp_ext.workflow import cli, runs
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.jobs import STAGES

# Sums are rounded in another order, which a training amplifies. The precision of float64 is 1e-16.
CLOSE = 1e-9


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    processes = RankProcesses(tmp_path_factory.mktemp("ranks"), timeout=120)  # whole trainings
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def config(small: RunConfig) -> RunConfig:
    """Without reconstruction, whose samples depend on the number of processes."""
    pruning = dataclasses.replace(small.pruning, l1_weight=0.005, reconstruction_samples=0)
    student = dataclasses.replace(small.student, epochs=3)
    teacher = dataclasses.replace(small.teacher, epochs=4)  # the whitening's bias is frozen in the last epoch
    return dataclasses.replace(small, teacher=teacher, student=student, pruning=pruning)


@pytest.fixture(scope="module")
def one(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run by one process."""
    path = tmp_path_factory.mktemp("one") / "run"
    run_share(0, path, config)
    return path


BATCH_NORM = partial(run_share, norm=nn.BatchNorm2d)


@pytest.fixture(scope="module")
def two(ranks: RankProcesses, config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Folder of a run with batch normalisation by two processes, and the result of each."""
    path = tmp_path_factory.mktemp("two") / "run"
    return path, ranks.run(BATCH_NORM, path, config)


def checkpoint(path: Path, stage: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(RunFolder(path).checkpoint(stage), weights_only=True)
    return state


def assert_same_training(path: Path, other: Path) -> None:
    """The weights agree within rounding; what was pruned, accuracies and widths agree exactly."""
    for stage in STAGES:
        mine, expected = checkpoint(path, stage), checkpoint(other, stage)
        assert mine["history"] == expected["history"]
        for name, value in expected["model"].items():
            assert value.dtype == torch.float64, name
            error = (mine["model"][name] - value).abs().max() / value.abs().max()
            assert error < CLOSE, (stage, name)
        assert RunFolder(path).read_result(stage) == RunFolder(other).read_result(stage)
        for here, there in zip(mine["epochs"], expected["epochs"], strict=True):
            assert here.pop("widths", None) == there.pop("widths", None)
            assert {**here, "seconds": 0} == pytest.approx({**there, "seconds": 0}, rel=CLOSE)
            assert here["validation_accuracy"] == there["validation_accuracy"]
            assert here["train_accuracy"] == there["train_accuracy"]


def test_two_processes_train_what_one_trains_also_after_a_kill(
    ranks: RankProcesses, config: RunConfig, one: Path, tmp_path: Path
) -> None:
    steps = kddp_ext.PruningHistory.from_json(checkpoint(one, "kddp")["history"]).steps
    assert len(steps) == 2  # the processes must agree on two prunes
    assert 1 < (RunFolder(one).read_result("kddp") or {})["width"] < 48
    # The teacher takes 28 steps, each student 21. Step 80 is in the second epoch of kddp.
    answers = ranks.run(partial(run_share, steps=80), tmp_path / "run", config)
    assert [message for message, *_ in answers] == ["killed", "killed"]
    resumed_by_one = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    run_share(0, resumed_by_one, config, resume=True)
    assert_same_training(resumed_by_one, one)
    ranks.run(partial(run_share, resume=True), tmp_path / "run", config)
    assert_same_training(tmp_path / "run", one)


def test_two_processes_with_batch_normalisation_end_with_the_same_bits(two: tuple[Path, list[Any]]) -> None:
    path, ((_, first_output, first), (_, second_output, second)) = two
    for stage in STAGES:
        assert first[stage].keys() == second[stage].keys()
        saved = checkpoint(path, stage)["model"]
        for name, value in first[stage].items():
            assert torch.equal(value, second[stage][name]), (stage, name)
            assert torch.equal(value, saved[name])
    assert "2 processes" in first_output
    assert "The report is" in first_output
    assert second_output == ""


def test_a_killed_run_of_two_processes_resumes_with_the_same_bits(
    ranks: RankProcesses, config: RunConfig, two: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    ranks.run(partial(BATCH_NORM, steps=80), tmp_path / "run", config)
    ranks.run(partial(BATCH_NORM, resume=True), tmp_path / "run", config)
    for stage in STAGES:
        resumed = checkpoint(tmp_path / "run", stage)["model"]
        for name, value in checkpoint(two[0], stage)["model"].items():
            assert torch.equal(resumed[name], value), (stage, name)


@pytest.mark.parametrize(("rank", "what"), [(1, "the data set"), (0, "the data set"), (0, "a checkpoint")])
def test_a_failure_on_one_rank_ends_the_other(
    ranks: RankProcesses, config: RunConfig, tmp_path: Path, rank: int, what: str
) -> None:
    answers = ranks.run(partial(run_share, fails=(rank, what)), tmp_path / "run", config)
    assert [message for message, *_ in answers] == [what if each == rank else "lost the other" for each in (0, 1)]


def test_settings_that_several_processes_cannot_use_are_refused(
    ranks: RankProcesses, config: RunConfig, tmp_path: Path
) -> None:
    odd = dataclasses.replace(config, student=dataclasses.replace(config.student, batch_size=63))
    compiled = dataclasses.replace(config, compile=True)
    whole = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, batch_size=2000), validation=201)
    messages = [
        ranks.run(run_share, tmp_path / str(number), each)[1][0] for number, each in enumerate((odd, compiled, whole))
    ]
    expected = "expected a multiple of 2 (the processes), got"
    assert messages[0] == f"--student.batch-size: {expected} 63"
    assert messages[1].startswith("--compile: expected False with 2 processes, got True")
    assert messages[2] == f"--teacher.batch-size: {expected} 999"


def test_processes_with_other_settings_are_refused(ranks: RankProcesses, config: RunConfig, tmp_path: Path) -> None:
    answers = ranks.run(run_share_with_own_seed, tmp_path / "run", config)
    assert all(message.startswith("the settings: expected the same on all ranks, got") for message, *_ in answers)


def test_the_processes_share_the_teachers_images(
    ranks: RankProcesses, image_data: Callable[..., ImageData], tmp_path: Path
) -> None:
    data = image_data(count=80)  # 70 for training: parts of 20, 20, 20 and 10
    expected = ask_teacher(0, tmp_path / "one", data)
    for answers, seen in zip(ranks.run(ask_teacher, tmp_path / "two", data), (40, 30), strict=True):
        for (logits, _), (whole, _) in zip(answers, expected, strict=True):
            assert torch.equal(logits, whole)
        assert [each for _, each in answers] == [seen, seen, 0]  # the last is read
    files = [{path.name: path.read_bytes()[-2800:] for path in (tmp_path / each).iterdir()} for each in ("one", "two")]
    assert files[0] == files[1]


def test_a_pruner_follows_batch_normalisation_that_became_synchronised() -> None:
    """`runs` replaces the BatchNorm modules on GPUs after the pruner has traced the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    nn.init.zeros_(model[1].weight[:4])  # type: ignore[arg-type]
    nn.init.constant_(model[1].bias[:4], -1)  # type: ignore[arg-type]  # four neurons are never active
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = kddp_ext.DynamicPruner(model, optimizer, example_inputs=(torch.randn(4, 6),), criterion="dead", patience=1)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    inputs = torch.randn(16, 6)
    for _ in range(2):
        kddp_ext.fused_kd_l1_loss(model(inputs), None, torch.arange(16) % 3, pruner.activations, alpha=0.0).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.prune()
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert model[1].num_features == 5
    assert [tuple(value.shape) for value in model.state_dict().values()][:6] == [(5, 6), (5,), (5,), (5,), (5,), (5,)]


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_torchrun_trains_and_reports(tmp_path: Path) -> None:
    options = ["--teacher.channels", "8", "--teacher.epochs", "1", "--student.channels", "4", "--student.epochs", "2"]
    options += ["--student.width", "16", "--threads", "1", "--device", "cpu", "--runs-dir", str(tmp_path)]
    ended = torchrun(tmp_path, "-m", "kddp_ext", "run", "--name", "mine", *options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("The report is") == 1
    assert all(RunFolder(tmp_path / "mine").read_result(stage) is not None for stage in STAGES)


EXITS_NORMALLY = """
import atexit
from kddp_ext.workflow import cli

def main():
    atexit.register(print, "cleaned up")
    print("done", end=" ")
    return 3

cli.main = main
cli.entry_point()
"""


@pytest.mark.parametrize(("processes", "out"), [("1", "done cleaned up\n"), ("2", "done ")])
def test_several_processes_exit_without_the_interpreters_cleanup(tmp_path: Path, processes: str, out: str) -> None:
    """A thread of gloo that needs the interpreter during its cleanup aborts the process, in about one run of 15."""
    environment = {**os.environ, "WORLD_SIZE": processes}
    command = [sys.executable, "-c", EXITS_NORMALLY]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, out, "")


ONE_WITHOUT_DATA = """
import os
from kddp_ext.workflow import cli
from kddp_ext.workflow import runs
from kddp_ext.workflow.errors import WorkflowError

def missing(*_):
    raise WorkflowError("the data is missing")

if os.environ["RANK"] == "1":
    runs.read_dataset = missing
cli.entry_point()
"""


def test_torchrun_ends_all_and_the_failing_rank_says_why(tmp_path: Path) -> None:
    script = tmp_path / "one_without_data.py"
    script.write_text(ONE_WITHOUT_DATA)
    ended = torchrun(tmp_path, str(script), "run", "--device", "cpu", "--runs-dir", str(tmp_path))
    assert ended.returncode != 0
    told = [line for line in ended.stderr.splitlines() if "kddp run: rank 1" in line]
    assert told == ["kddp run: rank 1: the data is missing"]
    assert "The report is" not in ended.stdout


@pytest.mark.parametrize(("rank", "said"), [("0", True), ("1", False)])
def test_ctrl_c_says_how_torchrun_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, said: bool
) -> None:
    def interrupted(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    for name, value in {"RANK": rank, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runs, "run_sweep", interrupted)
    assert cli.main(["run"]) == 130
    command = "torchrun --nproc-per-node 2 -m kddp_ext run --resume"
    wanted = f"Interrupted. Finished epochs are kept; continue with: {command}\n"
    assert capsys.readouterr().err == (wanted if said else "")
