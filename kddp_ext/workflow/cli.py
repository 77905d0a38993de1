"""The command `kddp`: its options, its messages and its exit codes."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Generic, NoReturn, TypeVar, get_args

import tyro
from rich.console import Console

from kddp_ext.workflow.config import (
    FOLDER_SIZE,
    Dataset,
    Device,
    Preset,
    RunConfig,
    ShrinkConfig,
    SweepConfig,
    for_own_networks,
    preset,
)
from kddp_ext.workflow.config_file import read_settings, run_with_settings, sweep_with_settings
from kddp_ext.workflow.errors import OptionError, WorkflowError
from kddp_ext.workflow.image_files import find_images

Config = TypeVar("Config", RunConfig, SweepConfig)

_HELP = """\
kddp: train a small neural network with the help of a large one, and remove the neurons that it does not need.

  kddp run         train a teacher, then a student alone, with KD, and with KDDP; write a report
  kddp sweep       the same for several seeds, widths and penalty weights, in one report
  kddp shrink      make a trained network smaller, while it is distilled from what it was
  kddp report      write the report of a run again, from the trainings that are finished
  kddp evaluate    measure the test accuracy of a run, or of one student file
  kddp predict     classify image files with a student
  kddp export      write a student as ONNX, torch.export program or state dict
  kddp info        show what a run or a student file is: accuracy, size, what was pruned, settings

Start with `kddp run`. It uses small scanned digits, needs no download, and takes less than a minute.
`kddp COMMAND --help` explains a command's options.
"""
_SYSTEM_ERROR, _USAGE_ERROR = 1, 2

_DATA_HELP = "Folder of the data set, or its parent. Default: that of the run, or download the data set once."
DataDir = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help=_DATA_HELP, help_behavior_hint="")]

OutputFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
OwnNetwork = Annotated[str, tyro.conf.arg(metavar="MODULE:FUNCTION", help_behavior_hint="")]

# Of the commands that train.
Name = Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
RunsDir = Annotated[Path, tyro.conf.arg(metavar="DIR")]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Threads = Annotated[int, tyro.conf.arg(metavar="N")]


@dataclass(frozen=True)
class TrainCommand(Generic[Config]):
    """The options of `kddp run` and `kddp sweep`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    settings_file: Annotated[Path | None, tyro.conf.arg(name="config", metavar="FILE", help_behavior_hint="")] = None
    """Settings from a file: a run's config.json, or your own .toml, .yaml or .json. Other options override it."""
    name: Name = ""
    """Name of the run and of its folder. Default: the data set, and the preset or "sweep"; with --config, the name of
    the file, or that of the run that wrote it with "-again"."""
    runs_dir: RunsDir = Path("runs")
    """Folder that contains the runs' folders."""
    teacher_from: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder of a run whose finished teacher is used. Its teacher's settings must be the same."""
    resume: Flag = False
    """Continue an interrupted run with the settings it was started with, or help another process with it."""
    device: Device = "auto"
    """auto uses a GPU if there is one."""
    threads: Threads = 0
    """CPU threads. 0 uses one for digits, where more do not help, and PyTorch's default otherwise."""
    tensorboard: Flag = False
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
        {"run": _run, "sweep": _sweep}[name](options)
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
    path, settings = _settings_file(arguments)
    config = _chosen_preset(arguments, settings)
    default = TrainCommand(config if path is None else run_with_settings(config, settings, path))
    command = tyro.cli(
        TrainCommand[RunConfig], prog="kddp run", description=_RUN, args=arguments, default=default, config=_TYRO
    )
    suffix = "" if command.config.preset == "default" else f"-{command.config.preset}"
    _train(command, SweepConfig.single(command.config), suffix)


def _sweep(arguments: list[str]) -> None:
    path, settings = _settings_file(arguments)
    run = _chosen_preset(arguments, settings)
    own = bool(run.student.network)
    config = SweepConfig(
        run=run,
        seeds=(0, 1, 2),
        widths=() if own else (16, 64, 256),
        l1_weights=(3e-4, 1e-3, 3e-3, 1e-2),
        retrain=not own,
    )
    default = TrainCommand(config if path is None else sweep_with_settings(config, settings, path))
    command = tyro.cli(
        TrainCommand[SweepConfig], prog="kddp sweep", description=_SWEEP, args=arguments, default=default, config=_TYRO
    )
    _train(command, command.config, "-sweep")


