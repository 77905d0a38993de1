"""The command `kddp`: its options, its messages and its exit codes."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Generic, NoReturn, TypeVar, get_args

import tyro
from rich.console import Console

from kddp_ext.workflow.config import Dataset, Device, Preset, RunConfig, SweepConfig, preset
from kddp_ext.workflow.errors import OptionError, WorkflowError

Config = TypeVar("Config", RunConfig, SweepConfig)

_HELP = """\
kddp: train a small neural network with the help of a large one, and remove the neurons that it does not need.

  kddp run         train a teacher, then a student alone, with KD, and with KDDP; write a report
  kddp sweep       the same for several seeds, widths and penalty weights, in one report
  kddp report      write the report of a run again, from the trainings that are finished
  kddp evaluate    measure the test accuracy of a run, or of one student file
  kddp info        show what a run or a student file is: accuracy, size, what was pruned, settings

Start with `kddp run`. It uses small scanned digits, needs no download, and takes less than a minute.
`kddp COMMAND --help` explains a command's options.
"""
_SYSTEM_ERROR, _USAGE_ERROR = 1, 2

_DATA_HELP = "Folder of the data set, or its parent. Default: download the data set once."
DataDir = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help=_DATA_HELP, help_behavior_hint="")]


@dataclass(frozen=True)
class TrainCommand(Generic[Config]):
    """The options of `kddp run` and `kddp sweep`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    name: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """Name of the run and of its folder. Default: the data set, and the preset or "sweep"."""
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Folder that contains the runs' folders."""
    data_dir: DataDir = None
    teacher_from: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder of a run whose finished teacher is used. Its teacher's settings must be the same."""
    resume: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Continue an interrupted run with the settings it was started with, or help another process with it."""
    device: Device = "auto"
    """auto uses a GPU if there is one."""
    threads: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """CPU threads. 0 uses one for digits, where more do not help, and PyTorch's default otherwise."""
    tensorboard: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Also write the metrics as TensorBoard event files, into runs/NAME/TRAINING/tensorboard."""


class Output(Console):
    """The console on standard output, whose errors say so."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            raise OSError(error.errno, f"cannot write to stdout: {error.strerror}") from error


def entry_point() -> NoReturn:
    """Run the command `kddp` with this process's arguments, and end the process with its exit code."""
    code = main()
    if not _started_by_torchrun():
        sys.exit(code)
    # A thread of gloo may release a tensor while the interpreter shuts down, and torch then aborts the process.
    for file in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            file.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    The code is 0 for success, 1 for what the system refuses (a full disk, no permission, a lost process), 2 for a
    setting or file that cannot be used, 130 after Ctrl-C, and 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    prefix = f"kddp {command}: "
    if _started_by_torchrun():
        prefix += f"rank {os.environ.get('RANK')}: "
    else:  # a process of torchrun that waits for another inside a library would not see the exception
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # while a failure can still be reported
        return code
    except WorkflowError as error:
        _print_error(f"{prefix}{error}")
        return _USAGE_ERROR
    except OSError as error:
        with suppress(OSError, ValueError):  # or the interpreter would fail at its end on what stdout still holds
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        file = "" if error.filename is None else f"{error.filename}: "  # `atomic_write` names its file in the message
        _print_error(f"{prefix}{file}{error.strerror or error}")
        return _SYSTEM_ERROR
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes prints it
            _print_error(f"Interrupted.{_how_to_resume(arguments)}")
        return 128 + (interrupt.args or [signal.SIGINT])[0]


def _dispatch(arguments: list[str]) -> int:
    """Run the command that the arguments name; returns the exit code."""
    name, *options = arguments or [""]
    if name in ("run", "sweep"):
        (_run if name == "run" else _sweep)(options)
    elif name in _COMMANDS:
        action = tyro.cli(_COMMANDS[name], args=options, prog=f"kddp {name}", config=_TYRO)
        action()
    elif name in ("", "-h", "--help", "help"):
        print(_HELP, end="")
        return 0 if name else _USAGE_ERROR
    elif name == "--version":
        from kddp_ext import __version__

        print(f"kddp {__version__}")
    else:
        _print_error(f"kddp: there is no command {name!r}; use run, sweep, {', '.join(_COMMANDS)}")
        return _USAGE_ERROR
    return 0


