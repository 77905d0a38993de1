"""The first derivative of the loss, opcheck and autocast."""

import pytest
import torch
from loss_cases import each_divergence, each_form, loss_and_gradient
from torch.library import opcheck

import kddp_ext


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 9, 21, generator=generator)
    activation = torch.randn(9, 12, generator=generator)
    return student, teacher, torch.randint(0, 21, (9,), generator=generator), activation


def loss_of(student, teacher, labels, *activations, **settings):
    options = {"temperature": 3.0, "alpha": 0.6, "l1_weight": 0.01, "label_smoothing": 0.1} | settings
    return kddp_ext.fused_kd_l1_loss(student, teacher, labels, activations, **options)


def leaves_of(batch):
    return [batch[index].clone().requires_grad_() for index in (0, 3)]


def doubles(batch):
    return [x.double() if x.is_floating_point() else x for x in batch]


@pytest.mark.slow_on_the_emulator
@each_form
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize(
    ("alpha", "backend"), [(0.0, "native"), (0.4, "native"), (1.0, "native"), (0.4, "reference"), (1.0, "reference")]
)
def test_gradcheck(batch, temperature, alpha, backend, form):
    student, teacher, labels, activation = (x[:4] for x in doubles(batch))
    labels[2] = -100
    settings = {"temperature": temperature, "alpha": alpha, "backend": backend, "jsd_beta": 0.3, **form}

    def function(s, a):
        return loss_of(s, teacher, labels, a, **settings)

    assert torch.autograd.gradcheck(function, (student.requires_grad_(), activation[:, :3].requires_grad_()))


@pytest.mark.parametrize("without", ["teacher", "labels"])
def test_gradcheck_without_teacher_or_labels(batch, without):
    student, teacher, labels, _ = doubles(batch)
    arguments = (None, labels) if without == "teacher" else (teacher, None)
    alpha = 0.0 if without == "teacher" else 1.0
    assert torch.autograd.gradcheck(lambda s: loss_of(s, *arguments, alpha=alpha), (student.requires_grad_(),))


@pytest.mark.parametrize("flags", [(True, True, False, True), (False, False, False, False), (True, False, True, False)])
def test_opcheck_of_the_loss(batch, flags):
    student, teacher, labels, activation = batch
    student.requires_grad_(flags[0])
    activation.requires_grad_(flags[1])
    constants = kddp_ext.LossSettings(label_smoothing=0.1).constants()
    scalars = torch.tensor([3.0, 0.6, 0.0, 0.01], dtype=torch.float64)
    layers = ([activation], scalars, [9])
    opcheck(torch.ops.kddp.kd_l1_loss.default, (student, teacher, labels, None, None, *layers, *constants, *flags))
    by_row, weights = (*constants[:-1], True), torch.rand(2, 9, dtype=torch.float64)
    for alpha, *sides in [
        (0.0, None, labels, None),
        (1.0, teacher, None, None),
        (0.5, teacher, teacher.softmax(1), torch.rand(21)),
    ]:
        scalars = torch.tensor([3.0, alpha, 20.0], dtype=torch.float64)
        opcheck(torch.ops.kddp.kd_l1_loss.default, (student, *sides, weights, [], scalars, [], *by_row, *flags))


def test_opcheck_of_statistics_and_gather_slices(batch):
    activation = batch[3]
    opcheck(torch.ops.kddp.neuron_statistics.default, (activation,))
    keep = torch.tensor([0, 3, 7])
    opcheck(torch.ops.kddp.gather_slices.default, ([activation], keep, keep, 9, 12, None, None))
    means = torch.ones(2, dtype=torch.float64)
    opcheck(torch.ops.kddp.gather_slices.default, ([activation], None, keep, 9, 12, torch.tensor([1, 2]), means))


@pytest.mark.parametrize("scale", [1.0, -2.5])
@pytest.mark.parametrize("half", [False, True])
def test_each_backward_of_a_retained_graph_gives_the_scaled_gradient(batch, scale, half):
    student, teacher, labels, activation = (x.half() if half and x.is_floating_point() else x for x in batch)
    leaves = leaves_of((student, teacher, labels, activation))
    loss = loss_of(leaves[0], teacher, labels, leaves[1])
    unscaled = torch.autograd.grad(loss, leaves, retain_graph=True)
    once = torch.autograd.grad(loss * scale, leaves, retain_graph=True)
    again = torch.autograd.grad(loss * scale, leaves, retain_graph=True)
    torch.testing.assert_close(once, tuple(gradient * scale for gradient in unscaled))
    (last,) = torch.autograd.grad(loss * scale, leaves[:1])
    assert all(torch.equal(x, y) for x, y in zip((*once, once[0]), (*again, last), strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, leaves[:1])


@pytest.mark.parametrize("backend", ["native", "reference"])
@each_divergence
def test_teacher_and_terms_have_no_gradient(batch, divergence, backend):
    student, teacher, labels, activation = batch
    teacher.requires_grad_()
    options = {"return_terms": True, "divergence": divergence, "backend": backend}
    loss, terms = loss_of(student.requires_grad_(), teacher, labels, activation, **options)
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert not any(term.requires_grad for term in terms)


def test_only_inputs_that_require_a_gradient_get_one(batch):
    student, teacher, labels, activation = batch
    activation.requires_grad_()
    loss_of(student, teacher, labels, activation).backward()
    assert student.grad is None
    torch.testing.assert_close(activation.grad, activation.detach().sign() * 0.01 / 9)
    assert not loss_of(student, teacher, labels, activation.detach()).requires_grad
    with torch.no_grad():
        assert not loss_of(student, teacher, labels, activation).requires_grad


def test_under_autocast(batch):
    _, teacher, labels, activation = batch
    layer = torch.nn.Linear(12, 21)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(activation)
        loss = loss_of(logits, teacher, labels, activation)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32


def test_float64_on_one_side_is_computed_in_float64():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 33, generator=generator)
    teacher = torch.randn(5, 33, generator=generator, dtype=torch.float64)
    loss, gradient = loss_and_gradient(student, teacher, torch.arange(5))
    truth = kddp_ext.fused_kd_l1_loss(student.double(), teacher, torch.arange(5), backend="reference")
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, truth, rtol=1e-13, atol=0)
    assert gradient.dtype == torch.float32


@each_form
def test_the_module_equals_the_function(batch, form):
    student, teacher, labels, activation = batch
    settings = {"temperature": 2.0, "alpha": 0.6, "l1_weight": 0.01, "label_smoothing": 0.1, "jsd_beta": 0.2, **form}
    settings |= {"ignore_index": int(labels[0]), "dkd_target_weight": 0.5, "dkd_non_target_weight": 2.0}
    module = kddp_ext.FusedKDL1Loss(**settings)
    assert not list(module.parameters())
    expected = loss_of(student, teacher, labels, activation, **settings)
    assert torch.equal(module(student, teacher, labels, [activation]), expected)
