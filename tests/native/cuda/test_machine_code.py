"""The machine code of the kernels, by architecture: no spills, few registers, 16-byte accesses, enough occupancy.

Skipped with the reason if kddp_ext was built without CUDA kernels."""

import re

import backends
import pytest
import torch
from machine_code import MissingError, built_module, instructions, kernels, virtual_architectures

import kddp_ext
from kddp_ext.ops import library

FLOATS = ("float32", "bfloat16", "float16")
# By rows and dtype: registers per thread, on any architecture. 64 for each of 1024 threads are all of a multiprocessor.
# float64 needs two registers per number.
MOST_REGISTERS = {
    **{f"{rows} {dtype}": 64 for rows in ("small_teams", "warps", "blocks") for dtype in FLOATS},
    **{f"long_rows {dtype}": 128 for dtype in FLOATS},
    "long_rows float64": 168,
    **{f"{rows} float64": 128 for rows in ("warps", "blocks")},
    "scale_gradients": 64,
    "gather_layer": 64,
    "sum_products": 64,
    "prepare_loss": 32,
    "probe": 16,
}


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


def test_every_architecture_has_every_kernel(module, built):
    wanted = {name.partition("-")[0] for name in architectures() if not name.endswith("-virtual")}
    assert {kernel.architecture for kernel in built} == {f"sm_{number}" for number in wanted}
    of_each = {a: sorted(k.name for k in built if k.architecture == a) for a in {k.architecture for k in built}}
    assert len({tuple(names) for names in of_each.values()}) == 1
    names = next(iter(of_each.values()))
    assert len(names) == len(set(names)), "kernels of the same name would be checked as one"
    assert {" ".join(name.split()[:2]) for name in names} == set(MOST_REGISTERS)


def test_newer_gpus_have_ptx_to_translate(module):
    wanted = {name.partition("-")[0] for name in architectures() if not name.endswith("-real")}
    assert wanted
    assert set(virtual_architectures(module)) == {f"sm_{name}" for name in wanted}


def test_no_kernel_spills_registers(built):
    assert [k for k in built if k.stack_bytes or k.local_bytes] == []


def test_kernels_stay_within_their_registers(built):
    beyond = {
        f"{kernel.name} on {kernel.architecture}": kernel.registers
        for kernel in built
        if kernel.registers > MOST_REGISTERS[table_key(kernel)]
    }
    assert beyond == {}


def test_kernels_access_16_bytes_at_once_and_no_local_memory(module, built):
    for architecture in sorted({kernel.architecture for kernel in built}):
        counted = instructions(module, architecture)
        for kernel in built:
            # A batch has few labels and counters.
            if kernel.architecture != architecture or kernel.name in ("prepare_loss", "probe"):
                continue
            found = counted[kernel.symbol]
            assert any(name.startswith("LDG") and ".128" in name for name in found), kernel
            # A product is one number, and its team stores it alone.
            stores_vectors = kernel.name != "sum_products"
            assert not stores_vectors or any(name.startswith("STG") and ".128" in name for name in found), kernel
            local = [name for name in found if name.split(".")[0] in ("LDL", "STL")]
            assert local == [], kernel


@pytest.fixture(scope="module")
def launch_of(request):
    """Threads and dynamic shared memory of the launch for a batch, as the emulator records it."""
    emulated = backends.emulated(request.config)

    def launch(dtype, classes, is_usual=False):
        emulated.emulator.clear()
        with library.stand_in(emulated.module, emulated.place()):
            logits, labels = torch.randn(2, classes, dtype=dtype), torch.zeros(2).long() if is_usual else None
            alpha = 0.9 if is_usual else 1.0
            kddp_ext.fused_kd_l1_loss(logits, logits, labels, [torch.randn(2, 64)], alpha=alpha, l1_weight=0.1)
        *_, call = [call for call in emulated.emulator.calls() if call["name"] == "launch"]
        return call["block"], call["shared"]

    return launch


@pytest.mark.parametrize(
    ("rows", "classes", "dtype"),
    [
        *(("small_teams", 64 if dtype == "float32" else 56, dtype) for dtype in FLOATS),
        *(
            (rows, classes, dtype)
            for dtype in FLOATS
            for rows, classes in [("small_teams", 10), ("warps", 65), ("warps", 432)]
        ),
    ],
)
def test_small_rows_have_an_occupancy_of_one_half(built, launch_of, rows, classes, dtype):
    threads, shared = launch_of(getattr(torch, dtype), classes)
    found = [kernel for kernel in built if table_key(kernel) == f"{rows} {dtype}"]
    assert len(found) == 3 * len({kernel.architecture for kernel in built})
    for kernel in found:
        assert kernel.occupancy(threads, shared) >= 0.5, (kernel, threads, shared)


@pytest.mark.parametrize(("calls", "threads"), [("usual", 384), ("difference|weighted", 256)])
def test_two_blocks_of_long_rows_fit_on_a_multiprocessor(built, launch_of, calls, threads):
    """While one of them waits for a reduction or for its row's last thread, the other one computes."""
    assert launch_of(torch.float32, 20000, is_usual=calls == "usual") == (threads, 0)
    found = [kernel for kernel in built if re.fullmatch(rf"long_rows (float32|.*16) ({calls})", kernel.name)]
    assert len(found) == (3 if calls == "usual" else 6) * len({kernel.architecture for kernel in built})
    assert [kernel for kernel in found if 2 * threads * kernel.registers > 65536] == []


def test_occupancy_worked_out_by_hand():
    # Compute capability 8.0, 256 threads: 65536 // (64 * 256) = 4 blocks of 8 warps, which are 32 of 64 warps.
    from machine_code import Kernel

    kernel = Kernel("sm_80", "", registers=64, stack_bytes=0, local_bytes=0, shared_bytes=0)
    assert kernel.occupancy(256) == 0.5
    assert Kernel("sm_80", "", 32, 0, 0, 0).occupancy(256) == 1
    assert Kernel("sm_80", "", 33, 0, 0, 0).occupancy(256) == 0.75  # 40 registers, which come in eights
    assert kernel.occupancy(256, (164 << 10) // 2 - 1024) == 0.25  # shared memory has room for 2 blocks
    assert Kernel("sm_86", "", 16, 0, 0, 0).occupancy(32) == 16 * 32 / 1536  # at most 16 blocks
