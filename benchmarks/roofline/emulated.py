"""Counts the bytes that this package's CUDA kernels move, by running them on the tests' emulator."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cases import Shape, make_inputs
from benchmarks.roofline import passes
from benchmarks.roofline.model import SECTOR_BYTES, Traffic
from benchmarks.roofline.torch_operations import OperationCounter
from kddp_ext.ops import library

ROOT = Path(__file__).parent.parent.parent
MOST_DEVICES = 64

# Exponentials per class in csrc/cuda/row_elements.cuh with forward_kl, labels and temperature 4: one for the student,
# one for the teacher (add_element; e^s is a power of the student's). A row that is cached in shared memory caches
# them too; a row that is read twice computes them again for its gradient (RowPart::recompute).
EXPONENTIALS_OF_CACHED_CLASS, EXPONENTIALS_OF_CLASS_READ_TWICE = 2, 4

# Instructions that a thread executes for a class of that call on sm_90, by the bytes of a logit: bounds that
# tests/native/cuda/test_instructions.py checks. What is executed once for a row, and activations, are not counted.
INSTRUCTIONS_OF_CACHED_CLASS = {4: 54, 2: 50}
INSTRUCTIONS_OF_CLASS_READ_TWICE = {4: 50, 2: 46}


def build() -> Any:
    """The tests' emulated module (tests/helpers/backends.py), compiled if it has changed.

    Raises:
        ImportError: The tests, or packages that they need, are missing.
    """
    folder = str(ROOT / "tests" / "helpers")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import backends  # type: ignore[import-not-found]

    return backends.Emulated(ROOT / "build" / "emulator")


INCOMING = Traffic(1, 0, 4)  # PyTorch fills the gradient of the loss


class Counter:
    """Counts passes on the emulator, as on a GPU with a given number of multiprocessors.

    Args:
        emulated: `backends.Emulated`.
        most_elements: larger tensors are run with fewer rows on a smaller GPU, so that each block has as much to do,
            and the counts are scaled up. None: all shapes are run in full.
    """

    def __init__(self, emulated: Any, most_elements: int | None) -> None:
        self._emulated = emulated
        self._most_elements = most_elements
        self._known: dict[tuple[Any, int], Any] = {}
        self.scaled: dict[str, int] = {}  # the factors of the cases that were not run in full

    def loss(self, shape: Shape, multiprocessors: int) -> tuple[Traffic, Traffic, Traffic]:
        """The costs of the forward, a backward with a loss scale, and the usual backward."""
        result: tuple[Traffic, Traffic, Traffic] = self._once(shape, multiprocessors, self._loss)
        return result

    def compaction(self, layer: passes.Layer, multiprocessors: int) -> Traffic:
        """The costs of gathering half of the layer."""
        result: Traffic = self._once(layer, multiprocessors, self._compaction)
        return result

    def _once(self, case: Any, multiprocessors: int, count: Callable[[Any, int], Any]) -> Any:
        if (case, multiprocessors) not in self._known:
            self._known[case, multiprocessors] = count(case, multiprocessors)
        return self._known[case, multiprocessors]

    def _loss(self, shape: Shape, multiprocessors: int) -> tuple[Traffic, Traffic, Traffic]:
        smaller, factor = self._shrunk(shape, max(shape.classes, shape.neurons))
        forward, scaling, usual = passes.loss_passes(make_inputs(smaller))
        fewer = -(-multiprocessors // factor)
        first, (preparation, report) = self._count_kernels(forward, fewer)
        once = SECTOR_BYTES * (preparation["sectors_read"] + preparation["sectors_written"])  # for any number of rows
        scaled, in_place = (self._count_kernels(run, fewer)[0].plus(INCOMING) for run in (scaling, usual))
        cached = report["dynamic_shared"] > 0  # the kernel caches rows there
        exponentials = EXPONENTIALS_OF_CACHED_CLASS if cached else EXPONENTIALS_OF_CLASS_READ_TWICE
        instructions = INSTRUCTIONS_OF_CACHED_CLASS if cached else INSTRUCTIONS_OF_CLASS_READ_TWICE
        elements = shape.rows * shape.classes
        first = first.times(factor)._replace(
            needed_bytes=passes.forward_bytes(shape),
            moved_bytes=factor * (first.moved_bytes - once) + once,
            exponentials=exponentials * elements,
            instructions=instructions[shape.dtype.itemsize] * elements,
        )
        return first, scaled.times(factor)._replace(needed_bytes=passes.backward_bytes(shape)), in_place.times(factor)

    def _compaction(self, layer: passes.Layer, multiprocessors: int) -> Traffic:
        smaller, factor = self._shrunk(layer, layer.columns)
        inputs = passes.make_layer(smaller)
        counted, _ = self._count(lambda: passes.compaction(inputs), -(-multiprocessors // factor))
        return counted.times(factor)._replace(needed_bytes=passes.compaction_bytes(layer))

    def _shrunk(self, case: Any, row_elements: int) -> tuple[Any, int]:
        """The case with fewer rows, and the factor between them."""
        most_rows = case.rows if self._most_elements is None else max(self._most_elements // row_elements, 2)
        factor = next(f for f in range(1, case.rows + 1) if case.rows % f == 0 and case.rows // f <= most_rows)
        if factor > 1:
            self.scaled[str(case)] = factor
        return case._replace(rows=case.rows // factor), factor

    def _count(self, run: Callable[[], object], multiprocessors: int) -> tuple[Traffic, list[dict[str, Any]]]:
        """The costs of a run's kernels and of its PyTorch operations, and the reports of the kernels."""
        operations = OperationCounter()

        def recorded() -> None:
            with operations:
                run()

        kernels, reports = self._count_kernels(recorded, multiprocessors)
        return operations.traffic().plus(kernels), reports

    def _count_kernels(self, run: Callable[[], object], multiprocessors: int) -> tuple[Traffic, list[dict[str, Any]]]:
        """The costs of a run's kernels alone, and their reports. Under a dispatch mode the loss takes another path."""
        emulator = self._emulated.emulator
        emulator.set_devices(MOST_DEVICES, multiprocessors)
        emulator.clear()
        try:
            with self._emulated.serves():
                library._stand_in = (self._emulated.module, self._emulated.place(_device_of(multiprocessors)))
                run()
            reports = emulator.reports()
        finally:
            emulator.set_devices()
            emulator.clear()
        sectors = sum(report["sectors_read"] + report["sectors_written"] for report in reports)
        return Traffic(len(reports), 0, sectors * SECTOR_BYTES), reports


_devices: dict[int, int] = {}


def _device_of(multiprocessors: int) -> int:
    """A separate device for each size of GPU, because the kernels cache how many blocks a device runs at once."""
    return _devices.setdefault(multiprocessors, MOST_DEVICES - 1 - len(_devices))
