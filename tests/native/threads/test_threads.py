"""ThreadSanitizer finds no data race in the CPU kernels, and results are the same bytes for any number of threads.

The kernels are linked with our own OpenMP (openmp.cpp), because ThreadSanitizer does not understand GCC's.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from native_build import CSRC, CXX, FOR_EACH, SHARED, compile_all, kernel_flags, supported

HERE = Path(__file__).parent
FLAGS = ["-g1", "-O1", "-fsanitize=thread"]


def has_thread_sanitizer():
    if shutil.which(CXX) is None:
        return False
    asked = subprocess.run([CXX, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    return os.path.isabs(asked.stdout.strip())


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The jobs, linked with an OpenMP with barriers and with one without."""
    if not has_thread_sanitizer():
        pytest.skip(f"{CXX} has no ThreadSanitizer")
    folder = tmp_path_factory.mktemp("threads")
    # One instruction set is enough: threads do not depend on it, except that AVX2 and later may write past the caches.
    kernels = [*FLAGS, *kernel_flags("avx2" if "avx2" in supported() else "baseline")]
    sources = [*((CSRC / "cpu" / f"{name}.cpp", kernels) for name in FOR_EACH), (HERE / "jobs.cpp", FLAGS)]
    sources += [(CSRC / "cpu" / f"{name}.cpp", [*FLAGS, "-fopenmp"]) for name in SHARED]
    sources += [(HERE / "openmp.cpp", FLAGS), (HERE / "openmp.cpp", [*FLAGS, "-DKDDP_WITHOUT_BARRIERS"])]
    *objects, right, wrong = compile_all(folder, sources)
    made = {}
    for name, openmp in (("right", right), ("wrong", wrong)):
        made[name] = folder / name
        subprocess.run([CXX, "-fsanitize=thread", *map(str, [*objects, openmp]), "-o", str(made[name])], check=True)
    return made


def run(program):
    return subprocess.run([str(program)], capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
def test_no_data_race_and_same_bytes_for_any_number_of_threads(programs):
    ended = run(programs["right"])
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    assert ended.stdout == "140 jobs on several threads, 0 different\n"


@pytest.mark.timeout(600)
def test_missing_barrier_is_detected(programs):
    ended = run(programs["wrong"])
    assert ended.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in ended.stderr
