"""Measures the line coverage of kddp_ext with coverage.py, and of csrc and the bindings with gcov:

    pip install 'kddp_ext[test,coverage]'
    python tools/coverage.py [arguments of pytest]

The CUDA sources are counted as the emulator compiles them. All instruction sets are compiled from the same sources, so
only the best one of this processor is counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from native_build import CXX, build_package, run_tests, supported  # noqa: E402

GCOV = ["--coverage", "-fprofile-update=atomic"]
# These tests compile their own programs, which are not counted.
LEFT_OUT = (
    "project/docs",
    "project/static_typing",
    "native/emulator",
    "native/threads",
    "native/test_linkage.py",
    "native/cuda/test_cmake.py",
    "native/cuda/test_planted_faults.py",
)
# Processes that the tests start are counted, too; killed ones lose their counts.
CONFIG = """
[run]
source = {package}
parallel = True
data_file = {folder}/coverage
patch = subprocess, _exit
sigterm = True
[report]
show_missing = True
skip_covered = True
exclude_also =
    if TYPE_CHECKING:
    raise NotImplementedError
    \\.\\.\\.$
[paths]
source =
    {root}/kddp_ext
    {package}
"""


def compiler_that_counts(folder: Path) -> Path:
    """Write a compiler wrapper for the emulated kernels that adds gcov's flags."""
    script = folder / "g++"
    script.write_text(f'#!/bin/sh\nexec {CXX} "$@" {" ".join(GCOV)}\n')
    script.chmod(0o755)
    return script


def report_native(folder: Path) -> None:
    """Print the coverage of each file. A line of a template counts once, as run if any instance ran it."""
    filters = ["--filter", f"{ROOT}/csrc/", "--filter", f"{ROOT}/python_bindings/"]
    options = ["--gcov-ignore-errors", "all", "--merge-mode-functions", "separate", "--json", "-"]
    command = [sys.executable, "-m", "gcovr", "--root", str(ROOT), *filters, *options, str(folder)]
    counted = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    files: dict[str, dict[int, bool]] = {}
    for file in counted["files"]:
        lines = files.setdefault(file["file"], {})
        for line in file["lines"]:
            lines[line["line_number"]] = lines.get(line["line_number"], False) or line["count"] > 0
    for name, lines in sorted(files.items(), key=lambda item: sum(item[1].values()) / max(len(item[1]), 1)):
        missing = [number for number, ran in sorted(lines.items()) if not ran]
        print(f"{name:<45}{len(lines) - len(missing):>6} of {len(lines):>5}  {missing[:20] or ''}")
    total, ran = sum(map(len, files.values())), sum(sum(lines.values()) for lines in files.values())
    print(f"C++ and CUDA: {ran} of {total} lines, {100 * ran / max(total, 1):.1f}%")


def main(arguments: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = build_package(folder, supported()[-1], [*GCOV, "-O0"])
        config = folder / "coveragerc"
        config.write_text(CONFIG.format(package=site / "kddp_ext", folder=folder, root=ROOT))
        coverage = ["-m", "coverage"]
        runner = [*coverage, "run", f"--rcfile={config}", "-m", "pytest"]
        environment = os.environ | {"CXX": str(compiler_that_counts(folder))}
        options = ["--timeout=1200", *(f"--ignore={ROOT / 'tests' / name}" for name in LEFT_OUT), *arguments]
        chosen = [] if any(Path(each).exists() for each in arguments) else [ROOT / "tests"]
        failed = run_tests(site, chosen, options, environment, runner)
        for step in ("combine", "report"):
            subprocess.run([sys.executable, *coverage, step, f"--rcfile={config}"], check=True)
        report_native(folder)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
