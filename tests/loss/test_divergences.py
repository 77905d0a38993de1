"""What holds of the divergences by their mathematics, whoever computes them: the kernels, and the reference."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import DIVERGENCES

import kddp_ext

T = 2.5
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
standardized_or_not = pytest.mark.parametrize("standardize_logits", [False, True])


@pytest.fixture(params=["native", "reference"])
def backend(request):
    return request.param


@pytest.fixture
def logits():
    return torch.randn(2, 8, 23, generator=torch.Generator().manual_seed(11), dtype=torch.float64) * 3


LABELS = torch.arange(8)


def kd_and_gradient(student, teacher, labels=LABELS, **settings):
    """T² · D, averaged over the rows, and its gradient."""
    leaf = student.clone().requires_grad_()
    options = {"temperature": T, "alpha": 1.0} | settings
    loss = kddp_ext.fused_kd_l1_loss(leaf, teacher, labels, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def probabilities(student, teacher):
    return F.softmax(student / T, 1), F.softmax(teacher / T, 1)


def test_gradients_in_closed_form(logits, backend):
    student, teacher = logits
    q, p = probabilities(student, teacher)
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
        _, ours = kd_and_gradient(
            student,
            teacher,
            divergence=divergence,
            jsd_beta=0.3,
            dkd_target_weight=2.0,
            dkd_non_target_weight=5.0,
            backend=backend,
        )
        torch.testing.assert_close(ours, gradient * T / 8, rtol=1e-10, atol=1e-14)


def test_reverse_is_forward_with_the_sides_exchanged(logits, backend):
    student, teacher = logits
    reverse, _ = kd_and_gradient(student, teacher, divergence="reverse_kl", backend=backend)
    forward, _ = kd_and_gradient(teacher, student, backend=backend)
    torch.testing.assert_close(reverse, forward, rtol=1e-13, atol=0)


def test_jsd_exchanges_its_sides_with_beta(logits, backend):
    student, teacher = logits
    one, _ = kd_and_gradient(student, teacher, divergence="jsd", jsd_beta=0.2, backend=backend)
    other, _ = kd_and_gradient(teacher, student, divergence="jsd", jsd_beta=0.8, backend=backend)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("beta", "limit"), [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_jsd_near_its_ends(logits, backend, beta, limit):
    """JSD / beta tends to the forward divergence as beta goes to 0, JSD / (1 - beta) to the reverse one at 1."""
    jsd = kd_and_gradient(*logits, divergence="jsd", jsd_beta=beta, backend=backend)
    end = kd_and_gradient(*logits, divergence=limit, backend=backend)
    scale = min(beta, 1 - beta)
    torch.testing.assert_close(jsd[0] / scale, end[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(jsd[1] / scale, end[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_bounded_by_the_entropy_of_its_weights(backend, beta):
    """Reached where the two have no class in common."""
    student, teacher = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    student[:, 0], teacher[:, 1] = 1e5, 1e5
    ours, gradient = kd_and_gradient(student, teacher, LABELS[:2], divergence="jsd", jsd_beta=beta, backend=backend)
    weights = torch.tensor([beta, 1 - beta], dtype=torch.float64)
    torch.testing.assert_close(ours / T**2, -(weights * weights.log()).sum(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, torch.zeros(2, 4).double(), rtol=0, atol=1e-15)


def test_dkd_weighted_by_the_teachers_doubt_is_forward_kl(logits, backend):
    """KL = TCKD + (1 - p_y) NCKD (Zhao et al., equation 7), and the gradients likewise."""
    for row in range(8):
        student, teacher = logits[:, row : row + 1]
        label = LABELS[row : row + 1]
        doubt = 1 - float(F.softmax(teacher / T, 1)[0, row])
        weights = {"dkd_target_weight": 1.0, "dkd_non_target_weight": doubt}
        ours = kd_and_gradient(student, teacher, label, divergence="dkd", backend=backend, **weights)
        forward = kd_and_gradient(student, teacher, label, backend=backend)
        torch.testing.assert_close(ours, forward, rtol=1e-10, atol=1e-13)


def test_dkd_is_linear_in_its_weights(logits, backend):
    def of(target, non_target):
        weights = {"dkd_target_weight": target, "dkd_non_target_weight": non_target}
        return kd_and_gradient(*logits, divergence="dkd", backend=backend, **weights)

    for both, target, other in zip(of(2.0, 3.0), of(1.0, 0.0), of(0.0, 1.0), strict=True):
        torch.testing.assert_close(both, 2 * target + 3 * other, rtol=1e-12, atol=1e-14)
    assert of(0.0, 0.0)[0] == 0
    assert not of(0.0, 0.0)[1].any()


@each_divergence
def test_standardized_logits_have_no_shift_and_no_scale(logits, backend, divergence):
    student, teacher = logits
    settings = {"divergence": divergence, "standardize_logits": True, "backend": backend}
    value, gradient = kd_and_gradient(student, teacher, **settings)
    moved, of_moved = kd_and_gradient(student * 7 - 100, teacher * 0.1 + 5, **settings)
    torch.testing.assert_close(moved, value, rtol=1e-5, atol=0)  # but for the 1e-7 beside the deviation
    torch.testing.assert_close(of_moved * 7, gradient, rtol=1e-4, atol=1e-8)
    # So there is no gradient along either.
    torch.testing.assert_close(gradient.sum(1), torch.zeros(8).double(), rtol=0, atol=1e-13)
    along = (gradient * (student - student.mean(1, keepdim=True))).sum(1)
    torch.testing.assert_close(along, torch.zeros(8).double(), rtol=0, atol=1e-7)


@each_divergence
def test_the_cross_entropy_sees_the_logits_as_they_are(logits, divergence):
    settings = {"divergence": divergence, "standardize_logits": True, "alpha": 0.5, "return_terms": True}
    _, terms = kddp_ext.fused_kd_l1_loss(*logits, LABELS, **settings)
    torch.testing.assert_close(terms.ce, F.cross_entropy(logits[0], LABELS), rtol=1e-13, atol=0)


@each_divergence
@standardized_or_not
def test_divergences_are_at_least_zero(backend, divergence, standardize_logits):
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-3, 0.1, 3.0):
        student, teacher = torch.randn(2, 40, 9, generator=generator) * scale
        settings = {"divergence": divergence, "standardize_logits": standardize_logits}
        for row in range(40):
            sides = student[row : row + 1].double(), teacher[row : row + 1].double()
            value, _ = kd_and_gradient(*sides, LABELS[:1], backend=backend, **settings)
            assert value >= -1e-14


@each_divergence
@standardized_or_not
def test_alpha_and_temperature_weigh_the_gradient(logits, backend, divergence, standardize_logits):
    """loss = alpha · T² · D + (1 - alpha) · CE, of which the terms are the parts."""
    student, teacher = logits
    settings = {"divergence": divergence, "standardize_logits": standardize_logits, "backend": backend}
    kd, of_kd = kd_and_gradient(student, teacher, **settings)
    ce, of_ce = kd_and_gradient(student, teacher, alpha=0.0, **settings)
    both, of_both = kd_and_gradient(student, teacher, alpha=0.3, **settings)
    torch.testing.assert_close(both, 0.3 * kd + 0.7 * ce, rtol=1e-12, atol=0)
    torch.testing.assert_close(of_both, 0.3 * of_kd + 0.7 * of_ce, rtol=1e-11, atol=1e-14)
