"""Rows of many chunks, computed by one thread or by several: exact, and bitwise equal for any number of threads."""

import pytest
import torch
from loss_cases import Case, each_divergence, evaluate, fused, reference


def evaluate_both(student, teacher, labels, **settings):
    """The results of the kernels and of the reference in float64."""
    case = Case(student, teacher, labels, [], settings)
    return evaluate(case, fused), evaluate(case, reference, torch.float64)


@pytest.mark.slow_on_the_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@each_divergence
@pytest.mark.parametrize(("rows", "classes"), [(300, 130), (1, 2500), (3, 9000), (2, 40_000)])
def test_any_number_of_threads_gives_the_same(rows, classes, divergence, dtype):
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, rows, classes, generator=generator).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    activations = [torch.randn(rows, width, generator=generator).to(dtype) for width in (600, 3)]
    for settings in ({"alpha": 0.6}, {"alpha": 1.0, "standardize_logits": True}, {"temperature": 3.0}):
        case = Case(student, teacher, labels, activations, settings | {"divergence": divergence, "l1_weight": 0.1})
        results = []
        for number in (1, 2, 3, 5, 7):
            torch.set_num_threads(number)
            result = evaluate(case, fused)
            results.append([result.loss, result.terms, *result.gradients])
        assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow_on_the_emulator
@pytest.mark.parametrize("where", [0, 70, 1500, 6000, 39_999])
@pytest.mark.parametrize("margin", [30.0, 300.0, 3e4])
def test_a_chunk_may_begin_far_below_its_highest_logit(where, margin):
    """The kernels take the reference of a chunk from its first vectors; they must notice one that is too low."""
    generator = torch.Generator().manual_seed(where)
    student, teacher = torch.randn(2, 2, 40_000, generator=generator)
    student[0, where], teacher[0, where], student[1, where] = margin, margin, -margin
    ours, truth = evaluate_both(student, teacher, torch.tensor([where, 3]))
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.terms.double(), truth.terms, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.gradients[0].double(), truth.gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.slow_on_the_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1000, 40_000, 40_017])
@pytest.mark.parametrize("offsets", [(0.0, 0.0), (700.0, -90.0), (3e4, -6e4), (6e4, 0.0)])
@pytest.mark.parametrize("temperature", [0.125, 1.0, 4.0, 3.0])
def test_logits_far_from_zero(dtype, classes, offsets, temperature):
    """A common offset cancels in the softmax; only the rounding of the logits themselves remains."""
    logits = torch.randn(2, 3, classes, generator=torch.Generator().manual_seed(classes)) * 3
    student, teacher = (x.add(offset).to(dtype) for x, offset in zip(logits, offsets, strict=True))
    labels = torch.tensor([0, classes // 2, classes - 1])
    ours, truth = evaluate_both(student, teacher, labels, temperature=temperature)
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(ours.terms.double(), truth.terms, rtol=4e-6, atol=4e-6)
    close = {"rtol": max(torch.finfo(dtype).eps, 1e-5), "atol": 2e-7 * max(1, temperature)}
    torch.testing.assert_close(ours.gradients[0].double(), truth.gradients[0], **close)


def test_classes_excluded_in_one_chunk_only():
    student, teacher = torch.randn(2, 2, 5000, generator=torch.Generator().manual_seed(0))
    student[:, 1024:3000] = teacher[:, 1024:3000] = -torch.inf
    valid = student[0].isfinite()
    ours, _ = evaluate_both(student, teacher, torch.tensor([0, 4999]))
    alone, _ = evaluate_both(student[:, valid], teacher[:, valid], torch.tensor([0, 4999 - 1976]))
    torch.testing.assert_close(ours.loss, alone.loss)
    torch.testing.assert_close(ours.gradients[0][:, valid], alone.gradients[0])
    assert not ours.gradients[0][:, ~valid].any()
