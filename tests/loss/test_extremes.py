"""Infinities, huge margins, empty and ignored batches, NaNs: what comes out, and what must not spread."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import DIVERGENCES, Case, evaluate, fused, reference, reverse_source

import kddp_ext

INFINITY = float("inf")

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
standardized_or_not = pytest.mark.parametrize("standardize_logits", [False, True])


def both(student, teacher, labels, **settings):
    """Our result, after it has been found equal to the reference's in float64."""
    options = {"temperature": 4.0, "alpha": 0.9, "l1_weight": 0.0, "label_smoothing": 0.0} | settings
    case = Case(student, teacher, labels, [], options)
    ours, truth = evaluate(case, fused), evaluate(case, reference, torch.float64)
    weight = 8 if options.get("divergence") == "dkd" else 1
    rounding = torch.finfo(torch.float32).eps * weight * max(2 * options["temperature"] ** 2, 8)
    close = {"rtol": 2e-6, "atol": rounding, "equal_nan": True, "check_dtype": False}
    torch.testing.assert_close(ours.loss, truth.loss, **close)
    torch.testing.assert_close(ours.terms, truth.terms, **close)
    # Where a row has no softmax, which of its classes are NaN is nobody's concern.
    gradients = [x.gradients[0].double() for x in (ours, truth)]
    nan = [x.isnan().any(1) for x in gradients]
    assert torch.equal(*nan)
    sources = 4 * torch.stack([x.nan_to_num(0, 0, 0).abs().amax(1) for x in gradients]).amax(0)
    if options.get("divergence") == "reverse_kl":
        sides = (F.log_softmax(x.double() / options["temperature"], 1) for x in (student, teacher))
        sources += reverse_source(*sides).nan_to_num(0, 0, 0)
    for one, true, source in zip(*gradients, sources, strict=True):
        if not true.isnan().any():
            atol = rounding + torch.finfo(torch.float32).eps * float(source)
            torch.testing.assert_close(one, true, rtol=2e-6, atol=atol)
    return ours


@pytest.fixture
def logits():
    return torch.randn(2, 6, 37, generator=torch.Generator().manual_seed(3))


LABELS = torch.arange(6)


@each_divergence
@standardized_or_not
@pytest.mark.parametrize("temperature", [0.5, 4.0, 7.0])
@pytest.mark.parametrize("margin", [1e2, 1e4, 1e30])
def test_huge_margins(logits, temperature, margin, divergence, standardize_logits):
    student, teacher = logits
    student[0, 3], teacher[0, 5], student[1, 2], teacher[2, 4] = margin, margin, -margin, -margin
    student[3, 3], student[3, 4], teacher[4, 4] = margin, margin, margin
    options = {"divergence": divergence, "standardize_logits": standardize_logits}
    result = both(student, teacher, LABELS, temperature=temperature, **options)
    assert result.gradients[0].isfinite().all()


@each_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", [4e3, 6e4])
def test_margins_of_a_thousand_temperatures_in_half_precision(logits, dtype, margin, divergence):
    """Where PyTorch's formula in this dtype gives NaN or infinity, ours is a few roundings from the truth."""
    student, teacher = logits.to(dtype)
    student[0, 3], teacher[0, 5], student[1, 2], teacher[2, 4] = margin, margin, -margin, -margin
    case = Case(student, teacher, LABELS, [], {"temperature": 4.0, "alpha": 0.9, "divergence": divergence})
    ours, truth = evaluate(case, fused), evaluate(case, reference, torch.float64)
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=2e-6, atol=0)
    rounding = torch.finfo(dtype).eps * float(truth.gradients[0].abs().max())
    torch.testing.assert_close(ours.gradients[0].double(), truth.gradients[0], rtol=0, atol=2 * rounding)


@each_divergence
def test_classes_masked_on_both_sides_count_for_nothing(logits, divergence):
    student, teacher = logits
    student[:, 20:], teacher[:, 20:] = -INFINITY, -INFINITY
    masked = both(student, teacher, LABELS, divergence=divergence)
    alone = both(student[:, :20].contiguous(), teacher[:, :20].contiguous(), LABELS, divergence=divergence)
    torch.testing.assert_close(masked.loss, alone.loss)
    torch.testing.assert_close(masked.gradients[0][:, :20], alone.gradients[0])
    assert not masked.gradients[0][:, 20:].any()


