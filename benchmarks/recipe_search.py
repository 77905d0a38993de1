"""Trains students with other settings and compares their validation accuracy. It never uses the test images.

python -m benchmarks.recipe_search SOURCE --folder DIR --data-dir DIR --validation N --changes CHANGE ... [--stage kddp]

SOURCE is the folder of a finished teacher. Each CHANGE is one training: options and values, joined by commas, such as
"student.learning_rate=0.002,distillation.alpha=0.7". A training that is finished is not repeated.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from benchmarks.table import Table
from benchmarks.trainings import Study, changed, mean_accuracy, over_seeds, show, study_parser


def main() -> None:
    """Run everything that is not finished, then write the table."""
    parser = study_parser(__doc__)
    parser.add_argument("--changes", nargs="+", metavar="CHANGE", default=[""])
    parser.add_argument("--stage", choices=("scratch", "kd", "kddp"), default="kd")
    parser.set_defaults(seeds=[0])
    arguments = parser.parse_args()
    if not arguments.validation:
        parser.error("--validation: expected the number of images to choose settings by, got 0")
    study, stage = Study(arguments), arguments.stage
    for seed in arguments.seeds:
        for change in arguments.changes:
            config = changed(study.config, f"seed={seed},{change}")
            study.finish(f"{stage} {change}, seed {seed}", lambda c=config: study.student(stage, c))
    show([_table(arguments.folder)], arguments.markdown)


def _table(folder: Path) -> Table:
    rows = []
    for name, results in over_seeds(folder).items():
        stage, _, change = name.partition(" ")
        settings = re.sub(r"(student|pruning|distillation)\.", "", change).replace(",", ", ")
        width = f"{statistics.fmean(sum(each['widths'].values()) for each in results):.0f}" if stage == "kddp" else ""
        rows.append([stage, settings, mean_accuracy(results), width])
    return Table("search", "Validation accuracy", ["training", "settings", "accuracy", "width"], rows)


if __name__ == "__main__":
    main()
