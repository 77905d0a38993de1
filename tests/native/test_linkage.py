"""The linker cannot mix the code of two instruction sets."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulator import compiler

CSRC = Path(__file__).parents[2] / "csrc"
FORMULAS = """
#include "row_math.h"
double use(const kddp::KdL1Loss& job, kddp::ChunkSums& row, kddp::RowGradient& gradient) {
    const kddp::RowParams rule = kddp::row_params(job);
    merge(row, rebase(row, row, 1, 1, 1), kddp::gradient_form(rule.divergence), row);
    const double kd = finish_divergence(rule, row, {}, {}, {}, 0, 1, gradient);
    return kd + finish_cross_entropy(rule, row, {}, 1, 0, 1, gradient);
}
"""


def shared_functions(source: Path) -> list[str]:
    """Functions of ours with weak symbols: the linker keeps one copy for all objects. Compiled with -O0."""
    if shutil.which(compiler()) is None or shutil.which("nm") is None:
        pytest.skip("needs a C++ compiler and nm")
    command = [compiler(), "-std=c++17", "-O0", f"-I{CSRC}", f"-I{CSRC / 'include'}", "-c", str(source)]
    subprocess.run([*command, "-o", str(source.with_suffix(".o"))], check=True)
    listed = subprocess.run(
        ["nm", "-C", str(source.with_suffix(".o"))], check=True, capture_output=True, text=True
    ).stdout
    weak = re.findall(r" W (kddp::.*)", listed)
    return [name for name in weak if not re.match(r"kddp::(\w+)::\1\(", name)]  # trivial constructors


def test_row_math_has_no_weak_symbols(tmp_path):
    source = tmp_path / "formulas.cpp"
    source.write_text(FORMULAS, encoding="utf-8")
    assert shared_functions(source) == []
