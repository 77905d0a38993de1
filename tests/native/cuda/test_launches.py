"""Where launches go and what else the host asks of CUDA, as the emulator records it.

A launch takes the given device and stream and leaves the caller's device as it was. Nothing allocates, copies, waits or
synchronizes, so that a CUDA graph can capture it.
"""

import re
import sys
from types import SimpleNamespace
from unittest import mock

import backends
import pytest
import torch

import kddp_ext
from kddp_ext.loss import functional
from kddp_ext.ops import cuda, gather_slices, gradient_products, library
from kddp_ext.ops.scale_gradients import scale_gradients

TOO_LARGE = 720  # cudaErrorCooperativeLaunchTooLarge
kd_l1_loss = sys.modules["kddp_ext.ops.kd_l1_loss"]  # the function hides the module


@pytest.fixture
def emulated(request):
    emulated = backends.emulated(request.config)
    emulated.emulator.set_devices(2)
    emulated.emulator.device = 0
    emulated.emulator.clear()
    yield emulated
    emulated.emulator.set_devices()
    emulated.emulator.device = 0


def calls_go_to(emulated, device, stream):
    return library.stand_in(emulated.module, emulated.place(device, stream))


def launches_of(emulated):
    return [(call["device"], call["stream"]) for call in emulated.emulator.calls() if call["name"] == "launch"]


def forward():
    logits = torch.randn(6, 40, requires_grad=True)
    activation = torch.randn(6, 33, requires_grad=True)
    labels = torch.tensor([0, 3, -100, 39, 7, 1])
    return kddp_ext.fused_kd_l1_loss(logits, torch.randn(6, 40), labels, [activation], l1_weight=0.1)


def gather():
    keep_rows, keep_columns = torch.tensor([0, 4, 8]), torch.tensor([1, 7])
    gather_slices([torch.randn(9, 8), torch.randn(9, 8)], keep_rows, keep_columns, rows=9, columns=8)


