"""Compiles CUDA sources for the emulator with a C++ compiler, and makes twins of sources with one line changed."""

import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from filelock import FileLock

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
RUNTIME = HERE / "runtime"
INCLUDED = {".h", ".cuh", ".hpp", ".cpp"}
# A static variable of a template is a library's own, not shared by all that are loaded: as in programs of their own.
FLAGS = ("-std=c++17", "-g1", "-fPIC", "-DKDDP_EMULATOR", "-ffp-contract=off", "-fno-gnu-unique")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


class BuildError(RuntimeError):
    """The compiler is missing, or refused a source; the text is what it said."""


def compiler() -> str:
    """The C++ compiler: $CXX, else g++.

    Raises:
        BuildError: There is none.
    """
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"the emulator compiles kernels with {name}, which is not installed (or set CXX)")
    return path


@functools.cache
def _version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-8000:]}")


def _headers(folders: Iterable[Path]) -> str:
    """A hash of all that may be included from these folders."""
    hashed = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in INCLUDED):
            hashed.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return hashed.hexdigest()


def _write(path: Path, command: Sequence[str]) -> None:
    """Runs a command that writes a file, which is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        _run([*command, "-o", str(partial)])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _object(source: Path, folder: Path, flags: Sequence[str], headers: str) -> Path:
    parts = (str(source), hashlib.sha256(source.read_bytes()).hexdigest(), headers, _version(compiler()), *flags)
    path = folder / f"{source.stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.o"
    if not path.exists():
        _write(path, [compiler(), *flags, "-x", "c++", "-c", str(source)])
    return path


def build(
    sources: Sequence[Path],
    folder: Path,
    *,
    include: Sequence[Path] = (),
    flags: Sequence[str] = (),
    runtime_flags: Sequence[str] = (),
    sanitize: bool = False,
    kind: Literal["library", "executable", "module"] = "library",
    name: str = "emulated",
) -> Path:
    """Compiles sources together with the emulator's runtime, and gives the file: at once where nothing has changed.

    Args:
        sources: .cu and .cpp files.
        folder: Where objects and results are kept, from one call to the next.
        include: Folders of headers, before the emulator's own. A change in any header compiles everything anew.
        flags: For the sources, after our own (`-O1`, which compiles templates fastest, unless another is given).
        runtime_flags: For the emulator's runtime.
        sanitize: With AddressSanitizer and UndefinedBehaviorSanitizer; see `sanitizer_environment`.
        kind: A library for ctypes, an executable (a source has `main`), or a Python module (with pybind11's headers).
        name: Of the result; of a module, the name that its PYBIND11_MODULE has.

    Raises:
        BuildError: No compiler, or errors in a source.
    """
    options = [*FLAGS, "-O1", *(SANITIZE if sanitize else ())]
    of_runtime = [*options, *(() if sanitize else ("-O2",)), f"-I{INCLUDE}", f"-I{RUNTIME}", *runtime_flags]
    of_sources = [*options, *flags, *(f"-I{path}" for path in (*include, INCLUDE))]
    if kind == "module":
        import pybind11

        of_sources += [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    hashed = _headers([*include, INCLUDE])
    jobs = [(RUNTIME / "all.cpp", folder, of_runtime, _headers([INCLUDE, RUNTIME]))]
    jobs += [(Path(path), folder, of_sources, hashed) for path in sources]
    folder.mkdir(parents=True, exist_ok=True)
    # Of several processes one compiles; the others find what it made.
    with FileLock(folder / "lock"), ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _object(*job), jobs))
    key = hashlib.sha256(chr(0).join([kind, name, *map(str, objects)]).encode()).hexdigest()[:20]
    suffix = {"library": ".so", "executable": "", "module": sysconfig.get_config_var("EXT_SUFFIX")}[kind]
    path = folder / key / f"{name}{suffix}"
    if not path.exists():
        link = [*(SANITIZE if sanitize else ()), *(() if kind == "executable" else ("-shared", "-Wl,-Bsymbolic"))]
        _write(path, [compiler(), *link, *map(str, objects)])
    return path


def twin(source: Path, replace: str, by: str, to: Path) -> Path:
    """Writes a copy of a source with one thing changed, to see that its tests notice. Returns `to`.

    For a header, choose `to` under a folder that comes first in `include`, so that it is found before the original.

    Raises:
        ValueError: `replace` is not in the source exactly once: the source has changed, so the twin has to.
    """
    text = Path(source).read_text(encoding="utf-8")
    found = text.count(replace)
    if found != 1:
        raise ValueError(f"{source} has {replace!r} {found} times, and a twin changes what is there once")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text.replace(replace, by), encoding="utf-8")
    return to


def sanitizer_environment() -> dict[str, str]:
    """The environment in which Python can load what was built with `sanitize`: the sanitizer has to be there first."""
    found = []
    for library in ("libasan.so", "libubsan.so"):
        asked = [compiler(), f"-print-file-name={library}"]
        path = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            raise BuildError(f"{compiler()} has no {library}")
        found.append(os.path.realpath(path))
    # Python itself keeps memory until it ends.
    return {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
