"""Compiles CUDA sources for the emulator in tests/native/emulator, and controls what was compiled.

See docs/cuda-without-a-gpu.md.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

EMULATOR = Path(__file__).parents[1] / "native" / "emulator"
INCLUDE = EMULATOR / "include"
RUNTIME = EMULATOR / "runtime"
HEADERS = {".h", ".cuh", ".hpp", ".cpp"}
# -fno-gnu-unique: every library has its own static variables of templates, as separate programs would.
FLAGS = (
    "-std=c++17", "-g1", "-fPIC", "-DKDDP_EMULATOR", "-ffp-contract=off", "-fno-gnu-unique", "-fno-strict-aliasing",
)  # fmt: skip
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")

Source = Path | tuple[Path, Sequence[str]]
"""A source, and optionally compiler flags for it alone."""


class BuildError(RuntimeError):
    """The compiler is missing or rejected a source. The text is the compiler's."""


def compiler() -> str:
    """The C++ compiler: $CXX, or else g++.

    Raises:
        BuildError: It is not installed.
    """
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"the emulator compiles kernels with {name}, which is not installed (or set CXX)")
    return path


@functools.cache
def _version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


def _hash(*parts: str | bytes) -> str:
    joined = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(joined).hexdigest()[:20]


def _hash_of_headers(folders: Iterable[Path]) -> str:
    """A hash of every file that a source could include from these folders."""
    paths = [(folder, path) for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in HEADERS]
    return _hash(*(part for folder, path in paths for part in (str(path.relative_to(folder)), path.read_bytes())))


