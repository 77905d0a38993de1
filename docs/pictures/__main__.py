"""Draws the documentation's pictures into docs/images: `python docs/pictures --run runs/digits`.

Without --run, the picture of a run is not drawn again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import compaction
import study
import training_step
import width
from shapes import save

DOCS = Path(__file__).parent.parent


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(prog="python docs/pictures", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, metavar="DIR", help="the folder of a finished `kddp run`")
    parser.add_argument(
        "--folder", type=Path, default=DOCS / "images", metavar="DIR", help="where to write (default docs/images)"
    )
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="default svg")
    arguments = parser.parse_args()
    pictures = {"training-step": training_step.draw(), "compaction": compaction.draw()}
    pictures |= study.pictures(DOCS / "cifar10-study.json")
    if arguments.run is not None:
        pictures["width-over-epochs"] = width.draw(arguments.run)
    for name, figure in pictures.items():
        save(figure, arguments.folder / f"{name}.{arguments.format}")


if __name__ == "__main__":
    main()
