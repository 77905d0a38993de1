"""Small runs of `kddp run` in processes of their own, and all that they leave: what runs that met a fault are held to.

Importing takes longer than such a run. So it is done once, in a process of which each run is a fork: a whole process,
with a number, files and signals of its own, that has everything imported.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from kddp_ext import DynamicPruner
from kddp_ext.files import atomic_write, leftovers
from kddp_ext.saving.student_file import read_student_header
from kddp_ext.workflow import plots, report, run, timing
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.datasets import read_dataset
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.job import STAGES
from kddp_ext.workflow.plots import draw

OPTIONS = ["--teacher.channels", "4", "--teacher.epochs", "2", "--student.channels", "2", "--student.epochs", "4"]
OPTIONS += ["--student.width", "24", "--pruning.l1-weight", "0.02", "--pruning.threshold", "0.1", "--threads", "1"]
OPTIONS += ["--pruning.patience", "1", "--device", "cpu", "--augment", "True", "--student.batch-size", "250"]
OPTIONS += ["--teacher.batch-size", "250", "--validation", "50", "--name", "run"]

# What a run does in turn. Logits are the teacher's; most are computed in the epochs of kd.
PHASES = ("start", "teacher", "scratch", "logits", "kd", "kddp", "timing", "report")
_HERE = str(Path(__file__).parent)
IN_TIME = 120.0  # seconds after which a process hangs


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; the negative number of the signal that ended it.
        out: what it wrote to stdout.
        err: and to stderr.
    """

    code: int
    out: str
    err: str


class Process:
    """A process that calls `action` and ends with the exit code that this returns.

    Args:
        action: called in the process; can be pickled.
        folder: where its output goes.
    """

    def __init__(self, action: Callable[[], int], folder: Path) -> None:
        self._out, self._err = folder / "stdout", folder / "stderr"
        for path in (self._out, self._err):
            path.unlink(missing_ok=True)  # of a process before
        self._process = _server().Process(target=_act, args=(action, self._out, self._err), daemon=True)
        self._process.start()

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def speaks(self) -> bool:
        """Whether it has printed something: what it does has begun."""
        return self._out.exists() and self._out.stat().st_size > 0

    def wait(self) -> Ended:
        """How it ended, as soon as it has."""
        self._process.join(IN_TIME)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"a run hangs: {self._err.read_text()}")
        texts = [path.read_text() if path.exists() else "" for path in (self._out, self._err)]
        return Ended(self._process.exitcode, *texts)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self.running() and self._process.pid is not None:
            os.kill(self._process.pid, number)


