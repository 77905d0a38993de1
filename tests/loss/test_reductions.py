"""Reductions, normalizer, weights, and logits of other shapes, against eager PyTorch's formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DTYPES, each_divergence

import kddp_ext

T, ALPHA = 3.0, 0.6


def rows_of(student, teacher, labels, class_weights=None):
    """KD and CE of each row, (2, N); 0 for ignored rows."""
    p, q = ((x / T).log_softmax(1) for x in (teacher, student))
    kd = T**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(1)
    ce = F.cross_entropy(student, labels, weight=class_weights, reduction="none")
    return torch.where(labels == -100, 0, torch.stack([kd, ce]))


@pytest.fixture(params=["native", "reference"])
def loss_of(request):
    def function(student, teacher, labels, *arguments, **options):
        options = {"temperature": T, "alpha": ALPHA, "backend": request.param, **options}
        return kddp_ext.fused_kd_l1_loss(student, teacher, labels, *arguments, **options)

    return function


def batch(rows=9, classes=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, rows, classes, generator=generator)).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[::4] = -100
    return student.requires_grad_(), teacher, labels


def assert_same(ours, theirs, leaf, weights=None):
    """The same value and gradient."""
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, leaf, weights, retain_graph=True) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_sum_and_normalizer(loss_of):
    student, teacher, labels = batch()
    kd, ce = rows_of(student, teacher, labels).sum(1)
    total = ALPHA * kd + (1 - ALPHA) * ce
    assert_same(loss_of(student, teacher, labels, reduction="sum"), total, student)
    for normalizer in (5, torch.tensor(5.0)):
        assert_same(loss_of(student, teacher, labels, normalizer=normalizer), total / 5, student)


@pytest.mark.parametrize("alpha", [0.0, ALPHA, 1.0])
def test_none_gives_a_value_and_a_gradient_for_each_row(loss_of, alpha):
    student, teacher, labels = batch()
    loss, terms = loss_of(student, teacher, labels, reduction="none", alpha=alpha, return_terms=True)
    kd, ce = rows_of(student, teacher, labels)
    assert_same(loss, alpha * kd + (1 - alpha) * ce, student, torch.linspace(-1, 2, len(labels), dtype=torch.float64))
    torch.testing.assert_close((terms.kd, terms.ce), (kd.detach(), ce.detach()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", ["samples", "classes", "both"])
def test_weights(loss_of, reduction, weights):
    student, teacher, labels = batch()
    sample_weights = torch.linspace(0, 2, len(labels), dtype=torch.float64) if weights != "classes" else None
    class_weights = torch.linspace(0.5, 3, 7, dtype=torch.float64) if weights != "samples" else None
    loss = loss_of(
        student, teacher, labels, sample_weights=sample_weights, class_weights=class_weights, reduction=reduction
    )
    kd, ce = rows_of(student, teacher, labels, class_weights)
    of_rows = (labels != -100).double() if sample_weights is None else sample_weights * (labels != -100)
    of_labels = of_rows if class_weights is None else of_rows * class_weights[labels.clamp(min=0)]
    kd, ce = of_rows * kd, of_rows * ce
    if reduction == "mean":
        kd, ce = kd.sum() / of_rows.sum(), ce.sum() / of_labels.sum()
    if reduction == "sum":
        kd, ce = kd.sum(), ce.sum()
    assert_same(loss, ALPHA * kd + (1 - ALPHA) * ce, student, torch.ones_like(loss))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_cross_entropy_of_pytorch(loss_of, smoothing, weighted, soft, reduction):
    student, teacher, labels = batch()
    labels = teacher.softmax(1) * 1.5 if soft else labels
    weights = torch.linspace(0, 3, 7, dtype=torch.float64) if weighted else None
    loss, terms = loss_of(
        *(student, None, labels),
        alpha=0.0,
        class_weights=weights,
        label_smoothing=smoothing,
        reduction=reduction,
        return_terms=True,
    )
    wanted = F.cross_entropy(student, labels, weights, label_smoothing=smoothing, reduction=reduction)
    assert_same(loss, wanted, student, torch.ones_like(loss))
    torch.testing.assert_close(terms.ce, wanted.detach())


@pytest.mark.parametrize("class_dim", [1, -1])
def test_soft_labels_with_a_teacher_and_sample_weights(loss_of, class_dim):
    student, teacher, _ = batch()
    labels = torch.rand(9, 7, generator=torch.Generator().manual_seed(1)).softmax(1).double()
    weights = torch.linspace(0, 2, 9, dtype=torch.float64)
    kd = rows_of(student, teacher, torch.zeros(9, dtype=torch.int64))[0]
    ce = F.cross_entropy(student, labels, reduction="none")
    wanted = (weights * (ALPHA * kd + (1 - ALPHA) * ce)).sum() / weights.sum()
    loss, terms = loss_of(
        *(x.reshape(3, 3, 7).movedim(-1, class_dim) for x in (student, teacher, labels)),
        sample_weights=weights.reshape(3, 3),
        class_dim=class_dim,
        return_terms=True,
    )
    assert_same(loss, wanted, student)
    assert terms.correct == ((student.argmax(1) == labels.argmax(1)) & (weights > 0)).sum()


def test_the_module_moves_its_class_weights():
    module = kddp_ext.FusedKDL1Loss(class_weights=torch.ones(7))
    assert module.to(torch.float64).class_weights.dtype == torch.float64
    assert module.to("meta").class_weights.device.type == "meta"


def test_rows_of_weight_0_have_no_effect_whatever_they_contain(loss_of):
    student, teacher, labels = batch()
    weights = torch.ones(9)
    weights[3] = 0
    wanted = loss_of(student, teacher, labels, sample_weights=weights)
    broken = student.detach().clone()
    broken[3] = torch.nan
    loss = loss_of(broken.requires_grad_(), teacher, labels, sample_weights=weights)
    torch.testing.assert_close(loss, wanted)
    (gradient,) = torch.autograd.grad(loss, broken)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, student)[0])
    assert not gradient[3].any()
    assert loss_of(student, teacher, labels, sample_weights=torch.zeros(9)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_micro_batches_with_a_normalizer_equal_one_batch(loss_of, dtype):
    student, teacher, labels = batch(rows=32, dtype=dtype)
    labels[labels == -100] = 0  # every row counts
    hidden = torch.randn(32, 5, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    images = torch.randn(32, 4, 3, 3, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
    leaves, options = (student, hidden, images), {"l1_weight": [0.1, 0.2]}

    def part(start, end, **others):
        rows = slice(start, end)
        return loss_of(student[rows], teacher[rows], labels[rows], [hidden[rows], images[rows]], **options, **others)

    parts = [part(start, end, normalizer=32) for start, end in ((0, 3), (3, 20), (20, 32))]
    rtol, atol = (1e-12, 1e-15) if dtype == torch.float64 else (2e-3, 1e-6)
    torch.testing.assert_close(sum(parts), part(0, 32), rtol=rtol, atol=atol)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (sum(parts), part(0, 32))]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("shape", "class_dim"), [((7,), -1), ((3, 5, 7), -1), ((3, 5, 7), 2), ((2, 7, 3, 4), 1), ((7, 6), 0)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_of_other_shapes(loss_of, shape, class_dim, reduction):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    labels = torch.randint(0, 7, shape[:class_dim] + shape[class_dim:][1:], generator=generator)
    loss = loss_of(student, teacher, labels, class_dim=class_dim, reduction=reduction)
    flat = [x.movedim(class_dim, -1).reshape(-1, 7) for x in (student, teacher)]
    wanted = loss_of(*flat, labels.reshape(-1), reduction=reduction)
    assert_same(loss, wanted if reduction == "mean" else wanted.reshape(labels.shape), student, torch.ones_like(loss))


def test_one_tensor_as_activations(loss_of):
    student, teacher, labels = batch()
    activation = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    one, several = (loss_of(student, teacher, labels, x, l1_weight=0.1) for x in (activation, [activation]))
    assert_same(one, several, activation)


@each_divergence
@given(
    rows=st.integers(1, 40),
    classes=st.integers(2, 300),
    dtype=st.sampled_from(sorted(DTYPES)),
    reduction=st.sampled_from(["mean", "sum", "none", "normalizer"]),
    soft=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15)
def test_errors_are_at_most_twice_pytorchs(divergence, rows, classes, dtype, reduction, soft, smoothing, seed):
    student, teacher, labels = batch(rows, classes, DTYPES[dtype], seed)
    generator = torch.Generator().manual_seed(seed)
    options = {"normalizer": 3.7} if reduction == "normalizer" else {"reduction": reduction}
    if soft and divergence != "dkd":
        labels = torch.randn(rows, classes, generator=generator).softmax(1).to(DTYPES[dtype])
    options |= {"temperature": T, "alpha": ALPHA, "divergence": divergence, "label_smoothing": smoothing}
    options |= {"sample_weights": torch.rand(rows, generator=generator)}
    options |= {"class_weights": torch.rand(classes, generator=generator)}

    def evaluate(backend, dtype):
        leaf = student.detach().to(dtype).requires_grad_()
        loss = kddp_ext.fused_kd_l1_loss(leaf, teacher.to(dtype), labels, backend=backend, **options)
        return loss.detach(), *torch.autograd.grad(loss, leaf, torch.ones_like(loss))

    results = [evaluate("native", student.dtype), evaluate("reference", student.dtype)]
    for ours, theirs, truth in zip(*results, evaluate("reference", torch.float64), strict=True):
        errors = [(x.double() - truth).abs().max() for x in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(ours.dtype).eps * truth.abs().max() + 1e-7