_RUN = (
    "Train a teacher, then the student three times: on the labels alone (scratch), with the teacher's logits (kd), "
    "and with these logits while inactive neurons are removed (kddp). Everything is kept in runs/NAME; report.md "
    "there has the table and a picture."
)
_SWEEP = (
    "Train one teacher, and students of several seeds, widths and penalty weights: on the labels alone (scratch), "
    "with KD, with KDDP, and with KD at the widths that KDDP found. An interrupted sweep continues with --resume; "
    "processes started with --resume while it runs share the work. report.md in its folder has the tables and a "
    "picture."
)


def _run(arguments: list[str]) -> None:
    default = TrainCommand(_chosen_preset(arguments))
    command = tyro.cli(
        TrainCommand[RunConfig], prog="kddp run", description=_RUN, args=arguments, default=default, config=_TYRO
    )
    suffix = "" if command.config.preset == "default" else f"-{command.config.preset}"
    _train(command, SweepConfig.single(command.config), command.config.dataset + suffix)


def _sweep(arguments: list[str]) -> None:
    config = SweepConfig(
        run=_chosen_preset(arguments),
        seeds=(0, 1, 2),
        widths=(16, 64, 256),
        l1_weights=(3e-4, 1e-3, 3e-3, 1e-2),
        retrain=True,
    )
    default = TrainCommand(config)
    command = tyro.cli(
        TrainCommand[SweepConfig], prog="kddp sweep", description=_SWEEP, args=arguments, default=default, config=_TYRO
    )
    _train(command, command.config, f"{command.config.run.dataset}-sweep")


def _train(command: TrainCommand[Any], sweep: SweepConfig, default_name: str) -> None:
    if command.threads < 0:
        raise OptionError("threads", "a number of at least 0", command.threads)
    # Torch and matplotlib load here, so that --help and a mistyped option do not wait for them.
    import torch

    from kddp_ext.workflow.distributed import process_group
    from kddp_ext.workflow.runs import run_sweep
    from kddp_ext.workflow.runtime import prepare_process

    if threads := command.threads or (1 if sweep.run.dataset == "digits" else 0):
        torch.set_num_threads(threads)
    prepare_process()
    with process_group(use_gpus=command.device != "cpu"):
        run_sweep(
            command.runs_dir / (command.name or default_name),
            sweep,
            Output(),
            data_dir=command.data_dir,
            resume=command.resume,
            device=command.device,
            teacher_from=command.teacher_from,
            tensorboard=command.tensorboard,
        )


def _report(path: tyro.conf.Positional[Path]) -> Callable[[], None]:
    """Write the report of a run or a sweep again, from the trainings that are finished.

    Args:
        path: Folder of a run or a sweep.
    """
    from kddp_ext.workflow.report import rebuild_report

    return partial(rebuild_report, path, Output())


def _evaluate(
    path: tyro.conf.Positional[Path], data_dir: DataDir = None, device: Device = "auto"
) -> Callable[[], None]:
    """Measure the accuracy on the test images of every finished network of a run, or of one student file.

    Args:
        path: Folder of a run or a sweep, or a student.safetensors file.
        device: auto uses a GPU if there is one.
    """
    from kddp_ext.workflow.inspect import evaluate

    return partial(evaluate, path, data_dir, device, Output())


def _info(path: tyro.conf.Positional[Path]) -> Callable[[], None]:
    """Show what a run or a student file is: accuracy, size, what was pruned, settings. Needs no data set.

    Args:
        path: Folder of a run or a sweep, or a student.safetensors file.
    """
    from kddp_ext.workflow.inspect import describe

    return partial(describe, path, Output())


_COMMANDS = {"report": _report, "evaluate": _evaluate, "info": _info}
_TYRO = (tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)


def _chosen_preset(arguments: list[str]) -> RunConfig:
    """The defaults of the options, which depend on --dataset and --preset. The real parser reports wrong choices."""
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


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """Handle SIGTERM as Python handles Ctrl-C. A second one ends the process."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


def _print_error(line: str) -> None:
    with suppress(OSError):  # if stderr fails too, the exit code has to do
        print(line, file=sys.stderr, flush=True)


def _started_by_torchrun() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _how_to_resume(arguments: list[str]) -> str:
    if not arguments or arguments[0] not in ("run", "sweep") or {"-h", "--help"} & {*arguments}:
        return ""
    start = ["kddp"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "kddp_ext"]
    command = [*start, *arguments] + ([] if "--resume" in arguments else ["--resume"])
    return f" Finished epochs are kept; continue with: {shlex.join(command)}"
