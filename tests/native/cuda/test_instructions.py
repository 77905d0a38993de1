"""How many instructions the loss executes for a class, counted in the machine code of sm_90: the whole, aligned vectors
of a row, without the label. On large GPUs that number, and not memory, can limit the loss (docs/performance.md).

Skipped with the reason if kddp_ext was built without CUDA kernels or without those of sm_90.
"""

import pytest
from inner_loops import inner_loops, instructions_per_turn
from machine_code import MissingError, built_module, kernels

from benchmarks.roofline.emulated import INSTRUCTIONS_OF_CACHED_CLASS, INSTRUCTIONS_OF_CLASS_READ_TWICE

ARCHITECTURE = "sm_90"
ELEMENTS = {"float32": 4, "bfloat16": 8, "float16": 8}  # of a vector of 16 bytes

# At most, for a class: by rows and calls, in float32 and in 16 bits. A usual call is forward_kl of teacher and labels.
BOUNDS = {
    ("small_teams", "usual"): (INSTRUCTIONS_OF_CACHED_CLASS[4], INSTRUCTIONS_OF_CACHED_CLASS[2]),
    ("warps", "usual"): (INSTRUCTIONS_OF_CACHED_CLASS[4], INSTRUCTIONS_OF_CACHED_CLASS[2]),
    ("blocks", "usual"): (INSTRUCTIONS_OF_CACHED_CLASS[4], INSTRUCTIONS_OF_CACHED_CLASS[2]),
    ("long_rows", "usual"): (INSTRUCTIONS_OF_CLASS_READ_TWICE[4], INSTRUCTIONS_OF_CLASS_READ_TWICE[2]),
    ("blocks", "dkd"): (91, 86),
    ("blocks", "reverse_kl"): (88, 80),
    ("blocks", "jsd"): (134, 126),
    ("long_rows", "reverse_kl"): (103, 99),
    ("long_rows", "jsd"): (166, 159),
}
KERNELS = {"usual": "usual", "dkd": "difference", "reverse_kl": "weighted", "jsd": "weighted"}
# The float additions and multiplications of a class in row_elements.cuh: for the sums, the second pass, the gradient.
ARITHMETIC = {"usual": (10, 0, 5), "dkd": (10, 0, 5), "reverse_kl": (10, 0, 6), "jsd": (10, 15, 6)}


def passes(rows, call, n):
    """What a turn of each pass executes: its classes, its arithmetic, its 16-byte accesses and its exponentials."""
    sums, mixture, gradient = ARITHMETIC[call]
    if rows == "long_rows":  # reads n classes of both sides in each pass, and computes the exponentials again
        again = mixture or 4
        yield n, n * sums, {"LDG": 2, "EX2": 2 * n}
        if mixture:
            yield n, n * mixture, {"LDG": 2, "EX2": 2 * n}
        yield n, n * (gradient + again), {"LDG": 2, "EX2": 2 * n, "STG": 1}
        return
    planes = 2 * n // 4
    yield n, 0, {"LDG": 2, "STS": planes}
    if call != "usual":  # which finds the highest logits while it reads
        yield 4, 0, {"LDS": 2}
    yield 4, 4 * sums, {"LDS": 2, "STS": 2, "EX2": 8}
    if mixture:
        yield 4, 4 * mixture, {"LDS": 2, "STS": 2, "EX2": 8}
    yield n, n * gradient, {"LDS": planes, "STG": 1}


@pytest.fixture(scope="module")
def built():
    """The module, and the symbols of its kernels by name."""
    try:
        path = built_module()
        symbols = {kernel.name: kernel.symbol for kernel in kernels(path) if kernel.architecture == ARCHITECTURE}
    except MissingError as reason:
        pytest.skip(str(reason))
    if not symbols:
        pytest.skip(f"kddp_ext was built without machine code for {ARCHITECTURE}")
    return path, symbols


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize(("rows", "call"), BOUNDS)
def test_instructions_of_a_class(built, rows, call, dtype):
    path, symbols = built
    loops = inner_loops(path, ARCHITECTURE, symbols[f"{rows} {dtype} {KERNELS[call]}"])
    counted = [
        instructions_per_turn(loops, arithmetic, **marks) / classes
        for classes, arithmetic, marks in passes(rows, call, ELEMENTS[dtype])
    ]
    print(f"\n{rows} {dtype} {call}: {sum(counted):.1f} instructions ({', '.join(f'{x:.1f}' for x in counted)})")
    assert sum(counted) <= BOUNDS[rows, call][dtype != "float32"]
