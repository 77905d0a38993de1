"""A whole run: the stages in turn, then the report."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from kddp_ext.files import remove_leftovers
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import INFO, read_dataset
from kddp_ext.workflow.distributed import Processes
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder, locked, make_folder, open_run, require_run
from kddp_ext.workflow.job import STAGES, Job
from kddp_ext.workflow.models import check_networks
from kddp_ext.workflow.progress import Progress
from kddp_ext.workflow.report import print_table, write_report
from kddp_ext.workflow.runtime import Device, Runtime
from kddp_ext.workflow.stages import Run, train_student, train_teacher
from kddp_ext.workflow.teacher_logits import TeacherLogits
from kddp_ext.workflow.teacher_source import take_teacher
from kddp_ext.workflow.tensorboard import require_tensorboard
from kddp_ext.workflow.timing import read_timing, write_timing


def run_workflow(
    path: Path,
    config: RunConfig,
    console: Console,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    device: Device = "auto",
    teacher_from: Path | None = None,
    processes: Processes | None = None,
    tensorboard: bool = False,
) -> None:
    """Train every stage that is not finished, then write and print the report.

    Args:
        path: folder of the run.
        config: what to train.
        console: where progress and the table go.
        data_dir: where the data set lies; downloaded when None.
        resume: continue the run that is in `path`.
        device: where to compute.
        teacher_from: a run or sweep whose finished teacher is to be used.
        processes: those that share the work, all of which call this; by default this one alone. The first writes the
            files and has the console.
        tensorboard: write each stage's metrics as event files too.

    Raises:
        WorkflowError: a setting or a file does not serve; the message says which.
        OSError: the run's folder can't be written to.
    """
    started = time.monotonic()
    processes = Processes() if processes is None else processes
    if not processes.is_first:
        console = Console(quiet=True, force_terminal=False)
    title = f"KDDP on {INFO[config.dataset].name}"
    runtime = _runtime(device, config, processes)
    if tensorboard:
        processes.on_rank_zero(require_tensorboard)
    processes.on_rank_zero(lambda: make_folder(path, "run"))
    with processes.held_on_rank_zero(locked(path)):
        folder = processes.on_rank_zero(lambda: open_run(path, config, resume=resume))
        processes.all_or_raise(lambda: require_run(path))  # the folder is one that all of them see
        processes.on_rank_zero(lambda: remove_leftovers(path))
        if teacher_from is not None:
            processes.on_rank_zero(lambda: take_teacher(folder, teacher_from, config))
        if not processes.on_rank_zero(lambda: _finished(folder) and folder.timing.is_file()):
            data = _data(config, data_dir, runtime)
            notes = _train(Run(folder, data, runtime, Progress(console), tensorboard), config, title)
            processes.on_rank_zero(lambda: write_timing(folder, data.example(), runtime, notes))
        processes.on_rank_zero(lambda: None if folder.report.is_file() else write_report(folder, config, title))
    processes.on_rank_zero(lambda: print_table(console, folder, title, read_timing(folder)))
    console.print(f"{time.monotonic() - started:.0f} s. The report is {folder.report}", highlight=False, soft_wrap=True)


def _runtime(device: Device, config: RunConfig, processes: Processes) -> Runtime:
    def make() -> Runtime:
        check_networks(config, INFO[config.dataset])
        if config.compile and processes.count > 1:
            raise WorkflowError(
                f"--compile: expected False with {processes.count} processes, got True: batch normalisation "
                "communicates, which torch.compile does not follow"
            )
        return Runtime(device, config.precision, processes)

    processes.require_same("the settings", config.to_json())
    runtime = processes.all_or_raise(make)
    processes.require_same("the device and precision", f"{runtime.device.type} {runtime.dtype}")
    return runtime


def _data(config: RunConfig, data_dir: Path | None, runtime: Runtime) -> ImageData:
    processes = runtime.processes
    raw = processes.local_rank_zero_first(lambda: read_dataset(config.dataset, data_dir))

    def make() -> ImageData:
        data = ImageData(raw, INFO[config.dataset], config, runtime.device)
        for option, batch_size in (("teacher", config.teacher.batch_size), ("student", config.student.batch_size)):
            images = min(batch_size, len(data.train))
            if images % processes.count:
                raise WorkflowError(
                    f"--{option}.batch-size: expected a batch that the {processes.count} processes can share equally, "
                    f"got {images} images"
                )
        return data

    return processes.all_or_raise(make)


def _train(run: Run, config: RunConfig, title: str) -> list[str]:
    """Train what is not finished; returns what is to be said of the time."""
    data, progress = run.data, run.progress
    progress.line(
        f"{title}: {len(data.train):,} images for training, {len(data.validation):,} for validation, "
        f"{len(data.test):,} for the test; {run.runtime}"
    )
    teacher = train_teacher(run, Job("teacher", "teacher", config))
    logits = TeacherLogits(teacher, data, config.student.shift, run.folder.teacher_logits, run.runtime, progress)
    for stage in STAGES[1:]:
        train_student(run, Job(stage, stage, config), logits)
    progress.line(str(logits.use))
    return [str(logits.use)]


def _finished(folder: RunFolder) -> bool:
    return all(folder.read_result(stage) is not None for stage in STAGES)
