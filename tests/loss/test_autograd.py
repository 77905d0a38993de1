"""The loss as a citizen of PyTorch: gradcheck, opcheck, torch.compile, torch.func, retained graphs, autocast."""

import copy
import warnings

import pytest
import torch
from loss_cases import DIVERGENCES
from torch.library import opcheck

import kddp_ext
from kddp_ext import ops

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
standardized_or_not = pytest.mark.parametrize("standardize_logits", [False, True])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 9, 21, generator=generator)
    activation = torch.randn(9, 12, generator=generator)
    return student, teacher, torch.randint(0, 21, (9,), generator=generator), activation


def loss_of(student, teacher, labels, *activations, **settings):
    options = {"temperature": 3.0, "alpha": 0.6, "l1_weight": 0.01, "label_smoothing": 0.1} | settings
    return kddp_ext.fused_kd_l1_loss(student, teacher, labels, activations, **options)


@each_divergence
@standardized_or_not
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_gradcheck(batch, temperature, alpha, divergence, standardize_logits):
    student, teacher, labels, activation = (x.double() if x.is_floating_point() else x for x in batch)
    labels[2] = -100
    settings = {"divergence": divergence, "standardize_logits": standardize_logits, "jsd_beta": 0.3}

    def function(s, a):
        return loss_of(s, teacher, labels, a, temperature=temperature, alpha=alpha, **settings)

    inputs = (student[:4].requires_grad_(), activation[:4, :3].requires_grad_())
    teacher, labels = teacher[:4], labels[:4]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("without", ["teacher", "labels"])
def test_gradcheck_of_one_term(batch, without):
    student, teacher, labels, _ = (x.double() if x.is_floating_point() else x for x in batch)
    arguments = (None, labels) if without == "teacher" else (teacher, None)
    alpha = 0.0 if without == "teacher" else 1.0
    assert torch.autograd.gradcheck(lambda s: loss_of(s, *arguments, alpha=alpha), (student.requires_grad_(),))


@pytest.mark.parametrize("flags", [(True, True, False, True), (False, False, False, False), (True, False, True, False)])
def test_opcheck_of_the_loss(batch, flags):
    student, teacher, labels, activation = batch
    arguments = (
        student,
        teacher,
        labels,
        [activation],
        [0.01],
        [9.0],
        3.0,
        0.6,
        0.1,
        -100,
        0,
        0.5,
        1.0,
        8.0,
        False,
        *flags,
    )
    opcheck(ops.kd_l1_loss_operator, arguments)


@pytest.mark.parametrize("divergence", [1, 2, 3])
@standardized_or_not
def test_opcheck_of_each_divergence(batch, divergence, standardize_logits):
    student, teacher, labels, activation = batch
    settings = ([0.01], [9.0], 3.0, 0.6, 0.1, -100, divergence, 0.3, 1.0, 8.0, standardize_logits)
    opcheck(
        ops.kd_l1_loss_operator,
        (student, teacher, labels, [activation], *settings, True, True, False, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_opcheck_of_scaling(batch):
    gradients, scale = [batch[0], batch[3]], torch.tensor(2.0)
    for operator in (torch.ops.kddp.scale_gradients, torch.ops.kddp.scale_gradients_):
        opcheck(operator, (gradients, scale, [1.0, 0.5]))


def test_opcheck_of_absent_inputs(batch):
    student, teacher, labels, _ = batch
    opcheck(
        ops.kd_l1_loss_operator,
        (student, None, labels, [], [], [], 3.0, 0.0, 0.0, -100, 0, 0.5, 1.0, 8.0, False, True, False, False, False),
    )
    opcheck(
        ops.kd_l1_loss_operator,
        (student, teacher, None, [], [], [], 3.0, 1.0, 0.0, -100, 0, 0.5, 1.0, 8.0, False, True, False, False, False),
    )


def test_opcheck_of_statistics_and_compaction(batch):
    _, _, _, activation = batch
    opcheck(torch.ops.kddp.neuron_statistics.default, (activation,))
    keep = torch.tensor([0, 3, 7])
    opcheck(torch.ops.kddp.gather_slices.default, ([activation], keep, keep, 9, 12, None, None))
    means = torch.ones(2, dtype=torch.float64)
    opcheck(torch.ops.kddp.gather_slices.default, ([activation], None, keep, 9, 12, torch.tensor([1, 2]), means))


def test_compiles_without_a_graph_break(batch):
    student, teacher, labels, activation = batch

    def step(s, a, weight):
        loss, terms = kddp_ext.fused_kd_l1_loss(s * 2, teacher, labels, [a], l1_weight=weight, return_terms=True)
        return loss * 3 + 0 * terms.kd, terms

    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        for function in (step, torch.compile(step, fullgraph=True)):
            for weight in (0.01, 0.02):  # a schedule of the penalty must not break it either
                s, a = student.clone().requires_grad_(), activation.clone().requires_grad_()
                loss, terms = function(s, a, weight)
                loss.backward()
                results.append((loss.detach(), *(t.detach() for t in terms), s.grad, a.grad))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])


