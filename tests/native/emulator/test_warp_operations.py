"""Shuffles, votes and reductions against the same in NumPy, for full and partial masks; types of 16 bits."""

from functools import reduce

import numpy as np
import pytest
import torch
from emulator.arrays import pointer

SHUFFLES = ["idx", "up", "down", "xor"]
OPERATIONS = [*SHUFFLES, "ballot", "any", "all", "add", "min", "max", "and", "or", "bit_xor", "match_any"]


def source_lane(operation, lane, parameter, width):
    """Where a shuffle reads, as the PTX manual defines it for shfl.sync."""
    first = lane // width * width
    if operation == "idx":
        return first + parameter % width
    if operation == "up":
        return lane - parameter if lane - parameter >= first else lane
    if operation == "down":
        return lane + parameter if lane + parameter < first + width else lane
    other = lane ^ parameter
    return other if other < first + width else lane


def expected_of(operation, mask, values, parameters, width):
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    of_lanes = [int(values[lane]) for lane in lanes]
    if operation in SHUFFLES:
        return {lane: values[source_lane(operation, lane, int(parameters[lane]), width)] for lane in lanes}
    if operation == "match_any":
        return {lane: sum(1 << other for other in lanes if (values[other] & 3) == (values[lane] & 3)) for lane in lanes}
    common = {
        "ballot": lambda: sum((values[lane] & 1) << lane for lane in lanes),
        "any": lambda: int(any(v & 1 for v in of_lanes)),
        "all": lambda: int(all(v & 1 for v in of_lanes)),
        "add": lambda: sum(of_lanes),
        "min": lambda: min(of_lanes),
        "max": lambda: max(of_lanes),
        "and": lambda: reduce(np.bitwise_and, of_lanes),
        "or": lambda: reduce(np.bitwise_or, of_lanes),
        "bit_xor": lambda: reduce(np.bitwise_xor, of_lanes),
    }[operation]()
    return dict.fromkeys(lanes, common)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("mask", "width"), [(0xFFFFFFFF, 32), (0xFFFFFFFF, 8), (0x00FF00F0, 4), (0x80000001, 1)])
def test_an_operation(emulator, run, operation, mask, width):
    generator = np.random.default_rng(1)
    for seed in range(4):
        emulator.seed = seed
        values = generator.integers(-(2**20), 2**20, 32).astype(np.int32)
        if operation in ("any", "all"):
            values = values | 1 if seed % 2 else values & ~1
        # Within a segment of `width` lanes of the mask, so that no lane reads one that is not there.
        parameters = np.full(32, generator.integers(0, width), np.int32)
        results = np.full(32, 12345, np.int32)
        arguments = (OPERATIONS.index(operation), mask, values, parameters, width, results)
        if mask == 0x00FF00F0 and operation in ("up", "down", "idx"):
            parameters %= 4
        run("run_operate", *arguments, 32)
        for lane, value in expected_of(operation, mask, values, parameters, width).items():
            assert results[lane] == np.array(value).astype(np.int32)
        assert all(results[lane] == 12345 for lane in range(32) if not mask >> lane & 1)


def test_a_block_whose_last_warp_is_not_full(run):
    """The lanes beyond the block count as exited."""
    values, results = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    run("run_operate", OPERATIONS.index("add"), 0xFFFFFFFF, values, values, 32, results, 20)
    assert results[:20].tolist() == [190] * 20


def test_types_of_all_sizes(run):
    doubles, integers, halves = np.zeros(32), np.zeros(32, np.int64), np.zeros(32, np.float16)
    run("run_exchange_types", doubles, integers, halves)
    neighbours = np.arange(32) ^ 1
    assert (doubles == neighbours + 0.5).all()
    assert (integers == (1 << 40) + neighbours).all()
    assert (halves == neighbours).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_are_bit_for_bit_those_of_torch(emulator, dtype):
    brain = int(dtype == torch.bfloat16)
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    widened, expected = torch.empty(65536), bits.view(dtype).float()
    emulator.library.from_16_bits(pointer(bits.numpy()), pointer(widened.numpy()), 65536, brain)
    nan = expected.isnan()
    assert torch.equal(widened.isnan(), nan)
    assert torch.equal(widened[~nan].view(torch.int32), expected[~nan].view(torch.int32))
    # Every number of 16 bits, every middle between two, and what lies just beside them; and any number of 32 bits.
    finite = expected[expected.isfinite()].sort().values
    middle = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    infinity = torch.tensor(torch.inf)
    anything = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(1))
    numbers = [finite, middle, middle.nextafter(infinity), middle.nextafter(-infinity)]
    numbers += [anything.to(torch.int32).view(torch.float32), infinity[None], -infinity[None], infinity[None] * 0]
    source = torch.cat(numbers)
    narrowed = torch.empty(len(source), dtype=torch.int16)
    emulator.library.to_16_bits(pointer(source.numpy()), pointer(narrowed.numpy()), len(source), brain)
    nan = source.isnan()
    assert torch.equal(narrowed[~nan], source.to(dtype).view(torch.int16)[~nan])
    assert (narrowed[nan] == 0x7FFF).all()  # CUDA has one NaN


def fused(emulator, a, b, c, brain):
    result = np.zeros_like(a)
    emulator.library.fused_multiply_add(*(pointer(x) for x in (a, b, c, result)), len(a), brain)
    return result


def test_a_fused_multiplication_and_addition_rounds_once(emulator):
    generator = np.random.default_rng(2)
    a, b, c = (generator.integers(0, 65536, 100_000).astype(np.uint16) for _ in range(3))
    result = fused(emulator, a, b, c, 0)
    with np.errstate(all="ignore"):
        # The sum of three such numbers is exact in 64 bits of mantissa; where it is in double, its rounding is known.
        exact = np.prod([x.view(np.float16).astype(np.longdouble) for x in (a, b)], axis=0) + c.view(np.float16)
        double = exact.astype(np.float64)
        known = np.isfinite(double) & (double.astype(np.longdouble) == exact)
        expected = double.astype(np.float16).view(np.uint16)
    assert known.sum() > 50_000
    assert (result[known] == expected[known]).all()


@pytest.mark.parametrize(
    # 1.5 * (1 + the least step) is the middle between two numbers; c says which, however small.
    ("brain", "a", "b", "least", "expected"),
    [(0, 0x3E00, 0x3C01, 0x0001, [0x3E02, 0x3E02, 0x3E01]), (1, 0x3FC0, 0x3F81, 0x0080, [0x3FC2, 0x3FC2, 0x3FC1])],
)
def test_a_fused_multiplication_and_addition_in_the_middle(emulator, brain, a, b, least, expected):
    c = np.array([0, least, least | 0x8000], np.uint16)
    assert fused(emulator, np.full(3, a, np.uint16), np.full(3, b, np.uint16), c, brain).tolist() == expected
