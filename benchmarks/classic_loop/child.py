"""Runs one loop in its own process, because the workflow's process settings would help the classic loop, too.

It builds networks and images and prints "ready". Then it runs its steps once for each line on stdin and prints the
result.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from benchmarks.classic_loop.classic import ClassicLoop
from benchmarks.classic_loop.ours import OurLoop
from benchmarks.classic_loop.pairs import PAIRS, build_networks, load_images
from kddp_ext.workflow.runtime import Runtime, prepare_process


class Task(NamedTuple):
    """What a process measures.

    Attributes:
        pair: a name in PAIRS.
        loop: "classic", "cached" or "teacher every step".
        data_dir: folder of CIFAR-10, or None for random images.
        threads: PyTorch's threads.
        workers: workers of the classic loop's DataLoader.
        warm_up, steps: uncounted and timed steps of a round.
        smoke: whether to use tiny networks.
    """

    pair: str
    loop: str
    data_dir: str | None
    threads: int
    workers: int
    warm_up: int
    steps: int
    smoke: bool


def build(task: Task, folder: Path) -> ClassicLoop | OurLoop:
    """Build the loop of a task; `folder` is where the cached logits are written."""
    config = PAIRS[task.pair].config(task.smoke)
    data = load_images(config, task.data_dir, task.smoke)
    torch.manual_seed(0)
    teacher, student = build_networks(config)
    if task.loop == "classic":
        return ClassicLoop(config, teacher, student, data, task.workers)
    logits = None
    if task.loop == "cached":
        logits = folder / "logits.safetensors"
        values = torch.randn(len(data.train), data.info.classes)
        safetensors.torch.save_file({"logits": values}, logits)
    return OurLoop(config, teacher, student, data, logits, Runtime("cpu", config.precision))


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    torch.set_num_threads(task.threads)
    if task.loop != "classic":
        prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        loop = build(task, Path(folder))
        print("ready", flush=True)
        for _line in sys.stdin:
            print(json.dumps(loop.run(task.warm_up, task.steps)._asdict()), flush=True)


if __name__ == "__main__":
    main()