@each_divergence
@pytest.mark.parametrize("label", [2, 9])
def test_a_class_that_the_student_alone_excludes(logits, label, divergence):
    """Infinitely wrong, to what weighs by the teacher."""
    student, teacher = logits
    student[2, 9] = -INFINITY
    labels = LABELS.clone()
    labels[2] = label
    result = both(student, teacher, labels, divergence=divergence, alpha=1.0)
    assert result.loss.isfinite() == (divergence in ("reverse_kl", "jsd"))
    assert result.gradients[0].isfinite().all()


@each_divergence
@pytest.mark.parametrize("label", [2, 9])
def test_a_class_that_the_teacher_alone_excludes(logits, label, divergence):
    """Infinitely wrong, to what weighs by the student; such a row has no gradient and gets 0."""
    student, teacher = logits
    teacher[2, 9] = -INFINITY
    labels = LABELS.clone()
    labels[2] = label
    result = both(student, teacher, labels, divergence=divergence, alpha=1.0)
    assert result.loss.isfinite() == (divergence != "reverse_kl")
    assert result.gradients[0].isfinite().all()
    assert result.gradients[0][2].any() == (divergence != "reverse_kl")


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0)])
def test_a_part_of_dkd_of_weight_zero_has_no_effect(logits, weights):
    """Not even where it is infinite."""
    student, teacher = logits
    student[2, 2 if weights[0] == 0 else 9] = -INFINITY
    options = dict(zip(("dkd_target_weight", "dkd_non_target_weight"), weights, strict=True))
    assert both(student, teacher, LABELS, divergence="dkd", alpha=1.0, **options).loss.isfinite()


def test_dkd_of_a_label_that_no_other_class_competes_with(logits):
    """Where both sides exclude all others, nothing is left to learn; where one does, the others have no softmax."""
    student, teacher = logits
    others = torch.ones(37, dtype=torch.bool)
    others[0] = False
    student[0, others] = -INFINITY
    one_side = both(student, teacher, LABELS, divergence="dkd", alpha=1.0)
    assert one_side.loss.isnan()
    teacher[0, others] = -INFINITY
    result = both(student, teacher, LABELS, divergence="dkd", alpha=1.0)
    assert result.loss.isfinite()
    assert not result.gradients[0][0].any()


