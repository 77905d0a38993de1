"""Compiling for the emulator: caching, errors and sanitizers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from backends import ROOT
from emulator import BuildError, Emulator, build, sanitizer_environment

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
