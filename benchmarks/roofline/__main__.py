"""Models what the loss and the compaction cost on GPUs, from counts on the emulator. Nothing is measured.

python -m benchmarks.roofline [--gpus H100,A100] [--launch-microseconds T] [--most-elements N | --whole]
                              [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from benchmarks.arguments import names_of
from benchmarks.cases import Shape, make_inputs
from benchmarks.comparisons.loss import SHAPES
from benchmarks.moved_bytes import needed_bytes
from benchmarks.roofline import emulated, passes
from benchmarks.roofline.gpus import GPUS, Gpu
from benchmarks.roofline.model import LAUNCH_SECONDS, Traffic, modelled
from benchmarks.roofline.tables import Case, counts, times
from benchmarks.roofline.torch_operations import OperationCounter
from benchmarks.table import write_markdown
from kddp_ext.files import write_json

JSON_VERSION = 1
LAYER = passes.Layer(4096, 4096)
PARTS = ("forward", "backward with a loss scale")
MOST_ELEMENTS = 1 << 21  # takes seconds per shape


def main() -> int:
    """Returns 0, or 2 if the emulator cannot be built."""
    arguments = _parse()
    console = Console()
    try:
        with console.status("compiling the kernels for the emulator"):
            emulator = emulated.build()
    except (ImportError, RuntimeError) as error:
        console.print(f"The emulated kernels cannot be built: {error}", style="red", markup=False)
        return 2
    counter = emulated.Counter(emulator, arguments.most_elements)
    by_gpu = []
    for name in arguments.gpus:
        with console.status(f"running the kernels on the emulator, as on {name}"):
            by_gpu.append((GPUS[name], all_cases(counter, GPUS[name], SHAPES, LAYER)))
    steps = [(gpu, [case for case in cases if not case.name.endswith(PARTS)]) for gpu, cases in by_gpu]
    tables = [counts(by_gpu[0][1], by_gpu[0][0], counter.scaled), times(steps, arguments.launch_seconds)]
    for table in tables:
        console.print(table.for_terminal())
    if arguments.markdown:
        write_markdown(arguments.markdown, None, tables)
    if arguments.json:
        write_json(arguments.json, _json(by_gpu, counter, arguments.launch_seconds))
    return 0


def all_cases(counter: emulated.Counter, gpu: Gpu, shapes: list[Shape], layer: passes.Layer) -> list[Case]:
    """The parts and the whole of a step for each shape, and the compaction of a layer, on one GPU."""
    cases = []
    for shape in shapes:
        own, eager = counter.loss(shape, gpu.multiprocessors), eager_loss(shape)
        cases += [Case(f"{shape}: {part}", *pair) for part, *pair in zip(PARTS, own[:2], eager[:2], strict=True)]
        step = own[0].plus(own[2])._replace(needed_bytes=needed_bytes(shape))
        cases.append(Case(f"{shape}: step", step, eager[0].plus(eager[2])))
    return [*cases, Case(str(layer), counter.compaction(layer, gpu.multiprocessors), eager_compaction(layer))]


def eager_loss(shape: Shape) -> tuple[Traffic, Traffic, Traffic]:
    """Counts the passes in plain PyTorch, on meta tensors."""
    forward, scaling, usual = passes.eager_passes(make_inputs(shape, "meta"))
    return _operations(forward), _operations(scaling), _operations(usual)


def eager_compaction(layer: passes.Layer) -> Traffic:
    """Counts `index_select` of the rows and of the columns of each tensor."""
    inputs = passes.make_layer(layer, "meta")
    return _operations(lambda: passes.eager_compaction(inputs))


def _operations(run: Callable[[], object]) -> Traffic:
    operations = OperationCounter()
    with operations:
        run()
    return operations.traffic()


def _json(by_gpu: list[tuple[Gpu, list[Case]]], counter: emulated.Counter, launch_seconds: float) -> dict[str, Any]:
    def implementation(traffic: Traffic, gpu: Gpu) -> dict[str, Any]:
        return {"counted": traffic._asdict(), "modelled_seconds": modelled(traffic, gpu, launch_seconds)._asdict()}

    return {
        "version": JSON_VERSION,
        "measured": False,
        "launch_seconds": launch_seconds,
        "scaled_by": counter.scaled,
        "gpus": [
            {
                **gpu._asdict(),
                "cases": [
                    {
                        "case": case.name,
                        "kddp_ext": implementation(case.kernels, gpu),
                        "eager": implementation(case.eager, gpu),
                    }
                    for case in cases
                ],
            }
            for gpu, cases in by_gpu
        ],
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gpus",
        type=names_of(GPUS),
        default=list(GPUS),
        metavar="NAMES",
        help=f"of {', '.join(GPUS)} (default: all)",
    )
    parser.add_argument(
        "--launch-microseconds",
        dest="launch_seconds",
        type=lambda text: float(text) * 1e-6,
        default=LAUNCH_SECONDS,
        metavar="T",
        help=f"assumed time per launch (default {LAUNCH_SECONDS * 1e6:g})",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--most-elements",
        type=int,
        default=MOST_ELEMENTS,
        metavar="N",
        help=f"run fewer rows of larger tensors and scale the counts (default {MOST_ELEMENTS})",
    )
    size.add_argument("--whole", dest="most_elements", action="store_const", const=None, help="run whole shapes")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables to this file, or between its markers")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
