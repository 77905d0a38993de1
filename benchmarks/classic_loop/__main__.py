"""Images per second of the KD stage: the workflow's training compared with the usual distillation loop.

python -m benchmarks.classic_loop [--data-dir DIR] [--pairs cnn5,resnet] [--steps N] [--rounds N] [--threads N]
                                  [--workers N] [--json FILE] [--markdown FILE] [--smoke]
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import torch
from rich.console import Console

import kddp_ext
from benchmarks import disturbance, machine
from benchmarks.arguments import at_least, names_of
from benchmarks.classic_loop.classic import distillation_loss
from benchmarks.classic_loop.pairs import PAIRS
from benchmarks.classic_loop.processes import LOOPS, measure
from benchmarks.settings import Settings
from benchmarks.table import Table, times, write_markdown
from benchmarks.timing import Quartiles
from kddp_ext.files import write_json

JSON_VERSION = 1


def main() -> int:
    arguments = _parse()
    require_same_loss()
    console = Console()
    described = machine.describe(Settings(arguments.threads, 0.0, arguments.rounds, False, arguments.smoke))
    head = machine.summary(described)
    console.print(head)
    results = {}
    for pair in arguments.pairs:
        with console.status(f"measuring {pair}"):
            results[pair] = measure(pair, arguments)
    found = table(results, arguments.data_dir, arguments.workers)
    console.print(found.for_terminal())
    quality = disturbance.summary(results)
    console.print(quality)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "markdown")}
        content = {"version": JSON_VERSION, "machine": described, "settings": settings, "pairs": results}
        write_json(arguments.json, content)
    if arguments.markdown:
        write_markdown(arguments.markdown, f"{head}. {quality}", [found], head_name="classic-loop-machine")
    return 0


def require_same_loss() -> None:
    """Raises RuntimeError unless both loops minimise the same function."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = torch.randn(2, 16, 10, generator=generator)
    labels = torch.randint(0, 10, (16,), generator=generator)
    classic = distillation_loss(logits, teacher_logits, labels, temperature=4.0, alpha=0.9)
    ours = kddp_ext.fused_kd_l1_loss(logits, teacher_logits, labels, temperature=4.0, alpha=0.9)
    if not math.isclose(float(classic), float(ours), rel_tol=1e-5):
        raise RuntimeError(f"the losses differ: {float(classic)} in the classic loop, {float(ours)} in ours")


def table(results: dict[str, Any], data_dir: str | None, workers: int) -> Table:
    """Medians of the images per second and of the rounds' ratios, with their range."""
    rows = []
    for pair, result in results.items():
        speeds = [f"{result['images_per_second'][loop]:,.0f}" for loop in LOOPS]
        ratios = [times(Quartiles(**result["times_classic"][loop])) for loop in LOOPS if loop != "classic"]
        rows.append([PAIRS[pair].title, *speeds, *ratios])
    columns = ["student", "classic", "ours, cached logits", "ours, teacher every step"]
    columns += ["cached / classic", "every step / classic"]
    images = "Random images of CIFAR-10's shape." if data_dir is None else "CIFAR-10."
    note = f"{images} The classic loop has {workers} workers. Medians over the rounds; in brackets the ratios' range."
    return Table("classic-loop", "Images per second of the KD stage", columns, rows, note)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classic_loop", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", metavar="DIR", help="folder of CIFAR-10 (default: random images of its shape)")
    parser.add_argument(
        "--pairs",
        type=names_of(PAIRS),
        default=list(PAIRS),
        metavar="NAMES",
        help=f"some of {', '.join(PAIRS)} (default all)",
    )
    parser.add_argument("--steps", type=at_least(1), default=20, help="timed steps of each round (default 20)")
    parser.add_argument("--warm-up", type=at_least(0), default=5, help="uncounted steps before those (default 5)")
    parser.add_argument("--rounds", type=at_least(1), default=7, help="turns of each loop (default 7)")
    parser.add_argument("--threads", type=at_least(1), default=2, help="PyTorch's threads in each loop (default 2)")
    parser.add_argument("--workers", type=at_least(0), default=2, help="of the classic loop's DataLoader (default 2)")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny networks, to check that everything runs; the figures mean nothing"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--markdown", metavar="FILE", help="write the table to this file, or into its marked place")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
