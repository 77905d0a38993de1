"""Measures which lines the tests run: of kddp_ext with coverage.py, of csrc and the bindings with gcov:

    pip install 'kddp_ext[test,coverage]'
    python tools/coverage.py [arguments of pytest]

The CUDA sources are counted as the emulator compiles them. Every instruction set is compiled of the same sources, so
one stands for all: the best of this processor.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from native_build import CXX, build_package, run_tests, supported  # noqa: E402

GCOV = ["--coverage", "-O0", "-fprofile-update=atomic"]
# Processes that tests start are counted, too; those that are killed lose what they counted.
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
    """A compiler for the emulated kernels that adds what gcov needs."""
    script = folder / "g++"
    script.write_text(f'#!/bin/sh\nexec {CXX} "$@" {" ".join(GCOV)}\n')
    script.chmod(0o755)
    return script


def report_native(folder: Path) -> None:
    filters = ["--filter", f"{ROOT}/csrc/", "--filter", f"{ROOT}/python_bindings/"]
    options = ["--gcov-ignore-errors", "all", "--merge-mode-functions", "separate", "--exclude-unreachable-branches"]
    command = [sys.executable, "-m", "gcovr", "--root", str(ROOT), *filters, *options, "--sort", "uncovered-number"]
    subprocess.run([*command, str(folder)], check=True)


def main(arguments: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = build_package(folder, supported()[-1], GCOV)
        config = folder / "coveragerc"
        config.write_text(CONFIG.format(package=site / "kddp_ext", folder=folder, root=ROOT))
        coverage = ["-m", "coverage"]
        runner = [*coverage, "run", f"--rcfile={config}", "-m", "pytest"]
        environment = os.environ | {"CXX": str(compiler_that_counts(folder))}
        failed = run_tests(site, [ROOT / "tests"], arguments, environment, runner)
        for step in ("combine", "report"):
            subprocess.run([sys.executable, *coverage, step, f"--rcfile={config}"], check=True)
        report_native(folder)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
