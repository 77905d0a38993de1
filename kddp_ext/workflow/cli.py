"""The command `kddp`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import tyro

from kddp_ext.workflow.config import Dataset, Preset, RunConfig
from kddp_ext.workflow.errors import LostProcessError, SharedError, WorkflowError, message_of
from kddp_ext.workflow.presets import preset
from kddp_ext.workflow.runtime import Device
from kddp_ext.workflow.signals import (
    Interrupted,
    Output,
    OutputError,
    end_process,
    fill_standard_files,
    flush_stdout,
    give_up_stdout,
    interruptible,
)
from kddp_ext.workflow.sweep_config import SweepConfig

_HELP = """\
kddp: make a neural network small while it learns from a larger one.

  kddp run         train a teacher, then a student on its own, with KD, and with KDDP; write a report
  kddp sweep       the same over seeds, widths and penalty weights, with one report
  kddp report      write the report of a run or a sweep anew, from what is on disk
  kddp evaluate    measure the accuracy of a run, or of one saved student, on the test images
  kddp info        show what a run or a saved student is: architecture, size, what was pruned

Start with `kddp run`. It uses small scanned digits that need no download, and takes half a minute.
`kddp COMMAND --help` explains a command's options.
"""
_SYSTEM_ERROR, _USAGE_ERROR = 1, 2


@dataclass(frozen=True)
class RunCommand:
    """What `kddp run` is given besides the config."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    name: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """Name of the run and of its folder. Without it: the data set, and the preset unless that is default."""
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Where the folders of runs are kept."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder of the data set, or the one above it. Without it, the data set is downloaded once."""
    teacher_from: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """A run or sweep whose finished teacher is used, where its settings are the same."""
    resume: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Continue a run that was interrupted, with the settings it was started with."""
    device: Device = "auto"
    """auto takes a GPU where there is one."""
    threads: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Processor threads. 0 takes one for digits, too small for more to help, and PyTorch's choice otherwise."""
    tensorboard: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Write the metrics as TensorBoard's event files too, into runs/NAME/STAGE/tensorboard."""


@dataclass(frozen=True)
class SweepCommand:
    """What `kddp sweep` is given besides the config."""

    config: Annotated[SweepConfig, tyro.conf.arg(name="")] = field(default_factory=SweepConfig)
    name: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """Name of the sweep and of its folder. Without it: the data set's, and -sweep."""
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Where the folders of runs are kept."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder of the data set, or the one above it. Without it, the data set is downloaded once."""
    teacher_from: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """A run or sweep whose finished teacher is used, where its settings are the same."""
    resume: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Continue a sweep, enlarge it, or help another process with it."""
    device: Device = "auto"
    """auto takes a GPU where there is one."""
    threads: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Processor threads. 0 takes one for digits, too small for more to help, and PyTorch's choice otherwise."""


@dataclass(frozen=True)
class ReportCommand:
    """What `kddp report` is given."""

    path: tyro.conf.Positional[Path]
    """Folder of a run or of a sweep, finished or not."""


@dataclass(frozen=True)
class EvaluateCommand:
    """What `kddp evaluate` is given."""

    path: tyro.conf.Positional[Path]
    """Folder of a run, or a student.safetensors file."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder of the data set, or the one above it. Without it, the data set is downloaded once."""
    device: Device = "auto"
    """auto takes a GPU where there is one."""


@dataclass(frozen=True)
class InfoCommand:
    """What `kddp info` is given."""

    path: tyro.conf.Positional[Path]
    """Folder of a run, or a student.safetensors file."""


