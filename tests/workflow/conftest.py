"""Small runs on the digits, and files of the data sets' formats that the tests write themselves."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kddp_ext.workflow import stages
from kddp_ext.workflow.config import RunConfig, StudentConfig, TeacherConfig
from kddp_ext.workflow.run import run_workflow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def quick_latency() -> Iterator[None]:
    """Measure each latency for a moment only."""
    measure = stages.latency
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "latency", lambda model, image, batch: measure(model, image, batch, budget=0.001))
        yield


@pytest.fixture(scope="session")
def small() -> RunConfig:
    """A run of seconds in which KDDP has three chances to prune."""
    config = RunConfig(
        teacher=TeacherConfig(channels=(8, 16), epochs=2),
        student=StudentConfig(channels=(4, 8), width=48, epochs=4, batch_size=128, learning_rate=1e-2),
        precision="float32",
    )
    pruning = dataclasses.replace(config.pruning, l1_weight=0.05, threshold=0.2, patience=1)
    return dataclasses.replace(config, pruning=pruning)


@pytest.fixture
def quiet() -> Console:
    """A console that nobody reads."""
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="session")
def _finished_once(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "finished"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_workflow(path, small, Console(file=io.StringIO()), device="cpu")
    torch.set_num_threads(threads)
    return path


@pytest.fixture
def finished_run(_finished_once: Path, tmp_path: Path) -> Path:
    """Folder of a run of `small`, finished; a test may do with it what it likes."""
    return Path(shutil.copytree(_finished_once, tmp_path / "finished"))