# What is prepared, the operation, and its launches.
OPERATIONS = {
    "forward": (lambda: None, lambda _: forward(), 2),
    "backward": (forward, lambda loss: loss.backward(torch.tensor(3.0)), 1),
    "gather": (lambda: None, lambda _: gather(), 1),
    "products": (lambda: torch.randn(9, 8), lambda a: gradient_products(a, a, axis=1, samples=9), 1),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize(("device", "stream"), [(0, 0), (1, 0), (0, 0x51DE), (1, 0x51DE)])
def test_an_operation_is_launched_on_the_device_and_stream_of_its_tensors(emulated, operation, current, device, stream):
    prepare, run, launches = OPERATIONS[operation]
    with calls_go_to(emulated, device, stream):
        prepared = prepare()
        emulated.emulator.device = current
        emulated.emulator.clear()
        run(prepared)
    assert launches_of(emulated) == [(device, stream)] * launches
    allowed = {"cudaSetDevice", "cudaFuncSetAttribute", "launch"}
    assert {call["name"] for call in emulated.emulator.calls()} <= allowed
    assert not any(call["error"] for call in emulated.emulator.calls())
    assert emulated.emulator.device == current


@pytest.mark.parametrize(("scale", "in_place", "moves"), [(1.0, True, False), (1.0, False, True), (3.0, True, True)])
def test_a_backward_with_a_gradient_of_1_moves_nothing(emulated, scale, in_place, moves):
    gradients = [torch.randn(5, 7), torch.randn(5, 9)]
    expected = [gradient * scale for gradient in gradients]
    with calls_go_to(emulated, 0, 0):
        scaled = scale_gradients(gradients, torch.tensor(scale), in_place=in_place)
    (report,) = emulated.emulator.reports()
    assert (report["sectors_written"] > 0) is moves
    assert all(map(torch.equal, scaled, expected))
    assert (scaled[0].data_ptr() == gradients[0].data_ptr()) is in_place


def test_45_layers_take_three_launches_after_the_one_that_prepares(emulated):
    with calls_go_to(emulated, 1, 0x51DE):
        layers = [torch.randn(4, 10) for _ in range(45)]
        loss = kddp_ext.fused_kd_l1_loss(torch.randn(4, 10), None, torch.zeros(4, dtype=torch.int64), layers, alpha=0.0)
    assert loss.isfinite()
    assert launches_of(emulated) == [(1, 0x51DE)] * 4


def test_a_missing_device_is_an_error_of_its_own_call_only(emulated):
    error = "choosing the device failed with cudaErrorInvalid"
    with calls_go_to(emulated, 2, 0), pytest.raises(RuntimeError, match=error):
        forward()
    assert emulated.emulator.device == 0
    with calls_go_to(emulated, 0, 0):
        assert forward().isfinite()


def test_a_call_needs_nothing_that_an_earlier_one_left(emulated):
    """No memory outlives a call, so none lies in the pool of a CUDA graph, and calls may share it on any stream."""
    with calls_go_to(emulated, 0, 0x51DE), mock.patch.object(kd_l1_loss, "workspace_on", full_of_ones):
        assert forward().isfinite()
    assert launches_of(emulated) == [(0, 0x51DE)] * 2  # the first sets the counters to 0


def full_of_ones(device):
    return lambda size: torch.full((size,), 0xFF, dtype=torch.uint8, device=device)


def test_an_occupancy_that_was_asked_in_vain_is_asked_again(emulated):
    """A device that nobody has used, and that is lost for a moment."""
    gradients = [torch.ones(20000)]
    emulated.emulator.set_devices(3)
    emulated.emulator.device = 2
    with calls_go_to(emulated, 2, 0):
        emulated.emulator.set_devices(0)
        with pytest.raises(RuntimeError, match="the launch of the backward failed with cudaErrorInvalidDevice"):
            scale_gradients(gradients, torch.tensor(2.0))
        emulated.emulator.set_devices(3)
        emulated.emulator.clear()
        scale_gradients(gradients, torch.tensor(2.0))
    (launch,) = [call for call in emulated.emulator.calls() if call["name"] == "launch"]
    assert launch["grid"] > 1


def test_a_launch_that_is_too_large_for_the_context_is_repeated_with_half_of_its_blocks(emulated):
    student, teacher = torch.randn(2, 2, 40000).unbind()  # blocks wait for others' slices
    labels = torch.arange(2)

    def loss_and_gradient():
        logits = student.clone().requires_grad_()
        loss = kddp_ext.fused_kd_l1_loss(logits, teacher, labels, ignore_index=0)
        loss.backward()
        return loss.detach(), logits.grad

    emulated.emulator.set_devices(usable=1)
    with calls_go_to(emulated, 0, 0):
        computed = loss_and_gradient()
    launches = [(call["grid"], call["error"]) for call in emulated.emulator.calls() if call["name"] == "launch"]
    _prepares, *refused, (grid, error), _backward = launches
    assert [*refused, (grid, error)] == [*((grid << n, TOO_LARGE) for n in range(len(refused), 0, -1)), (grid, 0)]
    assert refused
    torch.testing.assert_close(computed, loss_and_gradient())


@pytest.mark.parametrize(
    ("rows", "classes", "cooperative"),
    [(64, 40, False), (64, 20000, False), (2, 20000, True)],  # only in the last do blocks share a row
)
def test_only_blocks_that_share_a_row_need_a_cooperative_launch(emulated, rows, classes, cooperative):
    logits, labels = torch.randn(rows, classes), torch.arange(rows) % 40
    with calls_go_to(emulated, 0, 0):
        loss = kddp_ext.fused_kd_l1_loss(logits, None, labels, alpha=0.0, ignore_index=1)
    prepares, report = emulated.emulator.reports()
    assert (prepares["cooperative"], report["cooperative"]) == (False, cooperative)
    torch.testing.assert_close(loss, kddp_ext.fused_kd_l1_loss(logits, None, labels, alpha=0.0, ignore_index=1))


@pytest.mark.parametrize("rows", [1, 4096, 4097, 100_000])  # 1, 1, 2 and 16 blocks count
@pytest.mark.parametrize("normalizer", [None, 50.0])
def test_ignored_labels_do_not_count(emulated, rows, normalizer):
    logits = torch.randn(rows, 3)
    labels = torch.randint(-1, 3, (rows,))
    settings = {"alpha": 0.0, "ignore_index": -1, "normalizer": normalizer}
    with calls_go_to(emulated, 0, 0):
        loss = kddp_ext.fused_kd_l1_loss(logits, None, labels, **settings)
    torch.testing.assert_close(loss, kddp_ext.fused_kd_l1_loss(logits, None, labels, **settings))


def test_the_sources_call_no_other_functions_of_the_cuda_runtime():
    used = set()
    for path in [*backends.CUDA.iterdir(), backends.ROOT / "python_bindings" / "cuda.cpp"]:
        used |= set(re.findall(r"\b(cuda[A-Z]\w+)\(", path.read_text(encoding="utf-8")))
    assert used == {
        "cudaDeviceGetAttribute", "cudaFuncGetAttributes", "cudaFuncSetAttribute", "cudaGetDevice", "cudaGetErrorName",
        "cudaGetErrorString", "cudaGetLastError", "cudaLaunchCooperativeKernel",
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor", "cudaSetDevice",
    }  # fmt: skip


def native(driver=13000, runtime=13000, error=""):
    return SimpleNamespace(
        driver_version=lambda: driver, runtime_version=lambda: runtime, device_error=lambda _: error,
        architectures="80-real 120",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "hip", "reason"),
    [
        (native(driver=0), None, "found no NVIDIA driver"),
        (native(driver=12040), None, "the NVIDIA driver supports CUDA 12.4 and kddp_ext was built with CUDA 13.0"),
        (
            native(error="cudaErrorNoKernelImageForDevice"),
            None,
            "has kernels for 80-real 120 and none for compute capability 6.1",
        ),
        (native(error="cudaErrorDevicesUnavailable"), None, "device 0 cannot be used: cudaErrorDevicesUnavailable"),
        (native(), "6.4", "built for ROCm"),
        (native(driver=13020), None, None),
    ],
)
def test_the_reason_why_cuda_cannot_be_used_is_one_sentence(monkeypatch, module, hip, reason):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    why = cuda.why_not(module, 0)
    assert (why is None) if reason is None else (reason in why and "\n" not in why)


