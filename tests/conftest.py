"""Settings of the whole suite, and what its tests of kernels run on."""

import os
import sys

import backends
import pytest
import torch
from hypothesis import settings

# A gate gives the same answer for the same code; elsewhere every run draws anew.
settings.register_profile("gate", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("gate")

# Tests of numbers, which hold for all kernels; those of threads and of errors only the CPU's have.
ON_ALL_KERNELS = {
    "test_values", "test_extremes", "test_long_rows", "test_statistics", "test_autograd", "test_divergences",
    "test_conventions", "test_gather_slices",
}  # fmt: skip
# On the emulator minutes: with --emulated=all.
SLOW_ON_THE_EMULATOR = {
    "test_rows_longer_than_a_stage_and_outputs_larger_than_the_caches", "test_a_gather_worth_threads",
    "test_half_precision_gradients_do_not_vanish_before_they_are_scaled", "test_long_rows", "test_logits_far_from_zero",
    "test_the_same_on_any_number_of_threads", "test_any_number_of_threads_gives_the_same",
    "test_a_chunk_may_begin_far_below_its_highest_logit",
    "test_gradcheck", "test_float64_equals_the_reference", "test_each_divergence_compiles_without_a_graph_break",
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--emulated",
        choices=("some", "all", "only", "none"),
        default="some",
        help="tests of kernels on the emulated GPU too: those that take seconds, all, all and none on the CPU, or none",
    )
    parser.addoption(
        "--sanitized",
        action="store_true",
        help="kernels compiled with AddressSanitizer and UBSan: tests/native/*_suite.py",
    )


def pytest_generate_tests(metafunc):
    if "kernels" not in metafunc.fixturenames:
        return
    on_all = metafunc.module.__name__.rpartition(".")[2] in ON_ALL_KERNELS
    wanted = metafunc.config.getoption("emulated")
    slow = metafunc.function.__name__ in SLOW_ON_THE_EMULATOR
    emulated = wanted in ("all", "only") or (wanted == "some" and not slow)
    served_by = ["cpu"] * (wanted != "only") + ["emulated"] * emulated + ["cuda"] * backends.has_gpu()
    if on_all:
        metafunc.parametrize("kernels", served_by, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def kernels(request):
    """What serves a test: the CPU's kernels, the GPU's on the emulator for tensors on the CPU, or a GPU."""
    which = getattr(request, "param", "cpu")
    if which == "cpu":
        yield which
        return
    if which == "cuda":
        with backends.tensors_on("cuda"):
            yield which
        return
    # What PyTorch does beside is small, and its threads would wait for one another on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with backends.emulated(request.config).serves():
        yield which
    torch.set_num_threads(threads)


@pytest.fixture
def examples(kernels, request):
    """How many examples to draw: all, or a fifth where the emulator is to take seconds, or with sanitizers."""
    fewer = kernels == "emulated" and request.config.getoption("emulated") == "some"
    share = 5 if fewer or request.config.getoption("sanitized") else 1
    return lambda count: count // share


@pytest.fixture(autouse=True)
def _nothing_compiled_stays():
    """torch limits how often a function is compiled: nn.Sequential's forward, say, by all tests together."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def _on_a_gpu(request):
    """Tests marked `cuda` need a device."""
    if request.node.get_closest_marker("cuda") and not backends.has_gpu():
        pytest.skip("no CUDA device is visible to PyTorch")