def _compile(path: Path, command: Sequence[str]) -> Path:
    """Runs a command that writes `path`, unless it exists. A failed or killed command leaves no file behind."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def build(
    sources: Sequence[Source],
    folder: Path,
    *,
    include: Sequence[Path] = (),
    flags: Sequence[str] = (),
    sanitize: bool = False,
    kind: Literal["library", "module"] = "library",
    name: str = "emulated",
) -> Path:
    """Compiles sources together with the emulator's runtime. Returns the built file, at once if nothing has changed.

    Args:
        sources: .cu and .cpp files.
        folder: Keeps objects and results from one call to the next.
        include: Folders of headers, searched before the emulator's own. A changed header recompiles everything.
        flags: For the sources, after the defaults (`-O1`, which compiles templates fastest).
        sanitize: With AddressSanitizer and UndefinedBehaviorSanitizer; see `sanitizer_environment`.
        kind: A library for ctypes, or a Python module (with pybind11).
        name: The name of the result. For a module, that of its PYBIND11_MODULE.

    Raises:
        BuildError: The compiler is missing, or a source has errors.
    """
    options = [*FLAGS, "-O1", *(SANITIZE if sanitize else ())]
    runtime_options = [*options, *(() if sanitize else ("-O2",)), f"-I{INCLUDE}", f"-I{RUNTIME}"]
    options += [*flags, *(f"-I{path}" for path in (*include, INCLUDE))]
    if kind == "module":
        import pybind11

        options += [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    headers = _hash_of_headers([*include, INCLUDE])
    jobs = [(RUNTIME / "all.cpp", runtime_options, _hash_of_headers([INCLUDE, RUNTIME]))]
    for source in sources:
        path, extra = source if isinstance(source, tuple) else (source, ())
        jobs.append((path, [*options, *extra], headers))

    def compile_object(job: tuple[Path, list[str], str]) -> Path:
        source, options, headers = job
        key = _hash(str(source), source.read_bytes(), headers, _version(compiler()), *options)
        command = [compiler(), *options, "-x", "c++", "-c", str(source)]
        return _compile(folder / f"{source.stem}-{key}.o", command)

    folder.mkdir(parents=True, exist_ok=True)
    # One process compiles; the others wait and use its result.
    with FileLock(folder / "lock"), ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compile_object, jobs)]
    suffix = {"library": ".so", "module": sysconfig.get_config_var("EXT_SUFFIX")}[kind]
    link = [*(SANITIZE if sanitize else ()), "-shared", "-Wl,-Bsymbolic"]
    return _compile(folder / _hash(kind, name, *objects) / f"{name}{suffix}", [compiler(), *link, *objects])


def twin(source: Path, replace: str, by: str, to: Path) -> Path:
    """Writes a copy of a source with one change, to check that tests notice it. Returns `to`.

    For a header, put `to` in a folder that comes first in `include`, so that it is found before the original.

    Raises:
        ValueError: `replace` does not occur exactly once, because the source has changed.
    """
    text = source.read_text(encoding="utf-8")
    count = text.count(replace)
    if count != 1:
        raise ValueError(f"{replace!r} occurs {count} times in {source}, expected once")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text.replace(replace, by), encoding="utf-8")
    return to


def sanitizer_environment() -> dict[str, str]:
    """The environment in which Python can load what was built with `sanitize`: it preloads the sanitizers."""
    libraries = []
    for library in ("libasan.so", "libubsan.so"):
        command = [compiler(), f"-print-file-name={library}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            raise BuildError(f"{compiler()} has no {library}")
        libraries.append(os.path.realpath(path))
    # Python itself leaks memory when it exits.
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def address_and_bytes(memory: Any) -> tuple[ctypes.c_void_p, int]:
    """Of a contiguous tensor or NumPy array."""
    if hasattr(memory, "data_ptr"):
        return ctypes.c_void_p(memory.data_ptr()), memory.numel() * memory.element_size()
    return ctypes.c_void_p(memory.ctypes.data), memory.nbytes


def _argument(value: Any) -> Any:
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return value.encode() if isinstance(value, str) else address_and_bytes(value)[0]


class Emulator:
    """The emulator of one built file: settings, reports and recorded calls. `library` has the C functions."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_reports.restype = ctypes.c_char_p
        self.library.emulator_calls.restype = ctypes.c_char_p
        self.library.emulator_seed.restype = ctypes.c_uint64

    def run(self, name: str, *arguments: Any) -> str | None:
        """Calls a C function with tensors, integers (as int64) and texts. Returns the text of its error, or None."""
        function = self.library[name]
        function.restype = ctypes.c_char_p
        text = function(*map(_argument, arguments))
        return text.decode() if text else None

    @property
    def seed(self) -> int:
        """Determines the order of lanes, warps and blocks. Initially $KDDP_EMULATOR_SEED, or 0."""
        return self.library.emulator_seed()

    @seed.setter
    def seed(self, value: int) -> None:
        self.library.emulator_set_seed(ctypes.c_uint64(value))

    @property
    def device(self) -> int:
        """The current device of the calling thread."""
        return self.library.emulator_device()

    @device.setter
    def device(self, value: int) -> None:
        if self.library.emulator_set_device(value):
            raise ValueError(f"there is no device {value}")

    def last_error(self) -> int:
        """Calls cudaGetLastError(), which also resets the error."""
        return self.library.emulator_last_error()

    def set_devices(self, count: int = 2, multiprocessors: int = 4, usable: int | None = None) -> None:
        """Sets the number of devices and of multiprocessors of each, and how many of these the context has (all)."""
        self.library.emulator_set_devices(count, multiprocessors, multiprocessors if usable is None else usable)

    def allow(self, memory: Any, *, writable: bool, name: str = "", size: int | None = None) -> None:
        """Lets kernels access a tensor or array, or `size` bytes of it.

        Once anything is allowed, everything else is out of bounds, until `allow_everything`.
        """
        address, total = address_and_bytes(memory)
        length = ctypes.c_size_t(total if size is None else size)
        self.library.emulator_allow(address, length, writable, name.encode())

    def allow_everything(self) -> None:
        """Revokes all calls of `allow`."""
        self.library.emulator_allow_everything()

    def needs(self, memory: Any, *, is_store: bool, kernel: str = "") -> None:
        """Declares that the next launch, or the next of a kernel whose name contains this, has to read or write every
        byte of `memory`; otherwise it fails.
        """
        address, total = address_and_bytes(memory)
        self.library.emulator_needs(address, ctypes.c_size_t(total), is_store, kernel.encode())

    def reports(self) -> list[dict[str, Any]]:
        """What each launch since `clear` did, as `emulator::Report` describes it."""
        return json.loads(self.library.emulator_reports())

    def calls(self) -> list[dict[str, Any]]:
        """Launches and CUDA runtime calls since `clear`, in order, as `emulator::Call` describes them."""
        return json.loads(self.library.emulator_calls())

    def clear(self) -> None:
        """Forgets reports and calls."""
        self.library.emulator_clear()
