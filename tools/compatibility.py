"""Builds the wheel for each Python and tests it with each torch, in fresh environments; the table goes to the docs:

    pip install 'kddp_ext[release]'
    python tools/compatibility.py --pythons 3.10 3.11 3.12 3.13 --torches 2.13.0 2.14.1 [--suite]

The wheels are built from the sdist, without CUDA. Without --suite, a combination takes about two minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->)", re.DOTALL)
MOST_BYTES = 3_000_000
# What a combination has to pass, and what takes a few minutes more.
SMOKE = ("loss/test_values.py", "loss/test_arguments.py", "loss/test_autograd.py", "ops/test_gather_slices.py")
SMOKE += ("pruning/test_pruner.py", "pruning/test_find.py", "saving/test_student_file.py", "workflow/test_run.py")
SUITE = ("activations", "loss", "ops", "pruning", "saving", "workflow", "native/test_native.py")
TEST_PACKAGES = ("pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "pybind11>=2.13", "pillow>=10")


def run(command: Sequence[str | Path], **options: Any) -> str:
    """The output of a command; RuntimeError with the end of what it said where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout + done.stderr


def environment(folder: Path, python: str) -> Path:
    """Makes a virtual environment and gives its interpreter."""
    run(["uv", "venv", "--quiet", "--python", python, folder])
    return folder / "bin" / "python"


def install(python: Path, *packages: str | Path) -> None:
    run(["uv", "pip", "install", "--quiet", "--python", python, *packages])


def build_sdist(folder: Path) -> Path:
    run([sys.executable, "-m", "build", "--sdist", "--installer", "uv", "--outdir", folder, ROOT])
    return next(folder.glob("*.tar.gz"))


def build_wheel(sdist: Path, python: str, folder: Path) -> dict[str, Any]:
    """Builds and inspects a wheel."""
    started = time.monotonic()
    command = ["uv", "build", "--quiet", "--wheel", "--python", python, "--out-dir", folder]
    run([*command, "-C", "cmake.define.KDDP_CUDA=OFF", sdist])
    wheel = next(folder.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    if not {"kddp_ext/py.typed", "kddp_ext/_core.pyi"} <= set(names) or any("test" in name for name in names):
        raise RuntimeError(f"{wheel.name} has other files than it should: {names}")
    if wheel.stat().st_size > MOST_BYTES:
        raise RuntimeError(f"{wheel.name} has {wheel.stat().st_size} bytes, more than {MOST_BYTES}")
    return {
        "wheel": wheel.name,
        "bytes": wheel.stat().st_size,
        "build_seconds": round(time.monotonic() - started),
        "manylinux": manylinux(wheel),
        "path": wheel,
    }


def manylinux(wheel: Path) -> str:
    """The tag that the symbols which a wheel asks of the system allow, libgomp aside, which torch brings."""
    told = run([sys.executable, "-m", "auditwheel", "-v", "show", wheel])
    found = re.search(r'constrained by.*?"(manylinux_\d+_\d+_\w+)"', told.replace("\n", " "))
    found = found or re.search(r'consistent with.*?"(manylinux_\d+_\d+_\w+)"', told.replace("\n", " "))
    return found.group(1) if found else f"none: {told.strip()[-200:]}"


def run_tests(python: Path, tests: Sequence[str], scratch: Path) -> str:
    """The last line that pytest says, of tests on the installed package."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    # A warning of another torch is no failure.
    command += ["-W", "default", "--rootdir", ROOT, "--emulated=none", *(ROOT / "tests" / name for name in tests)]
    told = run(command, cwd=scratch, env=os.environ | {"CI": "1"})
    return re.sub(r" in [\d.]+s.*", "", told.strip().splitlines()[-1])


def test_combination(wheel: Path, python: str, torch: str, tests: Sequence[str], scratch: Path) -> dict[str, Any]:
    interpreter = environment(scratch / "venv", python)
    result: dict[str, Any] = {"torch": torch}
    try:
        install(interpreter, f"torch=={torch}", wheel, *TEST_PACKAGES)
        result["installed"] = run([interpreter, "-c", "import torch; print(torch.__version__)"], cwd=scratch).strip()
        result["tests"] = run_tests(interpreter, tests, scratch)
        run([scratch / "venv" / "bin" / "kddp", "run", "--name", "compatibility"], cwd=scratch)
        result["kddp run"] = "passed"
    except RuntimeError as error:
        print(error, file=sys.stderr)
        result["failed"] = str(error).splitlines()[-1]
    return result


def test_editable(python: str, torch: str, scratch: Path) -> str:
    """An editable install of a copy of the sources: a changed line is seen without another build."""
    sources = scratch / "sources"
    files = run(["git", "ls-files", "-z"], cwd=ROOT).split("\0")
    for name in filter(None, files):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, sources / name)
    interpreter = environment(scratch / "venv", python)
    install(interpreter, f"torch=={torch}")
    install(interpreter, "-C", "cmake.define.KDDP_CUDA=OFF", "--editable", sources)
    with (sources / "kddp_ext" / "__init__.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    program = "import kddp_ext; kddp_ext.build_info(); assert kddp_ext.CHANGED; print(kddp_ext.__file__)"
    if str(sources) not in run([interpreter, "-c", program], cwd=scratch):
        raise RuntimeError("the editable install is not imported from its sources")
    return "passed"


def table(rows: Sequence[dict[str, Any]], torches: Sequence[str], editable: str) -> str:
    """The results in Markdown."""
    head = ["Python", "wheel", "symbols allow", *(f"torch {torch}" for torch in torches)]
    lines = [head, ["---", "---:", "---", *("---" for _ in torches)]]
    for row in rows:
        cells = [each.get("failed") or f"{each['tests']}; `kddp run` passed" for each in row["torches"]]
        lines.append([row["python"], f"{row['bytes'] / 1e6:.2f} MB", row["manylinux"], *cells])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    installed = sorted({each["installed"] for row in rows for each in row["torches"] if "installed" in each})
    machine = f"{platform.machine()}, glibc {platform.libc_ver()[1]}"
    return f"{text}\nOn {machine}; torch as installed: {', '.join(installed)}. Editable install: {editable}.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", required=True, help="versions or interpreters, as uv takes them")
    parser.add_argument("--torches", nargs="+", required=True)
    parser.add_argument("--suite", action="store_true", help="all tests of loss, pruning and workflow")
    options = parser.parse_args()
    tests = SUITE if options.suite else SMOKE
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sdist = build_sdist(scratch)
        for number, python in enumerate(options.pythons):
            (wheels := scratch / f"wheels-{number}").mkdir()
            row = build_wheel(sdist, python, wheels)
            wheel = row.pop("path")
            row["python"] = run([run(["uv", "python", "find", python]).strip(), "--version"]).split()[-1]
            row["torches"] = []
            for torch in options.torches:
                (place := scratch / f"{number}-{torch}").mkdir()
                row["torches"].append(test_combination(wheel, python, torch, tests, place))
                print(row["python"], row["torches"][-1], flush=True)
                shutil.rmtree(place)
            rows.append(row)
        (place := scratch / "editable").mkdir()
        editable = test_editable(options.pythons[0], options.torches[0], place)
    PAGE.write_text(TABLE.sub(lambda _: table(rows, options.torches, editable), PAGE.read_text()))
    return any("failed" in each for row in rows for each in row["torches"])


if __name__ == "__main__":
    sys.exit(main())
