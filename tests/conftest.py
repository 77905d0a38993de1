"""Settings of all tests: which kernels they use, which of them are quick, and threads of parallel workers."""

import os
import sys

# The workers of `pytest -n auto` share the cores, so each computes on one. torch reads this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import backends
import pytest
import torch
from hypothesis import settings

# Tests of benchmarks/, which is not installed, find it behind the installed package.
sys.path.append(str(Path(__file__).parents[1]))

# With CI set, Hypothesis draws the same examples in every run, so that the gate's answer depends on the code only.
settings.register_profile("gate", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("gate")

# `pytest -m quick`, to run while editing: one minute on one core, without emulator, other processes or training.
# tests/project/test_layers.py checks that each entry matches a file.
QUICK = (
    "loss/test_arguments.py",
    "loss/test_conventions.py",
    "loss/test_derivatives.py",
    "loss/test_divergences.py",
    "loss/test_gradient_ownership.py",
    "loss/test_reductions.py",
    "loss/test_values.py",
    "activations/test_*.py",
    "pruning/test_history.py",
    "pruning/test_selection.py",
    "pruning/test_settings.py",
    "saving/test_student_file.py",
    "workflow/test_data.py",
    "workflow/test_files.py",
    "workflow/test_models.py",
    "project/test_layers.py",
)

# Tests of numbers, which hold for all kernels. Only the CPU kernels have tests of threads and errors.
ON_ALL_KERNELS = {
    "test_values", "test_extremes", "test_long_rows", "test_statistics", "test_autograd", "test_divergences",
    "test_conventions", "test_gather_slices", "test_gradient_products", "test_reductions",
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--emulated",
        choices=("some", "all", "only", "none"),
        default="some",
        help="which kernel tests also run on the emulated GPU: those that take seconds (some), all, all and none on "
        "the CPU (only), or none",
    )
    parser.addoption(
        "--sanitized",
        action="store_true",
        help="the kernels are compiled with AddressSanitizer and UBSan (tests/native/*_suite.py)",
    )


def is_quick(path):
    """Whether `-m quick` runs this file."""
    return any(path.match(f"tests/{pattern}") for pattern in QUICK)


def only_quick(config):
    return config.getoption("markexpr") == "quick"


def pytest_ignore_collect(collection_path, config):
    """`-m quick` does not even import the other files and the conftest.py of other folders."""
    if not only_quick(config):
        return None
    if collection_path.parent.name == "tests" and collection_path.is_dir():
        return collection_path.name not in {pattern.partition("/")[0] for pattern in QUICK} or None
    return (collection_path.suffix == ".py" and not is_quick(collection_path)) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if is_quick(item.path):
            item.add_marker("quick")
        if item.get_closest_marker("cuda") and not backends.has_gpu():
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible to PyTorch"))


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.rpartition(".")[2] not in ON_ALL_KERNELS:
        return
    wanted = "none" if only_quick(metafunc.config) else metafunc.config.getoption("emulated")
    slow = any(mark.name == "slow_on_the_emulator" for mark in metafunc.definition.iter_markers())
    emulated = wanted in ("all", "only") or (wanted == "some" and not slow)
    chosen = ["cpu"] * (wanted != "only") + ["emulated"] * emulated + ["cuda"] * backends.has_gpu()
    metafunc.parametrize("kernels", chosen, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def kernels(request):
    """The kernels that a test uses: the CPU's, the CUDA kernels on the emulator for CPU tensors, or those on a GPU."""
    which = getattr(request, "param", "cpu")
    if which == "cpu":
        yield which
        return
    if which == "cuda":
        with backends.tensors_on("cuda"):
            yield which
        return
    # PyTorch has little to do here, and its threads would wait for each other on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with backends.emulated(request.config).serves():
        yield which
    torch.set_num_threads(threads)


@pytest.fixture
def examples(kernels, request):
    """The number of examples to draw: all, or a fifth on the emulator (unless --emulated=all) and with sanitizers."""
    fewer = kernels == "emulated" and request.config.getoption("emulated") == "some"
    share = 5 if fewer or request.config.getoption("sanitized") else 1
    return lambda count: count // share


@pytest.fixture(autouse=True)
def _restore_torch():
    """Restores what a test or the command line sets: threads, denormals, and the limited number of compilations."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
