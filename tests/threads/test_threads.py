"""The CPU kernels' threads under ThreadSanitizer: no data race, and the same bytes on any number of threads.

The kernels are linked with an OpenMP of our own (openmp.cpp), for ThreadSanitizer does not understand GCC's.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-g1", "-O1", "-fsanitize=thread", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
# Threads are the same in all instruction sets but for the stores that pass the caches, which AVX2 has and every
# processor that it runs on.
AVX2 = ["-mavx2", "-mfma", "-mf16c"] if platform.machine() == "x86_64" else []
# The definitions that CMakeLists.txt gives to one instruction set, under the name of the one that is always there.
KERNELS = ["-fopenmp", '-DKDDP_ISA_NAME="baseline"', "-DKDDP_ISA_KERNELS=baseline_kernels"]
KERNELS += ["-DKDDP_ISA_COMPACTION=baseline_compaction", *AVX2]


def compile_all(folder, jobs):
    """Compiles (source, flags) pairs, two at a time; gives the objects."""
    objects = [folder / f"{index}-{source.stem}.o" for index, (source, _) in enumerate(jobs)]

    def compile_one(job):
        (source, flags), target = job
        subprocess.run([CXX, *FLAGS, *flags, "-c", str(source), "-o", str(target)], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, zip(jobs, objects, strict=True)))
    return objects


def has_thread_sanitizer():
    if shutil.which(CXX) is None:
        return False
    asked = subprocess.run([CXX, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    return os.path.isabs(asked.stdout.strip())


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The jobs with an OpenMP that keeps its barriers, and with one that does not."""
    if not has_thread_sanitizer():
        pytest.skip(f"{CXX} has no ThreadSanitizer")
    folder = tmp_path_factory.mktemp("threads")
    sources = [(CSRC / "cpu" / f"{name}.cpp", KERNELS) for name in ("kd_l1_loss", "compaction")]
    sources += [(CSRC / "cpu" / "dispatch.cpp", []), (HERE / "jobs.cpp", [])]
    sources += [(HERE / "openmp.cpp", []), (HERE / "openmp.cpp", ["-DKDDP_WITHOUT_BARRIERS"])]
    *kernels, right, wrong = compile_all(folder, sources)
    made = {}
    for name, openmp in (("right", right), ("wrong", wrong)):
        made[name] = folder / name
        subprocess.run([CXX, "-fsanitize=thread", *map(str, [*kernels, openmp]), "-o", str(made[name])], check=True)
    return made


def run(program):
    return subprocess.run([str(program)], capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
def test_no_data_race_and_the_same_bytes(programs):
    ended = run(programs["right"])
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    assert ended.stdout == "116 jobs on several threads, 0 different\n"


@pytest.mark.timeout(600)
def test_a_missing_barrier_would_be_noticed(programs):
    ended = run(programs["wrong"])
    assert ended.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in ended.stderr
