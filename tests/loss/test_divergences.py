"""Definitions and mathematical properties of the divergences, for the kernels and for the reference."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import each_divergence, loss_and_gradient, standardized_or_not

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


def softmax(row):
    exponentials = [torch.exp(x - max(row)) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def kl(x, y):
    return sum(a * (a / b).log() for a, b in zip(x, y, strict=True))


def definition(p, q, label, divergence):
    """The divergence of two lists of probabilities, with beta = 0.3 and dkd's weights 2 and 5."""
    if divergence == "forward_kl":
        return kl(p, q)
    if divergence == "reverse_kl":
        return kl(q, p)
    if divergence == "jsd":
        m = [0.3 * a + 0.7 * b for a, b in zip(p, q, strict=True)]
        return 0.3 * kl(p, m) + 0.7 * kl(q, m)
    binary = [[x[label], 1 - x[label]] for x in (p, q)]
    others = [[value / (1 - x[label]) for c, value in enumerate(x) if c != label] for x in (p, q)]
    return 2 * kl(*binary) + 5 * kl(*others)


PARAMETERS = {"jsd_beta": 0.3, "dkd_target_weight": 2.0, "dkd_non_target_weight": 5.0}


@each_divergence
@standardized_or_not
def test_values_equal_the_definitions(logits, kd_and_gradient, divergence, standardize_logits):
    labels = torch.tensor([1, 4, 0, -100, 2, 22, 7, 7])
    settings = {"divergence": divergence, "standardize_logits": standardize_logits} | PARAMETERS
    total = 0.0
    for student, teacher, label in zip(*logits, labels.tolist(), strict=True):
        if label >= 0:
            if standardize_logits:
                student, teacher = ((x - x.mean()) / (x.var().sqrt() + 1e-7) for x in (student, teacher))
            total += definition(softmax(list(teacher / T)), softmax(list(student / T)), label, divergence)
    kd, gradient = kd_and_gradient(*logits, labels, **settings)
    torch.testing.assert_close(kd, T**2 * total / 7, rtol=1e-12, atol=0)
    assert not gradient[3].any()


def test_gradients_equal_their_closed_forms(logits, kd_and_gradient):
    q, p = (F.softmax(x / T, 1) for x in logits)
    m = 0.3 * p + 0.7 * q
    ratio, to_mixture = (q / p).log(), (q / m).log()
    at_label = F.one_hot(LABELS, 23).double()
    others_q, others_p = (x * (1 - at_label) / (1 - x[at_label.bool()])[:, None] for x in (q, p))
    excess = ((q - p) * at_label).sum(1, keepdim=True)
    closed = {
        "forward_kl": q - p,
        "reverse_kl": q * (ratio - (q * ratio).sum(1, keepdim=True)),
        "jsd": 0.7 * q * (to_mixture - (q * to_mixture).sum(1, keepdim=True)),
        "dkd": 2 * excess * (at_label - others_q) + 5 * (others_q - others_p),
    }
    for divergence, gradient in closed.items():
        _, ours = kd_and_gradient(*logits, divergence=divergence, **PARAMETERS)
        torch.testing.assert_close(ours, gradient * T / 8, rtol=1e-10, atol=1e-14)


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


@each_divergence
@standardized_or_not
def test_divergences_are_at_least_zero(kd_and_gradient, divergence, standardize_logits):
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-3, 0.1, 3.0):
        sides = torch.randn(2, 40, 9, generator=generator).double() * scale
        for row in range(40):
            settings = {"divergence": divergence, "standardize_logits": standardize_logits}
            value, _ = kd_and_gradient(*sides[:, row : row + 1], LABELS[:1], **settings)
            assert value >= -1e-14


@each_divergence
@standardized_or_not
def test_alpha_and_temperature_weigh_value_and_gradient(logits, kd_and_gradient, divergence, standardize_logits):
    """loss = alpha · T² · D + (1 - alpha) · CE; the cross entropy uses the logits without standardisation."""
    settings = {"divergence": divergence, "standardize_logits": standardize_logits}
    kd, kd_gradient = kd_and_gradient(*logits, **settings)
    ce, ce_gradient = kd_and_gradient(*logits, alpha=0.0, **settings)
    both, both_gradient = kd_and_gradient(*logits, alpha=0.3, **settings)
    torch.testing.assert_close(ce, F.cross_entropy(logits[0], LABELS), rtol=1e-13, atol=0)
    torch.testing.assert_close(both, 0.3 * kd + 0.7 * ce, rtol=1e-12, atol=0)
    torch.testing.assert_close(both_gradient, 0.3 * kd_gradient + 0.7 * ce_gradient, rtol=1e-11, atol=1e-14)
