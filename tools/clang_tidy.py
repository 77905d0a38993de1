"""Checks the C++ and CUDA sources with clang-tidy: `python tools/clang_tidy.py [FILE ...]`; without a file, all.

Clang's own warnings are on, too. CUDA sources are read as C++ through the headers of the tests' emulator. The CPU's
vector kernels are checked for the narrowest and the widest instruction set, without OpenMP, whose header clang-tidy
does not contain. It takes a minute on two cores.
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
# The analyzer inlines small functions only; with larger ones an instance of the loss takes two minutes.
ANALYZER = ("-Xclang", "-analyzer-config", "-Xclang", "mode=shallow")
NAMES = ('-DKDDP_COMPILER="clang-tidy"', '-DKDDP_CUDA_COMPILER="clang-tidy"', '-DKDDP_CUDA_ARCHITECTURES="emulated"')
CORE = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}")
PYTHON = (f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}")
EMULATED = ("-DKDDP_EMULATOR", f"-isystem{EMULATOR / 'include'}")
OF_EMULATOR = ("-DKDDP_EMULATOR", f"-I{EMULATOR / 'include'}", f"-I{EMULATOR / 'runtime'}")
AVX512 = ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16")
INSTRUCTION_SETS = {"avx512_bf16": AVX512, "baseline": ()}

Unit = tuple[Path, tuple[str, ...]]  # a source and its flags


def _units() -> Iterator[Unit]:
    """All sources with their flags, the slowest first."""
    for name, flags in INSTRUCTION_SETS.items():
        names = (f'-DKDDP_ISA_NAME="{name}"', f"-DKDDP_ISA_KERNELS={name}_kernels")
        yield CPU / "kd_l1_loss.cpp", (*CORE, *flags, *names)
        # Only the loss has loops for avx512_bf16.
        names = (f"-DKDDP_ISA_KERNELS={name.removesuffix('_bf16')}_kernels",)
        yield CPU / "gradient_products.cpp", (*CORE, *flags, *names)
    yield BINDINGS / "cuda.cpp", (*CORE, *EMULATED, *NAMES, *PYTHON)
    yield BINDINGS / "core.cpp", (*CORE, *NAMES, *PYTHON)
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        yield source, (*CORE, *EMULATED, "-DKDDP_LOGITS=float32")
    for source in ("gather.cpp", "isa.cpp"):
        yield CPU / source, CORE
    yield EMULATOR / "runtime" / "all.cpp", OF_EMULATOR
    for source in sorted((EMULATOR / "kernels").glob("*.cu")):
        yield source, (*OF_EMULATOR, f"-isystem{ROOT / 'csrc'}")


def _check(unit: Unit) -> str:
    """What clang-tidy reports on a source and its headers."""
    source, flags = unit
    command = ["clang-tidy", "--quiet", str(source), "--", *COMMON, *ANALYZER, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    return done.stdout or done.stderr or f"{source}: clang-tidy ended with {done.returncode}"


def main() -> int:
    """Returns 1 if clang-tidy reports anything."""
    wanted = {Path(name).resolve() for name in sys.argv[1:]}
    units = [unit for unit in _units() if not wanted or unit[0] in wanted]
    if unknown := wanted - {source for source, _ in units}:
        raise SystemExit(f"these files are not compiled on their own: {', '.join(map(str, unknown))}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [text for text in pool.map(_check, units) if text]
    print("\n".join(dict.fromkeys(found)))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
