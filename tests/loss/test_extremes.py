"""Infinite and huge logits, NaNs, empty and ignored batches: the results, and which rows they may affect."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import (
    Case,
    composite,
    each_divergence,
    each_form,
    evaluate,
    fused,
    largest_error,
    loss_and_gradient,
    reference,
    reverse_source,
)

import kddp_ext

INFINITY, NAN = float("inf"), float("nan")
LABELS = torch.arange(6)


@pytest.fixture
def logits():
    return torch.randn(2, 6, 37, generator=torch.Generator().manual_seed(3))


def evaluate_checked(student, teacher, labels, **settings):
    """The result of the kernels, after a comparison with the reference in float64."""
    case = Case(student, teacher, labels, [], settings)
    ours, truth = evaluate(case, fused), evaluate(case, reference, torch.float64)
    temperature, divergence = settings.get("temperature", 4.0), settings.get("divergence")
    rounding = torch.finfo(torch.float32).eps * (8 if divergence == "dkd" else 1) * max(2 * temperature**2, 8)
    close = {"rtol": 2e-6, "atol": rounding, "equal_nan": True, "check_dtype": False}
    torch.testing.assert_close(ours.loss, truth.loss, **close)
    torch.testing.assert_close(ours.terms, truth.terms, **close)
    # In a row without a softmax any of the classes may be NaN.
    gradients = [x.gradients[0].double() for x in (ours, truth)]
    nan = [x.isnan().any(1) for x in gradients]
    assert torch.equal(*nan)
    sources = 4 * torch.stack([x.nan_to_num(0, 0, 0).abs().amax(1) for x in gradients]).amax(0)
    if divergence in ("reverse_kl", "symmetric_kl"):
        sides = (F.log_softmax(x.double() / temperature, 1) for x in (student, teacher))
        sources += reverse_source(*sides).nan_to_num(0, 0, 0)
    for one, true, source in zip(*gradients, sources, strict=True):
        if not true.isnan().any():
            atol = rounding + torch.finfo(torch.float32).eps * float(source)
            torch.testing.assert_close(one, true, rtol=2e-6, atol=atol)
    return ours


@each_form
@pytest.mark.parametrize("temperature", [0.5, 4.0, 7.0])
@pytest.mark.parametrize("margin", [1e2, 1e4, 1e30])
def test_huge_margins_give_finite_values(logits, temperature, margin, form):
    student, teacher = logits
    student[0, 3], teacher[0, 5], student[1, 2], teacher[2, 4] = margin, margin, -margin, -margin
    student[3, 3], student[3, 4], teacher[4, 4] = margin, margin, margin
    options = {"temperature": temperature, **form}
    plain = evaluate(Case(student, teacher, LABELS, [], options), reference)
    for result in (evaluate_checked(student, teacher, LABELS, **options), plain):
        assert result.terms.isfinite().all()
        assert result.terms[0] > 0
        assert result.gradients[0].isfinite().all()


@each_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", [4e3, 6e4])
def test_margins_of_a_thousand_temperatures_in_half_precision(logits, dtype, margin, divergence):
    """PyTorch's formula in this dtype gives NaN or infinity; the kernels are a few roundings from the exact value."""
    student, teacher = logits.to(dtype)
    student[0, 3], teacher[0, 5], student[1, 2], teacher[2, 4] = margin, margin, -margin, -margin
    case = Case(student, teacher, LABELS, [], {"divergence": divergence})
    ours, truth = evaluate(case, fused), evaluate(case, reference, torch.float64)
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=2e-6, atol=0)
    rounding = torch.finfo(dtype).eps * float(truth.gradients[0].abs().max())
    torch.testing.assert_close(ours.gradients[0].double(), truth.gradients[0], rtol=0, atol=2 * rounding)


