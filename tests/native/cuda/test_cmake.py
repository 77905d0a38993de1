"""Which CUDA architectures cmake/cuda.cmake builds, with an nvcc and an nvidia-smi that only list some."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def configure(tmp_path):
    """Configures the project and returns CMake's line about CUDA. No file is compiled for a GPU."""
    if not shutil.which("cmake") or not importlib.util.find_spec("pybind11"):
        pytest.skip("cmake and pybind11 are needed")
    import pybind11

    def configure(kddp_cuda, *, codes=None, gpus=None, **environment):
        programs = tmp_path / "bin"
        programs.mkdir()
        for name, lines in (("nvcc", codes), ("nvidia-smi", gpus)):
            if lines is not None:
                (programs / name).write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in lines))
                (programs / name).chmod(0o755)
        environment = {"CUDACXX": str(programs / "nvcc"), "CUDAARCHS": "", **environment}
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        done = subprocess.run(
            ["cmake", "-S", ROOT, "-B", tmp_path / "build", f"-DKDDP_CUDA={kddp_cuda}",
             f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPYTHON_EXECUTABLE={sys.executable}"],
            env={**os.environ, **environment, "PATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        text = " ".join((done.stdout + done.stderr).split())
        return text[text.index("KDDP_CUDA") :]

    return configure


CUDA_12 = ["sm_50", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a"]
CUDA_13 = [*CUDA_12[1:], "sm_100", "sm_103", "sm_120"]
OLD = "75-real 80-real 90-real"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"codes": CUDA_13}, f"building CUDA kernels for {OLD} 100-real 120-real 80-virtual with"),
        ({"codes": CUDA_12}, f"building CUDA kernels for {OLD} 80-virtual with"),
        ({"codes": CUDA_12, "CUDAARCHS": "80;90"}, "building CUDA kernels for 80 90 with"),
        ({"codes": ["sm_35"]}, "nvcc lists neither 75 nor 80 among its architectures"),
        ({}, "nvcc was not found; install the CUDA toolkit, or set CUDACXX"),
    ],
)
def test_on_builds_the_architectures_that_nvcc_supports(configure, arguments, line):
    assert configure("ON", **arguments).startswith(f"KDDP_CUDA=ON: {line}")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"codes": CUDA_13, "gpus": ["8.0", "8.0", "9.0"]}, "building CUDA kernels for 80 90 with"),
        ({"codes": CUDA_12, "gpus": ["10.0"]}, "building without CUDA kernels, because nvcc does not support a GPU"),
        ({"gpus": ["9.0"]}, "building without CUDA kernels, because nvcc was not found"),
        ({"codes": CUDA_13, "gpus": ["no devices"]}, "building without CUDA kernels, because no GPU was found"),
    ],
)
def test_auto_builds_for_the_gpus_of_the_machine(configure, arguments, line):
    text = configure("AUTO", **arguments)
    assert text.startswith(f"KDDP_CUDA=AUTO: {line}")
    assert ("pip install . -C cmake.define.KDDP_CUDA=ON" in text) == ("without" in line)


def test_another_value_is_an_error(configure):
    assert configure("YES").startswith("KDDP_CUDA is YES: expected AUTO, ON or OFF")