def _server() -> multiprocessing.context.ForkServerContext:
    """A process that has everything imported, and of which each run is a fork."""
    if _HERE not in os.environ.get("PYTHONPATH", ""):  # the server has it of the environment, or finds no module
        os.environ["PYTHONPATH"] = os.pathsep.join([_HERE, *filter(None, sys.path)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_runs_prepared"])
    before = os.getcwd()
    os.chdir(_HERE)  # where it starts comes first: not the source folder, whose package has no native module
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
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
        torch.set_num_threads(1)
        self.prepare()
        return main([self.command, *self.arguments])


def nothing() -> None:
    """What a run needs no preparation for."""


def start(runs: Path, *more: str, prepare: Callable[[], object] = nothing, output: Path | None = None) -> Process:
    """Start the run in `runs`, in a process that calls `prepare`, which can be pickled, before.

    What it prints goes to the folder `output`; without it, to `runs`.
    """
    return Process(Run(("--runs-dir", str(runs), *OPTIONS, *more), prepare), output or runs)


def quicken() -> None:
    """Import what a run imports on its way, read the data once, and measure latencies for a moment only."""
    import rich._emoji_codes  # noqa: F401
    import torch._dynamo  # the optimizers import it
    import torch.utils.flop_counter

    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    # Traces the model. There must be no backward pass here: autograd's threads do not outlast a fork.
    DynamicPruner(model, optimizer, example_inputs=(torch.zeros(2, 1, 8, 8),))
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "fonts.png", {}, {}, "")
    raw = read_dataset("digits", None)
    run.read_dataset = lambda name, folder: raw if name == "digits" else read_dataset(name, folder)
    timing.forward_seconds = partial(timing.forward_seconds, budget=0.001)
    gc.collect()
    gc.freeze()  # what is imported here need not be looked through, and so copied, by each process


def shorten() -> None:
    """Leave out what a run computes to measure and draw, where the files that it writes are what matters."""
    for module in (report, plots):
        module.draw = lambda path, *_: atomic_write(path, lambda file: file.write(b"a picture"))
    models = timing.find_models
    unpruned = nn.Linear(1, 1)
    timing.find_models = lambda path: [
        dataclasses.replace(each, load=lambda _example: unpruned) for each in models(path)
    ]
    timing.forward_seconds = lambda _model, _image, _batch: 0.001


def phase_of(runs: Path) -> str:
    """What the run in `runs` does now, as far as its folder tells."""
    folder = RunFolder(runs / "run")
    if not folder.job("teacher").exists():
        return "start"
    for stage in STAGES:
        if folder.result(stage).exists():
            continue
        if stage == "kd" and folder.job("kd").exists() and not _next_logits(folder):
            return "logits"
        return stage
    return "report" if folder.timing.exists() else "timing"


def _next_logits(folder: RunFolder) -> bool:
    """Whether the logits of the epoch that kd trains now are there."""
    metrics = folder.job("kd") / "metrics.jsonl"
    epochs = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    last = int(OPTIONS[OPTIONS.index("--student.epochs") + 1])
    return epochs == last or len(list(folder.teacher_logits.glob("*.safetensors"))) > epochs


def unfinished_files(runs: Path) -> list[Path]:
    """What lies in `runs` and did not get into its place."""
    return [each for folder in (runs, *runs.rglob("*")) if folder.is_dir() for each in leftovers(folder)]


def ending(runs: Path) -> dict[str, Any]:
    """All that a run leaves, but for times: report and picture, results, history of every epoch, all tensors."""
    folder = RunFolder(runs / "run")
    left: dict[str, Any] = {name: (folder.path / name).read_bytes() for name in ("config.json", "report.md")}
    left["report.png"] = (folder.path / "report.png").read_bytes()
    for stage in STAGES:
        left[f"{stage} result"] = content_of(folder.result(stage))
        left[f"{stage} metrics"] = content_of(folder.job(stage) / "metrics.jsonl")
        left[f"{stage} checkpoint"] = content_of(folder.checkpoint(stage))
    for stage in STAGES[1:]:
        left[f"{stage} student"] = content_of(folder.student(stage))
    left["the teacher's logits"] = {path.name: content_of(path) for path in folder.teacher_logits.glob("*")}
    left["the files"] = sorted(str(path.relative_to(runs)) for path in runs.rglob("*") if path.parent != runs)
    return left


def content_of(path: Path) -> Any:
    """What a file of a run or a sweep holds, but for times, so that == compares all of it."""
    if path.name == "metrics.jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "checkpoint.pt":
        state = torch.load(path, weights_only=True)
        return comparable({**state, "epochs": [without_times(epoch) for epoch in state["epochs"]]})
    if path.name == "student.safetensors":
        return (comparable(safetensors.torch.load_file(path)), read_student_header(path))
    if path.suffix == ".safetensors":
        return comparable(safetensors.torch.load_file(path))
    return path.read_bytes()


def without_times(epoch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in epoch.items() if key != "seconds"}


def comparable(value: Any) -> Any:
    """Tensors as their bytes, so that == compares all of them."""
    if isinstance(value, torch.Tensor):
        whole = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return (str(value.dtype), tuple(value.shape), whole.numpy().tobytes())
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(each) for each in value]
    return value


def differences(left: dict[str, Any], expected: dict[str, Any]) -> Sequence[str]:
    """The names of what differs between two endings."""
    return [name for name in expected.keys() | left.keys() if left.get(name) != expected.get(name)]