@each_divergence
def test_classes_that_both_sides_mask_have_no_effect(logits, divergence):
    student, teacher = logits
    student[:, 20:], teacher[:, 20:] = -INFINITY, -INFINITY
    masked = evaluate_checked(student, teacher, LABELS, divergence=divergence)
    rest = (x[:, :20].contiguous() for x in (student, teacher))
    alone = evaluate_checked(*rest, LABELS, divergence=divergence)
    torch.testing.assert_close(masked.loss, alone.loss)
    torch.testing.assert_close(masked.gradients[0][:, :20], alone.gradients[0])
    assert not masked.gradients[0][:, 20:].any()


@each_divergence
@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("label", [2, 9])
def test_a_class_that_one_side_or_both_exclude(logits, sides, label, divergence):
    """A class that only the denominator of D excludes makes D infinite; where reverse KL is, its gradient is 0."""
    for side in sides:
        logits[side, 2, 9] = -INFINITY
    labels = LABELS.clone()
    labels[2] = label
    result = evaluate_checked(*logits, labels, divergence=divergence, alpha=1.0)
    infinite = sides in {"forward_kl": [(0,)], "reverse_kl": [(1,)], "dkd": [(0,)], "symmetric_kl": [(0,), (1,)]}.get(
        divergence, []
    )
    assert result.loss.isinf() == infinite
    assert not result.loss.isnan()
    gradient = result.gradients[0]
    assert gradient.isfinite().all()
    assert gradient[2].any() == (divergence != "reverse_kl" or sides != (1,))
    if sides == (0, 1):
        assert not gradient[2, 9]


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0)])
def test_a_part_of_dkd_with_weight_zero_has_no_effect_even_if_infinite(logits, weights):
    student, teacher = logits
    student[2, 2 if weights[0] == 0 else 9] = -INFINITY
    options = dict(zip(("dkd_target_weight", "dkd_non_target_weight"), weights, strict=True))
    assert evaluate_checked(student, teacher, LABELS, divergence="dkd", alpha=1.0, **options).loss.isfinite()


def test_dkd_where_all_classes_but_the_label_are_excluded(logits):
    """If both sides exclude them, the row contributes nothing; if one does, its other classes have no softmax."""
    student, teacher = logits
    student[0, 1:] = -INFINITY
    assert evaluate_checked(student, teacher, LABELS, divergence="dkd", alpha=1.0).loss.isnan()
    teacher[0, 1:] = -INFINITY
    result = evaluate_checked(student, teacher, LABELS, divergence="dkd", alpha=1.0)
    assert result.loss.isfinite()
    assert not result.gradients[0][0].any()


@each_divergence
@pytest.mark.parametrize(
    ("bad", "standardize_logits"), [(INFINITY, False), (NAN, False), (INFINITY, True), (NAN, True), (-INFINITY, True)]
)
@pytest.mark.parametrize("side", [0, 1])
def test_a_row_without_a_softmax_is_nan_and_no_other_row(logits, bad, standardize_logits, side, divergence):
    logits[side, 2, 9] = bad
    result = evaluate_checked(*logits, LABELS, divergence=divergence, standardize_logits=standardize_logits)
    assert result.loss.isnan()
    assert result.gradients[0].isnan().any(1).tolist() == [False, False, True, False, False, False]


@each_divergence
def test_a_row_of_minus_infinities_is_nan(logits, divergence):
    logits[0, 1] = -INFINITY
    assert evaluate_checked(*logits, LABELS, divergence=divergence).loss.isnan()


@each_form
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_term_of_weight_zero_has_no_effect_even_if_not_finite(logits, alpha, form):
    student, teacher = logits
    labels = LABELS
    if alpha == 0:
        teacher[2, 9] = NAN
    elif not form["standardize_logits"]:
        student[:, 30:], teacher[:, 30:] = -INFINITY, -INFINITY
        labels = labels + 30  # an infinite cross entropy
    result = evaluate_checked(student, teacher, labels, alpha=alpha, **form)
    assert result.loss.isfinite()
    assert result.gradients[0].isfinite().all()


