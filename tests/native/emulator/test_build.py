"""Compiling for the emulator: caching, errors, twins with a fault, and sanitizers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import ROOT
from emulated_calls import aligned
from emulator import BuildError, Emulator, build, sanitizer_environment, twin

KERNELS = Path(__file__).parent / "kernels"
WORKING = KERNELS / "working.cu"
INCLUDE = [ROOT / "csrc", KERNELS]


def test_a_build_is_reused_until_something_changes(folder, tmp_path):
    source, header = tmp_path / "source.cu", tmp_path / "number.h"
    source.write_text('#include "number.h"\nextern "C" int number() { return NUMBER + OTHER; }\n')
    header.write_text("#define NUMBER 1\n")

    def built(flag):
        return build([(source, [flag])], folder, include=[tmp_path])

    first = built("-DOTHER=0")
    assert built("-DOTHER=0") == first
    paths = [first, built("-DOTHER=10")]
    header.write_text("#define NUMBER 2\n")
    paths.append(built("-DOTHER=0"))
    assert [Emulator(path).library.number() for path in paths] == [1, 11, 2]


def test_compiler_errors(folder, tmp_path, monkeypatch):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void kernel() { return 1; }\n")
    with pytest.raises(BuildError, match=r"wrong\.cu:1:\d+: error"):
        build([source], folder)
    assert not list(folder.glob("wrong*"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="compiles kernels with no-such-compiler, which is not installed"):
        build([WORKING], folder)


@pytest.mark.parametrize(
    ("replace", "by", "error"),
    [
        ("    __syncthreads();\n    sum = lane", "    sum = lane", "reads (shared memory that no|what thread)"),
        (
            "sum = lane < int(blockDim.x) / 32 ? warp_sums.load(lane) : 0;",
            "sum = warp_sums.load(lane);",
            "reads shared memory that no",
        ),
        ("columns + i);", "columns + i + 1);", "out of bounds: reads 4 bytes"),
    ],
)
def test_a_twin_with_a_fault_is_found(folder, tmp_path, replace, by, error):
    source = twin(WORKING, replace, by, tmp_path / "twin.cu")
    emulator = Emulator(build([source], folder, include=INCLUDE))
    values, sums = aligned((4, 100), torch.float32, fill=1), aligned((4,), torch.float32)
    emulator.allow(values, writable=False, name="values")
    emulator.allow(sums, writable=True, name="sums")
    for seed in range(5):
        emulator.seed = seed
        text = emulator.run("run_sum_of_block", values, sums, 4, 100, 64)
        assert re.search(rf"kernel sum_of_block, block .*twin\.cu:\d+: .*{error}", text)


def test_a_twin_needs_exactly_one_occurrence(tmp_path):
    for text, count in (("distance > 0", 2), ("no such text", 0)):
        with pytest.raises(ValueError, match=f"'{text}' occurs {count} times in .*working.cu, expected once"):
            twin(WORKING, text, "", tmp_path / "twin.cu")
    assert not list(tmp_path.iterdir())


SANITIZED_RUN = """
import sys, torch
from emulator import Emulator
from pathlib import Path
emulator, values, out = Emulator(Path({library!r})), torch.ones(2, 100), torch.zeros(64)
assert emulator.run("run_fault", "missing_barrier", torch.zeros(1024), values, 0)  # its stacks are reused
assert emulator.run("run_sum_of_block", values, out, 2, 100, 64) is None
print(*out[:2].tolist(), flush=True)
emulator.run({function!r}, *{arguments})
"""


@pytest.mark.parametrize(
    ("function", "arguments", "error"),
    [
        ("run_sum_of_block", "(values, out, 2, 100, 64)", None),
        ("run_read_beyond", "(torch.zeros(16), out, 16)", "AddressSanitizer: heap-buffer-overflow"),
        ("run_use_local_array", "(out, 8)", "index 8 out of bounds|AddressSanitizer: stack-buffer-overflow"),
    ],
)
def test_sanitizers_see_plain_accesses(folder, function, arguments, error):
    try:
        library = build(sorted(KERNELS.glob("*.cu")), folder, include=INCLUDE, sanitize=True, name="sanitized")
        environment = sanitizer_environment()
    except BuildError as reason:
        if not re.search("cannot find .*(asan|ubsan)|has no lib", str(reason)):
            raise
        pytest.skip("the compiler has no sanitizers")
    code = SANITIZED_RUN.format(library=str(library), function=function, arguments=arguments)
    environment["PYTHONPATH"] = str(ROOT / "tests" / "helpers")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout == "100.0 100.0\n", done.stderr
    assert (done.returncode == 0) == (error is None), done.stderr
    if error is not None:
        assert re.search(error, done.stderr)
