"""The reference's standardised logits; tests/loss/test_divergences.py holds the rest of it to definitions."""

import pytest
import torch

from kddp_ext.ops.reference import standardized


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.1, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_logits_standardize_to_zero(value, dtype):
    row = torch.full((1, 7), value, dtype=dtype, requires_grad=True)
    z = standardized(row)
    assert not z.any()
    (gradient,) = torch.autograd.grad(z[0, 2], row)
    through_mean = torch.full((1, 7), -1 / 7, dtype=dtype)
    through_mean[0, 2] += 1
    torch.testing.assert_close(gradient * 1e-7, through_mean)


def test_standardized_uses_pytorchs_mean_and_deviation():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(21), dtype=torch.float64)
    logits *= torch.tensor([[2.0], [2e3], [2e-6]])
    plain = (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)
    torch.testing.assert_close(standardized(logits), plain, rtol=1e-12, atol=1e-12)
    huge = standardized(torch.tensor([[1e30, 0.0, 0.0, -1e30]]))
    torch.testing.assert_close(huge, torch.tensor([[1.5**0.5, 0.0, 0.0, -(1.5**0.5)]]))
