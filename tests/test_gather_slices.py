"""The native gather against plain indexing, over drawn shapes, dtypes and indices."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kddp_ext import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]


def indices(size):
    return st.none() | st.lists(st.integers(0, size - 1), unique=True).map(lambda i: torch.tensor(i, dtype=torch.int64))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=st.integers(1, 40), columns=st.integers(1, 40), inner=st.sampled_from([1, 1, 3, 9]))
def test_equals_indexing(data, rows, columns, inner):
    keep_rows, keep_columns = data.draw(indices(rows)), data.draw(indices(columns))
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4))
    tensors = [(torch.randn(rows, columns * inner) * 9).to(dtype) for dtype in dtypes]
    tensors.append(torch.randn(columns * inner, rows).t())
    arguments = (tensors, keep_rows, keep_columns)
    gathered, _ = ops.gather_slices(*arguments, rows=rows, columns=columns)
    truth, _ = reference.gather_slices(*arguments, rows=rows, columns=columns)
    for ours, true in zip(gathered, truth, strict=True):
        assert ours.is_contiguous()
        assert ours.dtype == true.dtype
        assert torch.equal(ours, true)


def test_vectors_and_convolutions():
    keep = torch.tensor([4, 0])
    vector = torch.arange(6.0)
    assert ops.gather_slices([vector], keep, None, rows=6, columns=1)[0][0].tolist() == [4, 0]
    kernel = torch.randn(6, 5, 3, 3)
    (smaller,), _ = ops.gather_slices([kernel], keep, torch.tensor([1]), rows=6, columns=5)
    assert torch.equal(smaller, kernel[keep][:, [1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_the_pruned_columns_contributed(dtype):
    weight = torch.randn(7, 10 * 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep_rows, kept, pruned = torch.tensor([6, 2]), torch.tensor([0, 1, 2, 5, 8, 9]), torch.tensor([3, 4, 6, 7])
    means = torch.randn(4, dtype=torch.float64)
    _, shift = ops.gather_slices(
        [weight], keep_rows, kept, rows=7, columns=10, pruned_columns=pruned, pruned_means=means
    )
    truth = weight.double().reshape(7, 10, 2)[keep_rows][:, pruned].sum(2) @ means
    torch.testing.assert_close(shift, truth)


def test_a_gather_worth_threads():
    weight = torch.randn(1000, 1200)
    keep = torch.arange(0, 1000, 2)
    (smaller,), _ = ops.gather_slices([weight], keep, keep, rows=1000, columns=1200)
    assert torch.equal(smaller, weight[keep][:, keep])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_rows": torch.tensor([4])}, "keep_rows: expected indices from 0 to 3, got 4 to 4"),
        ({"keep_columns": torch.tensor([-1, 2])}, "keep_columns: expected indices from 0 to 4, got -1 to 2"),
        ({"keep_rows": torch.tensor([1.0])}, "keep_rows: expected a contiguous vector of int64, got torch.float32"),
        ({"pruned_columns": torch.tensor([9])}, "pruned_columns: expected indices from 0 to 4"),
        ({"rows": 3}, r"tensors\[0\]: expected a multiple of 3 x 5 elements, got shape \(4, 5\)"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"keep_rows": None, "keep_columns": None, "rows": 4, "columns": 5} | changes
    with pytest.raises(ValueError, match=message):
        ops.gather_slices([torch.zeros(4, 5)], **arguments)
