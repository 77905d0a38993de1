"""The formulas of other libraries' distillation losses, and the call of `fused_kd_l1_loss` that equals each.

docs/losses.md has the table; each of its rows names its test here.
"""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import loss_and_gradient

import kddp_ext

T = 3.0


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(7)
    student, teacher = torch.randn(2, 12, 31, generator=generator, dtype=torch.float64) * 3
    return student, teacher, torch.randint(0, 31, (12,), generator=generator)


def assert_equal(batch, theirs, factor=1.0, **settings):
    """`factor` times our loss equals `theirs` in value and gradient, in the kernels and in the reference."""
    student, teacher, labels = batch
    leaf = student.clone().requires_grad_()
    value = theirs(leaf, teacher, labels)
    (gradient,) = torch.autograd.grad(value, leaf)
    for backend in ("native", "reference"):
        ours, ours_gradient = loss_and_gradient(*batch, temperature=T, backend=backend, **settings)
        torch.testing.assert_close(factor * ours, value.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(factor * ours_gradient, gradient, rtol=1e-8, atol=1e-12)


def kl(teacher, student, reduction="batchmean"):
    return F.kl_div(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1), reduction=reduction)


def test_hinton_as_repdistiller_has_it(batch):
    """gamma · CE + alpha · T² · KL, with the mean of KL over the batch."""
    assert_equal(batch, lambda s, t, y: 0.1 * F.cross_entropy(s, y) + 0.9 * T**2 * kl(t, s), alpha=0.9)


def test_weights_that_do_not_add_up_to_one(batch):
    """mdistiller's KD (CE weight 0.1, KD weight 0.9) and any other two weights: our loss times their sum."""
    ce, kd = 1.0, 3.0

    def theirs(s, t, y):
        return ce * F.cross_entropy(s, y) + kd * T**2 * kl(t, s)

    assert_equal(batch, theirs, factor=ce + kd, alpha=kd / (ce + kd))


def test_torchdistill_puts_alpha_on_the_cross_entropy(batch):
    alpha = 0.3
    assert_equal(batch, lambda s, t, y: alpha * F.cross_entropy(s, y) + (1 - alpha) * T**2 * kl(t, s), alpha=1 - alpha)


def test_haitongli_averages_over_the_classes_as_well(batch):
    """F.kl_div's default reduction divides by N · C, so its KL is C times smaller."""
    alpha, classes = 0.9, 31

    def theirs(s, t, y):
        mean = kl(t, s, reduction="none").mean()  # equals reduction="mean", which warns
        return mean * (alpha * T * T) + F.cross_entropy(s, y) * (1 - alpha)

    total = alpha / classes + (1 - alpha)
    assert_equal(batch, theirs, factor=total, alpha=alpha / classes / total)


def test_textbrewer_has_no_temperature_squared(batch):
    """The cross entropy with the teacher's softmax: the gradient of KL / T², with another value."""

    def theirs(s, t, y):
        entropy = -(F.softmax(t / T, 1) * F.log_softmax(t / T, 1)).sum(1).mean()
        return -(F.softmax(t / T, 1) * F.log_softmax(s / T, 1)).sum(1).mean() - entropy

    assert_equal(batch, theirs, factor=1 / T**2, alpha=1.0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_trl_generalised_jsd(batch, beta):
    """GKD: the mixture by logsumexp, beta on the teacher, no T²."""

    def theirs(s, t, y):
        log_q, log_p = F.log_softmax(s / T, 1), F.log_softmax(t / T, 1)
        shares = torch.log(torch.tensor([1 - beta, beta], dtype=torch.float64))
        log_m = torch.logsumexp(torch.stack([log_q + shares[0], log_p + shares[1]]), 0)
        teacher = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
        student = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
        return beta * teacher + (1 - beta) * student

    assert_equal(batch, theirs, factor=1 / T**2, alpha=1.0, divergence="jsd", jsd_beta=beta)


def test_trl_at_its_ends(batch):
    """GKD with beta 0 is the forward divergence, with beta 1 the reverse one."""
    assert_equal(batch, lambda s, t, y: kl(t, s), factor=1 / T**2, alpha=1.0)
    assert_equal(batch, lambda s, t, y: kl(s, t), factor=1 / T**2, alpha=1.0, divergence="reverse_kl")


@pytest.mark.parametrize("skew", [0.1, 0.5])
def test_distillm_skewed_divergences(batch, skew):
    """The KL to a mixture that holds a share of its first argument, no T²."""

    def skewed(first, second):
        x, y = F.softmax(first / T, 1), F.softmax(second / T, 1)
        mixed = skew * x + (1 - skew) * y
        return (x * F.log_softmax(first / T, 1)).sum(1).mean() - (x * mixed.log()).sum(1).mean()

    options = {"factor": 1 / T**2, "alpha": 1.0, "skew": skew}
    assert_equal(batch, lambda s, t, y: skewed(t, s), divergence="skew_kl", **options)
    assert_equal(batch, lambda s, t, y: skewed(s, t), divergence="skew_reverse_kl", **options)


def test_jeffreys_divergence(batch):
    """The sum of the two KLs, which is twice our mean, no T²."""
    assert_equal(batch, lambda s, t, y: kl(t, s) + kl(s, t), factor=2 / T**2, alpha=1.0, divergence="symmetric_kl")


def test_mdistiller_dkd(batch):
    """alpha · TCKD + beta · NCKD, each with T²; NCKD masks the label by -1000."""
    alpha, beta = 1.0, 8.0

    def theirs(s, t, y):
        mask = F.one_hot(y, s.shape[1]).bool()
        q, p = F.softmax(s / T, 1), F.softmax(t / T, 1)
        binary = [torch.stack([x[mask], x[~mask].view(len(x), -1).sum(1)], 1) for x in (q, p)]
        tckd = F.kl_div(binary[0].log(), binary[1], reduction="sum") * T**2 / len(y)
        others = [x / T - 1000.0 * mask for x in (s, t)]
        nckd = F.kl_div(F.log_softmax(others[0], 1), F.softmax(others[1], 1), reduction="sum") * T**2 / len(y)
        return alpha * tckd + beta * nckd

    settings = {"divergence": "dkd", "dkd_target_weight": alpha, "dkd_non_target_weight": beta}
    assert_equal(batch, theirs, alpha=1.0, **settings)


def test_logit_standardisation(batch):
    """Each row minus its mean, divided by its deviation plus 1e-7, then Hinton's loss."""

    def theirs(s, t, y):
        s_z, t_z = ((x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True)) for x in (s, t))
        return 0.1 * F.cross_entropy(s, y) + 0.9 * T**2 * kl(t_z, s_z)

    assert_equal(batch, theirs, alpha=0.9, standardize_logits=True)


def test_keras_activity_regulariser():
    """λ · Σ|a| of a layer, divided by the batch size."""
    activation = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    logits = torch.zeros(6, 2, dtype=torch.float64)
    ours = kddp_ext.fused_kd_l1_loss(logits, logits, None, [activation], alpha=1.0, l1_weight=0.01)
    theirs = 0.01 * activation.abs().sum() / 6
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, activation)[0] for x in (ours, theirs)))
