"""A prune in the middle of training: compiled and in mixed precision."""

import copy

import pruner_cases
import pytest
import torch
from dead_neurons import ALIVE, CLASSES, DEAD, INPUTS
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import kddp_ext

pytestmark = pytest.mark.usefixtures("one_trace_each")

WIDTH = 9


def make_student():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


def make_pruner(model, optimizer):
    return pruner_cases.make_pruner(model, optimizer, criterion="dead", example_inputs=(torch.randn(4, INPUTS),))


def kill(student, neurons):
    with torch.no_grad():
        student[1].weight[neurons] = 0
        student[1].bias[neurons] = -1


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, INPUTS, generator=generator), torch.randint(CLASSES, (16,), generator=generator)


def loss_of(model, pruner, seed):
    x, labels = batch(seed)
    logits = model(x)
    return kddp_ext.fused_kd_l1_loss(logits, None, labels, pruner.activations, alpha=0.0, l1_weight=1e-4)


@pytest.mark.parametrize("compiled_first", [False, True], ids=["pruner of the student", "pruner of the compiled"])
def test_a_compiled_student_is_recompiled_once_after_a_prune(compiled_first, tmp_path):
    """Forward and backward; the results are those of the same training without a compiler."""

    def run(backend):
        torch.compiler.reset()
        student = make_student()
        model = student if backend is None else torch.compile(student, backend=backend, fullgraph=True)
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
        pruner = make_pruner(model if compiled_first else student, optimizer)
        compiled = []
        for prune, dead in enumerate(([2], [], [0, 1])):
            kill(student, dead)
            for step in range(2):
                optimizer.zero_grad()
                loss_of(model, pruner, seed=10 * prune + step).backward()
                optimizer.step()
                kill(student, dead)  # an optimizer with momentum would revive them
            assert pruner.prune().neurons_pruned == len(dead)
            compiled.append(0 if backend is None else backend.frame_count)
        loss_of(model, pruner, seed=99)
        compiled.append(0 if backend is None else backend.frame_count)
        return compiled, student, model, pruner

    counter = CompileCounterWithBackend("aot_eager")
    compiled, student, model, pruner = run(counter)
    assert compiled == [1, 2, 2, 3]  # the second prune removed nothing
    _, expected, _, _ = run(None)
    for (name, tensor), other in zip(student.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other, msg=lambda m, n=name: f"{n}: {m}")
    x, _ = batch(5)
    torch.testing.assert_close(model(x), copy.deepcopy(student)(x))
    torch.testing.assert_close(model.eval()(x), student.eval()(x))
    kddp_ext.save_student(tmp_path / "student", model, pruner.history)
    loaded = kddp_ext.load_student(tmp_path / "student", make_student, (x,))
    assert torch.equal(loaded.eval()(x), student(x))


def test_autocast_to_bfloat16():
    """Parameters and moments stay float32; activations are observed in the dtype in which they are computed."""
    student = make_student()
    optimizer = torch.optim.AdamW(student.parameters())
    pruner = make_pruner(student, optimizer)
    kill(student, DEAD)
    for step in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(student, pruner, seed=step)
            assert pruner.activations[0].dtype == torch.bfloat16
        loss.backward()
        optimizer.step()
        if step == 0:
            kill(student, DEAD)
            with torch.autocast("cpu", torch.bfloat16):
                assert pruner.prune().neurons_pruned == len(DEAD)
    for parameter in student.parameters():
        moment = optimizer.state[parameter]["exp_avg"]
        assert parameter.dtype == moment.dtype == torch.float32
        assert parameter.shape == moment.shape
        assert parameter.isfinite().all()


@pytest.mark.parametrize("moment", range(4), ids=["before unscale_", "before step", "before update", "after update"])
@pytest.mark.parametrize("overflow", [False, True])
def test_a_gradient_scaler_continues(moment, overflow):
    """At any moment of the step, a prune changes neither the scale nor which steps are skipped."""

    def run(prune_at):
        student = make_student()
        kill(student, DEAD)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        pruner = make_pruner(student, optimizer)

        actions = [lambda: scaler.unscale_(optimizer), lambda: scaler.step(optimizer), scaler.update, lambda: None]
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(student, pruner, seed=step)).backward()
            if overflow and step == 1:
                student[3].bias.grad[0] = torch.inf
            for moment, action in enumerate(actions):
                if step == 1 and moment == prune_at:
                    assert pruner.prune().neurons_pruned == len(DEAD)
                action()
            kill(student, DEAD if student[0].out_features == WIDTH else [])
        return student, scaler

    student, scaler = run(moment)
    expected, expected_scaler = run(None)
    assert student[0].out_features == len(ALIVE)
    assert scaler.state_dict() == expected_scaler.state_dict()
    assert scaler.get_scale() == (2.0**7 if overflow else 2.0**9)
    for (name, tensor), whole in zip(student.state_dict().items(), expected.state_dict().values(), strict=True):
        kept = whole
        if whole.dim() and name != "3.bias":
            kept = whole[:, ALIVE] if name == "3.weight" else whole[ALIVE]
        torch.testing.assert_close(tensor, kept, msg=lambda m, n=name: f"{n}: {m}")