@each_divergence
@standardized_or_not
def test_each_divergence_compiles_without_a_graph_break(batch, divergence, standardize_logits):
    student, teacher, labels, activation = batch

    def step(s):
        return loss_of(s, teacher, labels, activation, divergence=divergence, standardize_logits=standardize_logits)

    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            s = student.clone().requires_grad_()
            loss = function(s)
            loss.backward()
            results.append((loss.detach(), s.grad))
    torch.testing.assert_close(*results)


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

    of_student, of_activation = torch.func.grad(step, argnums=(0, 1))(student, activation)
    s, a = student.clone().requires_grad_(), activation.clone().requires_grad_()
    step(s, a).backward()
    torch.testing.assert_close(of_student, s.grad)
    torch.testing.assert_close(of_activation, a.grad)
    value = torch.func.grad_and_value(lambda s: 2 * loss_of(s, teacher, labels))(student)[1]
    torch.testing.assert_close(value, 2 * loss_of(student, teacher, labels))


def test_backward_scales_by_what_comes_from_above(batch):
    student, teacher, labels, activation = batch
    gradients = []
    for scale in (1.0, -2.5):
        s, a = student.clone().requires_grad_(), activation.clone().requires_grad_()
        (scale * loss_of(s, teacher, labels, a)).backward()
        gradients.append((s.grad / scale, a.grad / scale))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_retained_graph_gives_the_same_gradient_again(batch):
    student, teacher, labels, activation = batch
    s, a = student.clone().requires_grad_(), activation.clone().requires_grad_()
    loss = loss_of(s, teacher, labels, a)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        if times == 1:
            first = s.grad.clone(), a.grad.clone()
        torch.testing.assert_close((s.grad, a.grad), (first[0] * times, first[1] * times))


@pytest.mark.parametrize("scale", [1.0, -2.5])
@pytest.mark.parametrize("half", [False, True])
def test_what_is_saved_is_overwritten_by_the_last_backward_alone(batch, scale, half):
    student, teacher, labels, activation = (x.half() if half and x.is_floating_point() else x for x in batch)
    s, a = student.clone().requires_grad_(), activation.clone().requires_grad_()
    loss = loss_of(s, teacher, labels, a) * scale
    once = torch.autograd.grad(loss, [s, a], retain_graph=True)
    again = torch.autograd.grad(loss, [s, a], retain_graph=True)
    (last,) = torch.autograd.grad(loss, [s])
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])
    assert torch.equal(once[0], last)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, [s])


@each_divergence
def test_a_second_derivative_is_refused(batch, divergence):
    student, teacher, labels, _ = batch
    student.requires_grad_()
    scale = torch.ones((), requires_grad=True)
    loss = loss_of(student, teacher, labels, divergence=divergence) * scale
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_inputs_are_not_changed(batch):
    before = copy.deepcopy(batch)
    student, teacher, labels, activation = batch
    student.requires_grad_(), activation.requires_grad_()
    loss_of(student, teacher, labels, activation).backward()
    assert all(torch.equal(x, y) for x, y in zip(batch, before, strict=True))


def test_terms_and_teacher_have_no_gradient(batch):
    student, teacher, labels, activation = batch
    teacher.requires_grad_()
    loss, terms = kddp_ext.fused_kd_l1_loss(student.requires_grad_(), teacher, labels, [activation], return_terms=True)
    loss.backward()
    assert teacher.grad is None
    assert not any(term.requires_grad for term in terms)


def test_only_what_requires_a_gradient_gets_one(batch):
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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "reverse_kl", "standardize_logits": True},
        {"divergence": "jsd", "jsd_beta": 0.2},
        {"divergence": "dkd", "dkd_target_weight": 0.5, "dkd_non_target_weight": 2.0},
    ],
)
def test_module_equals_function(batch, settings):
    student, teacher, labels, activation = batch
    module = kddp_ext.FusedKDL1Loss(temperature=3.0, alpha=0.6, l1_weight=0.01, label_smoothing=0.1, **settings)
    function = loss_of(student, teacher, labels, activation, **settings)
    assert torch.equal(module(student, teacher, labels, [activation]), function)
    if settings:
        assert not torch.equal(function, loss_of(student, teacher, labels, activation))
        assert not torch.equal(function, loss_of(student, teacher, labels, activation, divergence=module.divergence))
    assert "temperature=3.0" in repr(module)
    assert f"divergence={module.divergence!r}" in repr(module)
    assert not list(module.parameters())
