"""A whole run: the stages in turn, then the report."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import INFO, read_dataset
from kddp_ext.workflow.models import check_depth
from kddp_ext.workflow.progress import Progress
from kddp_ext.workflow.report import print_table, write_report
from kddp_ext.workflow.run_folder import STAGES, RunFolder, locked, open_run
from kddp_ext.workflow.runtime import Device, Runtime
from kddp_ext.workflow.stages import Run, run_student, run_teacher
from kddp_ext.workflow.teacher_cache import TeacherLogits


def run_workflow(
    path: Path,
    config: RunConfig,
    console: Console,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    device: Device = "auto",
) -> None:
    """Train every stage that is not finished, then write and print the report.

    Args:
        path: folder of the run.
        config: what to train.
        console: where progress and the table go.
        data_dir: where the data set lies; downloaded when None.
        resume: continue the run that is in `path`.
        device: where to compute.

    Raises:
        WorkflowError: a setting or a file does not serve; the message says which.
        OSError: the run's folder can't be written to.
    """
    started = time.monotonic()
    info = INFO[config.dataset]
    runtime = Runtime(device, config.precision)
    check_depth(config, info)
    folder = open_run(path, config, resume=resume)
    title = f"KDDP on {info.name}"
    with locked(folder):
        if not _finished(folder):
            data = ImageData(read_dataset(config.dataset, data_dir), info, config, runtime.device)
            progress = Progress(console)
            progress.line(
                f"{title}: {len(data.train):,} images for training, {len(data.validation):,} for validation, "
                f"{len(data.test):,} for the test; {runtime}"
            )
            run = Run(folder, config, data, runtime, progress)
            teacher = run_teacher(run)
            logits = TeacherLogits(teacher, data, folder.teacher_logits, runtime, progress)
            for stage in STAGES[1:]:
                run_student(run, stage, logits)
        if not folder.report.is_file():
            write_report(folder, config, title)
    print_table(console, folder, title)
    console.print(f"{time.monotonic() - started:.0f} s. The report is {folder.report}", highlight=False, soft_wrap=True)


def _finished(folder: RunFolder) -> bool:
    return all(folder.read_result(stage) is not None for stage in STAGES)
