"""The native CPU module: its build information, its libraries, and its results on every instruction set."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kddp_ext
from kddp_ext import _core

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")
TESTS = Path(__file__).parents[1]
NUMERIC_SUITE = [TESTS / "loss" / f"test_{name}.py" for name in ("values", "extremes", "long_rows")]
NUMERIC_SUITE += [TESTS / "ops" / "test_gradient_products.py"]


def run_python(*arguments, **environment):
    """Runs a new interpreter, in a folder where the source tree does not hide the installed package."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_build_info_describes_the_build():
    info = kddp_ext.build_info()
    assert info["cpu"] in INSTRUCTION_SETS
    assert info["cuda"] is (importlib.util.find_spec("kddp_ext._cuda") is not None)
    assert bool(info["cuda_architectures"]) is info["cuda"]
    assert info["compiler"]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_passes_the_numeric_suite(name):
    probe = run_python("-c", "import kddp_ext; kddp_ext.build_info()", KDDP_CPU_ISA=name)
    if probe.returncode:
        assert "KDDP_CPU_ISA: expected one of" in probe.stderr
        pytest.skip(f"this processor or build has no {name}")
    if kddp_ext.build_info()["cpu"] == name:
        pytest.skip(f"this process uses {name}, so the suite runs on it anyway")
    options = ("-q", "-x", "-p", "no:cacheprovider", "--emulated=none")
    suite = run_python("-m", "pytest", *options, *NUMERIC_SUITE, KDDP_CPU_ISA=name)
    assert suite.returncode == 0, suite.stdout[-3000:]


def test_unknown_instruction_set_is_refused_at_the_first_call():
    result = run_python("-c", "import kddp_ext; kddp_ext.build_info()", KDDP_CPU_ISA="mmx")
    assert "KDDP_CPU_ISA: expected one of" in result.stderr
    assert "got 'mmx'" in result.stderr


LOSS_AND_RUNTIMES = """
import re, torch, kddp_ext
student = torch.randn(256, 100, requires_grad=True)
kddp_ext.fused_kd_l1_loss(student, student.detach(), torch.zeros(256, dtype=torch.int64)).backward()
print(*re.findall(r"\\S*/lib[gi]?omp\\S*", open("/proc/self/maps").read()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_serves_the_process():
    """In a new process, because other packages may load further runtimes."""
    ended = run_python("-c", LOSS_AND_RUNTIMES)
    assert len(set(ended.stdout.split())) == 1, ended


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_native_module_does_not_link_torch():
    content = Path(_core.__file__).read_bytes()
    assert not re.search(rb"libtorch|libc10|_ZN(5torch|2at|3c10)", content)
