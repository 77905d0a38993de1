"""`fisher_loss`: the coefficients have the covariance of the loss's second derivative."""

import pytest
import torch
import torch.nn.functional as F

import kddp_ext


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (4.0, 1.0), (2.0, 0.7), (3.0, 0.0)])
def test_the_covariance_is_the_second_derivative_of_the_loss(temperature, alpha):
    torch.manual_seed(0)
    row = torch.randn(1, 5, dtype=torch.float64)
    label = torch.tensor([2])

    def loss(z):
        soft = F.kl_div(F.log_softmax(z / temperature, 1), F.softmax(row / temperature, 1), reduction="batchmean")
        return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(z, label)

    right = torch.autograd.functional.hessian(loss, row)[0, :, 0]
    rows = 200_000
    logits = row.repeat(rows, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(kddp_ext.fisher_loss(logits, temperature=temperature, alpha=alpha), logits)
    coefficients = gradient * rows
    torch.testing.assert_close(coefficients.mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=0.01)
    torch.testing.assert_close(coefficients.T @ coefficients / rows, right, rtol=0, atol=0.005)


def test_a_generator_makes_it_reproducible():
    logits = torch.randn(6, 4)
    values = [kddp_ext.fisher_loss(logits, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert values[0] == values[1] != kddp_ext.fisher_loss(logits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(3)}, ValueError, r"logits: expected \(N, C\) floating point, got torch.float32"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "logits: expected"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
        ({"alpha": 1.5}, ValueError, "alpha: expected a number from 0 to 1, got 1.5"),
        ({"alpha": "1"}, TypeError, "alpha"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        kddp_ext.fisher_loss(**{"logits": torch.zeros(2, 3), **arguments})
