"""Compiles the native CPU module with other flags than the package's, for a single instruction set."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX", "g++")
COMMON = ["-std=c++17", "-fPIC", "-ffp-contract=fast", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# As in CMakeLists.txt.
INSTRUCTION_SETS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
FOR_EACH = ("kd_l1_loss", "gradient_products")  # compiled for each instruction set
SHARED = ("isa", "gather")  # compiled once for all instruction sets


def kernel_flags(instruction_set: str) -> list[str]:
    """Flags of `FOR_EACH` for an instruction set, under the name of the one that isa.cpp always knows."""
    names = ['-DKDDP_ISA_NAME="baseline"', "-DKDDP_ISA_KERNELS=baseline_kernels"]
    return ["-fopenmp", *names, *INSTRUCTION_SETS[instruction_set]]


def supported() -> list[str]:
    """The instruction sets that this processor supports, the best one last."""
    import kddp_ext

    if platform.machine() not in ("x86_64", "AMD64"):
        return ["baseline"]
    names = list(INSTRUCTION_SETS)
    best: str = kddp_ext.build_info()["cpu"]
    return names[: names.index(best) + 1]


def compile_all(folder: Path, jobs: Sequence[tuple[Path, Iterable[str]]]) -> list[Path]:
    """Compiles (source, flags) pairs, two at a time. Returns the objects."""
    objects = [folder / f"{index}-{source.stem}.o" for index, (source, _) in enumerate(jobs)]

    def compile_one(job: tuple[tuple[Path, Iterable[str]], Path]) -> None:
        (source, flags), target = job
        subprocess.run([CXX, *COMMON, *flags, "-c", str(source), "-o", str(target)], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, zip(jobs, objects, strict=True)))
    return objects


def build_package(folder: Path, instruction_set: str, flags: Sequence[str]) -> Path:
    """Copies the package to `folder / "site"`, with a native module compiled with `flags`. Returns that folder."""
    import pybind11

    site = folder / "site"
    shutil.copytree(
        ROOT / "kddp_ext", site / "kddp_ext", ignore=shutil.ignore_patterns("_core*.so", "_cuda*.so", "__pycache__")
    )
    python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    jobs = [(CSRC / "cpu" / f"{name}.cpp", [*kernel_flags(instruction_set), *flags]) for name in FOR_EACH]
    jobs += [(CSRC / "cpu" / f"{name}.cpp", ["-fopenmp", *flags]) for name in SHARED]
    binding = [*python, "-fvisibility=hidden", '-DKDDP_COMPILER="instrumented"', *flags]
    jobs += [(ROOT / "python_bindings" / "core.cpp", binding)]
    objects = compile_all(folder, jobs)
    module = site / "kddp_ext" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([CXX, "-shared", "-fopenmp", *flags, *map(str, objects), "-o", str(module)], check=True)
    return site


def run_tests(
    site: Path,
    tests: Iterable[Path],
    arguments: Sequence[str],
    environment: dict[str, str],
    runner: Sequence[str] = ("-m", "pytest"),
) -> int:
    """Runs tests on the package in `site`, with a cache of their own. Returns pytest's exit code."""
    command = [sys.executable, *runner, "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["-o", f"cache_dir={site.parent / 'cache'}", *arguments, *map(str, tests)]
    # Not started in the source folder, which has no native module and would be imported first.
    return subprocess.run(command, cwd=site, env=environment | {"PYTHONPATH": str(site)}, check=False).returncode
