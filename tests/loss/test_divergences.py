"""Definitions and mathematical properties of the divergences, for the kernels and for the reference."""

import pytest
import torch
from loss_cases import (
    Case,
    composite,
    each_divergence,
    each_form,
    evaluate,
    fused,
    loss_and_gradient,
    reference,
)

T = 2.5
LABELS = torch.arange(8)


@pytest.fixture
def logits():
    return torch.randn(2, 8, 23, generator=torch.Generator().manual_seed(11), dtype=torch.float64) * 3


@pytest.fixture(params=["native", "reference"])
def kd_and_gradient(request):
    """A function that computes T² · D, averaged over the rows, and its gradient."""

    def function(student, teacher, labels=LABELS, **settings):
        options = {"temperature": T, "alpha": 1.0, "backend": request.param} | settings
        return loss_and_gradient(student, teacher, labels, **options)

    return function


@each_form
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_value_and_gradient_equal_those_of_pytorchs_functions(logits, alpha, form):
    options = {"temperature": T, "alpha": alpha, "l1_weight": 0.2, "label_smoothing": 0.1, **form}
    options |= {"jsd_beta": 0.3, "dkd_target_weight": 2.0, "dkd_non_target_weight": 5.0}
    labels = torch.tensor([1, 4, 0, -100, 2, 22, 7, 7])
    case = Case(*logits, labels, [torch.ones(8, 1, dtype=torch.float64)], options)
    truth = evaluate(case, composite)
    for ours in (evaluate(case, fused), evaluate(case, reference)):
        torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.terms, truth.terms, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.gradients[0], truth.gradients[0], rtol=1e-10, atol=1e-14)
        assert not ours.gradients[0][3].any()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_at_most_the_entropy_of_its_weights(kd_and_gradient, beta):
    """Two distributions without a common class reach the bound."""
    student, teacher = torch.zeros(2, 2, 4, dtype=torch.float64)
    student[:, 0], teacher[:, 1] = 1e5, 1e5
    ours, gradient = kd_and_gradient(student, teacher, LABELS[:2], divergence="jsd", jsd_beta=beta)
    weights = torch.tensor([beta, 1 - beta], dtype=torch.float64)
    torch.testing.assert_close(ours / T**2, -(weights * weights.log()).sum(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, torch.zeros(2, 4).double(), rtol=0, atol=1e-15)


@each_divergence
def test_standardized_logits_ignore_shift_and_scale(logits, kd_and_gradient, divergence):
    student, teacher = logits
    settings = {"divergence": divergence, "standardize_logits": True}
    value, gradient = kd_and_gradient(student, teacher, **settings)
    moved, gradient_moved = kd_and_gradient(student * 7 - 100, teacher * 0.1 + 5, **settings)
    torch.testing.assert_close(moved, value, rtol=1e-5, atol=0)  # the 1e-7 in the denominator has a small effect
    torch.testing.assert_close(gradient_moved * 7, gradient, rtol=1e-4, atol=1e-8)
    # The gradient has no component along a shift or a change of scale.
    torch.testing.assert_close(gradient.sum(1), torch.zeros(8).double(), rtol=0, atol=1e-13)
    along = (gradient * (student - student.mean(1, keepdim=True))).sum(1)
    torch.testing.assert_close(along, torch.zeros(8).double(), rtol=0, atol=1e-7)


@each_form
def test_divergences_are_at_least_zero(kd_and_gradient, form):
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-3, 0.1, 3.0):
        sides = torch.randn(2, 40, 9, generator=generator).double() * scale
        for row in range(40):
            value, _ = kd_and_gradient(*sides[:, row : row + 1], LABELS[:1], **form)
            assert value >= -1e-14
