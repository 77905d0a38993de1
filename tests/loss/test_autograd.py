"""The loss under autograd, torch.compile, torch.func, opcheck and autocast."""

import warnings

import pytest
import torch
from loss_cases import each_divergence, each_form, loss_and_gradient
from torch.library import opcheck

import kddp_ext
from kddp_ext import ops


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
    settings = kddp_ext.LossSettings(temperature=3.0, alpha=0.6, label_smoothing=0.1)
    opcheck(
        ops.kd_l1_loss_operator,
        (student, teacher, labels, [activation], [0.01], [9.0], *settings.operator_arguments(), *flags),
    )
    for alpha, *sides in [(0.0, None, labels), (1.0, teacher, None)]:
        arguments = kddp_ext.LossSettings(alpha=alpha).operator_arguments()
        opcheck(ops.kd_l1_loss_operator, (student, *sides, [], [], [], *arguments, *flags))


def test_opcheck_of_statistics_and_gather_slices(batch):
    activation = batch[3]
    opcheck(torch.ops.kddp.neuron_statistics.default, (activation,))
    keep = torch.tensor([0, 3, 7])
    opcheck(torch.ops.kddp.gather_slices.default, ([activation], keep, keep, 9, 12, None, None))
    means = torch.ones(2, dtype=torch.float64)
    opcheck(torch.ops.kddp.gather_slices.default, ([activation], None, keep, 9, 12, torch.tensor([1, 2]), means))


def assert_compiles(step, *inputs, calls=((),), **options):
    """Without a graph break, with the results and gradients of eager execution."""
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        for function in (step, torch.compile(step, fullgraph=True, **options)):
            for arguments in calls:
                leaves = [x.detach().clone().requires_grad_() for x in inputs]
                outputs = function(*leaves, *arguments)
                outputs[0].backward()
                results.append([*(x.detach() for x in outputs), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(results[: len(calls)], results[len(calls) :], strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compiles_without_a_graph_break(batch):
    student, teacher, labels, activation = batch

    def step(s, a, weight):
        loss, terms = kddp_ext.fused_kd_l1_loss(s * 2, teacher, labels, [a], l1_weight=weight, return_terms=True)
        return loss * 3 + 0 * terms.kd, *terms

    assert_compiles(step, student, activation, calls=[(0.01,), (0.02,)])


@pytest.mark.slow_on_the_emulator
@each_form
def test_each_divergence_compiles_without_a_graph_break(batch, form):
    student, teacher, labels, activation = batch
    channels = torch.randn(9, 5, 4, 3)

    def step(s, a):
        return (loss_of(s, teacher, labels, activation, a, **form),)

    assert_compiles(step, student, channels, backend="aot_eager")


def test_compiles_for_any_batch_size(batch):
    step = torch.compile(loss_of, fullgraph=True, dynamic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rows in (9, 5, 7):
            arguments = [x[:rows] for x in batch]
            torch.testing.assert_close(step(*arguments), loss_of(*arguments))


@each_divergence
def test_functorch_grad(batch, divergence):
    student, teacher, labels, activation = batch

    def step(s, a):
        return loss_of(s, teacher, labels, a, divergence=divergence)

    gradients, value = torch.func.grad_and_value(lambda s, a: 2 * step(s, a), argnums=(0, 1))(student, activation)
    leaves = leaves_of(batch)
    loss = 2 * step(*leaves)
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(gradients, torch.autograd.grad(loss, leaves))


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


@each_divergence
def test_a_second_derivative_raises(batch, divergence):
    student, teacher, labels, _ = batch
    student.requires_grad_()
    scale = torch.ones((), requires_grad=True)
    loss = loss_of(student, teacher, labels, divergence=divergence) * scale
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


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
