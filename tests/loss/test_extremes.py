"""Infinities, huge margins, empty and ignored batches, NaNs: what comes out, and what must not spread."""

import pytest
import torch
from loss_cases import Case, evaluate, fused, reference

import kddp_ext

INFINITY = float("inf")


def both(student, teacher, labels, **settings):
    options = {"temperature": 4.0, "alpha": 0.9, "l1_weight": 0.0, "label_smoothing": 0.0} | settings
    case = Case(student, teacher, labels, [], options)
    ours, truth = evaluate(case, fused), evaluate(case, reference, torch.float64)
    kwargs = {"rtol": 2e-6, "atol": 1e-6, "equal_nan": True, "check_dtype": False}
    torch.testing.assert_close(ours.loss, truth.loss, **kwargs)
    torch.testing.assert_close(ours.terms, truth.terms, **kwargs)
    torch.testing.assert_close(ours.gradients, truth.gradients, **kwargs)
    return ours


@pytest.fixture
def logits():
    return torch.randn(2, 6, 37, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 7.0])
@pytest.mark.parametrize("margin", [1e2, 1e4, 1e30])
def test_huge_margins(logits, temperature, margin):
    student, teacher = logits
    student[0, 3], teacher[0, 5], student[1, 2], teacher[2, 4] = margin, margin, -margin, -margin
    both(student, teacher, torch.arange(6), temperature=temperature)


def test_classes_masked_on_both_sides_count_for_nothing(logits):
    student, teacher = logits
    student[:, 20:], teacher[:, 20:] = -INFINITY, -INFINITY
    masked = both(student, teacher, torch.arange(6))
    alone = both(student[:, :20].contiguous(), teacher[:, :20].contiguous(), torch.arange(6))
    torch.testing.assert_close(masked.loss, alone.loss)
    torch.testing.assert_close(masked.gradients[0][:, :20], alone.gradients[0])
    assert not masked.gradients[0][:, 20:].any()


def test_a_class_that_the_student_alone_excludes_is_infinitely_wrong(logits):
    student, teacher = logits
    student[2, 9] = -INFINITY
    result = both(student, teacher, torch.arange(6))
    assert result.loss == INFINITY
    assert result.gradients[0].isfinite().all()


def test_a_class_that_the_teacher_excludes_is_no_problem(logits):
    student, teacher = logits
    teacher[2, 9] = -INFINITY
    assert both(student, teacher, torch.arange(6)).loss.isfinite()


@pytest.mark.parametrize("bad", [INFINITY, float("nan")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_has_no_softmax_is_nan_in_its_row_alone(logits, bad, side):
    logits[side, 2, 9] = bad
    result = both(*logits, torch.arange(6))
    assert result.loss.isnan()
    rows = result.gradients[0].isnan().any(1)
    assert rows.tolist() == [False, False, True, False, False, False]


def test_a_row_of_minus_infinities_is_nan(logits):
    logits[0, 1] = -INFINITY
    assert both(*logits, torch.arange(6)).loss.isnan()


@pytest.mark.parametrize(("alpha", "side"), [(0.0, 1), (1.0, None)])
def test_a_term_of_weight_zero_has_no_effect(logits, alpha, side):
    """Not even where it is infinite or not a number."""
    student, teacher = logits
    labels = torch.arange(6)
    if side == 1:
        teacher[2, 9] = float("nan")
    else:
        student[:, 30:], teacher[:, 30:] = -INFINITY, -INFINITY
        labels = labels + 30  # an infinite cross entropy
    result = both(student, teacher, labels, alpha=alpha)
    assert result.loss.isfinite()
    assert result.gradients[0].isfinite().all()


def test_ignored_rows_have_no_effect_whatever_they_hold(logits):
    student, teacher = logits
    labels = torch.tensor([0, -100, 2, -100, 4, 5])
    kept = labels != -100
    student[1], teacher[3] = float("nan"), INFINITY
    result = both(student, teacher, labels, label_smoothing=0.1)
    alone = both(student[kept], teacher[kept], labels[kept], label_smoothing=0.1)
    torch.testing.assert_close(result.loss, alone.loss)
    torch.testing.assert_close(result.gradients[0][kept], alone.gradients[0])
    assert not result.gradients[0][~kept].any()


def test_another_ignore_index(logits):
    labels = torch.tensor([0, 3, 2, 3, 4, 5])
    ours = kddp_ext.fused_kd_l1_loss(*logits, labels, ignore_index=3)
    truth = kddp_ext.fused_kd_l1_loss(*logits, labels, ignore_index=3, backend="reference")
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("labels", [torch.full((4,), -100), None])
def test_nothing_to_learn_from_is_zero(dtype, labels):
    rows = 0 if labels is None else 4
    student = torch.zeros(rows, 5, dtype=dtype, requires_grad=True)
    activation = torch.zeros(rows, 3, dtype=dtype, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64) if labels is None else labels
    loss = kddp_ext.fused_kd_l1_loss(student, torch.zeros(rows, 5, dtype=dtype), labels, [activation], l1_weight=0.1)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()
    assert not activation.grad.any()


def test_activations_of_no_neurons(logits):
    empty = torch.zeros(6, 0, requires_grad=True)
    _, terms = kddp_ext.fused_kd_l1_loss(*logits, torch.arange(6), [empty], l1_weight=0.1, return_terms=True)
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
