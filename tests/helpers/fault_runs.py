"""Small runs of `kddp` in their own processes.

Importing takes longer than such a run. So one process imports everything once, and every run is a fork of it: a
complete process, with its own number, files and signals.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import torch
from torch import nn

from kddp_ext import DynamicPruner
from kddp_ext.files import atomic_write, write_text
from kddp_ext.workflow import report, runs
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.datasets import read_dataset
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.jobs import STAGES

OPTIONS = ["--teacher.channels", "4", "--teacher.epochs", "2", "--student.channels", "2", "--student.epochs", "4"]
OPTIONS += ["--student.width", "24", "--pruning.l1-weight", "0.02", "--pruning.threshold", "0.1", "--threads", "1"]
OPTIONS += ["--pruning.patience", "1", "--device", "cpu", "--augment", "True", "--student.batch-size", "250"]
OPTIONS += ["--teacher.batch-size", "250", "--validation", "50", "--name", "run"]

# The phases of a run in order. "logits" are the teacher's; most are computed in the epochs of kd.
PHASES = ("start", "teacher", "scratch", "logits", "kd", "kddp", "report")
_HERE = str(Path(__file__).parent)
_MOST_SECONDS = 120.0


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, or the negative number of the signal that ended it.
        out: what it wrote to stdout.
        err: what it wrote to stderr.
    """

    code: int
    out: str
    err: str


class Process:
    """A process that calls `action` and ends with the exit code that `action` returns.

    Args:
        action: can be pickled.
        folder: where its output goes.
    """

    def __init__(self, action: Callable[[], int], folder: Path) -> None:
        self._out, self._err = folder / "stdout", folder / "stderr"
        for path in (self._out, self._err):
            path.unlink(missing_ok=True)  # of an earlier process
        self._process = _server().Process(target=_act, args=(action, self._out, self._err), daemon=True)
        self._process.start()

    def running(self) -> bool:
        return self._process.is_alive()

    def has_printed(self) -> bool:
        return self._out.exists() and self._out.stat().st_size > 0

    def wait(self) -> Ended:
        """Wait for the process to end."""
        self._process.join(_MOST_SECONDS)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"a run hangs: {self._err.read_text()}")
        texts = [path.read_text() if path.exists() else "" for path in (self._out, self._err)]
        return Ended(self._process.exitcode, *texts)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if self.running() and self._process.pid is not None:
            os.kill(self._process.pid, number)


def _server() -> multiprocessing.context.ForkServerContext:
    """The process that has everything imported and forks the runs."""
    if _HERE not in os.environ.get("PYTHONPATH", ""):  # the server finds this module through the environment
        os.environ["PYTHONPATH"] = os.pathsep.join([_HERE, *filter(None, sys.path)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_runs_prepared"])
    before = os.getcwd()
    os.chdir(_HERE)  # the server imports from its working directory first; the source folder has no native module
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(before)
    return context


def _act(action: Callable[[], int], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.exit(action())


@dataclass(frozen=True)
class Run:
    """`kddp run`, or another command of kddp, as an action."""

    arguments: tuple[str, ...]
    prepare: Callable[[], object]
    command: str = "run"

    def __call__(self) -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
        torch.set_num_threads(1)
        self.prepare()
        return main([self.command, *self.arguments])


def nothing() -> None:
    """No preparation."""


def start(folder: Path, *more: str, prepare: Callable[[], object] = nothing, output: Path | None = None) -> Process:
    """Start a run in `folder`, in a process that calls `prepare`, which can be pickled, first.

    Its output goes to the folder `output`, by default to `folder`.
    """
    return Process(Run(("--runs-dir", str(folder), *OPTIONS, *more), prepare), output or folder)


def quicken() -> None:
    """Import what a run imports later, and read the data once."""
    import rich._emoji_codes  # noqa: F401
    import torch._dynamo  # the optimizers import it
    import torch.utils.flop_counter

    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    # Traces the model. There must be no backward pass here: autograd's threads do not survive a fork.
    DynamicPruner(model, optimizer, example_inputs=(torch.zeros(2, 1, 8, 8),))
    with tempfile.TemporaryDirectory() as folder:
        report.draw(Path(folder) / "fonts.png", [], "")
        report.write_page(Path(folder) / "script.html", "", {})
    raw = read_dataset("digits", None)
    runs.read_dataset = lambda name, folder: raw if name == "digits" else read_dataset(name, folder)
    gc.collect()
    gc.freeze()  # the collector then leaves these pages alone, and forks do not copy them


def shorten() -> None:
    """Do not draw the picture, where only the files that a run writes matter."""
    report.draw = lambda path, *_: atomic_write(path, lambda file: file.write(b"a picture"))
    report.write_page = lambda path, *_: write_text(path, "a page")


def phase_of(runs_folder: Path) -> str:
    """The current phase of the run, as far as its folder tells."""
    folder = RunFolder(runs_folder / "run")
    if not folder.job("teacher").exists():
        return "start"
    for stage in STAGES:
        if folder.result(stage).exists():
            continue
        return "logits" if stage == "kd" and folder.job("kd").exists() and not _next_logits(folder) else stage
    return "report"


def _next_logits(folder: RunFolder) -> bool:
    """Whether the logits of the current epoch of kd exist."""
    metrics = folder.metrics("kd")
    epochs = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    last = int(OPTIONS[OPTIONS.index("--student.epochs") + 1])
    return epochs == last or len(list(folder.teacher_logits.glob("*.safetensors"))) > epochs
