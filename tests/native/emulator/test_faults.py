"""Each fault of kernels/faults.cu is found, whatever the order of threads, and its text names it and its line."""

import re
from pathlib import Path

import pytest
import torch
from emulated_calls import aligned

SOURCE = (Path(__file__).parent / "kernels" / "faults.cu").read_text().splitlines()
THREAD = r"thread \d+"
UNWRITTEN = "reads shared memory that no thread of the block has written"
RACE = rf"race in \w+ memory: (reads|writes) what {THREAD} (wrote|read) at faults.cu:\d+, with no barrier between"
NO_FENCE = rf"what {THREAD} of block \d+ wrote at faults.cu:\d+, with no __threadfence behind it"
FAULTS = {
    "missing_barrier": f"{RACE}|{UNWRITTEN}",
    "missing_second_barrier": RACE,
    "missing_syncwarp": f"{RACE}|{UNWRITTEN}",
    "divergent_barrier": rf"divergent barrier: (the thread exits, but {THREAD} waits for it|{THREAD} has exited .*)",
    "two_barriers": rf"divergent barrier: {THREAD} waits at another one, faults.cu:\d+",
    "mask_without_caller": r"__shfl_sync: mask 0x0000ffff lacks the calling lane, (1[6-9]|2\d|3\d)",
    "source_outside_mask": rf"__shfl_xor_sync: {THREAD} reads lane \d+, which is not in mask 0x0000ffff",
    "source_has_exited": rf"__shfl_xor_sync: {THREAD} reads lane \d+, which has exited",
    "two_shuffles": rf"__shfl_sync with mask 0xf+: {THREAD} waits in __shfl_sync with mask 0xf+ at faults.cu:\d+",
    "masks_differ": rf"__any_sync with mask 0x\w+: {THREAD} waits in __any_sync with mask 0x\w+ at faults.cu:\d+",
    "one_too_far": r"out of bounds: writes 4 bytes at 0x\w+, 0 bytes behind the end of the 80 bytes of out",
    "writes_input": r"out of bounds: writes 4 bytes at 0x\w+ of read-only in",
    "unwritten": UNWRITTEN,
    "past_the_end_of_shared": "4 bytes of shared memory outside of every variable: at byte 128 of the 128 declared .*",
    "misaligned": r"misaligned: reads 16 bytes at 0x\w+4",
    "race_in_global": RACE,
    "two_writers": f"race in global memory: writes {NO_FENCE}",
    "missing_fence": f"race in global memory: reads {NO_FENCE}",
    "missing_barrier_before_fence": f"race in global memory: reads {NO_FENCE}",
    "too_much_static_shared": "49160 bytes of static shared memory exceed 48 KiB",
    "static_and_dynamic_shared": "16384 bytes of static and 40960 of dynamic shared memory exceed the limit of 49152",
}
CORRECT = ("correct syncwarp", "correct fence", "correct barrier before fence", "correct message of a warp")


@pytest.fixture(params=range(4))
def run_fault(emulator, request):
    """Runs a kernel of faults.cu under a seed and returns the text of its error, or None."""
    emulator.seed = request.param
    source, memory = aligned((64,), torch.float32, fill=0), aligned((1024,), torch.float32, fill=0)

    def run_fault(name, *, elements=1024, count=20, needed=None):
        out = memory[:elements]
        emulator.allow(source, writable=False, name="in")
        emulator.allow(out, writable=True, name="out")
        if needed is not None:
            emulator.needs(out[:needed], is_store=True)
        text = emulator.run("run_fault", name, out, source, count)
        emulator.allow_everything()
        return text

    return run_fault


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(emulator, run_fault, name):
    text = run_fault(name, elements=20 if name == "one_too_far" else 1024)
    lines = "|".join(f"faults.cu:{n}" for n, line in enumerate(SOURCE, 1) if line.endswith(f"// {name}"))
    assert text is not None
    assert re.fullmatch(rf"kernel {name}, block [01], {THREAD}, ({lines}): ({FAULTS[name]})", text), text
    assert not emulator.reports()
    assert emulator.run("run_fault", "correct syncwarp", *[aligned((256,), torch.float32)] * 2, 0) is None


@pytest.mark.parametrize("name", CORRECT)
def test_ordered_accesses_are_not_a_race(run_fault, name):
    assert run_fault(name) is None


def test_a_missing_tail_is_found_by_the_needed_bytes(run_fault):
    assert run_fault("missing_tail", count=20, needed=20) is None
    text = run_fault("missing_tail", count=21, needed=21)
    assert text == "kernel missing_tail: never wrote 4 of 84 needed bytes, the first one at 80"


def test_a_deadlock_lists_the_waiting_threads(run_fault):
    first, *waiting = run_fault("deadlock").split("\n")
    assert first == "kernel deadlock: deadlock, no thread can run"
    assert len(waiting) == 2
    text = "\n".join(sorted(waiting))
    assert re.search(r"1 thread\(s\) wait at faults.cu:\d+ \(lanes 0xffffffff\), one of them block 0, thread 0", text)
    assert re.search(r"31 thread\(s\) wait at faults.cu:\d+ \(barrier\), one of them block 0, thread 1", text)


def test_polling_forever_is_a_deadlock(run_fault):
    text = rf"kernel waits_forever, block 0, {THREAD}: deadlock: threads poll what no other thread writes\n  32 thread"
    assert re.match(text, run_fault("waits_forever"))


def test_the_seed_determines_the_order(emulator, run_fault):
    texts = set()
    for seed in range(20):
        emulator.seed = seed
        text = run_fault("missing_barrier")
        assert run_fault("missing_barrier") == text
        texts.add(text)
    assert len(texts) > 5
