"""Sectors, bytes and bank conflicts, against what one counts by hand."""

import numpy as np
import pytest
from emulator.arrays import aligned


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("count", "stride", "offset", "read", "written"),
    [
        (256, 1, 0, 32, 32),  # 8 warps of 128 bytes: four sectors each
        (256, 1, 1, 40, 32),  # one float further: a fifth
        (256, 2, 0, 64, 32),  # every second float: all sectors of twice the range
        (256, 8, 0, 256, 32),  # a sector for each
        (256, 32, 0, 256, 32),
        (100, 1, 0, 13, 13),  # 3 warps of 4 sectors, and 4 floats in one more
        (1, 1, 0, 1, 1),
    ],
)
def test_sectors_of_a_copy(emulator, run, seed, count, stride, offset, read, written):
    emulator.seed = seed
    values, out = aligned(count * stride, offset=offset), aligned(count)
    values[:] = np.arange(count * stride)
    run("run_copy", values, out, count, stride)
    assert (out == values[::stride]).all()
    (report,) = emulator.reports()
    assert report["kernel"] == "copy<float>"
    assert (report["grid"], report["block"]) == ([(count + 63) // 64, 1, 1], [64, 1, 1])
    assert (report["sectors_read"], report["sectors_written"]) == (read, written)
    assert (report["bytes_read"], report["bytes_written"]) == (4 * count, 4 * count)
    assert report["accesses_read"] == (count + 31) // 32


@pytest.mark.parametrize(("stride", "read"), [(1, 128), (2, 256), (4, 256)])
def test_sectors_of_vectors(emulator, run, stride, read):
    values, out = aligned(4 * 256 * stride), aligned(4 * 256)
    run("run_copy_of_vectors", values, out, 256, stride)
    (report,) = emulator.reports()
    assert (report["sectors_read"], report["sectors_written"]) == (read, 128)
    assert (report["bytes_read"], report["accesses_read"]) == (4096, 8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    # A column of the tile is 32 words of one bank without padding: 31 cycles more for each of 32 warps' loads.
    ("pitch", "conflicts"),
    [(32, 31 * 32), (33, 0)],
)
def test_bank_conflicts_of_a_transpose(emulator, run, seed, pitch, conflicts):
    emulator.seed = seed
    values, out = aligned(64 * 96), aligned(64 * 96)
    values[:] = np.arange(64 * 96)
    run("run_transpose", values, out, 64, 96, pitch)
    assert (out.reshape(96, 64) == values.reshape(64, 96).T).all()
    (report,) = emulator.reports()
    tiles = 6
    assert report["bank_conflicts"] == conflicts * tiles
    assert (report["shared_reads"], report["shared_writes"]) == (32 * tiles, 32 * tiles)
    assert (report["sectors_read"], report["sectors_written"]) == (64 * 96 // 8, 64 * 96 // 8)
    assert (report["barriers"], report["static_shared"]) == (tiles, 4 * 32 * 33)
    by_line = {site["line"]: site["bank_conflicts"] for site in report["sites"] if site["shared"]}
    assert sorted(by_line.values()) == [0, conflicts * tiles]


@pytest.mark.parametrize(
    ("size", "stride", "conflicts"),
    [
        (1, 1, 0),  # bytes of the same words
        (4, 1, 0),
        (4, 2, 1),  # two lanes a bank
        (4, 3, 0),
        (4, 32, 31),
        (8, 1, 0),  # half a warp fills all banks, twice
        (8, 2, 2 * 1),
        (16, 1, 0),  # a quarter fills all banks, four times
        (16, 2, 4 * 1),
        (16, 8, 4 * 7),
    ],
)
def test_bank_conflicts_by_size_and_stride(emulator, run, size, stride, conflicts):
    run("run_pass_through_shared", size, stride)
    (report,) = emulator.reports()
    assert report["bank_conflicts"] == 2 * conflicts  # of the store and of the load
    assert report["dynamic_shared"] == 32 * size * stride


def test_what_is_needed_is_reported(emulator, run):
    values, out = aligned(200), aligned(200)
    emulator.needs(values, is_store=False)
    emulator.needs(out, is_store=True)
    run("run_copy", values, out, 200, 1)
    (report,) = emulator.reports()
    assert (report["needed_read"], report["needed_written"]) == (800, 800)
    run("run_copy", values, out, 200, 1)  # it holds for one launch
    assert emulator.reports()[1]["needed_read"] == 0
    emulator.needs(values, is_store=False, checked=False)
    run("run_copy", values, out, 100, 1)
    emulator.needs(values, is_store=False)
    with pytest.raises(RuntimeError, match="never read 400 of the 800 bytes that it has to, first byte 400"):
        run("run_copy", values, out, 100, 1)


def test_too_few_blocks(emulator, run):
    values, out = aligned(200), aligned(200)
    emulator.needs(out, is_store=True)
    with pytest.raises(RuntimeError, match="never wrote 32 of the 800 bytes that it has to, first byte 768"):
        run("run_copy_with_too_few_blocks", values, out, 200)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("columns", [1, 31, 32, 100, 1000])
def test_reductions(emulator, run, seed, columns):
    emulator.seed = seed
    rows = 5
    values = np.random.default_rng(columns).integers(-8, 8, (rows, columns)).astype(np.float32)
    expected = values.sum(1)
    for threads in (32, 128, 1024):
        sums = np.full(rows, np.nan, np.float32)
        run("run_sum_of_block", values, sums, rows, columns, threads)
        assert (sums == expected).all()
    sums = np.full(rows, np.nan, np.float32)
    run("run_sum_by_tree", values, sums, rows, columns, 1024)
    assert (sums == expected).all()
    sums = np.full(2, np.nan, np.float32)
    pairs = np.arange(64, dtype=np.float32)
    run("run_sum_of_warp", pairs, sums, 64)
    assert sums.tolist() == [pairs[:32].sum(), pairs[32:].sum()]
