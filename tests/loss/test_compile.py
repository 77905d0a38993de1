"""The loss under torch.compile and torch.export: no graph break, few compilations, the eager values and gradients."""

import pytest
import torch
from loss_cases import each_form
from torch._dynamo.testing import CompileCounter

import kddp_ext

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(rows, classes=21):
    generator = torch.Generator().manual_seed(rows)
    student, teacher = torch.randn(2, rows, classes, generator=generator)
    activation = torch.randn(rows, 12, generator=generator)
    return (
        student.requires_grad_(),
        teacher,
        torch.randint(0, classes, (rows,), generator=generator),
        activation.requires_grad_(),
    )


def loss_of(student, teacher, labels, activation, temperature=3.0, alpha=0.6, l1_weight=0.01, **settings):
    return kddp_ext.fused_kd_l1_loss(
        student, teacher, labels, [activation], temperature=temperature, alpha=alpha, l1_weight=l1_weight, **settings
    )


def results(function, *arguments):
    loss = function(*arguments)
    student, _, _, activation, *_ = arguments
    return loss.detach(), *torch.autograd.grad(loss, (student, activation))


SIZES = (64, 32, 48, 17, 128, 5, 256, 99, 3, 200)
VALUES = [0.1 + 0.05 * step for step in range(10)]
SERIES = {
    "batch sizes": [batch(rows) for rows in SIZES],
    "temperatures": [(*batch(8), 1 + value, 0.6, 0.01) for value in VALUES],
    "alphas": [(*batch(8), 3.0, value, 0.01) for value in VALUES],
    "l1_weights": [(*batch(8), 3.0, 0.6, value) for value in VALUES],
    "temperatures in tensors": [(*batch(8), torch.tensor(1 + value), 0.6, 0.01) for value in VALUES],
    "alphas in tensors": [(*batch(8), 3.0, torch.tensor(value), 0.01) for value in VALUES],
    "l1_weights in tensors": [(*batch(8), 3.0, 0.6, torch.tensor(value)) for value in VALUES],
}


@pytest.mark.parametrize("series", SERIES.values(), ids=SERIES.keys())
def test_schedules_and_batch_sizes_cost_two_compilations_at_most(series):
    counter = CompileCounter()
    compiled = torch.compile(loss_of, backend=counter, fullgraph=True)
    for arguments in series:
        torch.testing.assert_close(results(compiled, *arguments), results(loss_of, *arguments))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_for_any_batch_size(dynamic):
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic)
    for rows in (9, 5, 7):
        torch.testing.assert_close(results(compiled, *batch(rows)), results(loss_of, *batch(rows)))


@each_form
def test_each_form_compiles_without_a_graph_break(form):
    channels = torch.randn(9, 5, 4, 3, requires_grad=True)
    student, teacher, labels, activation = batch(9)

    def step(s, teacher, labels, a, channels):
        loss, terms = kddp_ext.fused_kd_l1_loss(
            *(s * 2, teacher, labels, [a, channels]),
            l1_weight=[0.1, 0.2],
            **form,
            return_terms=True,
        )
        return loss * 3 + 0 * terms.kd

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = (student, teacher, labels, activation, channels)
    expected, found = (results(function, *inputs) for function in (step, compiled))
    torch.testing.assert_close(found, expected)
    of_channels = [torch.autograd.grad(function(*inputs), channels) for function in (step, compiled)]
    torch.testing.assert_close(of_channels[1], of_channels[0])


def test_soft_labels_and_weights_compile():
    student, teacher, _, activation = batch(8)
    labels, weights = torch.rand(8, 21), torch.rand(8)

    def step(s, teacher, labels, a):
        options = {"sample_weights": weights, "class_weights": torch.linspace(1, 2, 21), "l1_weight": 0.1}
        return kddp_ext.fused_kd_l1_loss(s, teacher, labels, a, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = (student, teacher, labels, activation)
    torch.testing.assert_close(results(compiled, *inputs), results(step, *inputs))


def test_one_tensor_as_logits_and_activation():
    def step(s, teacher, labels):
        return kddp_ext.fused_kd_l1_loss(s, teacher, labels, [s], l1_weight=0.1)

    student, teacher, labels, _ = batch(8)
    found, expected = (
        torch.autograd.grad(function(student, teacher, labels), student)
        for function in (torch.compile(step, fullgraph=True), step)
    )
    torch.testing.assert_close(found, expected)


class Model(torch.nn.Module):
    def __init__(self, penalised):
        super().__init__()
        self.penalised = penalised
        self.hidden, self.out = torch.nn.Linear(12, 20), torch.nn.Linear(20, 10)
        self.loss = kddp_ext.FusedKDL1Loss(l1_weight=0.01)

    def forward(self, x, teacher, labels):
        hidden = self.hidden(x).relu()
        return self.loss(self.out(hidden), teacher, labels, [hidden] if self.penalised else [])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("penalised", [False, True])
def test_an_exported_loss_has_its_gradient(strict, dynamic, penalised):
    def arguments(rows):
        return torch.randn(rows, 12), torch.randn(rows, 10), torch.randint(0, 10, (rows,))

    model = Model(penalised)
    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows},) * 3 if dynamic else None
    program = torch.export.export(model, arguments(8), strict=strict, dynamic_shapes=shapes)
    inputs = arguments(21 if dynamic else 8)
    found, expected = (
        torch.autograd.grad(function(*inputs), list(owner.parameters()))
        for function, owner in ((program.module(), program), (model, model))
    )
    torch.testing.assert_close(found, expected)


def test_a_batch_marked_as_dynamic_compiles():
    inputs = batch(8)
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    compiled = torch.compile(loss_of, backend="eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, *inputs), results(loss_of, *inputs))


def test_a_wrong_setting_in_a_tensor_is_an_error_when_it_is_read():
    compiled = torch.compile(loss_of, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"^temperature, alpha, normalizer, l1_weight: expected .* got -1.0"):
        compiled(*batch(8), torch.tensor(-1.0))
