"""Compiling for the emulator: what is kept, what is said when it fails, twins, modules, sanitizers, and both ways to
switch stacks."""

import importlib.util
import re
import subprocess
import sys
from ctypes import c_char_p
from pathlib import Path

import numpy as np
import pytest
from emulator.arrays import pointer
from emulator.build import BuildError, build, sanitizer_environment, twin
from emulator.control import Emulator

KERNELS = Path(__file__).parent / "kernels"
REDUCTIONS = KERNELS / "reductions.cu"


def test_a_build_is_kept_until_something_changes(folder, tmp_path):
    source = tmp_path / "source.cu"
    source.write_text('#include "number.h"\nextern "C" int number() { return NUMBER; }\n')
    header = tmp_path / "number.h"
    header.write_text("#define NUMBER 1\n")
    first = build([source], folder, include=[tmp_path])
    assert build([source], folder, include=[tmp_path]) == first
    header.write_text("#define NUMBER 2\n")
    second = build([source], folder, include=[tmp_path])
    assert second != first
    assert [Emulator(path).library.number() for path in (first, second)] == [1, 2]
    assert build([source], folder, include=[tmp_path], flags=["-DOTHER"]) not in (first, second)


def test_errors_of_the_compiler(folder, tmp_path, monkeypatch):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void kernel() { return 1; }\n")
    with pytest.raises(BuildError, match=r"wrong\.cu:1:\d+: error"):
        build([source], folder)
    assert not list(folder.glob("wrong*"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="compiles kernels with no-such-compiler, which is not installed"):
        build([REDUCTIONS], folder)


@pytest.mark.parametrize(
    ("replace", "by", "what"),
    [
        ("    __syncthreads();\n    sum = lane", "    sum = lane", "reads (shared memory that no|what thread)"),
        (
            "sum = lane < int(blockDim.x) / 32 ? of_warps.load(lane) : 0;",
            "sum = of_warps.load(lane);",
            "reads shared memory that no",
        ),
        ("columns + i);", "columns + i + 1);", "out of bounds: reads 4 bytes"),
    ],
)
def test_a_twin_with_a_fault_is_found(folder, tmp_path, replace, by, what):
    source = twin(REDUCTIONS, replace, by, tmp_path / "twin.cu")
    emulator = Emulator(build([source], folder))
    emulator.library.run_sum_of_block.restype = c_char_p
    values, sums = np.ones((4, 100), np.float32), np.zeros(4, np.float32)
    for seed in range(5):
        emulator.seed = seed
        emulator.allow_everything()
        emulator.allow(values, writable=False)
        emulator.allow(sums, writable=True)
        text = emulator.library.run_sum_of_block(pointer(values), pointer(sums), 4, 100, 64)
        assert re.search(rf"kernel sum_of_block, block .*twin\.cu:\d+: .*{what}", text.decode())


def test_a_twin_changes_what_is_there_once(tmp_path):
    for text, times in (("__syncthreads", 2), ("no such text", 0)):
        with pytest.raises(ValueError, match=f"reductions.cu has '{text}' {times} times"):
            twin(REDUCTIONS, text, "", tmp_path / "twin.cu")
    assert not list(tmp_path.iterdir())


def test_a_module_of_python(folder, tmp_path):
    """Errors become exceptions, and the settings are those of the module's own emulator."""
    pytest.importorskip("pybind11")
    source = tmp_path / "module.cu"
    source.write_text(
        '#include <pybind11/pybind11.h>\n#include "checked_memory.h"\n'
        "__global__ void fill(int* out) { checked::store(out + threadIdx.x, 7); }\n"
        "PYBIND11_MODULE(_filling, m) {\n"
        '    m.def("fill", [](uintptr_t out) {\n'
        "        CHECKED_LAUNCH(fill, 1, 32, 0, nullptr, reinterpret_cast<int*>(out));\n"
        "    });\n"
        "}\n"
    )
    path = build([source], folder, kind="module", name="_filling")
    spec = importlib.util.spec_from_file_location("_filling", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = np.zeros(32, np.int32)
    module.fill(out.ctypes.data)
    assert (out == 7).all()
    emulator = Emulator(path)
    assert emulator.reports()[0]["kernel"] == "fill"
    emulator.allow(out[:16], writable=True)
    with pytest.raises(RuntimeError, match=r"kernel fill, block .*: out of bounds: writes 4 bytes"):
        module.fill(out.ctypes.data)


def test_stacks_switched_by_the_system(folder):
    """As on processors for which there is no switch by hand."""
    emulator = Emulator(build([REDUCTIONS], folder, runtime_flags=["-DEMULATOR_UCONTEXT"], name="ucontext"))
    emulator.library.run_sum_of_block.restype = c_char_p
    values, sums = np.ones((4, 100), np.float32), np.zeros(4, np.float32)
    assert emulator.library.run_sum_of_block(pointer(values), pointer(sums), 4, 100, 64) is None
    assert sums.tolist() == [100] * 4


@pytest.fixture(scope="module")
def sanitized(folder):
    sources = [KERNELS / "sanitized" / "main.cpp", REDUCTIONS, KERNELS / "faults.cu"]
    try:
        return build(sources, folder, sanitize=True, kind="executable", name="sanitized")
    except BuildError as error:
        if re.search("cannot find .*(asan|ubsan)", str(error)):
            pytest.skip("the compiler has no sanitizers")
        raise


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("", None),
        ("heap", "AddressSanitizer: heap-buffer-overflow"),
        ("stack", "runtime error: index 8 out of bounds|AddressSanitizer: stack-buffer-overflow"),
        ("shift", "runtime error: shift exponent 32 is too large"),
    ],
)
def test_sanitizers(sanitized, fault, what):
    done = subprocess.run([sanitized, fault], capture_output=True, text=True, timeout=120)
    assert done.stdout == "100 100\n"
    assert (done.returncode == 0) == (what is None), done.stderr
    if what is None:
        assert not done.stderr
    else:
        assert re.search(what, done.stderr)


def test_a_sanitized_library_in_python(folder):
    """In a process of its own, which has the sanitizer from the start."""
    path = build([REDUCTIONS], folder, sanitize=True, name="sanitized_library")
    code = (
        "import ctypes, sys\n"
        f"function = ctypes.CDLL({str(path)!r}).run_sum_of_block\n"
        "values, sums = (ctypes.c_float * 200)(*[1] * 200), (ctypes.c_float * 2)()\n"
        "function(values, sums, 2, 100 + int(sys.argv[1]), 64)\n"
        "print(*sums)\n"
    )
    try:
        environment = sanitizer_environment()
    except BuildError as error:
        pytest.skip(str(error))

    def run(beyond):
        command = [sys.executable, "-c", code, str(beyond)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    done = run(0)
    assert (done.returncode, done.stdout) == (0, "100.0 100.0\n"), done.stderr
    done = run(1)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "sum_of_block" in done.stderr
