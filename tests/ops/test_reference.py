"""The truth that the kernels are tested against, itself held to definitions and to finite differences."""

import pytest
import torch
from loss_cases import DIVERGENCES

import kddp_ext
from kddp_ext.ops.reference import standardized

T = 2.5
LABELS = torch.tensor([1, 4, 0, -100, 2])
INFINITY = float("inf")

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
standardized_or_not = pytest.mark.parametrize("standardize_logits", [False, True])


@pytest.fixture
def logits():
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(21), dtype=torch.float64) * 2


def kd_and_gradient(student, teacher, **settings):
    leaf = student.clone().requires_grad_()
    options = {"temperature": T, "alpha": 1.0, "backend": "reference"} | settings
    loss = kddp_ext.fused_kd_l1_loss(leaf, teacher, LABELS, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def softmax(row):
    """Of a list of numbers, by its definition."""
    exponentials = [torch.exp(x - max(row)) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def kl(x, y):
    return sum(a * (a / b).log() for a, b in zip(x, y, strict=True))


def divergence_of(p, q, label, divergence):
    """Of two lists of probabilities; beta is 0.3, the weights of dkd are 2 and 5."""
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


@each_divergence
@standardized_or_not
def test_definitions_number_by_number(logits, divergence, standardize_logits):
    total = 0.0
    for student, teacher, label in zip(*logits, LABELS.tolist(), strict=True):
        if label >= 0:
            if standardize_logits:
                student, teacher = ((x - x.mean()) / (x.var().sqrt() + 1e-7) for x in (student, teacher))
            total += divergence_of(softmax(list(teacher / T)), softmax(list(student / T)), label, divergence)
    weights = {"jsd_beta": 0.3, "dkd_target_weight": 2.0, "dkd_non_target_weight": 5.0}
    settings = {"divergence": divergence, "standardize_logits": standardize_logits}
    kd, gradient = kd_and_gradient(*logits, **settings, **weights)
    torch.testing.assert_close(kd, T**2 * total / 4, rtol=1e-12, atol=0)
    assert not gradient[3].any()


@each_divergence
@standardized_or_not
def test_gradcheck(logits, divergence, standardize_logits):
    def function(student):
        settings = {"divergence": divergence, "standardize_logits": standardize_logits, "backend": "reference"}
        return kddp_ext.fused_kd_l1_loss(student, logits[1], LABELS, temperature=T, alpha=0.7, **settings)

    assert torch.autograd.gradcheck(function, (logits[0].requires_grad_(),))


@each_divergence
@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("classes", [slice(1, 2), slice(5, 7)])
def test_excluded_classes_leave_numbers(logits, divergence, sides, classes):
    """A label's class or others, excluded by the student, by the teacher or by both: no NaN, infinite where it is."""
    for side in sides:
        logits[side, :, classes] = -INFINITY
    kd, gradient = kd_and_gradient(*logits, divergence=divergence)
    infinite = {"forward_kl": (0,), "reverse_kl": (1,), "jsd": None, "dkd": (0,)}[divergence] == sides
    assert kd.isinf() == infinite
    assert not kd.isnan()
    assert gradient.isfinite().all()
    if sides == (0, 1):
        assert not gradient[:, classes].any()


@each_divergence
@standardized_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [1e3 * T, 1e30])
def test_margins_leave_numbers(logits, divergence, standardize_logits, dtype, margin):
    student, teacher = logits.to(dtype)
    student[0, 3], teacher[0, 5], student[1, 4], teacher[2, 0], teacher[4, 1] = margin, margin, -margin, -margin, margin
    settings = {"divergence": divergence, "standardize_logits": standardize_logits}
    kd, gradient = kd_and_gradient(student, teacher, **settings)
    assert kd.isfinite()
    assert kd > 0
    assert gradient.isfinite().all()


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


def test_standardized_is_pytorchs_mean_and_deviation(logits):
    logits = torch.cat([logits[0], logits[1] * 1e3, logits[0] * 1e-6])
    plain = (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)
    torch.testing.assert_close(standardized(logits), plain, rtol=1e-12, atol=1e-12)
    huge = standardized(torch.tensor([[1e30, 0.0, 0.0, -1e30]]))
    torch.testing.assert_close(huge, torch.tensor([[1.5**0.5, 0.0, 0.0, -(1.5**0.5)]]))


@each_divergence
@standardized_or_not
def test_ignored_rows_count_exactly_nothing(logits, divergence, standardize_logits):
    settings = {"divergence": divergence, "standardize_logits": standardize_logits}
    kd, gradient = kd_and_gradient(*logits, **settings)
    for value in (float("nan"), INFINITY, -INFINITY, 0.0):
        logits[:, 3] = value
        same, of_same = kd_and_gradient(*logits, **settings)
        assert torch.equal(same, kd)
        assert torch.equal(of_same, gradient)


@each_divergence
def test_the_teacher_gets_no_gradient(logits, divergence):
    teacher = logits[1].requires_grad_()
    student = logits[0].requires_grad_()
    kddp_ext.fused_kd_l1_loss(student, teacher, LABELS, divergence=divergence, backend="reference").backward()
    assert teacher.grad is None
    assert student.grad is not None
