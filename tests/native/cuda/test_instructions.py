"""How many instructions the loss executes for a class, counted in the machine code of sm_90: the whole, aligned vectors
of a row, without the label. On large GPUs that number, and not memory, can limit the loss (docs/performance.md).

Skipped with the reason if kddp_ext was built without CUDA kernels or without those of sm_90.
"""

import pytest
from inner_loops import inner_loops, instructions_per_turn
from machine_code import MissingError, built_module, kernels

ARCHITECTURE = "sm_90"
ELEMENTS = {"float32": 4, "bfloat16": 8, "float16": 8}  # of a vector of 16 bytes

# At most, for a class: by rows, and by the divergence whose passes are counted, in float32 and in 16 bits.
BOUNDS = {
    ("blocks", "forward_kl"): (91, 86),
    ("blocks", "reverse_kl"): (88, 80),
    ("blocks", "jsd"): (134, 126),
    ("long_rows", "reverse_kl"): (103, 99),
    ("long_rows", "jsd"): (166, 159),
}
# The float additions and multiplications of a class in row_elements.cuh: for the sums, the second pass, the gradient.
ARITHMETIC = {"forward_kl": (10, 0, 5), "reverse_kl": (10, 0, 6), "jsd": (10, 15, 6)}


def passes(rows, divergence, n):
    """What a turn of each pass executes: its classes, its arithmetic, its 16-byte accesses and its exponentials."""
    sums, mixture, gradient = ARITHMETIC[divergence]
    if rows == "long_rows":  # reads n classes of both sides in each pass, and computes the exponentials again
        again = mixture or 4
        yield n, n * sums, {"LDG": 2, "EX2": 2 * n}
        if mixture:
            yield n, n * mixture, {"LDG": 2, "EX2": 2 * n}
        yield n, n * (gradient + again), {"LDG": 2, "EX2": 2 * n, "STG": 1}
        return
    planes = 2 * n // 4
    yield n, 0, {"LDG": 2, "STS": planes}
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
@pytest.mark.parametrize(("rows", "divergence"), BOUNDS)
def test_instructions_of_a_class(built, rows, divergence, dtype):
    path, symbols = built
    form = "difference" if divergence == "forward_kl" else "weighted"
    loops = inner_loops(path, ARCHITECTURE, symbols[f"{rows} {dtype} {form}"])
    counted = [
        instructions_per_turn(loops, arithmetic, **marks) / classes
        for classes, arithmetic, marks in passes(rows, divergence, ELEMENTS[dtype])
    ]
    print(f"\n{rows} {dtype} {divergence}: {sum(counted):.1f} instructions ({', '.join(f'{x:.1f}' for x in counted)})")
    assert sum(counted) <= BOUNDS[rows, divergence][dtype != "float32"]
