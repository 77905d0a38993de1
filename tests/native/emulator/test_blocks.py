"""Blocks that wait for each other, the last block, atomic operations, and the order that a seed gives."""

import re

import numpy as np
import pytest


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("blocks", [1, 2, 16])
def test_blocks_that_wait_for_each_other(emulator, run, seed, blocks):
    emulator.seed = seed
    numbers, seen, arrived = np.zeros(blocks, np.int32), np.zeros(blocks, np.int32), np.zeros(1, np.uint32)
    run("run_exchange", numbers, seen, arrived, blocks, 1)
    assert seen.tolist() == [(block + 1) % blocks + 1 for block in range(blocks)]
    (report,) = emulator.reports()
    assert report["cooperative"]
    assert report["fences"] == 2 * blocks


@pytest.mark.parametrize("seed", range(3))
def test_without_a_cooperative_launch_they_may_wait_for_ever(emulator, run, seed):
    emulator.seed = seed
    numbers, seen, arrived = np.zeros(16, np.int32), np.zeros(16, np.int32), np.zeros(1, np.uint32)
    with pytest.raises(RuntimeError) as caught:
        run("run_exchange", numbers, seen, arrived, 16, 0)
    text = str(caught.value)
    assert "deadlock: threads wait in a loop for what no other thread writes" in text
    assert re.search(r"\d+ thread\(s\) wait at blocks.cu:\d+ \(a barrier\), one of them block", text)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("blocks", [1, 7, 40])
def test_the_last_block_sees_what_all_have_written(emulator, run, seed, blocks):
    emulator.seed = seed
    partial, total, tickets = np.zeros(blocks, np.int32), np.zeros(1, np.int32), np.zeros(1, np.uint32)
    for _ in range(2):  # the counter goes back to 0 by itself
        run("run_count_threads", partial, total, tickets, blocks, 48)
        assert total[0] == 48 * blocks
        assert tickets[0] == 0


@pytest.mark.parametrize("seed", range(4))
def test_atomic_operations_on_shared_and_global_memory(emulator, run, seed):
    emulator.seed = seed
    values = np.random.default_rng(seed).integers(0, 16, 1000).astype(np.int32)
    bins = np.zeros(16, np.int32)
    run("run_histogram", values, 1000, bins)
    assert (bins == np.bincount(values, minlength=16)).all()
    assert emulator.reports()[0]["atomics"] == 1000 + 3 * 16


def test_the_order_is_drawn_from_the_seed(emulator, run):
    def turns_of(seed):
        emulator.seed = seed
        assert emulator.seed == seed
        counter, turns = np.zeros(1, np.uint32), np.zeros(4 * 64, np.uint32)
        run("run_take_turns", counter, turns, 4, 64)
        assert sorted(turns) == list(range(256))
        return turns.tolist()

    orders = [turns_of(seed) for seed in range(20)]
    assert orders == [turns_of(seed) for seed in range(20)]
    assert len(set(map(tuple, orders))) == 20
    assert len({order.index(0) // 64 for order in orders}) == 4  # any block may come first
    assert len({order.index(0) % 64 // 32 for order in orders}) == 2  # and any warp
    assert len({order.index(0) % 32 for order in orders}) > 8  # and any lane
