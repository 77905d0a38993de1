"""Checks the C++ and CUDA sources by clang-tidy: `python tools/clang_tidy.py [FILE ...]`; no file means all of them.

Clang reads the sources, with its own warnings, where nothing else here does. The CUDA sources are read as C++ through
the headers of the tests' emulator;
the CPU's kernels for the narrowest and the widest of their instruction sets, and without
OpenMP, whose header clang-tidy does not bring. A minute on two cores.
"""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "csrc" / "cpu"
BINDINGS = ROOT / "python_bindings"
EMULATOR = ROOT / "tests" / "native" / "emulator"

COMMON = ("-x", "c++", "-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DKDDP_X86")
NAMES = ('-DKDDP_COMPILER="clang-tidy"', '-DKDDP_CUDA_COMPILER="clang-tidy"', '-DKDDP_CUDA_ARCHITECTURES="emulated"')
CORE = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}")
PYTHON = (f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}")
EMULATED = ("-DKDDP_EMULATOR", f"-isystem{EMULATOR / 'include'}")
OF_EMULATOR = ("-DKDDP_EMULATOR", f"-I{EMULATOR / 'include'}", f"-I{EMULATOR / 'runtime'}")
AVX512 = ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16")
INSTRUCTION_SETS = {"avx512_bf16": AVX512, "baseline": ()}

Unit = tuple[Path, tuple[str, ...]]  # a source and its flags


def _units() -> Iterator[Unit]:
    """All that is checked, what takes longest first."""
    for source in (CPU / "kd_l1_loss.cpp", CPU / "compaction.cpp"):
        for name, flags in INSTRUCTION_SETS.items():
            kernels = (f"-DKDDP_ISA_KERNELS={name}_kernels", f"-DKDDP_ISA_COMPACTION={name}_compaction")
            yield source, (*CORE, *flags, f'-DKDDP_ISA_NAME="{name}"', *kernels)
    yield BINDINGS / "cuda.cpp", (*CORE, *EMULATED, *NAMES, *PYTHON)
    yield BINDINGS / "core.cpp", (*CORE, *NAMES, *PYTHON)
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        yield source, (*CORE, *EMULATED)
    yield CPU / "dispatch.cpp", CORE
    yield EMULATOR / "runtime" / "all.cpp", OF_EMULATOR
    for source in sorted((EMULATOR / "kernels").rglob("*.c*")):
        yield source, OF_EMULATOR


def _check(unit: Unit) -> str:
    """What clang-tidy finds in a source and its headers."""
    source, flags = unit
    command = ["clang-tidy", "--quiet", str(source), "--", *COMMON, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    return done.stdout or done.stderr or f"{source}: clang-tidy ended with {done.returncode}"


def main() -> int:
    """Returns 1 where anything is found."""
    wanted = {Path(name).resolve() for name in sys.argv[1:]}
    units = [unit for unit in _units() if not wanted or unit[0] in wanted]
    if unknown := wanted - {source for source, _ in units}:
        raise SystemExit(f"not among the sources that are compiled by themselves: {', '.join(map(str, unknown))}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [text for text in pool.map(_check, units) if text]
    print("\n".join(dict.fromkeys(found)))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
