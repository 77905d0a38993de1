"""A sweep: one teacher, and a grid of students that it teaches. Any number of processes may work on one."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from kddp_ext.files import remove_leftovers, with_digest, write_json
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import INFO, read_dataset
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import InUseError, RunFolder, is_empty, locked, make_folder
from kddp_ext.workflow.job import Job
from kddp_ext.workflow.models import check_networks
from kddp_ext.workflow.progress import Progress
from kddp_ext.workflow.runtime import Device, Runtime
from kddp_ext.workflow.stages import Run, train_student, train_teacher
from kddp_ext.workflow.sweep_config import TEACHER, Point, SweepConfig, load_sweep, points
from kddp_ext.workflow.sweep_report import write_sweep_report
from kddp_ext.workflow.teacher_logits import TeacherLogits
from kddp_ext.workflow.teacher_source import take_teacher

# Between two looks for work, while other processes train what is left.
_WAIT = 2.0


def run_sweep(
    path: Path,
    sweep: SweepConfig,
    console: Console,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    device: Device = "auto",
    teacher_from: Path | None = None,
) -> None:
    """Train what of a sweep is not finished, then write its report.

    Started again with `resume`, it goes on where it stopped; a longer list of seeds, widths, weights or ablations
    is trained besides. Started in several processes at once, each takes trainings that no other works on.

    Args:
        path: folder of the sweep.
        sweep: what to train.
        console: where progress goes.
        data_dir: where the data set lies; downloaded when None.
        resume: continue the sweep that is in `path`, or help with it.
        device: where to compute.
        teacher_from: a run or sweep whose finished teacher is to be used.

    Raises:
        WorkflowError: a setting or a file does not serve; the message says which.
        OSError: the folder can't be written to.
    """
    info = INFO[sweep.run.dataset]
    runtime = Runtime(device, sweep.run.precision)
    for point in points(sweep, {}):
        for job in point.jobs:
            check_networks(job.config, info)
    folder = _open(path, sweep, resume=resume)
    if teacher_from is not None:
        with locked(path, wait=True):  # another process may be taking the same
            take_teacher(folder, teacher_from, sweep.run)
    data = ImageData(read_dataset(sweep.run.dataset, data_dir), info, sweep.run, runtime.device)
    run = Run(folder, data, runtime, Progress(console))
    folder.job(TEACHER).mkdir(exist_ok=True)
    with locked(folder.job(TEACHER), wait=True):
        teacher = train_teacher(run, Job(TEACHER, "teacher", sweep.run))
    logits = TeacherLogits(teacher, data, sweep.run.student.shift, folder.teacher_logits, runtime, run.progress)
    _train_all(run, sweep, logits)
    run.progress.line(str(logits.use))
    write_sweep_report(folder, sweep, sweep_points(folder, sweep))
    run.progress.line(f"The report is {folder.report}")


def _open(path: Path, sweep: SweepConfig, *, resume: bool) -> RunFolder:
    make_folder(path, "sweep")
    with locked(path, wait=True):  # another process may be starting the same
        folder = _begin_or_join(path, sweep, resume=resume)
        remove_leftovers(path)  # whoever writes in it, and not in a training's folder, has it locked
        return folder


def _begin_or_join(path: Path, sweep: SweepConfig, *, resume: bool) -> RunFolder:
    folder = RunFolder(path)
    if folder.sweep.is_file():
        if not resume:
            raise WorkflowError(
                f"{path} holds a sweep already. Continue it with --resume, or start another with --name."
            )
        changed = load_sweep(folder.sweep).differences(sweep)
        if changed:
            raise WorkflowError(f"{path} was started with other settings: {'; '.join(changed)}. Give another --name.")
    elif not is_empty(path):
        raise WorkflowError(f"{path} exists and is not a sweep of kddp. Give another --name or --runs-dir.")
    write_json(folder.sweep, with_digest(sweep.to_json()))
    return folder


def _train_all(run: Run, sweep: SweepConfig, logits: TeacherLogits) -> None:
    """Train until every job is finished, here or in another process."""
    while left := [job for job in _jobs(run.folder, sweep) if run.folder.read_result(job.name) is None]:
        if not any(_train_unless_taken(run, job, logits, f"{len(left)} left") for job in left):
            time.sleep(_WAIT)


def _train_unless_taken(run: Run, job: Job, logits: TeacherLogits, note: str) -> bool:
    """Whether this process trained it."""
    run.folder.job(job.name).mkdir(exist_ok=True)
    try:
        with locked(run.folder.job(job.name)):
            if run.folder.read_result(job.name) is not None:
                return False
            run.progress.line(f"{job.name} ({note})")
            train_student(run, job, logits)
            return True
    except InUseError:
        return False


def _jobs(folder: RunFolder, sweep: SweepConfig) -> list[Job]:
    """Every job that is known by now, those of the first seed first; each once."""
    known: dict[str, Job] = {}
    for seed in sweep.seeds:
        for point in sweep_points(folder, sweep):
            known |= {job.name: job for job in point.jobs if job.config.seed == seed}
    return list(known.values())


def sweep_points(folder: RunFolder, sweep: SweepConfig) -> list[Point]:
    """The points of a sweep, as far as what is finished determines them."""
    found = {}
    for point in points(sweep, {}):
        for job in point.jobs if point.kind == "kddp" else ():
            result = folder.read_result(job.name)
            if result is not None and result["width"] is not None:
                found[job.name] = result["width"]
    return points(sweep, found)
