"""Runs the benchmarks on this machine and prints their tables.

python -m benchmarks [--device cpu|cuda] [--only loss,compaction] [--threads N] [--seconds S] [--rounds N]
                     [--no-compile] [--json FILE] [--plot FILE] [--markdown FILE] [--smoke]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from rich.console import Console

from benchmarks import child, disturbance, machine
from benchmarks.arguments import at_least, names_of
from benchmarks.comparisons import COMPARISONS
from benchmarks.gpu import command, device
from benchmarks.plot import draw
from benchmarks.settings import Settings
from benchmarks.table import write_markdown
from kddp_ext.files import write_json

JSON_VERSION = 1
BUSY = 0.5  # load average above which other work disturbs


def main() -> int:
    """Returns 0 if every comparison ran, 1 if one failed, 2 if there is no such device."""
    arguments = _parse()
    if arguments.device == "cuda":
        return _on_a_gpu(arguments)
    settings = _settings(arguments)
    console = Console()
    described = machine.describe(settings)
    head = machine.summary(described)
    console.print(head)
    if described["load_average"] > BUSY:
        console.print(f"[yellow]other work is running (load {described['load_average']:.1f}): expect noise[/yellow]")
    results, failed = {}, []
    for name in arguments.only:
        try:
            with console.status(f"measuring {name}"):
                results[name] = {heap: child.run(name, heap, settings) for heap in COMPARISONS[name].heaps}
        except subprocess.CalledProcessError as error:
            console.print(f"[red]{name} failed, exit status {error.returncode}[/red]")
            failed.append(name)
            continue
        for table in COMPARISONS[name].tables(results[name]):
            console.print(table.for_terminal())
    quality = disturbance.summary(results)
    console.print(quality)
    _write(arguments, head, quality, described, settings, results)
    return 1 if failed else 0


def _on_a_gpu(arguments: argparse.Namespace) -> int:
    reason = device.why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    return command.run(arguments, _settings(arguments), device.gpu(), command.describe())


def _settings(arguments: argparse.Namespace) -> Settings:
    return Settings(arguments.threads, arguments.seconds, arguments.rounds, arguments.compile, arguments.smoke)


def _write(
    arguments: argparse.Namespace,
    head: str,
    quality: str,
    described: dict[str, Any],
    settings: Settings,
    results: dict[str, Any],
) -> None:
    if arguments.json:
        content = {
            "version": JSON_VERSION,
            "machine": described,
            "settings": settings._asdict(),
            "comparisons": results,
        }
        write_json(arguments.json, content)
    if arguments.markdown:
        tables = [table for name, result in results.items() for table in COMPARISONS[name].tables(result)]
        write_markdown(arguments.markdown, f"{head}. {quality}", tables)
    if arguments.plot and "loss" in results:
        draw(arguments.plot, results["loss"], head)


def _parse() -> argparse.Namespace:
    on_a_gpu = " and ".join(command.COMPARISONS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (default cpu)")
    parser.add_argument(
        "--only",
        type=names_of(COMPARISONS),
        metavar="NAMES",
        help=f"some of {', '.join(COMPARISONS)} (default all; on a GPU {on_a_gpu})",
    )
    parser.add_argument("--threads", type=at_least(1), default=2, help="threads of every implementation (default 2)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each implementation and shape (default 3)")
    parser.add_argument("--rounds", type=at_least(1), default=15, help="turns of each implementation (default 15)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, to check that everything runs; the figures mean nothing"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--plot", metavar="FILE", help="draw the loss comparison into this PNG file")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables to this file, or into its marked places")
    arguments = parser.parse_args()
    available = list(COMPARISONS if arguments.device == "cpu" else command.COMPARISONS)
    arguments.only = arguments.only or available
    if not set(arguments.only) <= set(available):
        parser.error(f"--device cuda measures only {on_a_gpu}")
    if arguments.plot and arguments.device == "cuda":
        parser.error("--plot draws the loss comparison of the CPU")
    if arguments.plot and "loss" not in arguments.only:
        parser.error("--plot draws the loss comparison, so --only must include loss")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
