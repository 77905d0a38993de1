"""Derivatives beyond the first: the values of the reference, or an error that says what to do."""

import weakref

import pytest
import torch
from loss_cases import each_divergence
from torch.autograd import forward_ad

import kddp_ext

CLASS_WEIGHTS = torch.linspace(0.5, 2, 5, dtype=torch.float64)
SETTINGS = {"temperature": 3.0, "alpha": 0.6, "l1_weight": 0.05, "label_smoothing": 0.1, "class_weights": CLASS_WEIGHTS}


def loss_of(student, teacher, labels, activation, backend="native", **settings):
    if settings.get("divergence") == "dkd" and labels.is_floating_point():
        labels = labels.argmax(-1)
    return kddp_ext.fused_kd_l1_loss(student, teacher, labels, [activation], backend=backend, **(SETTINGS | settings))


@pytest.fixture(params=["classes", "probabilities"])
def batch(request):
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 4, -100, 2]) if request.param == "classes" else teacher.flip(1).softmax(1)
    return student, teacher, labels, torch.randn(4, 3, generator=generator, dtype=torch.float64)


def both_backends(function):
    """What `function` gives for the native and the reference backend, which must agree."""
    native, reference = (function(backend) for backend in ("native", "reference"))
    torch.testing.assert_close(native, reference)


@each_divergence
def test_second_derivatives(batch, divergence):
    student, teacher, labels, activation = batch

    def function(s, a):
        return loss_of(s * s, teacher, labels, a + 2 * s[:, :3], divergence=divergence)

    inputs = (student.requires_grad_(), activation.requires_grad_())
    assert torch.autograd.gradgradcheck(function, inputs)


def test_hessians_of_logits_that_depend_on_the_activations(batch):
    student, teacher, labels, activation = batch

    def hessian(backend, **options):
        return torch.autograd.functional.hessian(
            lambda a: loss_of(a @ a.T @ student, teacher, labels, a.tanh(), backend), activation, **options
        )

    both_backends(hessian)
    both_backends(lambda backend: hessian(backend, vectorize=True))


def test_a_gradient_penalty_trains(batch):
    student, teacher, labels, activation = batch

    def penalty(backend):
        leaf = student.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            loss_of(leaf.exp(), teacher, labels, activation, backend), leaf, create_graph=True
        )
        return torch.autograd.grad(gradient.square().sum(), leaf)

    both_backends(penalty)


def test_a_modified_input_is_an_error_in_the_second_derivative_only(batch):
    student, teacher, labels, activation = batch
    logits = student.requires_grad_() * 1.0
    loss = loss_of(logits, teacher, labels, activation)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    logits.detach().add_(1)
    torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0], first)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_batched_gradients(batch):
    student, teacher, labels, activation = batch

    def batched(backend):
        leaf = student.clone().requires_grad_()
        loss = loss_of(leaf, teacher, labels, activation, backend)
        return torch.autograd.grad(loss, leaf, torch.arange(3.0, dtype=torch.float64), is_grads_batched=True)

    both_backends(batched)


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian], ids=lambda f: f.__name__
)
@each_divergence
def test_transforms(batch, transform, divergence):
    student, teacher, labels, activation = batch

    def transformed(backend):
        function = transform(
            lambda s, a: loss_of(s, teacher, labels, a, backend, divergence=divergence), argnums=(0, 1)
        )
        return function(student, activation)

    both_backends(transformed)


def test_vmap_over_samples(batch):
    def each_sample(backend):
        function = torch.func.vmap(torch.func.grad_and_value(lambda *sample: loss_of(*sample, backend)))
        return function(*(x[:, None] for x in batch))

    both_backends(each_sample)


def test_a_pulled_back_gradient_may_be_edited(batch):
    student, teacher, labels, activation = batch
    _, pull_back = torch.func.vjp(lambda s: loss_of(s, teacher, labels, activation), student)
    one = torch.ones((), dtype=torch.float64)
    first = pull_back(one)[0]
    before = first.clone()
    first.zero_()
    assert torch.equal(pull_back(one)[0], before)


def test_forward_mode(batch):
    student, teacher, labels, activation = batch

    def tangent(backend):
        with forward_ad.dual_level():
            s = forward_ad.make_dual(student, teacher)
            a = forward_ad.make_dual(activation, activation + 1)
            return forward_ad.unpack_dual(loss_of(s, teacher, labels, a, backend)).tangent

    assert tangent("native") != 0
    both_backends(tangent)


def test_a_pruners_activations_inside_a_transform_are_an_error(batch):
    student, teacher, labels, activation = batch
    tracked = kddp_ext.TrackedActivations([activation], [kddp_ext.NeuronStatistics(3)])
    with pytest.raises(RuntimeError, match=r"list\(pruner.activations\)"):
        torch.func.grad(lambda s: kddp_ext.fused_kd_l1_loss(s, teacher, labels, tracked))(student)
    assert tracked.statistics[0].rows == 0


@pytest.mark.parametrize("setting", ["temperature", "alpha", "l1_weight"])
def test_settings_as_tensors(batch, setting):
    value = torch.tensor(0.3, dtype=torch.float64)
    assert torch.equal(loss_of(*batch, **{setting: value}), loss_of(*batch, **{setting: 0.3}))
    with pytest.raises(ValueError, match=f"^{setting}: expected"):
        loss_of(*batch, **{setting: -value})
    with pytest.raises(ValueError, match=f"^{setting}: expected a number or a 0-dim tensor"):
        loss_of(*batch, **{setting: value[None]})
    learnable = value.requires_grad_()
    with pytest.raises(ValueError, match=f"^{setting}: expected a constant.*backend='reference'"):
        loss_of(*batch, **{setting: learnable})
    assert torch.autograd.gradcheck(lambda x: loss_of(*batch, "reference", **{setting: x}), learnable)


def test_probabilities_that_require_a_gradient(batch):
    student, teacher, _, activation = batch
    labels = teacher.softmax(1).requires_grad_()
    with pytest.raises(ValueError, match=r"^labels: expected a constant.*backend='reference'"):
        loss_of(student, teacher, labels, activation)
    assert torch.autograd.gradcheck(lambda x: loss_of(student, teacher, x, activation, "reference"), labels)


@pytest.mark.filterwarnings("ignore")  # torch.jit's own
def test_jit_trace_is_an_error_that_names_the_way_out(batch):
    student, teacher, labels, activation = batch
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace.*backend='reference'"):
        torch.jit.trace(lambda s: loss_of(s, teacher, labels, activation), (student,))
    traced = torch.jit.trace(lambda s: loss_of(s, teacher, labels, activation, "reference"), (student,))
    torch.testing.assert_close(traced(student * 2), loss_of(student * 2, teacher, labels, activation))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_teacher_in_inference_mode(batch, compiled):
    student, teacher, labels, activation = batch
    with torch.inference_mode():
        frozen = teacher.clone()

    def gradients(teacher):
        function = torch.compile(loss_of, backend="eager", fullgraph=True) if compiled else loss_of
        leaf = student.clone().requires_grad_()
        loss = function(leaf, teacher, labels, activation)
        first = torch.autograd.grad(loss, leaf, create_graph=True)
        return *first, *torch.autograd.grad(first[0].square().sum(), leaf)

    torch.testing.assert_close(gradients(frozen), gradients(teacher))


def test_a_settings_tensor_is_not_kept(batch):
    temperature = torch.tensor(2.0)
    loss_of(*batch, temperature=temperature)
    reference = weakref.ref(temperature)
    del temperature
    assert reference() is None
