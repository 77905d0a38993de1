"""What nvcc made of the kernels, for each architecture: nothing spilled, registers within bounds, 16 bytes at once, and
enough threads on a multiprocessor. Skipped, with the reason, where kddp_ext was built without CUDA."""

import backends
import pytest
import torch
from machine_code import MissingError, built_module, instructions, kernels, virtual_architectures

import kddp_ext
from kddp_ext.ops import library

FLOATS = ("float32", "bfloat16", "float16")
# Registers of a thread, on any architecture. 64 of each of 1024 threads are all that a multiprocessor has.
MOST_REGISTERS = {
    **{f"{rows} {dtype}": 64 for rows in ("small_teams", "warps", "blocks") for dtype in FLOATS},
    **{f"long_rows {dtype}": 128 for dtype in FLOATS},
    "long_rows float64": 160,
    **{f"{rows} float64": 128 for rows in ("warps", "blocks")},
    "scale_gradients": 64,
    "gather_layer": 64,
    "probe": 16,
}
"""By the kernel's rows and dtype; float64 needs two registers for each number."""


def table_key(kernel):
    return " ".join(kernel.name.split()[:2])


@pytest.fixture(scope="module")
def module():
    try:
        path = built_module()
        kernels(path)
    except MissingError as reason:
        pytest.skip(str(reason))
    return path


@pytest.fixture(scope="module")
def built(module):
    return kernels(module)


def architectures():
    return kddp_ext.build_info()["cuda_architectures"]


def test_every_kernel_is_there_for_every_architecture(module, built):
    wanted = {name.partition("-")[0] for name in architectures() if not name.endswith("-virtual")}
    assert {kernel.architecture for kernel in built} == {f"sm_{number}" for number in wanted}
    of_each = {a: sorted(k.name for k in built if k.architecture == a) for a in {k.architecture for k in built}}
    assert len({tuple(names) for names in of_each.values()}) == 1
    names = next(iter(of_each.values()))
    assert len(names) == len(set(names)), "two kernels of one name would be checked as one"
    assert {" ".join(name.split()[:2]) for name in names} == set(MOST_REGISTERS)


def test_newer_gpus_have_something_to_translate(module):
    wanted = {name.partition("-")[0] for name in architectures() if not name.endswith("-real")}
    assert wanted
    assert set(virtual_architectures(module)) == {f"sm_{name}" for name in wanted}


def test_nothing_is_spilled(built):
    assert [k for k in built if k.stack_bytes or k.local_bytes] == []


def test_registers(built):
    beyond = {
        f"{kernel.name} on {kernel.architecture}": kernel.registers
        for kernel in built
        if kernel.registers > MOST_REGISTERS[table_key(kernel)]
    }
    assert beyond == {}


def test_memory_is_read_and_written_16_bytes_at_once_and_is_never_local(module, built):
    for architecture in sorted({kernel.architecture for kernel in built}):
        counted = instructions(module, architecture)
        for kernel in built:
            if kernel.architecture != architecture or kernel.name == "probe":
                continue
            found = counted[kernel.symbol]
            assert any(name.startswith("LDG") and ".128" in name for name in found), kernel
            assert any(name.startswith("STG") and ".128" in name for name in found), kernel
            local = [name for name in found if name.split(".")[0] in ("LDL", "STL")]
            assert local == [], kernel


@pytest.fixture(scope="module")
def launch_of(request):
    """Threads and dynamic shared bytes of the launch that serves a batch, from the emulator's record of it."""
    emulated = backends.emulated(request.config)

    def launch(dtype, classes):
        emulated.emulator.clear()
        with library.stand_in(emulated.module, emulated.place()):
            logits = torch.randn(2, classes, dtype=dtype)
            kddp_ext.fused_kd_l1_loss(logits, logits, None, [torch.randn(2, 64)], alpha=1.0, l1_weight=0.1)
        call = next(call for call in emulated.emulator.calls() if call["name"] == "launch")
        return call["block"], call["shared"]

    return launch


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "classes"), [("small_teams", 10), ("small_teams", 64), ("warps", 65), ("warps", 432)])
def test_half_of_the_threads_find_room(built, launch_of, rows, classes, dtype):
    """Of the kernels with a row, or several, to a warp; the activations are served by the same threads."""
    threads, shared = launch_of(getattr(torch, dtype), classes)
    found = [kernel for kernel in built if table_key(kernel) == f"{rows} {dtype}"]
    assert len(found) == 2 * len({kernel.architecture for kernel in built})
    for kernel in found:
        assert kernel.occupancy(threads, shared) >= 0.5, (kernel, threads, shared)


def test_occupancy_as_worked_out_by_hand():
    """A multiprocessor of compute capability 8.0, 256 threads: 65536 // (64 * 256) = 4 blocks of 8 warps, 32 of 64."""
    from machine_code import Kernel

    kernel = Kernel("sm_80", "", registers=64, stack_bytes=0, local_bytes=0, shared_bytes=0)
    assert kernel.occupancy(256) == 0.5
    assert Kernel("sm_80", "", 32, 0, 0, 0).occupancy(256) == 1
    assert Kernel("sm_80", "", 33, 0, 0, 0).occupancy(256) == 0.75  # 40 registers, for they come in eights
    assert kernel.occupancy(256, (164 << 10) // 2 - 1024) == 0.25  # 2 blocks find room in shared memory
    assert Kernel("sm_86", "", 16, 0, 0, 0).occupancy(32) == 16 * 32 / 1536  # 16 blocks, whatever they need
