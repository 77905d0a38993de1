"""Errors against float64 are at most twice those of PyTorch's own functions in the same dtype."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from loss_cases import (
    Case,
    cases,
    classes_of,
    composite,
    each_form,
    evaluate,
    fused,
    largest_error,
    loss_and_gradient,
    reference,
    reverse_source,
)

import kddp_ext


def values_of(result):
    return [result.loss, *result.terms, *result.gradients]


def named(result):
    names = ("loss", "kd", "ce", "l1", "correct", "student gradient", "activation gradient")
    return zip(names, values_of(result), strict=True)


def assert_within_twice_pytorchs_error(case: Case) -> None:
    """Allows twice PyTorch's error plus a rounding of the numbers that the value was computed from."""
    ours, theirs = evaluate(case, fused), evaluate(case, composite)
    truth = evaluate(case, reference, torch.float64)
    sources = sources_of(case)
    for (name, value), other, true in zip(named(ours), values_of(theirs), values_of(truth), strict=True):
        kind = torch.finfo(value.dtype)
        if value.dtype == torch.float16 and float(true.abs().amax()) * len(case.labels) > kind.max:
            continue  # float16 cannot hold the gradient of a standardised constant row
        # For huge logits a divergence is a difference of logarithms of its own size, which are rounded, too.
        roundings = 4 if name in ("kd", "loss") else 2
        rounding = roundings * kind.eps * float(true.abs().amax()) + kind.tiny * kind.eps
        rounding += roundings * torch.finfo(torch.float32).eps * sources.get(name, 0.0)  # the dtype of the computation
        their_error = largest_error(other, true)
        if not math.isfinite(their_error):  # 0 times a logarithm that is infinite in float16
            their_error = 0.0
        error = largest_error(value, true)
        assert error <= 2 * their_error + rounding, f"{name}: {error:.3g} against {their_error:.3g} and {rounding:.3g}"


def sources_of(case: Case) -> dict[str, float]:
    """For each result, the size of the intermediate numbers whose rounding errors it contains."""
    settings = {"divergence": "forward_kl", "standardize_logits": False} | case.settings
    temperature, alpha = settings["temperature"], settings["alpha"]
    sides = [case.student.double(), case.teacher.double()]
    standardize = settings["standardize_logits"] and case.student.shape[1] > 1
    if standardize:
        sides = [(x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) for x in sides]
    weights = [settings.get(f"dkd_{x}target_weight", 1.0) for x in ("", "non_")]
    # A divergence is a difference of logarithms of sums with rounding errors of numbers near 1. Standardised logits
    # have rounding errors of their own.
    kd = temperature**2 * {"jsd": 2, "dkd": sum(weights), "symmetric_kl": 2}.get(settings["divergence"], 1)
    if standardize:
        kd *= 1 + float(torch.cat(sides).abs().amax()) / temperature
    log_q, log_p = (F.log_softmax(x / temperature, 1) for x in sides)
    gradient = torch.stack([(x.exp() * (1 - x)).amax(1) for x in (log_q, log_p)]).amax(0)
    if settings["divergence"] in ("reverse_kl", "symmetric_kl"):
        gradient += reverse_source(log_q, log_p)
    if settings["divergence"] == "dkd":  # the softmax over the other classes
        gradient = torch.full_like(gradient, sum(weights))
    if standardize:
        gradient = through_standardization(gradient, case.student.double())
    of_gradient = alpha * temperature * float(gradient.amax()) + (1 - alpha)
    labels = classes_of(case)
    rows = max(int((labels != -100).sum()), 1)
    if "class_weights" in settings and not case.labels.is_floating_point() and (labels != -100).any():
        weights = settings["class_weights"][labels[labels != -100]]
        rows = float(weights.sum() / weights.amax())
    return {"kd": kd, "ce": 1.0, "loss": alpha * kd + (1 - alpha), "student gradient": of_gradient / rows}


def through_standardization(source, logits):
    """Standardisation divides the gradient by the deviation and subtracts its component along the logits."""
    deviation = logits.std(1) + 1e-7
    margin = (logits.amax(1) - logits.amin(1)) / deviation
    along = margin * (logits - logits.mean(1, keepdim=True)).abs().amax(1) / deviation / (logits.shape[1] - 1)
    return (source + along) / deviation


@each_form
def test_error_is_at_most_twice_pytorchs(form, examples):
    @settings(max_examples=examples(60), deadline=None)
    @given(cases(**form))
    def holds(case):
        assert_within_twice_pytorchs_error(case)

    holds()


def divergence_alone(student, teacher, **options) -> Case:
    defaults = {"alpha": 1.0, "l1_weight": 0.0, "label_smoothing": 0.0}
    return Case(student, teacher, torch.zeros(len(student)).long(), [torch.zeros(len(student), 1)], defaults | options)


def errors_of_gradient(student, teacher, **options) -> tuple[float, float]:
    """The mean over the rows of the largest error of a row, for the kernels and for PyTorch."""
    case = divergence_alone(student, teacher, **options)
    truth = evaluate(case, reference, torch.float64).gradients[0]
    errors = [evaluate(case, function).gradients[0] - truth for function in (fused, composite)]
    return tuple(float(each.abs().amax(1).mean()) for each in errors)


def errors_of_term(student, teacher, **options) -> tuple[float, float]:
    """The mean error of the loss of single rows, for the kernels and for PyTorch."""
    errors = []
    for row in zip(student.split(1), teacher.split(1), strict=True):
        case = divergence_alone(*row, **options)
        truth = evaluate(case, reference, torch.float64).loss
        errors.append([evaluate(case, function).loss - truth for function in (fused, composite)])
    return tuple(torch.tensor(errors).abs().mean(0).tolist())