@each_divergence
@pytest.mark.parametrize("bad", [INFINITY, float("nan")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_has_no_softmax_is_nan_in_its_row_alone(logits, bad, side, divergence):
    logits[side, 2, 9] = bad
    result = both(*logits, LABELS, divergence=divergence)
    assert result.loss.isnan()
    rows = result.gradients[0].isnan().any(1)
    assert rows.tolist() == [False, False, True, False, False, False]


@each_divergence
@pytest.mark.parametrize("side", [0, 1])
def test_infinite_logits_cannot_be_standardized(logits, side, divergence):
    logits[side, 2, 9] = -INFINITY
    result = both(*logits, LABELS, divergence=divergence, standardize_logits=True)
    assert result.loss.isnan()
    rows = result.gradients[0].isnan().any(1)
    assert rows.tolist() == [False, False, True, False, False, False]


@each_divergence
def test_a_row_of_minus_infinities_is_nan(logits, divergence):
    logits[0, 1] = -INFINITY
    assert both(*logits, LABELS, divergence=divergence).loss.isnan()


@each_divergence
@standardized_or_not
@pytest.mark.parametrize(("alpha", "side"), [(0.0, 1), (1.0, None)])
def test_a_term_of_weight_zero_has_no_effect(logits, alpha, side, divergence, standardize_logits):
    """Not even where it is infinite or not a number."""
    student, teacher = logits
    labels = LABELS
    if side == 1:
        teacher[2, 9] = float("nan")
    elif not standardize_logits:
        student[:, 30:], teacher[:, 30:] = -INFINITY, -INFINITY
        labels = labels + 30  # an infinite cross entropy
    result = both(student, teacher, labels, alpha=alpha, divergence=divergence, standardize_logits=standardize_logits)
    assert result.loss.isfinite()
    assert result.gradients[0].isfinite().all()


@each_divergence
@standardized_or_not
def test_ignored_rows_have_no_effect_whatever_they_hold(logits, divergence, standardize_logits):
    student, teacher = logits
    labels = torch.tensor([0, -100, 2, -100, 4, -100])
    kept = labels != -100
    student[1], teacher[3], student[5] = float("nan"), INFINITY, 3.0
    options = {"label_smoothing": 0.1, "divergence": divergence, "standardize_logits": standardize_logits}
    result = both(student, teacher, labels, **options)
    alone = both(student[kept], teacher[kept], labels[kept], **options)
    torch.testing.assert_close(result.loss, alone.loss)
    torch.testing.assert_close(result.gradients[0][kept], alone.gradients[0])
    assert not result.gradients[0][~kept].any()


@each_divergence
def test_another_ignore_index(logits, divergence):
    labels = torch.tensor([0, 3, 2, 3, 4, 5])
    ours = kddp_ext.fused_kd_l1_loss(*logits, labels, ignore_index=3, divergence=divergence)
    truth = kddp_ext.fused_kd_l1_loss(*logits, labels, ignore_index=3, divergence=divergence, backend="reference")
    torch.testing.assert_close(ours, truth)


@each_divergence
@standardized_or_not
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [4, 0])
def test_nothing_to_learn_from_is_zero(dtype, rows, backend, divergence, standardize_logits):
    student = torch.zeros(rows, 5, dtype=dtype, requires_grad=True)
    activation = torch.zeros(rows, 3, dtype=dtype, requires_grad=True)
    labels = torch.full((rows,), -100)
    options = {"divergence": divergence, "standardize_logits": standardize_logits, "backend": backend}
    teacher = torch.randn(rows, 5).to(dtype)
    loss = kddp_ext.fused_kd_l1_loss(student, teacher, labels, [activation], l1_weight=0.1, **options)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()
    assert not activation.grad.any()


@each_divergence
@standardized_or_not
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_one_class_has_nothing_to_tell(backend, divergence, standardize_logits):
    student = torch.tensor([[3.0], [-1e30]], requires_grad=True)
    options = {"divergence": divergence, "standardize_logits": standardize_logits, "backend": backend}
    loss = kddp_ext.fused_kd_l1_loss(student, torch.tensor([[1.0], [7.0]]), torch.zeros(2).long(), alpha=1.0, **options)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@each_divergence
@pytest.mark.parametrize("value", [0.0, 0.1, -1000.1, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_standardize_to_zero(logits, value, dtype, divergence):
    """Exactly: a rounding of their mean, over 1e-7, would be anything."""
    student, teacher = logits.to(dtype)
    student[:], zeros = value, torch.zeros_like(student)
    options = {"divergence": divergence, "standardize_logits": True, "alpha": 1.0, "return_terms": True}
    loss, _ = kddp_ext.fused_kd_l1_loss(student, teacher, LABELS, **options)
    of_zeros, _ = kddp_ext.fused_kd_l1_loss(zeros, teacher, LABELS, **options)
    torch.testing.assert_close(loss, of_zeros, rtol=1e-6, atol=0)
    of_both, _ = kddp_ext.fused_kd_l1_loss(student, zeros - 3.3, LABELS, **options)
    assert float(of_both) <= 1e-5


def test_activations_of_no_neurons(logits):
    empty = torch.zeros(6, 0, requires_grad=True)
    _, terms = kddp_ext.fused_kd_l1_loss(*logits, LABELS, [empty], l1_weight=0.1, return_terms=True)
    assert terms.l1 == 0


def test_half_precision_gradients_do_not_vanish_before_they_are_scaled():
    """A gradient of 1e-9 is nothing in float16, but it is when the loss is scaled by 2^16 afterwards."""
    student = (torch.randn(4096, 1000, generator=torch.Generator().manual_seed(4)) * 0.01).half().requires_grad_()
    activation = torch.rand(4096, 8).half().requires_grad_()
    labels = torch.zeros(4096, dtype=torch.int64)
    loss = kddp_ext.fused_kd_l1_loss(student, torch.zeros(4096, 1000), labels, [activation], l1_weight=1e-5)
    (loss * 2**16).backward()
    exact = student.detach().double().requires_grad_()
    truth = kddp_ext.fused_kd_l1_loss(exact, torch.zeros(4096, 1000), labels, backend="reference")
    (truth * 2**16).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(activation.grad.unique(), torch.tensor([2**16 * 1e-5 / 4096]).half())
