"""Rows that are worked in many pieces, by one thread each or by all together: the same numbers, bit for bit."""

import pytest
import torch

import kddp_ext


def results(student, teacher, labels, **settings):
    student = student.clone().requires_grad_()
    loss, terms = kddp_ext.fused_kd_l1_loss(student, teacher, labels, return_terms=True, backend="native", **settings)
    loss.backward()
    return loss.detach(), torch.stack(list(terms)), student.grad


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2500), (3, 9000), (2, 40_000)])
def test_any_number_of_threads_gives_the_same(threads, rows, classes, divergence, dtype):
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, rows, classes, generator=generator).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    for settings in ({"alpha": 0.6}, {"alpha": 1.0, "standardize_logits": True}, {"temperature": 3.0}):
        alone = None
        for number in (1, 2, 5):
            threads(number)
            of_number = results(student, teacher, labels, divergence=divergence, **settings)
            alone = alone or of_number
            assert all(torch.equal(a, b) for a, b in zip(alone, of_number, strict=True))


@pytest.mark.parametrize("where", [0, 70, 1500, 6000, 39_999])
@pytest.mark.parametrize("margin", [30.0, 300.0, 3e4])
def test_a_piece_may_begin_far_below_its_highest_logit(where, margin):
    """The reference of a piece is looked up in its first vectors only; one that misleads has to be noticed."""
    generator = torch.Generator().manual_seed(where)
    student, teacher = torch.randn(2, 2, 40_000, generator=generator)
    student[0, where], teacher[0, where], student[1, where] = margin, margin, -margin
    labels = torch.tensor([where, 3])
    ours = results(student, teacher, labels)
    leaf = student.double().requires_grad_()
    loss, terms = kddp_ext.fused_kd_l1_loss(leaf, teacher.double(), labels, return_terms=True, backend="reference")
    loss.backward()
    torch.testing.assert_close(ours[0].double(), loss.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours[1].double(), torch.stack(list(terms)), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours[2].double(), leaf.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1000, 40_000, 40_017])
@pytest.mark.parametrize(("of_student", "of_teacher"), [(0.0, 0.0), (700.0, -90.0), (3e4, -6e4), (6e4, 0.0)])
@pytest.mark.parametrize("temperature", [0.125, 1.0, 4.0, 3.0])
def test_logits_far_from_zero(dtype, classes, of_student, of_teacher, temperature):
    """What all logits have in common is nothing to a softmax; what is left of them is the logits' own rounding."""
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, 3, classes, generator=generator)
    student, teacher = (student * 3 + of_student).to(dtype), (teacher * 3 + of_teacher).to(dtype)
    labels = torch.tensor([0, classes // 2, classes - 1])
    ours = results(student, teacher, labels, temperature=temperature)
    leaf = student.double().requires_grad_()
    settings = {"temperature": temperature, "return_terms": True, "backend": "reference"}
    loss, terms = kddp_ext.fused_kd_l1_loss(leaf, teacher.double(), labels, **settings)
    loss.backward()
    torch.testing.assert_close(ours[0].double(), loss.detach(), rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(ours[1].double(), torch.stack(list(terms)), rtol=4e-6, atol=4e-6)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(ours[2].double(), leaf.grad, rtol=max(rounding, 1e-5), atol=2e-7 * max(1, temperature))


def test_classes_excluded_in_one_piece_alone():
    student, teacher = torch.randn(2, 2, 5000, generator=torch.Generator().manual_seed(0))
    student[:, 1024:3000] = teacher[:, 1024:3000] = -torch.inf
    labels = torch.tensor([0, 4999])
    ours = results(student, teacher, labels)
    kept = torch.ones(5000, dtype=torch.bool)
    kept[1024:3000] = False
    alone = results(student[:, kept], teacher[:, kept], torch.tensor([0, 4999 - 1976]))
    torch.testing.assert_close(ours[0], alone[0])
    torch.testing.assert_close(ours[2][:, kept], alone[2])
    assert not ours[2][:, ~kept].any()