def entry_point() -> NoReturn:
    """The command `kddp`: `main` with the arguments of this process, which ends with its exit code."""
    end_process(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    That is 0, 2 for a setting or file that does not serve, 1 for what the system refuses (a full disk, no permission, a
    process that is gone), 130 after Ctrl-C and 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    fill_standard_files()
    try:
        with interruptible():
            return _act(arguments)
    except SharedError:  # the first of several processes has told it
        return _USAGE_ERROR
    except LostProcessError as error:
        _tell(command, message_of(error))
        return _SYSTEM_ERROR
    except WorkflowError as error:
        _tell(command, message_of(error))
        return _USAGE_ERROR
    except OutputError as error:
        give_up_stdout()
        _tell(command, f"cannot write to stdout: {error.strerror}.{_how_to_resume(arguments)}")
        return _SYSTEM_ERROR
    except OSError as error:
        _tell(command, message_of(error))
        return _SYSTEM_ERROR
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started, one says it
            _say(f"Interrupted.{_how_to_resume(arguments)}")
        return 128 + (interrupt.signal if isinstance(interrupt, Interrupted) else signal.SIGINT)


def _act(arguments: list[str]) -> int:
    """Do what the arguments say, and write all that it prints; returns the exit code."""
    commands = {"run": _run, "sweep": _sweep, "report": _report, "evaluate": _evaluate, "info": _info}
    code = 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        code = 0 if arguments else _USAGE_ERROR
    elif arguments[0] == "--version":
        from kddp_ext import __version__

        print(f"kddp {__version__}")
    elif arguments[0] in commands:
        commands[arguments[0]](arguments[1:])
    else:
        print(f"kddp: there is no command {arguments[0]!r}; use {', '.join(commands)}", file=sys.stderr)
        code = _USAGE_ERROR
    flush_stdout()
    return code


def _run(arguments: list[str]) -> None:
    command = _parse(
        RunCommand,
        arguments,
        "run",
        "Train a teacher, then the student three times: alone (scratch), under the teacher's guidance (kd), "
        "and under its guidance while superfluous neurons are removed (kddp). Everything is kept in "
        "runs/NAME; report.md there has the table and a picture.",
        default=RunCommand(config=_chosen_preset(arguments)),
    )
    config = command.config
    name = command.name or config.dataset + ("" if config.preset == "default" else f"-{config.preset}")

    # Matplotlib and the rest load here, so that --help and a mistyped option need not wait for them.
    from kddp_ext.workflow.distributed import process_group
    from kddp_ext.workflow.run import run_workflow

    _set_up(command.threads, config.dataset)
    with process_group(use_gpus=command.device != "cpu", tell=lambda message: _tell("run", message)) as processes:
        run_workflow(
            command.runs_dir / name,
            config,
            Output(),
            data_dir=command.data_dir,
            resume=command.resume,
            device=command.device,
            teacher_from=command.teacher_from,
            processes=processes,
            tensorboard=command.tensorboard,
        )


def _sweep(arguments: list[str]) -> None:
    command = _parse(
        SweepCommand,
        arguments,
        "sweep",
        "Train one teacher, and under it students of many seeds, widths and penalty weights: alone (scratch), with KD, "
        "with KDDP, and with KD at the widths that KDDP found. Interrupted, it goes on with --resume; started again "
        "with --resume while it runs, both share the work. report.md in its folder has the tables and a picture.",
        default=SweepCommand(config=SweepConfig(run=_chosen_preset(arguments))),
    )
    from kddp_ext.workflow.sweep import run_sweep

    _set_up(command.threads, command.config.run.dataset)
    run_sweep(
        command.runs_dir / (command.name or f"{command.config.run.dataset}-sweep"),
        command.config,
        Output(),
        data_dir=command.data_dir,
        resume=command.resume,
        device=command.device,
        teacher_from=command.teacher_from,
    )


def _report(arguments: list[str]) -> None:
    command = _parse(ReportCommand, arguments, "report", "Write the report of a run or a sweep from what is on disk.")
    from kddp_ext.workflow.rebuild import rebuild_report

    rebuild_report(command.path, Output())


def _set_up(threads: int, dataset: Dataset) -> None:
    import torch

    from kddp_ext.workflow.runtime import prepare_process

    if threads < 0:
        raise WorkflowError(f"--threads: expected a number of at least 0, got {threads}")
    threads = threads or (1 if dataset == "digits" else 0)
    if threads:
        torch.set_num_threads(threads)
    prepare_process()


def _evaluate(arguments: list[str]) -> None:
    command = _parse(
        EvaluateCommand,
        arguments,
        "evaluate",
        "Measure the accuracy on the test images: of every finished stage of a run, or of one saved student.",
    )
    from kddp_ext.workflow.inspect import evaluate

    evaluate(command.path, command.data_dir, command.device, Output())


def _info(arguments: list[str]) -> None:
    command = _parse(InfoCommand, arguments, "info", "Show what a run or a saved student is. Needs no data set.")
    from kddp_ext.workflow.inspect import describe

    describe(command.path, Output())


def _parse(kind: Any, arguments: list[str], name: str, description: str, default: Any = None) -> Any:
    options = {} if default is None else {"default": default}
    try:
        return tyro.cli(
            kind,
            args=arguments,
            prog=f"kddp {name}",
            description=description,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff),
            **options,
        )
    except OSError as error:  # of --help
        raise OutputError(error.errno, error.strerror) from error


def _chosen_preset(arguments: list[str]) -> RunConfig:
    """The options' defaults. A wrong choice is left for the real parser to explain."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--preset", default="default")
    try:
        chosen, _ = parser.parse_known_args(arguments)
    except SystemExit:
        return RunConfig()
    if chosen.dataset not in get_args(Dataset) or chosen.preset not in get_args(Preset):
        return RunConfig()
    return preset(chosen.dataset, chosen.preset)


def _tell(command: str, message: str) -> None:
    _say(f"kddp {command}: {message}")


def _say(line: str) -> None:
    with suppress(OSError):  # where stderr is gone too, the exit code has to do
        print(line, file=sys.stderr, flush=True)


def _how_to_resume(arguments: list[str]) -> str:
    if not arguments or arguments[0] not in ("run", "sweep") or {"-h", "--help"} & {*arguments}:
        return ""
    started = ["kddp"]
    if arguments[0] == "run" and "LOCAL_WORLD_SIZE" in os.environ:
        started = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "kddp_ext"]
    command = [*started, *arguments] + ([] if "--resume" in arguments else ["--resume"])
    return f" What is done is kept; continue with: {shlex.join(command)}"