@each_form
@pytest.mark.parametrize("ignored", [-100, 3])
def test_ignored_rows_have_no_effect_whatever_they_contain(logits, ignored, form):
    student, teacher = logits
    labels = torch.tensor([0, ignored, 2, ignored, 4, ignored])
    valid = labels != ignored
    options = {"label_smoothing": 0.1, "ignore_index": ignored, **form}
    alone = evaluate_checked(student[valid], teacher[valid], labels[valid], **options)
    case = Case(student, teacher, labels, [], options)
    before = evaluate(case, reference)
    student[1], teacher[3], student[5], teacher[5] = NAN, INFINITY, 3.0, -INFINITY
    result = evaluate_checked(student, teacher, labels, **options)
    torch.testing.assert_close(result.loss, alone.loss)
    torch.testing.assert_close(result.gradients[0][valid], alone.gradients[0])
    assert not result.gradients[0][~valid].any()
    after = evaluate(case, reference)
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(after.gradients[0], before.gradients[0])


@each_form
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [4, 0])
def test_empty_and_ignored_batches_give_zero(dtype, rows, backend, form):
    student = torch.zeros(rows, 5, dtype=dtype, requires_grad=True)
    activation = torch.zeros(rows, 3, dtype=dtype, requires_grad=True)
    teacher, labels = torch.randn(rows, 5).to(dtype), torch.full((rows,), -100)
    options = {"l1_weight": 0.1, "backend": backend, **form}
    loss = kddp_ext.fused_kd_l1_loss(student, teacher, labels, [activation], **options)
    loss.backward()
    assert not any(x.any() for x in (loss, student.grad, activation.grad))


@each_form
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_single_class_gives_zero(backend, form):
    student, teacher = torch.tensor([[3.0], [-1e30]]), torch.tensor([[1.0], [7.0]])
    results = loss_and_gradient(student, teacher, torch.zeros(2).long(), alpha=1.0, backend=backend, **form)
    assert not any(x.any() for x in results)


