"""The command line: fast help that a person can read, and errors in one line that say what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kddp_ext
from kddp_ext.workflow import runs
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.config import RunConfig, SweepConfig, differences, preset
from kddp_ext.workflow.errors import WorkflowError

COMMANDS = ("run", "sweep", "report", "evaluate", "predict", "export", "info")
Calls = list[tuple[Path, SweepConfig, dict[str, Any]]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Records what `kddp run` would have started."""
    calls: Calls = []
    monkeypatch.setattr(
        runs, "run_sweep", lambda path, sweep, _console, **options: calls.append((path, sweep, options))
    )
    return calls


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"kddp {command}" in text for command in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"kddp {kddp_ext.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: kddp {command}" in text
    assert "{None}" not in text


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    program = f"""
import resource, sys
from kddp_ext.workflow.cli import main
for arguments in (["--help"], *([command, "--help"] for command in {COMMANDS})):
    try:
        main(arguments)
    except SystemExit:
        pass
    if arguments == ["--help"]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        print("processor seconds:", used.ru_utime + used.ru_stime, file=sys.stderr)
print("imported:", *({{"torch", "matplotlib", "numpy"}} & sys.modules.keys()), file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    seconds, imported = ended.stderr.splitlines()
    assert float(seconds.split()[-1]) < 0.5
    assert imported == "imported:"


@pytest.mark.parametrize(
    "program",
    [
        "import torch, kddp_ext",
        "import kddp_ext, torch; kddp_ext.build_info",
        "import kddp_ext, torch, kddp_ext.ops",
    ],
)
def test_importing_the_package_registers_the_operators(program: str, tmp_path: Path) -> None:
    code = f"{program}; assert hasattr(torch.ops.kddp, 'gather_slices')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_the_package_lists_its_names_and_has_no_others() -> None:
    assert {*kddp_ext.__all__} <= {*dir(kddp_ext)}
    with pytest.raises(AttributeError, match="module 'kddp_ext' has no attribute 'loss_function'"):
        kddp_ext.loss_function  # noqa: B018


def test_an_unknown_command_and_option_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert (
        "no command 'train'; use run, sweep, shrink, report, evaluate, predict, export, info" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as end:
        main(["run", "--epochz", "3"])
    assert end.value.code == 2


def test_the_plain_commands_train_the_digits(started: Calls) -> None:
    assert main(["run"]) == main(["sweep"]) == 0
    (run, run_config, _), (sweep, sweep_config, _) = started
    assert (run, run_config) == (Path("runs/digits"), SweepConfig.single(preset("digits", "default")))
    assert (sweep, sweep_config.run) == (Path("runs/digits-sweep"), preset("digits", "default"))
    assert len(sweep_config.seeds) > 1


def test_options_override_the_preset(started: Calls, tmp_path: Path) -> None:
    arguments = ["--dataset", "cifar10", "--preset=quick", "--student.width", "77", "--pruning.compensate", "False"]
    assert main(["run", *arguments, "--runs-dir", str(tmp_path), "--resume"]) == 0
    ((path, sweep, options),) = started
    assert path == tmp_path / "cifar10-quick"
    assert options["resume"]
    assert sweep.run.student.epochs == preset("cifar10", "quick").student.epochs
    assert differences(preset("cifar10", "quick").options(), sweep.run.options()) == [
        "student.width: 1024 was saved, 77 is wanted",
        "pruning.compensate: True was saved, False is wanted",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --distillation.alpha 1.5", "--distillation.alpha: expected a number from 0 to 1, got 1.5"),
        (
            "run --distillation.dkd-target-weight -1",
            "--distillation.dkd-target-weight: expected a finite number of at least 0, got -1.0",
        ),
        ("run --distillation.temperature nan", "--distillation.temperature: expected a finite number above 0, got nan"),
        ("run --pruning.l1-weight -1", "--pruning.l1-weight: expected a number of at least 0, got -1.0"),
        ("run --pruning.threshold 0", "--pruning.threshold: expected a number above 0, at most 1, got 0.0"),
        ("run --student.epochs 0", "--student.epochs: expected a positive number, got 0"),
        ("run --student.channels 4 0", "--student.channels: expected a positive number, got (4, 0)"),
        ("run --teacher.momentum 1", "--teacher.momentum: expected a number from 0 to below 1, got 1.0"),
        (
            "run --pruning.start 0.6 --pruning.until 0.5",
            "--pruning.start: expected less than --pruning.until, which is 0.5, got 0.6",
        ),
        (
            "run --seed 9999999999999999999",
            "--seed: expected a whole number of at most 63 bits, got 9999999999999999999",
        ),
        ("run --threads -2", "--threads: expected a number of at least 0, got -2"),
        ("sweep --seeds 0 0", "--seeds: expected different values, got (0, 0)"),
        ("sweep --seeds", "--seeds: expected at least one seed, got none"),
        ("sweep --widths 0", "--widths: expected a positive number, got (0,)"),
        ("sweep --l1-weights nan", "--l1-weights: expected a positive number, got (nan,)"),
        (
            "sweep --l1-weights 0.1 0.1000000001",
            "--l1-weights: expected values that differ in six digits, got (0.1, 0.1000000001)",
        ),
        (
            "sweep --student.architecture resnet20 --student.channels --pruning.layers all",
            "--widths: expected none for resnet20, which has no hidden layer of --student.width",
        ),
        (
            "run --student.channels 4 4 4 4",
            "--student.channels: expected fewer channels: 4 poolings leave no pixel of 8x8 images",
        ),
        ("sweep --teacher-from nowhere", "--teacher-from: expected a run with a finished teacher, got nowhere"),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_option(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = arguments.split()
    assert main([command, *options, "--runs-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"kddp {command}: {message}\n"
    # The folder of a sweep is there before its teacher is copied.
    assert "--teacher-from" in options or not list(tmp_path.iterdir())


def test_a_run_that_found_no_data_can_be_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--runs-dir", str(tmp_path), "--dataset", "cifar10", "--data-dir", str(tmp_path / "nowhere")]
    for seed in ("0", "1"):
        assert main(["run", *options, "--seed", seed]) == 2
        assert f"{tmp_path / 'nowhere'}: expected a file data_batch_1" in capsys.readouterr().err


def test_evaluate_and_info_name_what_they_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "student.safetensors"
    foreign.write_bytes(b"not a student")
    for command in ("evaluate", "info"):
        for path, message in (
            (tmp_path / "nowhere", f"{tmp_path / 'nowhere'}: no such file or folder"),
            (tmp_path, f"{tmp_path} is not a run of kddp"),
            (foreign, str(foreign)),
        ):
            assert main([command, str(path)]) == 2
            assert message in capsys.readouterr().err


def test_a_diverging_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--runs-dir", str(tmp_path), "--teacher.learning-rate", "1e30", "--threads", "1"]
    assert main(["run", *options]) == 2
    assert "teacher: the training diverged: the loss is nan after epoch 1" in capsys.readouterr().err


def test_a_config_survives_json_and_refuses_what_it_does_not_know() -> None:
    for config in (RunConfig(), SweepConfig(seeds=(1, 2), ablations=("dead",))):
        assert type(config).from_json(config.to_json()) == config
        with pytest.raises(WorkflowError, match="missing or unknown: colour"):
            type(config).from_json({**config.to_json(), "colour": "blue"})
        with pytest.raises(WorkflowError, match="expected version 4"):
            type(config).from_json({**config.to_json(), "version": 1})
    with pytest.raises(WorkflowError, match=r"run\.teacher: expected a JSON object, got 3"):
        SweepConfig.from_json({**SweepConfig().to_json(), "run": {**SweepConfig().to_json()["run"], "teacher": 3}})
    for option, value, expected in (
        ("widths", 3, "a list"),
        ("retrain", 1, "True or False"),
        ("ablations", ("x",), "one of no-teacher, "),
        ("l1_weights", ("x",), "a number"),
    ):
        with pytest.raises(WorkflowError, match=f"--{option.replace('_', '-')}: expected {expected}"):
            SweepConfig(**{option: value})