@pytest.fixture
def built(monkeypatch):
    """Pretends that this build has a CUDA module; the test sets `driver`, its version."""
    module = SimpleNamespace(**vars(native()), driver=13000)
    module.driver_version = lambda: module.driver
    monkeypatch.setattr(cuda, "is_built", lambda: True)
    monkeypatch.setattr(cuda, "_loaded", lambda: module)
    monkeypatch.setattr(cuda, "_usable", set())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", {0: 0x10, 1: 0x20}.__getitem__, raising=False)
    monkeypatch.setattr(functional, "_devices_warned_of", set())
    return module


GPU = torch.device("cuda", 0)


def test_auto_falls_back_where_the_kernels_cannot_run(built):
    built.driver = 0
    with pytest.warns(
        UserWarning, match="plain PyTorch, because the CUDA kernels .* cannot run: found no NVIDIA driver"
    ):
        assert not functional.choose_native(GPU, "auto")
    assert not functional.choose_native(GPU, "auto"), "without a second warning"
    with pytest.raises(ValueError, match=r"backend: .* got 'native', but .* found no NVIDIA driver"):
        functional.choose_native(GPU, "native")
    with pytest.raises(RuntimeError, match="kddp_ext: found no NVIDIA driver"):
        cuda.module_and_place(0)


def test_a_failure_that_passes_is_forgotten_and_a_success_is_remembered(built):
    built.driver = 0
    assert not library.is_native(GPU)
    built.driver = 13000
    assert functional.choose_native(GPU, "auto")
    built.driver = 0
    assert cuda.module_and_place(0)[0] is built


def test_a_call_runs_on_the_current_stream_of_the_tensors_device(built):
    assert cuda.module_and_place(0) == (built, (0, 0x10))
    assert cuda.module_and_place(1) == (built, (1, 0x20))


def test_a_known_device_takes_little_python(built):
    tensor = SimpleNamespace(is_cuda=True, get_device=lambda: 0)
    library.native(tensor)
    calls = []
    sys.setprofile(lambda frame, event, _: event == "call" and calls.append(frame.f_code.co_name))
    library.native(tensor)
    library.is_native(GPU)
    sys.setprofile(None)
    assert [name for name in calls if name != "<lambda>"] == ["native", "module_and_place", "is_native", "why_unusable"]


def test_a_compiler_takes_the_answer_for_a_constant(built):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + library.is_native(GPU), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == 1


def test_build_info_without_cuda_kernels(monkeypatch):
    monkeypatch.setattr(cuda, "is_built", lambda: False)
    assert cuda.build_info() == {"cuda": False, "cuda_architectures": [], "cuda_compiler": ""}