@each_divergence
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("value", [0.1, -1000.1, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_standardize_to_zero(logits, value, dtype, backend, divergence):
    """The mean must be exact: its rounding error divided by 1e-7 would be arbitrary."""
    teacher = logits[1].to(dtype)
    zeros, equal = torch.zeros_like(teacher), torch.full_like(teacher, value)
    options = {"divergence": divergence, "standardize_logits": True, "alpha": 1.0, "backend": backend}
    loss, gradient = loss_and_gradient(equal, teacher, LABELS, **options)
    of_zeros, gradient_of_zeros = loss_and_gradient(zeros, teacher, LABELS, **options)
    torch.testing.assert_close(loss, of_zeros, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, gradient_of_zeros, rtol=1e-5, atol=0)
    assert float(loss_and_gradient(equal, zeros - 3.3, LABELS, **options)[0]) <= 1e-5


def test_activations_without_neurons(logits):
    empty = torch.zeros(6, 0, requires_grad=True)
    _, terms = kddp_ext.fused_kd_l1_loss(*logits, LABELS, [empty], l1_weight=0.1, return_terms=True)
    assert terms.l1 == 0


@pytest.mark.slow_on_the_emulator
def test_half_precision_gradients_do_not_vanish_before_they_are_scaled():
    """float16 rounds a gradient of 1e-9 to 0; a loss that is scaled by 2^16 afterwards must still have it."""
    student = (torch.randn(4096, 1000, generator=torch.Generator().manual_seed(4)) * 0.01).half().requires_grad_()
    activation = torch.rand(4096, 8).half().requires_grad_()
    teacher, labels = torch.zeros(4096, 1000), torch.zeros(4096, dtype=torch.int64)
    loss = kddp_ext.fused_kd_l1_loss(student, teacher, labels, [activation], l1_weight=1e-5)
    (loss * 2**16).backward()
    exact = student.detach().double().requires_grad_()
    (kddp_ext.fused_kd_l1_loss(exact, teacher, labels, backend="reference") * 2**16).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(activation.grad.unique(), torch.tensor([2**16 * 1e-5 / 4096]).half())


@each_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [4, 3000, 40_000])
@pytest.mark.parametrize("largest", [1e12, 1e20, 1.5e38])
def test_huge_standardized_logits_are_as_exact_as_the_references(largest, classes, dtype, divergence):
    """Their squares overflow, and the factor that turns them into exponents vanishes."""
    logits = torch.randn(2, 1, classes, generator=torch.Generator().manual_seed(classes)).clamp(-1, 1)
    logits[..., :4] = torch.tensor([[[1, -1, 0, 0.7]], [[-1, 1, 0.1, 0]]])
    student, teacher = (logits * largest).to(dtype)
    options = {"divergence": divergence, "standardize_logits": True, "label_smoothing": 0.1, "temperature": 1.0}
    for alpha in (1.0, 0.6):
        case = Case(student, teacher, torch.tensor([1]), [], options | {"alpha": alpha})
        ours, plain = evaluate(case, fused), evaluate(case, reference)
        truth = evaluate(case, reference, torch.float64)
        for name, value, other, true in zip(
            ("loss", "terms", "gradient"),
            (ours.loss, ours.terms, *ours.gradients),
            (plain.loss, plain.terms, *plain.gradients),
            (truth.loss, truth.terms, *truth.gradients),
            strict=True,
        ):
            size = float(true.abs().max()) + (name != "gradient")  # a divergence is a difference of numbers near 1
            rounding = 4 * torch.finfo(value.dtype).eps * size + 2e-44
            assert largest_error(value, true) <= 2 * largest_error(other, true) + rounding, name


@each_divergence
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("classes", [10, 1000, 20_000])
def test_standardized_logits_with_a_common_offset_are_as_exact_as_pytorchs(offset, classes, divergence):
    """An error of the mean is one of the value and the gradient, offset times as large."""
    logits = torch.randn(2, 4, classes, generator=torch.Generator().manual_seed(classes))
    student, teacher = logits + offset
    options = {"divergence": divergence, "standardize_logits": True, "alpha": 1.0, "temperature": 2.0}
    options |= {"l1_weight": 0.0, "label_smoothing": 0.0}
    case = Case(student, teacher, torch.arange(4), [torch.zeros(4, 1)], options)
    ours, theirs, truth = evaluate(case, fused), evaluate(case, composite), evaluate(case, reference, torch.float64)
    eps = torch.finfo(torch.float32).eps
    for value, other, true in (
        (ours.loss, theirs.loss, truth.loss),
        (ours.gradients[0], theirs.gradients[0], truth.gradients[0]),
    ):
        assert largest_error(value, true) <= 2 * largest_error(other, true) + 4 * eps * float(true.abs().max())


def test_squares_of_deviations_on_a_coarse_grid_are_not_all_rounded_down():
    """Near 1e4 deviations are multiples of 2^-10. A long sum has too few bits for n², and n² mod 8 is 0, 1 or 4."""
    largest = {"ours": 0.0, "theirs": 0.0}
    for seed in range(10):
        student, teacher = torch.randn(2, 4, 1000, generator=torch.Generator().manual_seed(seed)) + 1e4
        options = {"divergence": "jsd", "standardize_logits": True, "alpha": 1.0, "temperature": 2.0, "l1_weight": 0.0}
        case = Case(student, teacher, torch.arange(4), [torch.zeros(4, 1)], {**options, "label_smoothing": 0.0})
        true = evaluate(case, reference, torch.float64).loss
        for name, loss in (("ours", fused), ("theirs", composite)):
            largest[name] = max(largest[name], largest_error(evaluate(case, loss).loss, true))
    assert largest["ours"] <= 2 * largest["theirs"]


def test_a_teacher_without_a_softmax_is_nan_everywhere(logits):
    """Not infinite, as the weights of the reverse divergence are."""
    logits[1, 1] = -INFINITY
    for divergence in ("reverse_kl", "symmetric_kl"):
        case = Case(*logits, LABELS, [], {"divergence": divergence})
        for function in (fused, reference):
            assert evaluate(case, function).gradients[0][1].isnan().all(), divergence
