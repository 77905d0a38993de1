"""The formulas of other libraries' distillation losses, and the call of `fused_kd_l1_loss` that equals each.

docs/losses.md has the table; each of its rows names its test here.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loss_cases import loss_and_gradient

import kddp_ext

T = 3.0


C = 31


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(7)
    student, teacher = torch.randn(2, 12, C, generator=generator, dtype=torch.float64) * 3
    return student, teacher, torch.randint(0, C, (12,), generator=generator)


@pytest.fixture
def tokens(batch):
    """Three sequences of four tokens, five of which are padding."""
    student, teacher, labels = batch
    labels[[2, 3, 7, 10, 11]] = -100
    return student.view(3, 4, C), teacher.view(3, 4, C), labels.view(3, 4)


def assert_equal(batch, theirs, factor=1.0, **settings):
    """`factor` times our loss equals `theirs` in value and gradient, in the kernels and in the reference."""
    student, teacher, labels = batch
    leaf = student.clone().requires_grad_()
    value = theirs(leaf, teacher, labels)
    (gradient,) = torch.autograd.grad(value, leaf)
    for backend in ("native", "reference"):
        ours, ours_gradient = loss_and_gradient(*batch, backend=backend, **({"temperature": T} | settings))
        torch.testing.assert_close(factor * ours, value.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(factor * ours_gradient, gradient, rtol=1e-8, atol=1e-12)


def kl(teacher, student, reduction="batchmean"):
    return F.kl_div(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1), reduction=reduction)


def divergence_of_tokens(student, teacher, beta):
    """The generalised JSD with the weight `beta` on the teacher; its ends are the forward and the reverse KL."""
    log_q, log_p = (F.log_softmax(x / T, -1) for x in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    log_m = log_q if beta == 0 else log_p if beta == 1 else (beta * p + (1 - beta) * q).log()
    forward, reverse = (p * (log_p - log_m)).sum(-1), (q * (log_q - log_m)).sum(-1)
    return forward if beta == 0 else reverse if beta == 1 else beta * forward + (1 - beta) * reverse


# The settings of this package for a `beta` of TRL or Liger Kernel.
OF_BETA = {
    0.0: {"divergence": "forward_kl"},
    0.1: {"divergence": "jsd", "jsd_beta": 0.1},
    0.5: {"divergence": "jsd", "jsd_beta": 0.5},
    1.0: {"divergence": "reverse_kl"},
}
each_beta = pytest.mark.parametrize(("beta", "settings"), OF_BETA.items(), ids=map(str, OF_BETA))


def test_every_row_of_the_table_has_its_test():
    page = Path(__file__).parents[2].joinpath("docs", "losses.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)` \|$", page, re.MULTILINE)
    here = {name for name in globals() if name.startswith("test_")}
    assert len(named) == len(set(named))
    assert here == {*named, "test_every_row_of_the_table_has_its_test"}


def test_hinton_as_repdistiller_has_it(batch):
    """gamma · CE + alpha · T² · KL, with the mean of KL over the batch."""
    assert_equal(batch, lambda s, t, y: 0.1 * F.cross_entropy(s, y) + 0.9 * T**2 * kl(t, s), alpha=0.9)


def test_weights_that_do_not_add_up_to_one(batch):
    """mdistiller's KD (CE weight 0.1, KD weight 0.9) and any other two weights: our loss times their sum."""
    ce, kd = 1.0, 3.0

    def theirs(s, t, y):
        return ce * F.cross_entropy(s, y) + kd * T**2 * kl(t, s)

    assert_equal(batch, theirs, factor=ce + kd, alpha=kd / (ce + kd))


@pytest.mark.parametrize("beta", [None, 2.0])
def test_torchdistill_with_targets(batch, beta):
    """alpha weights the cross entropy, beta the divergence; beta is 1 - alpha by default."""
    alpha = 0.3
    w_kd = 1 - alpha if beta is None else beta

    def theirs(s, t, y):
        return alpha * F.cross_entropy(s, y) + w_kd * T**2 * kl(t, s)

    assert_equal(batch, theirs, factor=alpha + w_kd, alpha=w_kd / (alpha + w_kd))


def test_torchdistill_without_targets(batch):
    """With alpha None or 0, or without targets, KDLoss is the divergence without T² and without beta."""
    assert_equal(batch, lambda s, t, y: kl(t, s), factor=1 / T**2, alpha=1.0)


def test_modelopt_averages_over_the_classes_as_well(batch):
    """LogitsDistillationLoss with its default, reduction="mean" of F.kl_div."""
    assert_equal(batch, lambda s, t, y: T**2 * kl(t, s, reduction="none").mean(), factor=1 / C, alpha=1.0)


def test_modelopt_with_batchmean(tokens):
    """The mean over all tokens; without labels none is padding."""

    def theirs(s, t, y):
        return T**2 * kl(t.flatten(0, 1), s.flatten(0, 1))

    assert_equal((*tokens[:2], None), theirs, alpha=1.0)


def test_mmrazor_divides_images_by_their_number_only(batch):
    """KLDivergence of (N, C, H, W): the sum over pixels, divided by N."""
    student, teacher, _ = batch
    images = [x.view(2, 6, C).movedim(-1, 1).unflatten(-1, (2, 3)) for x in (student, teacher)]
    assert_equal((*images, None), lambda s, t, y: T**2 * kl(t, s), alpha=1.0, class_dim=1, normalizer=2)


