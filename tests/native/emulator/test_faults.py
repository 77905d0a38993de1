"""Each fault of kernels/faults.cu is found, whatever the order, and its text says where and what it is."""

import re
from ctypes import c_char_p, c_void_p
from pathlib import Path

import numpy as np
import pytest

SOURCE = (Path(__file__).parent / "kernels" / "faults.cu").read_text().splitlines()
THREAD = r"thread \(\d+, 0, 0\)"
NOT_YET_WRITTEN = "reads shared memory that no thread of the block has written"
MISSING_FENCE = (
    rf"race in global memory: reads what {THREAD} of block \(0, 0, 0\) wrote at faults.cu:\d+, with no __threadfence "
    "behind it"
)
KERNELS = {"missing_fence": "message", "fence_of_one_thread": "message_of_a_block"}  # of other names
# The number of each, and what its text says.
FAULTS = {
    "missing_barrier": (0, rf"reads what {THREAD} wrote at faults.cu:\d+, with no barrier between|{NOT_YET_WRITTEN}"),
    "missing_second_barrier": (
        1,
        rf"(reads|writes) what {THREAD} (wrote|read) at faults.cu:\d+, with no barrier between",
    ),
    "missing_syncwarp": (2, rf"reads what {THREAD} wrote at faults.cu:\d+, with no barrier between|{NOT_YET_WRITTEN}"),
    "order_of_pairs": (3, rf"reads what {THREAD} wrote at faults.cu:\d+, with no barrier between|{NOT_YET_WRITTEN}"),
    "divergent_barrier": (
        4,
        rf"divergent barrier: (the thread exits, but {THREAD} waits for it|{THREAD} has exited without it)",
    ),
    "two_barriers": (5, rf"divergent barrier: {THREAD} waits at another, faults.cu:\d+"),
    "mask_without_caller": (6, "__shfl_sync: mask 0x0000ffff lacks the calling lane, (1[6-9]|2.|3.)"),
    "source_outside_mask": (7, rf"__shfl_xor_sync: {THREAD} reads lane \d+, which is not in mask 0x0000ffff"),
    "source_has_exited": (8, rf"__shfl_xor_sync: {THREAD} reads lane \d+, which has exited"),
    "two_shuffles": (
        9,
        rf"__shfl_sync with mask 0xffffffff: {THREAD} waits in __shfl_sync with mask 0xffffffff at faults.cu:\d+",
    ),
    "masks_differ": (10, rf"__any_sync with mask 0x\w+: {THREAD} waits in __any_sync with mask 0x\w+ at faults.cu:\d+"),
    "bad_width": (11, "__shfl_sync: a width of 12 is no power of two up to 32"),
    "one_too_far": (12, r"out of bounds: writes 4 bytes at 0x\w+, 0 bytes behind the end of the 80 bytes of out"),
    "writes_input": (13, r"out of bounds: writes 4 bytes at 0x\w+, which is read-only: in"),
    "unwritten": (14, NOT_YET_WRITTEN),
    "past_the_end_of_shared": (
        15,
        r"4 bytes of shared memory outside of every variable: at byte 128 of the 128 declared at faults.cu:\d+",
    ),
    "misaligned": (18, r"misaligned: reads 16 bytes at 0x\w+4"),
    "race_in_global": (
        24,
        rf"race in global memory: reads what {THREAD} wrote at faults.cu:\d+, with no barrier between",
    ),
    "two_writers": (
        25,
        rf"race in global memory: writes what {THREAD} of block \([01], 0, 0\) wrote at faults.cu:\d+, with no "
        "__threadfence behind it",
    ),
    "missing_fence": (26, MISSING_FENCE),
    "fence_of_one_thread": (27, MISSING_FENCE),
    "traps": (21, r"__trap\(\)"),
    "too_much_static_shared": (22, "49160 bytes of static shared memory exceed 48 KiB"),
    "static_and_dynamic_shared": (
        23,
        "16384 bytes of static and 40960 of dynamic shared memory exceed the limit of 49152",
    ),
}


def places(name):
    """The lines of the source that are marked with a fault's name."""
    found = [n for n, text in enumerate(SOURCE, 1) if re.search(rf"// (race: )?{name}(: \w+)?$", text)]
    assert found
    return "|".join(f"faults.cu:{line}" for line in found)