def test_the_reverse_gradient_of_distant_distributions_is_more_exact_than_pytorchs():
    """q (log(q / p) - D) is a small difference of large numbers, so D must not be rounded."""
    student, teacher = 20 * torch.randn(2, 200, 13, generator=torch.Generator().manual_seed(0))
    ours, theirs = errors_of_gradient(student, teacher, divergence="reverse_kl", temperature=1.0)
    assert ours <= 0.7 * theirs, f"{ours:.3g} against {theirs:.3g}"


@pytest.mark.parametrize("divergence", ["forward_kl", "dkd"])
def test_the_gradient_of_standardized_outliers_is_as_exact_as_pytorchs(divergence):
    """The contribution of the deviation is a difference of nearly equal sums over p and over q."""
    generator = torch.Generator().manual_seed(0)
    logits = 0.03 * torch.randn(2, 64, 400, generator=generator)
    outliers = torch.randint(400, (64, 2), generator=generator)
    logits += torch.zeros(64, 400).scatter_add(1, outliers, torch.full((64, 2), 39.0))
    ours, theirs = errors_of_gradient(*logits, divergence=divergence, temperature=4.0, standardize_logits=True)
    assert ours <= 2 * theirs, f"{ours:.3g} against {theirs:.3g}"


@pytest.mark.parametrize("classes", [13, 400])
@pytest.mark.parametrize("standardize_logits", [False, True])
def test_jsd_of_near_distributions_is_as_exact_as_pytorchs(standardize_logits, classes):
    """log(q / m) is nearly 0; a difference of logarithms would have their rounding errors."""
    teacher, difference = torch.randn(2, 64, classes, generator=torch.Generator().manual_seed(0))
    options = {"divergence": "jsd", "temperature": 4.0, "jsd_beta": 0.5, "standardize_logits": standardize_logits}
    for errors in (errors_of_gradient, errors_of_term):
        ours, theirs = errors(teacher + 0.1 * difference, teacher, **options)
        assert ours <= theirs, f"{errors.__name__}: {ours:.3g} against {theirs:.3g}"


@pytest.mark.parametrize("classes", [13, 400])
def test_usual_calls_are_as_exact_as_pytorchs(classes):
    """On a GPU the quotients and logarithms of their sums are computed in float."""
    teacher, difference = torch.randn(2, 64, classes, generator=torch.Generator().manual_seed(0))
    for errors in (errors_of_gradient, errors_of_term):
        ours, theirs = errors(teacher + 0.3 * difference, teacher, temperature=4.0, alpha=0.9)
        assert ours <= 2 * theirs, f"{errors.__name__}: {ours:.3g} against {theirs:.3g}"


@pytest.mark.slow_on_the_emulator
@settings(max_examples=40, deadline=None)
@given(cases(dtypes=("float32",), rows=3, classes=70_000, largest_logit=30.0))
def test_long_rows(case):
    assert_within_twice_pytorchs_error(case)


@pytest.mark.slow_on_the_emulator
@settings(max_examples=150, deadline=None)
@given(cases(dtypes=("float32",), rows=40, classes=300, largest_logit=50.0))
def test_float64_equals_the_reference(case):
    """Up to a few rounding errors, because the two sum in different orders."""
    ours, truth = evaluate(case, fused, torch.float64), evaluate(case, reference, torch.float64)
    sources, few = sources_of(case), 16 * torch.finfo(torch.float64).eps
    widest = 1 + float(torch.cat([case.student, case.teacher]).abs().amax())  # an upper bound of the tempered logits
    for (name, value), true in zip(named(ours), values_of(truth), strict=True):
        allowed = few * widest * (float(true.abs().amax()) + sources.get(name, 0.0))
        assert largest_error(value, true) <= allowed, name


@each_form
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 31, 33, 100, 1023, 1025, 4097, 32768, 32769, 40000])
def test_every_remainder_of_the_vector_width(classes, form):
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, 3, classes, generator=generator)
    labels = torch.tensor([0, classes - 1, classes // 2])
    options = {"temperature": 3.0, "alpha": 0.7, "l1_weight": 0.1, "label_smoothing": 0.1, "jsd_beta": 0.3, **form}
    activations = [student[:, :1].relu()]
    assert_within_twice_pytorchs_error(Case(student, teacher, labels, activations, options))
    options["class_weights"] = torch.rand(classes, generator=generator)
    if form["divergence"] != "dkd":
        labels = torch.randn(3, classes, generator=generator).softmax(1)
    assert_within_twice_pytorchs_error(Case(student, teacher, labels, activations, options))


def test_the_first_of_equal_logits_is_the_prediction():
    student = torch.tensor([[1.0, 5.0, 5.0], [5.0, 5.0, 1.0], [0.0, 0.0, 0.0]])
    for label, correct in [(0, 2), (1, 1), (2, 0)]:
        labels = torch.full((3,), label)
        _, terms = kddp_ext.fused_kd_l1_loss(student, student, labels, return_terms=True)
        assert int(terms.correct) == correct == int((student.argmax(1) == labels).sum())


@each_form
def test_equal_logits_have_no_divergence(form):
    logits = torch.randn(50, 333, generator=torch.Generator().manual_seed(1)) * 100
    kd, gradient = loss_and_gradient(logits, logits, torch.arange(50), alpha=1.0, **form)
    rounding = torch.finfo(torch.float32).eps * (9 if form["divergence"] == "dkd" else 1)
    exact = form == {"divergence": "forward_kl", "standardize_logits": False}
    assert 0 <= float(kd) <= (0 if exact else 16 * rounding)
    assert float(gradient.abs().max()) <= 4 * rounding * 4 / 50
