"""Several processes train what one trains, end in the same bits, and fail together."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import workflow_ranks
from rank_processes import RankProcesses
from torch import nn

import kddp_ext
from kddp_ext.workflow import cli, runs
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.jobs import STAGES
from kddp_ext.workflow.processes import Processes

# Sums are rounded in another order, and a training amplifies that: float64 has 1e-16.
CLOSE = 1e-9


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    processes = RankProcesses(tmp_path_factory.mktemp("ranks"), timeout=120)  # whole trainings
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def config(small: RunConfig) -> RunConfig:
    """Without the reconstruction: its samples are a choice among all, and another one for each number of processes."""
    pruning = dataclasses.replace(small.pruning, l1_weight=0.005, reconstruction_samples=0)
    student = dataclasses.replace(small.student, epochs=3)
    teacher = dataclasses.replace(small.teacher, epochs=4)  # in the last, the whitening's bias learns no more
    return dataclasses.replace(small, teacher=teacher, student=student, pruning=pruning)


@pytest.fixture(scope="module")
def one(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run by one process."""
    path = tmp_path_factory.mktemp("one") / "run"
    workflow_ranks.run_share(0, path, config, 1)
    return path


@pytest.fixture(scope="module")
def two(ranks: RankProcesses, config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Folder of the same run by two processes, and what each returned."""
    path = tmp_path_factory.mktemp("two") / "run"
    return path, ranks.run(workflow_ranks.run_share, path, config)


def checkpoint(path: Path, stage: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(RunFolder(path).checkpoint(stage), weights_only=True)
    return state


def assert_close_end(path: Path, other: Path) -> None:
    """Weights within rounding; pruning, accuracies and widths exactly."""
    for stage in STAGES:
        mine, expected = checkpoint(path, stage), checkpoint(other, stage)
        assert mine["history"] == expected["history"]
        assert mine["architecture"] == expected["architecture"]
        for name, value in expected["model"].items():
            assert value.dtype in (torch.float64, torch.int64), name
            error = (mine["model"][name] - value).abs().max() / value.abs().max()
            assert error < CLOSE, (stage, name)
        assert RunFolder(path).read_result(stage) == RunFolder(other).read_result(stage)
        for here, there in zip(mine["epochs"], expected["epochs"], strict=True):
            assert {**here, "seconds": 0} == pytest.approx({**there, "seconds": 0}, rel=CLOSE)
            assert here["validation_accuracy"] == there["validation_accuracy"]
            assert here["train_accuracy"] == there["train_accuracy"]


def test_two_processes_train_what_one_trains(one: Path, two: tuple[Path, list[Any]]) -> None:
    assert_close_end(two[0], one)
    steps = kddp_ext.PruningHistory.from_json(checkpoint(one, "kddp")["history"]).steps
    assert len(steps) == 2  # or there was nothing to agree about
    assert 1 < (RunFolder(one).read_result("kddp") or {})["width"] < 48


def test_both_processes_end_in_the_same_bits_and_the_first_alone_speaks(two: tuple[Path, list[Any]]) -> None:
    path, ((_, first_said, first), (_, second_said, second)) = two
    for stage in STAGES:
        assert first[stage].keys() == second[stage].keys()
        saved = checkpoint(path, stage)["model"]
        for name, value in first[stage].items():
            assert torch.equal(value, second[stage][name]), (stage, name)
            assert torch.equal(value, saved[name])
    assert "2 processes" in first_said
    assert "The report is" in first_said
    assert second_said == ""


def test_a_killed_run_goes_on_with_any_number_of_processes(
    ranks: RankProcesses, config: RunConfig, one: Path, two: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    # 28 steps of the teacher, 21 of each student: in the second epoch of kddp.
    for path, steps in ((tmp_path / "two", 80), (tmp_path / "one", 80)):
        answers = ranks.run(workflow_ranks.run_share_killed, path, config, steps)
        assert [message for message, *_ in answers] == ["killed", "killed"]
    ranks.run(workflow_ranks.run_share_resumed, tmp_path / "two", config)
    for stage in STAGES:
        for name, value in checkpoint(two[0], stage)["model"].items():
            assert torch.equal(checkpoint(tmp_path / "two", stage)["model"][name], value), (stage, name)
    workflow_ranks.run_share(0, tmp_path / "one", config, 1, resume=True)
    assert_close_end(tmp_path / "one", one)


@pytest.mark.parametrize(
    ("rank", "what", "message"),
    [
        (1, "the data set", "rank 1: this is a fault of 1"),
        (0, "the data set", "rank 0: this is a fault of 0"),
        (1, "the images", "rank 1: this is a fault of 1"),
        (0, "a full disk", "rank 0: the/file: No such file or directory"),
    ],
)
def test_a_failure_of_one_ends_all_with_its_message(
    ranks: RankProcesses, config: RunConfig, tmp_path: Path, rank: int, what: str, message: str
) -> None:
    answers = ranks.run(workflow_ranks.run_share_failing, tmp_path / "run", config, rank, what)
    assert [told for told, *_ in answers] == [message, message]


def test_a_checkpoint_that_one_cannot_read_ends_all(ranks: RankProcesses, config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "run"
    ranks.run(workflow_ranks.run_share_killed, path, config, 10)
    answers = ranks.run(workflow_ranks.run_share_failing, path, config, 1, "a checkpoint", True)
    assert [told for told, *_ in answers] == ["rank 1: this is a fault of 1"] * 2
    RunFolder(path).checkpoint("teacher").write_bytes(b"nonsense")
    first, second = ranks.run(workflow_ranks.run_share_resumed, path, config)
    assert first[0] == second[0]
    assert first[0].startswith(f"{RunFolder(path).checkpoint('teacher')} is damaged")


def test_what_several_processes_cannot_do_is_refused_by_name(
    ranks: RankProcesses, config: RunConfig, tmp_path: Path
) -> None:
    odd = dataclasses.replace(config, student=dataclasses.replace(config.student, batch_size=63))
    compiled = dataclasses.replace(config, compile=True)
    whole = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, batch_size=2000), validation=201)
    messages = [
        ranks.run(workflow_ranks.run_share, tmp_path / str(number), each)[1][0]
        for number, each in enumerate((odd, compiled, whole))
    ]
    shared = "expected a batch that the 2 processes can share equally, got"
    assert messages[0] == f"--student.batch-size: {shared} 63 images"
    assert messages[1].startswith("--compile: expected False with 2 processes, got True")
    assert messages[2] == f"--teacher.batch-size: {shared} 999 images"


def test_processes_with_other_settings_are_refused(ranks: RankProcesses, config: RunConfig, tmp_path: Path) -> None:
    answers = ranks.run(workflow_ranks.run_share_with_own_seed, tmp_path / "run", config)
    assert all(message.startswith("rank 1: expected the settings of rank 0") for message, *_ in answers)


def test_each_process_asks_the_teacher_for_its_share(
    ranks: RankProcesses, image_data: Callable[..., ImageData], tmp_path: Path
) -> None:
    data = image_data(count=80)  # 70 for training: parts of 20, 20, 20 and 10
    expected = workflow_ranks.ask_teacher(0, tmp_path / "one", data, 1)
    for answers, seen in zip(ranks.run(workflow_ranks.ask_teacher, tmp_path / "two", data), (40, 30), strict=True):
        for (logits, _), (whole, _) in zip(answers, expected, strict=True):
            assert torch.equal(logits, whole)
        assert [each for _, each in answers] == [seen, seen, 0]  # the last is read
    files = [{path.name: path.read_bytes()[-2800:] for path in (tmp_path / each).iterdir()} for each in ("one", "two")]
    assert files[0] == files[1]


def batches(module: nn.Module, mean: float = 1.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three batches of inputs, and the gradients of their outputs."""
    generator = torch.Generator().manual_seed(0)
    sides = (5, 5) if isinstance(module, nn.BatchNorm2d) else ()
    shape = (12, module.num_features, *sides)
    pairs = [[torch.randn(shape, generator=generator) for _ in range(2)] for _ in range(3)]
    return [(inputs * 3 + mean, upstream) for inputs, upstream in pairs]


def some_batch_norm(kind: str) -> nn.Module:
    torch.manual_seed(0)
    module = {
        "plain": lambda: nn.BatchNorm2d(7),
        "of rows": lambda: nn.BatchNorm1d(7),
        "without weights": lambda: nn.BatchNorm2d(7, affine=False),
        "with the mean of all batches": lambda: nn.BatchNorm2d(7, momentum=None),
        "without running statistics": lambda: nn.BatchNorm2d(7, track_running_stats=False),
        "of doubles": lambda: nn.BatchNorm2d(7).double(),
    }[kind]()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize(
    "kind",
    [
        "plain", "of rows", "without weights", "with the mean of all batches", "without running statistics",
        "of doubles",
    ],
)  # fmt: skip
def test_batch_normalisation_is_that_of_the_joined_batch(ranks: RankProcesses, kind: str) -> None:
    module = some_batch_norm(kind)
    steps = batches(module)
    if kind == "of doubles":
        steps = [(inputs.double(), upstream.double()) for inputs, upstream in steps]
    names = list(module.state_dict())
    (expected, evaluated, state) = workflow_ranks.batch_norm(0, module, steps, 1)
    shares = ranks.run(workflow_ranks.batch_norm, module, steps, 2)
    tolerance = 1e-6 if kind != "of doubles" else 1e-14
    for step, (output, to_inputs, gradients) in enumerate(expected):
        for rank, (results, _, _) in enumerate(shares):
            assert_near(results[step][0], output[rank::2], tolerance)
            assert_near(results[step][1], to_inputs[rank::2], tolerance)
        for index, gradient in enumerate(gradients):
            assert_near(sum(results[step][2][index] for results, _, _ in shares), gradient, tolerance)
    for _, at_evaluation, own_state in shares:
        assert list(own_state) == names
        for name, value in state.items():
            assert_near(own_state[name], value, tolerance)
        if kind != "without running statistics":  # which evaluates by the batch it is given, each by its own here
            assert_near(at_evaluation, evaluated, tolerance)
    for name, value in shares[0][2].items():
        assert torch.equal(value, shares[1][2][name])


def assert_near(value: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert value.dtype == expected.dtype
    assert float((value - expected).abs().max()) <= tolerance * scale


def test_batch_normalisation_far_from_zero(ranks: RankProcesses) -> None:
    """Where the difference of a mean square and a squared mean would have nothing left of the variance."""
    module = some_batch_norm("plain")
    steps = batches(module, mean=3000.0)
    doubles = [(inputs.double(), upstream.double()) for inputs, upstream in steps]
    exact, _, _ = workflow_ranks.batch_norm(0, copy.deepcopy(module).double(), doubles, 1)
    last_place = 2.0**-12 / 3  # of an input, in standard deviations
    shares = ranks.run(workflow_ranks.batch_norm, module, steps, 2)
    for step, (output, *_) in enumerate(exact):
        for rank, (results, _, _) in enumerate(shares):
            error = (results[step][0] - output[rank::2]).abs().max()
            assert error <= last_place * module.weight.abs().max()


def test_batch_normalisation_under_autocast_and_channels_last(ranks: RankProcesses) -> None:
    module = some_batch_norm("plain")
    steps = [
        (inputs.bfloat16().contiguous(memory_format=torch.channels_last), upstream)
        for inputs, upstream in batches(module)
    ]
    expected, _, state = workflow_ranks.batch_norm(0, module, steps, 1, autocast=True)
    for rank, (results, _, own_state) in enumerate(ranks.run(workflow_ranks.batch_norm, module, steps, 2, True)):
        for (output, to_inputs, _), (whole, gradient, _) in zip(results, expected, strict=True):
            assert output.is_contiguous(memory_format=torch.channels_last)
            assert_near(output, whole[rank::2], 2**-8)  # half of bfloat16's last place
            assert_near(to_inputs, gradient[rank::2], 2**-7)
        for name, value in state.items():
            assert_near(own_state[name], value, 1e-6)


def test_batch_normalisation_after_a_prune_has_narrowed_it(ranks: RankProcesses) -> None:
    assert ranks.run(workflow_ranks.narrowed_batch_norm) == [True, True]


def test_one_process_alone_communicates_nothing() -> None:
    alone = Processes()
    assert alone.first(lambda: 3) == alone.machine_by_machine(lambda: 3) == 3
    assert alone.gather("a") == ["a"]
    assert torch.equal(alone.stack(torch.ones(2)), torch.ones(1, 2))
    with pytest.raises(KeyError):
        alone.together(lambda: {}["what fails"])


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


def test_torchrun(tmp_path: Path) -> None:
    options = ["--teacher.channels", "8", "--teacher.epochs", "1", "--student.channels", "4", "--student.epochs", "2"]
    options += ["--student.width", "16", "--threads", "1", "--device", "cpu", "--runs-dir", str(tmp_path)]
    ended = torchrun(tmp_path, "-m", "kddp_ext", "run", "--name", "mine", *options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("The report is") == 1
    assert all(RunFolder(tmp_path / "mine").read_result(stage) is not None for stage in STAGES)


TOLD_BY_THE_INTERPRETER = """
import atexit, sys
from kddp_ext.workflow import cli

def main():
    atexit.register(print, "tidied")
    print("done", end=" ")
    print("told", end=" ", file=sys.stderr)
    return 3

cli.main = main
cli.entry_point()
"""


@pytest.mark.parametrize(("processes", "out"), [("1", "done tidied\n"), ("2", "done ")])
def test_of_several_processes_none_ends_in_the_middle_of_what_gloo_does(
    tmp_path: Path, processes: str, out: str
) -> None:
    """A thread of gloo that needs the interpreter while that is taken down aborts the process: about one run in 15."""
    environment = {**os.environ, "WORLD_SIZE": processes}
    command = [sys.executable, "-c", TOLD_BY_THE_INTERPRETER]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, out, "told ")


ONE_WITHOUT_DATA = """
import os
from kddp_ext.workflow import cli
from kddp_ext.workflow import run
from kddp_ext.workflow.errors import WorkflowError

def missing(*_):
    raise WorkflowError("the data is missing")

if os.environ["RANK"] == "1":
    runs.read_dataset = missing
cli.entry_point()
"""


def test_torchrun_of_processes_of_which_one_fails(tmp_path: Path) -> None:
    script = tmp_path / "one_without_data.py"
    script.write_text(ONE_WITHOUT_DATA)
    ended = torchrun(tmp_path, str(script), "run", "--device", "cpu", "--runs-dir", str(tmp_path))
    assert ended.returncode != 0
    told = [line for line in ended.stderr.splitlines() if "kddp run:" in line]
    assert told == ["kddp run: rank 1: the data is missing"]


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
    wanted = f"Interrupted. What is done is kept; continue with: {command}\n"
    assert capsys.readouterr().err == (wanted if said else "")
