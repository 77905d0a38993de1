"""Counts what this package's CUDA kernels move, by running them on the tests' emulator."""

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

# Exponentials a class of csrc/cuda/row_elements.cuh with a divergence of the difference form, labels and a temperature
# of 4: one for the student and one for the teacher (add_element; e^s is a power of the student's). A row that is kept
# keeps them too; one that is read again takes them again for its gradient (RowPart::once_more).
EXPONENTIALS_OF_KEPT_CLASS, EXPONENTIALS_OF_CLASS_READ_AGAIN = 2, 4


def build() -> Any:
    """The emulated module as the tests have it (tests/helpers/backends.py), compiled where it has changed.

    Raises:
        ImportError: the tests, or what they need, are not there.
    """
    folder = str(ROOT / "tests" / "helpers")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import backends  # type: ignore[import-not-found]

    return backends.Emulated(ROOT / "build" / "emulator")


class Counter:
    """Runs passes on the emulator as on a GPU of so many multiprocessors.

    Args:
        emulated: `backends.Emulated`.
        most_elements: of a larger tensor fewer rows are run, on as much smaller a GPU (so that its blocks have as much
            to do), and what is counted is taken times as much. None: whole shapes.
    """

    def __init__(self, emulated: Any, most_elements: int | None) -> None:
        self._emulated = emulated
        self._most_elements = most_elements
        self._known: dict[tuple[Any, int], Any] = {}
        self.scaled: dict[str, int] = {}  # by how much, what was not run whole

    def loss(self, shape: Shape, multiprocessors: int) -> tuple[Traffic, Traffic, Traffic]:
        """Of forward, a backward under a loss scale, and the usual backward."""
        result: tuple[Traffic, Traffic, Traffic] = self._once(shape, multiprocessors, self._loss)
        return result

    def compaction(self, layer: passes.Layer, multiprocessors: int) -> Traffic:
        """Of taking half of the layer."""
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
        first, (report,) = self._count(forward, fewer)
        scaled, in_place = self._count(scaling, fewer)[0], self._count(usual, fewer)[0]
        # Rows that are kept are so in dynamic shared memory.
        of_class = EXPONENTIALS_OF_KEPT_CLASS if report["dynamic_shared"] else EXPONENTIALS_OF_CLASS_READ_AGAIN
        first = first.times(factor)._replace(
            needed_bytes=passes.forward_bytes(shape), exponentials=of_class * shape.rows * shape.classes
        )
        return first, scaled.times(factor)._replace(needed_bytes=passes.backward_bytes(shape)), in_place.times(factor)

    def _compaction(self, layer: passes.Layer, multiprocessors: int) -> Traffic:
        smaller, factor = self._shrunk(layer, layer.columns)
        inputs = passes.make_layer(smaller)
        counted, _ = self._count(lambda: passes.compaction(inputs), -(-multiprocessors // factor))
        return counted.times(factor)._replace(needed_bytes=passes.compaction_bytes(layer))

    def _shrunk(self, case: Any, of_row: int) -> tuple[Any, int]:
        """The case with a divisor of its rows, and by how much that is less."""
        most_rows = case.rows if self._most_elements is None else max(self._most_elements // of_row, 2)
        factor = next(f for f in range(1, case.rows + 1) if case.rows % f == 0 and case.rows // f <= most_rows)
        if factor > 1:
            self.scaled[str(case)] = factor
        return case._replace(rows=case.rows // factor), factor

    def _count(self, run: Callable[[], object], multiprocessors: int) -> tuple[Traffic, list[dict[str, Any]]]:
        """What the kernels of a run and PyTorch's operations beside them cost, and the kernels' reports."""
        emulator, operations = self._emulated.emulator, OperationCounter()
        emulator.set_devices(MOST_DEVICES, multiprocessors)
        emulator.clear()
        try:
            with self._emulated.serves(), operations:
                library._stand_in = (self._emulated.module, self._emulated.place(_device_of(multiprocessors)))
                run()
            reports = emulator.reports()
        finally:
            emulator.set_devices()
            emulator.clear()
        sectors = sum(report["sectors_read"] + report["sectors_written"] for report in reports)
        return operations.traffic().plus(Traffic(len(reports), 0, sectors * SECTOR_BYTES)), reports


_devices: dict[int, int] = {}


def _device_of(multiprocessors: int) -> int:
    """A device of its own for each size of GPU: the kernels ask a device once how many blocks it runs at once."""
    return _devices.setdefault(multiprocessors, MOST_DEVICES - 1 - len(_devices))
