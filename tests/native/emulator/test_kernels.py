"""Kernels without faults: their results, and sectors and bank conflicts that can be counted by hand."""

import pytest
import torch
from emulated_calls import aligned

I32, F32 = torch.int32, torch.float32


@pytest.mark.parametrize(
    ("count", "stride", "offset", "read", "written"),
    [
        (256, 1, 0, 32, 32),  # 8 warps of 128 bytes: four sectors each
        (256, 1, 1, 40, 32),  # one float further: a fifth sector
        (256, 2, 0, 64, 32),  # every second float: all sectors of twice the range
        (256, 32, 0, 256, 32),  # one sector per float
        (100, 1, 0, 13, 13),  # 3 warps of 4 sectors, and 4 floats in another sector
    ],
)
def test_sectors_of_a_copy(emulator, run, count, stride, offset, read, written):
    for seed in range(3):
        emulator.seed = seed
        values, out = aligned((count * stride + offset,), F32)[offset:], aligned((count,), F32)
        torch.arange(len(values), out=values)
        run("run_copy", values, out, count, stride, -(-count // 64))
        assert torch.equal(out, values[::stride])
        report = emulator.reports()[seed]
        assert (report["kernel"], report["grid"], report["block"]) == ("copy", -(-count // 64), 64)
        assert (report["sectors_read"], report["sectors_written"]) == (read, written)


@pytest.mark.parametrize(("stride", "read"), [(1, 128), (2, 256), (4, 256)])
def test_sectors_of_vectors(emulator, run, stride, read):
    run("run_copy_vectors", aligned((1024 * stride,), F32), aligned((1024,), F32), 256, stride)
    (report,) = emulator.reports()
    assert (report["sectors_read"], report["sectors_written"]) == (read, 128)


@pytest.mark.parametrize(
    ("size", "stride", "conflicts"),
    [
        (1, 1, 0),  # bytes of the same words
        (4, 1, 0),
        (4, 2, 1),  # two lanes per bank
        (4, 3, 0),
        (4, 32, 31),
        (8, 1, 0),  # half a warp fills all banks, twice
        (8, 2, 2),
        (16, 1, 0),  # a quarter of a warp fills all banks, four times
        (16, 2, 4),
        (16, 8, 28),
    ],
)
def test_bank_conflicts(emulator, run, size, stride, conflicts):
    run("run_pass_through_shared", size, stride)
    (report,) = emulator.reports()
    assert report["bank_conflicts"] == 2 * conflicts  # of the store and of the load
    assert (report["shared_reads"], report["shared_writes"]) == (1, 1)
    assert sorted(site["bank_conflicts"] for site in report["sites"] if site["shared"]) == [conflicts] * 2
    assert report["dynamic_shared"] == 32 * size * stride


def test_needed_bytes_hold_for_one_launch(emulator, run):
    values, out = aligned((200,), F32), aligned((200,), F32)
    for memory, is_store in ((values, False), (out, True)):
        emulator.needs(memory, is_store=is_store)
    run("run_copy", values, out, 200, 1, 4)
    run("run_copy", values, out, 200, 1, 3)
    emulator.needs(out, is_store=True)
    with pytest.raises(RuntimeError, match="never wrote 32 of 800 needed bytes, the first one at 768"):
        run("run_copy", values, out, 200, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_to_16_bits_equal_those_of_torch(emulator, dtype):
    finite = torch.arange(65536).to(torch.int16).view(dtype).float()
    finite = finite[finite.isfinite()].sort().values
    # All finite numbers, the middle between each two, its neighbours, random numbers, infinities and NaN.
    middle = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    infinity = torch.tensor([torch.inf])
    random = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(1)).to(I32).view(F32)
    numbers = [finite, middle, middle.nextafter(infinity), middle.nextafter(-infinity), random, infinity, -infinity]
    source = torch.cat([*numbers, infinity * 0])
    result = torch.empty(len(source), dtype=torch.int16)
    emulator.run("to_16_bits", source, result, len(source), int(dtype == torch.bfloat16))
    nan = source.isnan()
    assert torch.equal(result[~nan], source.to(dtype).view(torch.int16)[~nan])
    assert (result[nan] == 0x7FFF).all()


def test_conversions_from_float16_equal_those_of_torch(emulator):
    bits, result = torch.arange(65536).to(torch.int16), torch.empty(65536)
    emulator.run("from_float16", bits, result, 65536)
    torch.testing.assert_close(result, bits.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("blocks", [1, 2, 16])
def test_blocks_of_a_cooperative_launch_may_wait_for_each_other(emulator, run, blocks):
    for seed in range(5):
        emulator.seed = seed
        numbers, seen, arrived = (torch.zeros(blocks, dtype=I32) for _ in range(3))
        run("run_exchange", numbers, seen, arrived, blocks, 1)
        assert seen.tolist() == [(block + 1) % blocks + 1 for block in range(blocks)]
    with pytest.raises(RuntimeError, match="deadlock: threads poll what no other thread writes"):
        run("run_exchange", *(torch.zeros(16, dtype=I32) for _ in range(3)), 16, 0)


def test_the_seed_determines_the_order_of_lanes_warps_and_blocks(emulator, run):
    def turns_of(seed):
        emulator.seed = seed
        counter, turns = torch.zeros(1, dtype=I32), torch.zeros(256, dtype=I32)
        run("run_take_turns", counter, turns, 4, 64)
        assert sorted(turns.tolist()) == list(range(256))
        return turns.tolist()

    orders = [turns_of(seed) for seed in range(20)]
    assert orders == [turns_of(seed) for seed in range(20)]
    first = [order.index(0) for order in orders]
    assert len({thread // 64 for thread in first}) == 4  # any block may come first
    assert len({thread % 64 // 32 for thread in first}) == 2  # and any warp
    assert len({thread % 32 for thread in first}) > 8  # and any lane


INVALID_VALUE, INVALID_CONFIGURATION, TOO_LARGE = 1, 9, 720


@pytest.mark.parametrize(
    ("grid", "block", "shared", "cooperative", "error"),
    [
        (1, 1024, 0, 0, 0),
        (1, 1025, 0, 0, INVALID_CONFIGURATION),
        (1, 0, 0, 0, INVALID_CONFIGURATION),
        (0, 32, 0, 0, INVALID_CONFIGURATION),
        (1, 32, 49152, 0, 0),
        (1, 32, 49153, 0, INVALID_VALUE),
        (4, 1024, 0, 1, 0),  # one block of 1024 threads on each of 4 multiprocessors
        (5, 1024, 0, 1, TOO_LARGE),
    ],
)
def test_limits_of_a_launch(emulator, grid, block, shared, cooperative, error):
    assert emulator.library.launch_copy(*map(int, (grid, block, shared, cooperative))) == error
    assert emulator.last_error() == 0  # the call above has reset it
    assert len(emulator.reports()) == (error == 0)
    (call,) = emulator.calls()
    assert (call["name"], call["error"], call["block"], call["shared"]) == ("launch", error, block, shared)
