"""The command line: help that a person can read, and errors in one line that say what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from kddp_ext import files
from kddp_ext.workflow import checkpoint, run
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.config import RunConfig, differences
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.presets import preset


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, RunConfig, dict[str, Any]]]:
    """Catch what `kddp run` would have started."""
    calls: list[tuple[Path, RunConfig, dict[str, Any]]] = []
    monkeypatch.setattr(
        run, "run_workflow", lambda path, config, console, **options: calls.append((path, config, options))
    )
    return calls


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"kddp {command}" in text for command in ("run", "sweep", "report", "evaluate", "info"))
    assert main([]) == 2


@pytest.mark.parametrize("command", ["run", "sweep", "report", "evaluate", "info"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: kddp {command}" in text
    assert "{None}" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kddp ")


def test_an_unknown_command_and_option_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "no command 'train'; use run, sweep, report, evaluate, info" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["run", "--epochz", "3"])
    assert end.value.code == 2


def test_the_plain_command_runs_the_digits(started: list[Any]) -> None:
    assert main(["run"]) == 0
    ((path, config, _options),) = started
    assert path == Path("runs/digits")
    assert config == preset("digits", "default")


def test_options_override_the_preset(started: list[Any], tmp_path: Path) -> None:
    arguments = ["--dataset", "cifar10", "--preset=quick", "--student.width", "77", "--pruning.compensate", "False"]
    assert main(["run", *arguments, "--runs-dir", str(tmp_path), "--resume"]) == 0
    ((path, config, options),) = started
    assert path == tmp_path / "cifar10-quick"
    assert options["resume"]
    assert config.student.epochs == preset("cifar10", "quick").student.epochs
    changed = differences(preset("cifar10", "quick"), config)
    assert changed == [
        "student.width: 1024 was saved, 77 is wanted",
        "pruning.compensate: True was saved, False is wanted",
    ]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--distillation.alpha", "1.5", "--distillation.alpha: expected a number from 0 to 1, got 1.5"),
        ("--distillation.jsd-beta", "1", "--distillation.jsd-beta: expected a number between 0 and 1, got 1.0"),
        ("--distillation.temperature", "nan", "--distillation.temperature: expected a positive number, got nan"),
        ("--pruning.l1-weight", "-1", "--pruning.l1-weight: expected a number of at least 0, got -1.0"),
        ("--pruning.threshold", "0", "--pruning.threshold: expected a number above 0, at most 1, got 0.0"),
        ("--student.epochs", "0", "--student.epochs: expected a positive number, got 0"),
        ("--teacher.momentum", "1", "--teacher.momentum: expected a number from 0 to below 1, got 1.0"),
        ("--threads", "-2", "--threads: expected a number of at least 0, got -2"),
    ],
)
def test_a_bad_value_names_its_option(
    option: str, value: str, message: str, started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", option, value]) == 2
    assert capsys.readouterr().err == f"kddp run: {message}\n"
    assert not started


def test_more_poolings_than_the_image_has_sides_for_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--runs-dir", str(tmp_path), "--student.channels", "4", "4", "4", "4"]
    assert main(["run", *options]) == 2
    assert "--student.channels: 4 poolings" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_for_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["run", "--runs-dir", str(blocked)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("kddp run: ")
    assert str(blocked) in message
    assert message.count("\n") == 1


def test_a_run_that_found_no_data_can_be_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--runs-dir", str(tmp_path), "--dataset", "cifar10", "--data-dir", str(tmp_path / "nowhere")]
    for seed in ("0", "1"):
        assert main(["run", *options, "--seed", seed]) == 2
        assert f"{tmp_path / 'nowhere'}: expected a file data_batch_1" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save_checkpoint(path, {"epochs": 1})
    before = path.read_bytes()

    def full(_file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = files.atomic_write
    monkeypatch.setattr(checkpoint, "atomic_write", lambda place, _content: write(place, full))
    arguments = ["run", "--runs-dir", str(tmp_path), "--name", "full", "--threads", "1"]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    wanted = tmp_path / "full" / "teacher" / "checkpoint.pt"
    assert message == f"kddp run: cannot write {wanted}: No space left on device\n"
    assert not list(wanted.parent.iterdir())
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_checkpoint(path, {"epochs": 2})
    assert path.read_bytes() == before


def test_evaluate_and_info_name_what_they_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "student.safetensors"
    foreign.write_bytes(b"not a student")
    for command in ("evaluate", "info"):
        assert main([command, str(tmp_path / "nowhere")]) == 2
        assert f"{tmp_path / 'nowhere'}: no such file or folder" in capsys.readouterr().err
        assert main([command, str(tmp_path)]) == 2
        assert f"{tmp_path} is not a run of kddp" in capsys.readouterr().err
        assert main([command, str(foreign)]) == 2
        assert str(foreign) in capsys.readouterr().err


def test_a_diverging_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--runs-dir", str(tmp_path), "--teacher.learning-rate", "1e30", "--threads", "1"]
    assert main(["run", *options]) == 2
    assert "teacher: the loss is nan after epoch 1: the training diverged" in capsys.readouterr().err


def test_config_refuses_what_it_does_not_know() -> None:
    values = RunConfig().to_json()
    assert RunConfig.from_json(values) == RunConfig()
    with pytest.raises(WorkflowError, match="does not fit this version"):
        RunConfig.from_json({**values, "colour": "blue"})