def _default_name(config: RunConfig, settings_file: Path | None, suffix: str) -> str:
    """The name of the file of settings, or that of the run that wrote it; else that of the data set or its folder."""
    if settings_file is not None:
        written_by_run = settings_file.name == "config.json"
        return f"{settings_file.resolve().parent.name}-again" if written_by_run else settings_file.stem
    return (config.dataset if config.dataset != "folder" else Path(config.data_dir).resolve().name or "images") + suffix


def _train(command: TrainCommand[Any], sweep: SweepConfig, suffix: str) -> None:
    with _training(command.device, command.threads or (1 if sweep.run.dataset == "digits" else 0)):
        from kddp_ext.workflow.runs import run_sweep

        run_sweep(
            command.runs_dir / (command.name or _default_name(sweep.run, command.settings_file, suffix)),
            sweep,
            Output(),
            resume=command.resume,
            device=command.device,
            teacher_from=command.teacher_from,
            tensorboard=command.tensorboard,
        )


@contextmanager
def _training(device: Device, threads: int) -> Iterator[None]:
    """Prepare this process for a training, with PyTorch's number of threads if `threads` is 0, and join the others."""
    if threads < 0:
        raise OptionError("threads", "a number of at least 0", threads)
    # Torch and matplotlib load here and inside, so that --help and a mistyped option do not wait for them.
    import torch

    from kddp_ext.workflow.distributed import process_group
    from kddp_ext.workflow.runtime import prepare_process

    if threads:
        torch.set_num_threads(threads)
    prepare_process()
    with process_group(use_gpus=device != "cpu"):
        yield


def _shrink(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")],
    config: Annotated[ShrinkConfig, tyro.conf.arg(name="")],
    name: Name = "",
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = None,
    teacher: OwnNetwork = "",
    student: OwnNetwork = "",
    resume: Flag = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> Callable[[], None]:
    """Make a trained network smaller.

    It removes the neurons of all layers whose removal costs the loss least for what it saves, and trains the rest with
    the logits of what the network was. The result is runs/NAME/student.

    Args:
        source: Folder of a finished training, such as runs/first/teacher, or a student.safetensors file.
        name: Name of the folder of the result. Default: that of the run and of the training, and "shrunk".
        runs_dir: Folder that contains the runs' folders.
        teacher: The --teacher that the run was trained with, if any.
        student: The --student that the run was trained with, if any.
        resume: Continue after the last finished pass.
        device: auto uses a GPU if there is one.
        threads: CPU threads. 0 uses PyTorch's default.
    """
    training = source.parent if source.is_file() else source
    path = runs_dir / (name or f"{training.parent.name}-{training.name}-shrunk")

    def shrink() -> None:
        with _training(device, threads):
            from kddp_ext.workflow.shrink import run_shrink

            own = {"teacher": teacher, "student": student}
            run_shrink(source, path, config, Output(), data_dir=data_dir, resume=resume, device=device, own=own)

    return shrink


def _report(path: tyro.conf.Positional[Path]) -> Callable[[], None]:
    """Write the report of a run or a sweep again, from the trainings that are finished.

    Args:
        path: Folder of a run or a sweep.
    """
    from kddp_ext.workflow.report import rebuild_report

    return partial(rebuild_report, path, Output())


def _evaluate(
    path: tyro.conf.Positional[Path],
    data_dir: DataDir = None,
    teacher: OwnNetwork = "",
    student: OwnNetwork = "",
    device: Device = "auto",
) -> Callable[[], None]:
    """Measure the accuracy on the test images of every finished network of a run, or of one student file.

    Args:
        path: Folder of a run or a sweep, or a student.safetensors file.
        teacher: The --teacher that the run was trained with, if any.
        student: The --student that the run was trained with, if any.
        device: auto uses a GPU if there is one.
    """
    from kddp_ext.workflow.inspect import evaluate

    return partial(evaluate, path, data_dir, device, Output(), {"teacher": teacher, "student": student})


def _info(path: tyro.conf.Positional[Path]) -> Callable[[], None]:
    """Show what a run or a student file is: accuracy, size, what was pruned, settings. Needs no data set.

    Args:
        path: Folder of a run or a sweep, or a student.safetensors file.
    """
    from kddp_ext.workflow.inspect import describe

    return partial(describe, path, Output())


def _predict(
    student_file: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[str, ...]],
    student: OwnNetwork = "",
    json: bool = False,
    device: Device = "auto",
) -> Callable[[], None]:
    """Classify images with a student: a line for each, with path, class and probability, separated by tabs.

    Args:
        student_file: A student.safetensors file.
        images: Image files and folders of images; - reads paths from standard input, one a line.
        student: The --student that the run was trained with, if any.
        json: Print a JSON object for each image instead.
        device: auto uses a GPU if there is one.
    """
    if not images:
        raise WorkflowError("expected image files or folders after the student's file, or - for standard input")
    from kddp_ext.workflow.predict import predict

    return partial(predict, student_file, images, device, student, json)


