"""Runs every benchmark on this machine, prints a table, and writes JSON where asked.

python -m benchmarks [--threads N] [--seconds S] [--no-compile] [--json FILE]
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

import kddp_ext
from benchmarks import compaction, loss
from kddp_ext.files import write_json


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    console = Console()
    bandwidth = loss.copy_bandwidth(arguments.threads)
    console.print(
        f"torch {torch.__version__}, {arguments.threads} threads, {kddp_ext.build_info()['cpu']} kernels, "
        f"copy {bandwidth / 1e9:.1f} GB/s"
    )
    with console.status("measuring the loss"):
        rows = list(loss.measure(loss.SHAPES, arguments.threads, arguments.seconds, not arguments.no_compile))
    with console.status("measuring the compaction"):
        compacted = compaction.measure(repetitions=9)
    console.print(_loss_table(rows, bandwidth))
    ratio = compacted["index_select"] / compacted["kddp_ext"]
    console.print(
        f"compaction of {'-'.join(map(str, compaction.SIZES))} with Adam's state, half the neurons: "
        f"{compacted['kddp_ext'] * 1e3:.0f} ms, {ratio:.1f}x index_select"
    )
    if arguments.json:
        result = {
            "torch": torch.__version__,
            "threads": arguments.threads,
            "build": kddp_ext.build_info(),
            "copy_bytes_per_second": bandwidth,
            "loss": [row._asdict() for row in rows],
            "compaction_seconds": compacted,
        }
        write_json(arguments.json, result)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of every implementation (default 2)")
    parser.add_argument("--seconds", type=float, default=1.5, help="how long each is timed at each shape (default 1.5)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def _loss_table(rows: list[loss.Row], bandwidth: float) -> Table:
    table = Table(title="loss, forward + backward", title_justify="left")
    table.add_column("rows×classes, activations")
    for header in ("µs", "vs eager", "vs torch.compile", "share of copy bandwidth"):
        table.add_column(header, justify="right")
    for row in rows:
        own = row.seconds["kddp_ext"]
        ratios = [
            f"{row.seconds[name] / own:.1f}x" if name in row.seconds else "-" for name in ("eager", "torch.compile")
        ]
        table.add_row(row.shape, f"{own * 1e6:.0f}", *ratios, f"{row.bytes / own / bandwidth:.0%}")
    return table


if __name__ == "__main__":
    main()
