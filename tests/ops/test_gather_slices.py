"""The native gather equals plain indexing for random shapes, dtypes, strides and indices; so does its compensation."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kddp_ext import ops
from kddp_ext.ops import reference

# Elements of 1, 2, 4, 8 and 16 bytes.
DTYPES = [
    torch.bool, torch.bfloat16, torch.float16, torch.int16, torch.float32, torch.float64, torch.int64, torch.complex64,
    torch.complex128,
]  # fmt: skip
FLOAT_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def as_indices(values):
    return torch.tensor(values, dtype=torch.int64)


@st.composite
def indices(draw, size):
    """None, or indices: ascending as in a prune, in any order, or with repetitions."""
    chosen = draw(st.none() | st.lists(st.integers(0, size - 1), unique=draw(st.booleans()), max_size=2 * size))
    if chosen is None:
        return None
    return as_indices(sorted(set(chosen)) if draw(st.booleans()) else chosen)


def drawn_tensor(data, rows, columns, inner):
    """(rows, columns · inner): contiguous, a slice of wider rows, or transposed."""
    dtype = data.draw(st.sampled_from(DTYPES))
    layout = data.draw(st.sampled_from(["contiguous", "contiguous", "wider rows", "transposed"]))
    if layout == "transposed":
        return (torch.randn(columns * inner, rows) * 9).to(dtype).t()
    offset = data.draw(st.integers(1, 3)) if layout == "wider rows" else 0
    return (torch.randn(rows, columns * inner + offset) * 9).to(dtype)[:, offset:]


def assert_same(gathered, truth):
    for ours, true in zip(gathered, truth, strict=True):
        assert ours.is_contiguous()
        assert ours.dtype == true.dtype
        assert torch.equal(ours, true)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), rows=st.integers(1, 40), columns=st.integers(1, 90), inner=st.sampled_from([1, 1, 3, 9, 70]))
def test_gather_equals_indexing(data, rows, columns, inner):
    keep_rows, keep_columns = data.draw(indices(rows)), data.draw(indices(columns))
    tensors = [drawn_tensor(data, rows, columns, inner) for _ in range(data.draw(st.integers(1, 4)))]
    arguments = (tensors, keep_rows, keep_columns)
    assert_same(
        ops.gather_slices(*arguments, rows=rows, columns=columns)[0],
        reference.gather_slices(*arguments, rows=rows, columns=columns)[0],
    )


@pytest.mark.slow_on_the_emulator
@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.complex64, torch.complex128])
def test_outputs_larger_than_the_caches_are_gathered(dtype, ascending):
    generator = torch.Generator().manual_seed(0)
    rows, columns = 1023, 2 * (8 << 20) // 1000 // dtype.itemsize + 3
    weight = (torch.randn(rows, columns, generator=generator) * 9).to(dtype)
    keep_rows, keep_columns = (torch.randperm(n, generator=generator)[: n * 3 // 4] for n in (rows, columns))
    if ascending:
        keep_rows, keep_columns = keep_rows.sort().values, keep_columns.sort().values
    for keeps in [(keep_rows, keep_columns), (keep_rows, None), (None, keep_columns)]:
        (smaller,), _ = ops.gather_slices([weight], *keeps, rows=rows, columns=columns)
        assert_same([smaller], reference.gather_slices([weight], *keeps, rows=rows, columns=columns)[0])


def test_vectors_and_convolutions_are_gathered():
    keep = torch.tensor([4, 0])
    vector = torch.arange(6.0)
    assert ops.gather_slices([vector], keep, None, rows=6, columns=1)[0][0].tolist() == [4, 0]
    assert ops.gather_slices([torch.arange(12.0)[::2]], keep, None, rows=6, columns=1)[0][0].tolist() == [8, 0]
    kernel = torch.randn(6, 5, 3, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        stored = kernel.to(memory_format=layout)
        (smaller,), _ = ops.gather_slices([stored], keep, torch.tensor([1]), rows=6, columns=5)
        assert torch.equal(smaller, kernel[keep][:, [1]])


def test_conjugated_tensors_that_require_grad_are_gathered_as_values():
    weight = torch.randn(3, 4, dtype=torch.complex64, requires_grad=True)
    (smaller,), _ = ops.gather_slices([weight.conj()], torch.tensor([2]), None, rows=3, columns=4)
    assert not smaller.requires_grad
    assert torch.equal(smaller, weight.detach()[[2]].conj())


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from(FLOAT_DTYPES),
    rows=st.integers(1, 9),
    columns=st.integers(1, 90),
    inner=st.sampled_from([1, 1, 2, 9, 70]),
)
def test_shift_is_the_contribution_of_the_pruned_columns(data, dtype, rows, columns, inner):
    weight = (torch.randn(rows, columns * inner) * 3).to(dtype)
    keep_rows, kept = data.draw(indices(rows)), data.draw(indices(columns))
    pruned = data.draw(indices(columns).filter(lambda index: index is not None))
    means = torch.randn(len(pruned), dtype=torch.float64)
    arguments = {"rows": rows, "columns": columns, "pruned_columns": pruned, "pruned_means": means}
    gathered, shift = ops.gather_slices([weight, weight], keep_rows, kept, **arguments)
    truth, by_reference = reference.gather_slices([weight, weight], keep_rows, kept, **arguments)
    assert_same(gathered, truth)
    block = weight.double().reshape(rows, columns, inner)
    of_kept_rows = block if keep_rows is None else block[keep_rows]
    for ours, theirs, row in zip(shift.tolist(), by_reference.tolist(), of_kept_rows[:, pruned], strict=True):
        terms = (row * means[:, None]).flatten().tolist()
        magnitude = math.fsum(map(abs, terms))
        # Every term and every addition rounds once.
        assert abs(ours - math.fsum(terms)) <= (len(terms) + 1) * 2**-53 * magnitude
        bound = block.abs().sum() * means.abs().sum()
        assert abs(theirs - math.fsum(terms)) <= (len(terms) + inner + 1) * 2**-53 * bound


@pytest.mark.slow_on_the_emulator
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(701, 600, generator=generator).to(dtype) for _ in range(3)]
    keep, pruned = torch.arange(0, 600, 2), torch.arange(1, 600, 2)
    means = torch.randn(300, dtype=torch.float64, generator=generator)
    arguments = {"rows": 701, "columns": 600, "pruned_columns": pruned, "pruned_means": means}
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(ops.gather_slices(tensors, keep, keep, **arguments))
    assert_same(results[0][0], [tensor[keep][:, keep] for tensor in tensors])
    for gathered, shift in results[1:]:
        assert_same(gathered, results[0][0])
        assert torch.equal(shift, results[0][1])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_nan_and_infinity_in_pruned_columns_follow_ieee(dtype):
    nan, infinity = math.nan, math.inf
    weight = torch.ones(5, 40, dtype=dtype)
    weight[0, 1] = nan  # kept
    weight[1, 0] = nan
    weight[2, 2] = -infinity
    weight[3, 4] = infinity  # of mean 0
    kept, pruned = torch.arange(1, 40, 2), torch.arange(0, 40, 2)
    means = torch.ones(20, dtype=torch.float64)
    means[2] = 0
    _, shift = ops.gather_slices([weight], None, kept, rows=5, columns=40, pruned_columns=pruned, pruned_means=means)
    torch.testing.assert_close(shift.tolist(), [19.0, nan, -infinity, nan, 19.0], equal_nan=True, rtol=0, atol=0)


def pruned(columns, means):
    return {"pruned_columns": columns, "pruned_means": means}


ONE, MEAN = torch.tensor([1]), torch.ones(1, dtype=torch.float64)
ON_META = torch.zeros(4, 5, device="meta")
VECTOR = "pruned_means: expected a contiguous vector of 1 float64"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_rows": torch.tensor([4])}, "keep_rows: expected indices from 0 to 3, got 4 to 4"),
        ({"keep_columns": torch.tensor([-1, 2])}, "keep_columns: expected indices from 0 to 4, got -1 to 2"),
        ({"keep_rows": torch.tensor([1.0])}, "keep_rows: expected a contiguous vector of int64, got torch.float32"),
        (pruned(torch.tensor([9]), MEAN), "pruned_columns: expected indices from 0 to 4"),
        (pruned(ONE, None), "pruned_columns, pruned_means: expected both or neither"),
        (pruned(None, MEAN), "pruned_columns, pruned_means: expected both or neither"),
        (pruned(ONE, MEAN.float()), rf"{VECTOR}, got torch.float32 of shape \(1,\)"),
        (pruned(ONE, MEAN.repeat(2)), rf"{VECTOR}, got torch.float64 of shape \(2,\)"),
        (
            {"tensors": [torch.zeros(4, 5, dtype=torch.int64)], **pruned(ONE, MEAN)},
            r"tensors\[0\]: expected one of torch.float32, .*torch.float16 with pruned_means, got torch.int64",
        ),
        ({"tensors": [torch.zeros(4, 5), ON_META]}, r"tensors\[1\]: expected device cpu .*meta"),
        ({"tensors": [ON_META], "keep_columns": ONE}, r"keep_columns: expected device meta as tensors\[0\], got cpu"),
        (
            {"tensors": [ON_META], **pruned(ONE.to("meta"), MEAN)},
            r"pruned_means: expected device meta as tensors\[0\], got cpu",
        ),
        ({"rows": 3}, r"tensors\[0\]: expected a multiple of 3 x 5 elements, got shape \(4, 5\)"),
        ({"rows": 0}, r"tensors\[0\]: expected a multiple of 0 x 5 elements, got shape \(4, 5\)"),
    ],
)
def test_invalid_arguments_are_refused(changes, message):
    arguments = {"tensors": [torch.zeros(4, 5)], "keep_rows": None, "keep_columns": None, "rows": 4, "columns": 5}
    with pytest.raises(ValueError, match=message):
        ops.gather_slices(**arguments | changes)


def test_torch_operator_checks_its_indices():
    with pytest.raises(ValueError, match="keep_rows: expected indices from 0 to 3, got 7 to 7"):
        torch.ops.kddp.gather_slices([torch.zeros(4, 5)], torch.tensor([7]), None, 4, 5, None, None)
