"""Small runs on the digits, and files of the data sets' formats that the tests write themselves."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from kddp_ext.workflow import timing
from kddp_ext.workflow.config import RunConfig, StudentConfig, TeacherConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import DatasetInfo, RawDataset
from kddp_ext.workflow.run import run_workflow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs this small are slower on several threads. What the command line sets of the process ends with the test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True, scope="session")
def quick_latency() -> Iterator[None]:
    """Measure each latency for a moment only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "forward_seconds", partial(timing.forward_seconds, budget=0.001))
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
    # With the teacher's logits, which lie beside it.
    return Path(shutil.copytree(_finished_once.parent, tmp_path / "runs")) / _finished_once.name


@pytest.fixture
def image_data() -> Callable[..., ImageData]:
    """Makes a small data set of noise."""

    def make(seed: int = 0, validation: int = 10, augment: bool = True, count: int = 60) -> ImageData:
        random = np.random.default_rng(1)
        images = random.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        raw = RawDataset(images, np.arange(count) % 10, images[:7], np.arange(7))
        info = DatasetInfo("noise", 16, 3, 10, (120.0, 110.0, 100.0), (60.0, 50.0, 40.0))
        config = dataclasses.replace(RunConfig(), data_seed=seed, validation=validation, augment=augment)
        return ImageData(raw, info, config, torch.device("cpu"))

    return make
