"""The three loops take turns, each in its own process."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

from benchmarks.child import HEAPS
from benchmarks.classic_loop.child import Task
from benchmarks.classic_loop.pairs import PAIRS, Reading
from benchmarks.timing import PATIENCE, Rounds, rotated

LOOPS = ["classic", "cached", "teacher every step"]


def measure(pair: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of each loop, and the ratio to the classic loop, computed in each round.

    Returns:
        "images_per_second": median by loop. "times_classic": median, low and high (the range) by loop.
        "seconds": by loop and round. "images": number in a round. "round_count", "disturbed_rounds".

    Raises:
        RuntimeError: a loop's process ended, or its loss is not finite.
    """
    with ExitStack() as stack:
        loops = {name: stack.enter_context(Loop(_task(pair, name, arguments))) for name in LOOPS}
        rounds = take_turns(loops, arguments.rounds, 1 if arguments.smoke else PATIENCE)
    return summary(rounds, arguments.steps * PAIRS[pair].config(arguments.smoke).student.batch_size)


def take_turns(loops: Mapping[str, Loop], wanted: int, patience: int) -> list[dict[str, Reading]]:
    """Measure up to `wanted * patience` rounds; returns `wanted` of them, undisturbed ones first."""
    good: list[dict[str, Reading]] = []
    bad: list[dict[str, Reading]] = []
    for number in range(wanted * patience):
        readings = {name: loops[name].turn() for name in rotated(LOOPS, number)}
        (bad if any(reading.disturbed for reading in readings.values()) else good).append(readings)
        if len(good) == wanted:
            break
    return (good + bad)[:wanted]


def summary(rounds: list[dict[str, Reading]], images: int) -> dict[str, Any]:
    """Medians and ratios of the rounds, each over `images` images."""
    seconds = {name: [readings[name].seconds for readings in rounds] for name in LOOPS}
    ratios = {
        name: [classic / own for classic, own in zip(seconds["classic"], seconds[name], strict=True)]
        for name in LOOPS
        if name != "classic"
    }
    disturbed = sum(any(reading.disturbed for reading in readings.values()) for readings in rounds)
    return {
        "images_per_second": {name: images / statistics.median(values) for name, values in seconds.items()},
        "times_classic": {
            name: {"median": statistics.median(values), "low": min(values), "high": max(values)}
            for name, values in ratios.items()
        },
        "seconds": seconds,
        "images": images,
        **Rounds(seconds, disturbed).quality(),
    }


class Loop:
    """A process that trains one round at a time."""

    def __init__(self, task: Task) -> None:
        self._task = task
        environment = {name: value for name, value in os.environ.items() if name not in HEAPS["warm"]}
        command = [sys.executable, "-m", "benchmarks.classic_loop.child", json.dumps(task._asdict())]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def turn(self) -> Reading:
        """Run the steps of one round."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended; reading its answer reports that
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        reading = Reading(**json.loads(self._answer()))
        if not math.isfinite(reading.loss):
            raise RuntimeError(f"{self._task.pair}, {self._task.loop}: the loss is {reading.loss}")
        return reading

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise RuntimeError(f"{self._task.pair}, {self._task.loop}: ended with status {self._process.returncode}")
        return line

    def __enter__(self) -> Loop:
        self._answer()  # waits until it is built, so that nothing else runs in the first round
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()  # closes its stdin, which ends it


def _task(pair: str, loop: str, arguments: argparse.Namespace) -> Task:
    return Task(
        pair,
        loop,
        arguments.data_dir,
        arguments.threads,
        arguments.workers,
        arguments.warm_up,
        arguments.steps,
        arguments.smoke,
    )