class Faults:
    """Runs faults on an input of 64 elements and an output of some, and gives the error's text."""

    def __init__(self, emulator):
        self.emulator = emulator
        memory = np.zeros(4096, np.float32)
        start = -memory.ctypes.data // 4 % 4  # where 16 bytes are aligned
        self.input, self.memory = memory[start : start + 64], memory[start + 1024 :]
        emulator.library.run_fault.restype = c_char_p

    def run(self, which, *, elements=1024, count=20, needed=None):
        out = self.memory[:elements]
        self.emulator.allow(self.input, writable=False, name="in")
        self.emulator.allow(out, writable=True, name="out")
        if needed is not None:
            self.emulator.needs(out[:needed], is_store=True)
        text = self.emulator.library.run_fault(which, *(c_void_p(a.ctypes.data) for a in (out, self.input)), count)
        self.emulator.allow_everything()
        return text.decode() if text else None


@pytest.fixture
def faults(emulator):
    return Faults(emulator)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(faults, name, seed):
    which, what = FAULTS[name]
    faults.emulator.seed = seed
    text = faults.run(which, elements=20 if name == "one_too_far" else 1024)
    assert text is not None
    kernel = KERNELS.get(name, name)
    where = rf"kernel {kernel}, block \([01], 0, 0\), {THREAD}, ({places(name)}): (race in shared memory: )?({what})$"
    assert re.match(where, text), text
    assert not faults.emulator.reports()  # of a launch that failed there is none


@pytest.mark.parametrize("seed", range(6))
def test_what_is_in_order_is_no_race(faults, seed):
    faults.emulator.seed = seed
    for which in (32, 33, 34, 35, 36, 37):
        assert faults.run(which) is None


@pytest.mark.parametrize("seed", range(3))
def test_what_relies_on_the_order_of_a_vote(faults, seed):
    faults.emulator.seed = seed
    faults.emulator.set_shuffles_order(False)
    text = faults.run(37)
    assert re.search(rf"({places('vote_for_syncwarp')}): race in shared memory: reads what {THREAD} wrote", text)
    assert faults.run(32) is None


@pytest.mark.parametrize("seed", range(3))
def test_what_was_not_done(faults, seed):
    faults.emulator.seed = seed
    assert faults.run(16, count=21, needed=21) == (
        "kernel missing_tail: never wrote 4 of the 84 bytes that it has to, first byte 80"
    )
    assert faults.run(16, count=20, needed=20) is None
    # Rows of 10 elements by blocks of 32 rows: 70 rows need three.
    assert faults.run(17, count=700, needed=700) == (
        "kernel a_row_each: never wrote 240 of the 2800 bytes that it has to, first byte 2560"
    )
    assert faults.run(17, count=640, needed=640) is None


@pytest.mark.parametrize("seed", range(3))
def test_threads_that_wait_for_each_other(faults, seed):
    faults.emulator.seed = seed
    text = faults.run(19)
    first, *waiting = text.split("\n")
    assert first == "kernel deadlock: deadlock, no thread can go on"
    (shuffle,) = (n for n, line in enumerate(SOURCE, 1) if line.endswith("// deadlock: shuffle"))
    assert sorted(waiting) == [
        f"  1 thread(s) wait at faults.cu:{shuffle} (lanes 0xffffffff of a warp), one of them block (0, 0, 0), "
        "thread (0, 0, 0)",
        f"  31 thread(s) wait at faults.cu:{shuffle + 2} (a barrier), one of them block (0, 0, 0), thread (1, 0, 0)",
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_loop_that_waits_for_ever(faults, seed):
    faults.emulator.seed = seed
    text = faults.run(20)
    assert re.match(
        rf"kernel waits_for_ever, block \(0, 0, 0\), {THREAD}: deadlock: threads wait in a loop for what no "
        r"other thread writes\n  32 thread\(s\) run",
        text,
    )


def test_the_emulator_goes_on_after_a_fault(faults):
    for which, size in ((0, 1024), (4, 1024), (19, 1024), (12, 20)):
        assert faults.run(which, elements=size) is not None
        assert faults.run(32) is None
        assert (faults.memory[:32] == 1).all()


def test_the_same_seed_gives_the_same_order(faults):
    texts = set()
    for seed in range(20):
        faults.emulator.seed = seed
        text = faults.run(0)
        assert faults.run(0) == text
        texts.add(text)
    assert len(texts) > 5