@pytest.mark.parametrize("alpha", [0.1, 0.9])
def test_haitongli_and_deit_average_over_the_classes_as_well(batch, alpha):
    """The divergence is the mean over N · C elements, so it is C times smaller."""

    def theirs(s, t, y):
        return (1 - alpha) * F.cross_entropy(s, y) + alpha * T**2 * kl(t, s, reduction="sum") / s.numel()

    total = alpha / C + (1 - alpha)
    assert_equal(batch, theirs, factor=total, alpha=alpha / C / total)


def test_textbrewer_has_no_temperature_squared(batch):
    """The cross entropy with the teacher's softmax: the gradient of KL / T², with another value."""

    def theirs(s, t, y):
        entropy = -(F.softmax(t / T, 1) * F.log_softmax(t / T, 1)).sum(1).mean()
        return -(F.softmax(t / T, 1) * F.log_softmax(s / T, 1)).sum(1).mean() - entropy

    assert_equal(batch, theirs, factor=1 / T**2, alpha=1.0)


@each_beta
def test_trl_with_labels(tokens, beta, settings):
    """GKD and its relatives: the mean over the tokens that are not padding, no T²."""

    def theirs(s, t, y):
        return divergence_of_tokens(s, t, beta)[y != -100].mean()

    assert_equal(tokens, theirs, factor=1 / T**2, alpha=1.0, **settings)


@each_beta
def test_trl_without_labels(tokens, beta, settings):
    """The sum over all tokens, divided by the number of sequences."""
    student, teacher, _ = tokens

    def theirs(s, t, y):
        return divergence_of_tokens(s, t, beta).sum() / len(s)

    assert_equal((student, teacher, None), theirs, factor=1 / T**2, alpha=1.0, normalizer=3, **settings)


@each_beta
def test_trl_with_num_items_in_batch(tokens, beta, settings):
    """The sum over the tokens that are not padding, divided by their number in all micro-batches and processes."""
    items = torch.tensor(57)

    def theirs(s, t, y):
        return divergence_of_tokens(s, t, beta)[y != -100].sum() / items

    assert_equal(tokens, theirs, factor=1 / T**2, alpha=1.0, normalizer=items, **settings)


@each_beta
def test_liger_fused_linear_jsd(tokens, beta, settings):
    """LigerFusedLinearJSD: the mean over the rows that are not padding, no T²; it computes the logits itself."""
    student, teacher, labels = (x.flatten(0, 1) for x in tokens)

    def theirs(s, t, y):
        return torch.where(y == -100, 0, divergence_of_tokens(s, t, beta)).sum() / (y != -100).sum()

    assert_equal((student, teacher, labels), theirs, factor=1 / T**2, alpha=1.0, **settings)


@each_beta
def test_liger_fused_linear_jsd_loss(tokens, beta, settings):
    """The chunked LigerFusedLinearJSDLoss: weight_hard_loss · CE + weight_soft_loss · JSD, no T²."""
    batch = tuple(x.flatten(0, 1) for x in tokens)
    hard, soft = 0.5, 0.25

    def theirs(s, t, y):
        valid = y != -100
        jsd = divergence_of_tokens(s, t, beta)[valid].sum() / valid.sum()
        return hard * F.cross_entropy(s, y) + soft * jsd

    total = hard + soft / T**2
    assert_equal(batch, theirs, factor=total, alpha=soft / T**2 / total, **settings)


def of_distillm(tokens, loss_of_token):
    """The mean of a loss of two rows of probabilities over the tokens that are not padding, without a temperature."""
    batch = tuple(x.flatten(0, 1) for x in tokens)

    def theirs(s, t, y):
        losses = loss_of_token(F.softmax(s, -1), F.softmax(t, -1))
        return (losses * (y != -100)).sum() / (y != -100).sum()

    return batch, theirs


@pytest.mark.parametrize("lam", [0.1, 0.7])
def test_distillm_skewed_forward_kl(tokens, lam):
    """The gradient is that of the skewed KL; the value differs by the teacher's entropy."""
    batch, theirs = of_distillm(tokens, lambda q, p: (p * (p.log() - (lam * p + (1 - lam) * q).log())).sum(-1))
    assert_equal(batch, theirs, alpha=1.0, temperature=1.0, divergence="skew_kl", skew=lam)


@pytest.mark.parametrize("lam", [0.1, 0.7])
def test_distillm_skewed_reverse_kl(tokens, lam):
    batch, theirs = of_distillm(tokens, lambda q, p: (q * (q.log() - ((1 - lam) * p + lam * q).log())).sum(-1))
    assert_equal(batch, theirs, alpha=1.0, temperature=1.0, divergence="skew_reverse_kl", skew=lam)


@pytest.mark.parametrize("lam", [0.1, 0.9])
def test_distillm_js_distance(tokens, lam):
    def of_token(q, p):
        m = (1 - lam) * p + lam * q
        return (1 - lam) * (p * (p / m).log()).sum(-1) + lam * (q * (q / m).log()).sum(-1)

    batch, theirs = of_distillm(tokens, of_token)
    assert_equal(batch, theirs, alpha=1.0, temperature=1.0, divergence="jsd", jsd_beta=1 - lam)


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