def _export(
    student_file: tyro.conf.Positional[Path],
    onnx: OutputFile = None,
    torch_export: OutputFile = None,
    state_dict: OutputFile = None,
    student: OwnNetwork = "",
) -> Callable[[], None]:
    """Write a student for use without this package. Each file is compared with the student on random images first.

    Args:
        student_file: A student.safetensors file.
        onnx: An ONNX file, for any number of images at a time.
        torch_export: A program that torch.export.load reads.
        state_dict: The tensors by name: .safetensors, or any other ending for torch.load.
        student: The --student that the run was trained with, if any.
    """
    from kddp_ext.workflow.export import export

    files = {"onnx": onnx, "torch_export": torch_export, "state_dict": state_dict}
    return partial(export, student_file, Output(), **files, student=student)


_COMMANDS: dict[str, Callable[..., Callable[[], None]]] = {
    "shrink": _shrink,
    "report": _report,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "info": _info,
}
_TYRO = (tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)


def _settings_file(arguments: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """The file that --config names and its settings; the real parser reports a missing name."""
    chosen = _early_options(arguments, {"config": ""}).get("config")
    return (Path(chosen), read_settings(Path(chosen))) if chosen else (None, {"run": {}})


def _chosen_preset(arguments: list[str], settings: dict[str, Any]) -> RunConfig:
    """The defaults of the options, which depend on a few of them; the real parser reports wrong choices.

    `settings` are those of --config.
    """
    run = settings["run"]
    defaults = {"dataset": "digits", "preset": "default", "size": str(FOLDER_SIZE), "data_dir": ""}
    defaults = {name: str(run.get(name, default)) for name, default in defaults.items()}
    for kind in ("teacher", "student"):
        section = run.get(kind, {})
        defaults[kind] = str(section.get("network", "")) if isinstance(section, dict) else ""
    chosen = _early_options(arguments, defaults)
    dataset, name, size = (chosen.get(option, "") for option in ("dataset", "preset", "size"))
    if dataset not in get_args(Dataset) or name not in get_args(Preset) or not size.isdecimal():
        return RunConfig()
    images = len(find_images(Path(chosen["data_dir"]))) if dataset == "folder" and chosen["data_dir"] else 0
    config = preset(dataset, name, int(size), images)  # type: ignore[arg-type]
    return for_own_networks(config, chosen["teacher"], chosen["student"])


def _early_options(arguments: list[str], defaults: dict[str, str]) -> dict[str, str]:
    """The values of some options, before the others are known; none if one has no value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", f"--{name}.network", dest=name, default=default)
    try:
        return vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError:
        return {}


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
    if not arguments or arguments[0] not in ("run", "sweep", "shrink") or {"-h", "--help"} & {*arguments}:
        return ""
    start = ["kddp"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "kddp_ext"]
    command = [*start, *arguments] + ([] if "--resume" in arguments else ["--resume"])
    return f" Finished epochs are kept; continue with: {shlex.join(command)}"
