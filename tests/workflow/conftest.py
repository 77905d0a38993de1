"""Small runs on the digits, and small data sets."""

from __future__ import annotations

import dataclasses
import io
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from kddp_ext.workflow.config import RunConfig, StudentConfig, SweepConfig, TeacherConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import DatasetInfo, RawDataset
from kddp_ext.workflow.runs import run_sweep


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small runs are slower on several threads. Also restores what the command line changes in the process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def small() -> RunConfig:
    """A run of seconds in which KDDP prunes three times."""
    config = RunConfig(
        teacher=TeacherConfig(channels=(8, 16), epochs=2),
        student=StudentConfig(channels=(4, 8), width=48, epochs=4, batch_size=128, learning_rate=1e-2),
        precision="float32",
    )
    pruning = dataclasses.replace(config.pruning, l1_weight=0.05, threshold=0.2, patience=1)
    return dataclasses.replace(config, pruning=pruning)


def train_run(console: Console, path: Path, config: RunConfig | SweepConfig, **options: object) -> None:
    """Run a config or a sweep on the CPU."""
    sweep = config if isinstance(config, SweepConfig) else SweepConfig.single(config)
    run_sweep(path, sweep, console, device="cpu", **options)  # type: ignore[arg-type]


@pytest.fixture
def quiet() -> Console:
    """A console that prints into memory."""
    return Console(file=io.StringIO(), width=120)


@pytest.fixture
def run(quiet: Console) -> Callable[..., None]:
    """`run(path, config, **options)` trains and prints to `quiet`."""
    return partial(train_run, quiet)


@pytest.fixture(scope="session")
def _finished_once(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "finished"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_run(Console(file=io.StringIO()), path, small)
    torch.set_num_threads(threads)
    return path


@pytest.fixture
def finished_run(_finished_once: Path, tmp_path: Path) -> Path:
    """Folder of a finished run of `small`, beside the teacher's logits. The test may change it."""
    return Path(shutil.copytree(_finished_once.parent, tmp_path / "runs")) / _finished_once.name


@pytest.fixture
def image_data() -> Callable[..., ImageData]:
    """Makes a small data set of noise."""

    def make(seed: int = 0, validation: int = 10, augment: bool = True, count: int = 60) -> ImageData:
        random = np.random.default_rng(1)
        images = random.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        raw = RawDataset(images, np.arange(count) % 10, images[:7], np.arange(7))
        info = DatasetInfo("noise", 16, 3, tuple("0123456789"), (120.0, 110.0, 100.0), (60.0, 50.0, 40.0))
        config = dataclasses.replace(RunConfig(), data_seed=seed, validation=validation, augment=augment)
        return ImageData(raw, info, config, torch.device("cpu"))

    return make
