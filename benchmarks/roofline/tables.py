"""Tables of counts and modelled times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.roofline.gpus import Gpu
from benchmarks.roofline.model import Traffic, modelled
from benchmarks.table import Table


class Case(NamedTuple):
    """One pass on one GPU.

    Attributes:
        name: the shape and the pass.
        kernels: costs of this package's kernels.
        eager: costs of plain PyTorch.
    """

    name: str
    kernels: Traffic
    eager: Traffic


def counts(cases: Sequence[Case], gpu: Gpu, scaled: dict[str, int]) -> Table:
    """The counts for one GPU."""
    columns = ["", "kernels", "needed (MB)", "moved (MB)", "moved / needed", "exponentials (M)", "instructions (M)"]
    columns += ["eager kernels", "eager moved (MB)"]
    rows = [
        [
            case.name,
            f"{case.kernels.launches:.0f}",
            _megabytes(case.kernels.needed_bytes),
            _megabytes(case.kernels.moved_bytes),
            f"{case.kernels.moved_bytes / case.kernels.needed_bytes:.2f}",
            f"{case.kernels.exponentials / 1e6:,.3g}",
            f"{case.kernels.instructions / 1e6:,.3g}",
            f"{case.eager.launches:.0f}",
            _megabytes(case.eager.moved_bytes),
        ]
        for case in cases
    ]
    return Table("roofline-counts", f"Counted on the emulator, as on {gpu.name}", columns, rows, _scaling(scaled))


def _scaling(scaled: dict[str, int]) -> str:
    if not scaled:
        return "All shapes were run in full."
    parts = [f"{name} with 1/{factor} of the rows" for name, factor in scaled.items()]
    return f"Run with fewer rows on a smaller GPU and scaled up: {'; '.join(parts)}. The others were run in full."


def times(by_gpu: Sequence[tuple[Gpu, Sequence[Case]]], launch_seconds: float) -> Table:
    """The modelled times of the cases on each GPU."""
    columns = ["", *[f"{gpu.name} (µs)" for gpu, _ in by_gpu]]
    rows = [
        [cases[0].name, *[_time(case, gpu, launch_seconds) for (gpu, _), case in zip(by_gpu, cases, strict=True)]]
        for cases in zip(*(cases for _, cases in by_gpu), strict=True)
    ]
    note = (
        "This package / eager PyTorch (needed bytes at peak bandwidth; the part that bounds this package's time). "
        f"A launch is assumed to take {launch_seconds * 1e6:g} µs."
    )
    return Table("roofline-times", "Modelled times, not measured", columns, rows, note)


def _time(case: Case, gpu: Gpu, launch_seconds: float) -> str:
    own, eager = modelled(case.kernels, gpu, launch_seconds), modelled(case.eager, gpu, launch_seconds)
    return f"{_microseconds(own.total)} / {_microseconds(eager.total)} ({_microseconds(own.at_best)}; {own.bound})"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-4 else f"{seconds * 1e6:,.0f}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f}" if size < 1e8 else f"{size / 1e6:,.0f}"
