"""PyTorch's modes of a thread: what a prune makes outlives inference mode, and a default device does not reach it."""

import contextlib

import pytest
import torch
from pruner_cases import example, kill, make_model, make_pruner, observe
from torch import nn

import kddp_ext
from kddp_ext import PruningHistory

DEAD = [1, 4]


def train_step(model, optimizer, pruner):
    optimizer.zero_grad()
    labels = torch.zeros(6, dtype=torch.int64)
    kddp_ext.fused_kd_l1_loss(model(example()), None, labels, pruner.activations, alpha=0.0, l1_weight=1e-3).backward()
    optimizer.step()


@pytest.fixture
def student():
    model = make_model()
    return model, torch.optim.Adam(model.parameters())


def test_training_goes_on_after_a_prune_in_inference_mode(student):
    """An evaluation of the new model is often in that mode, and the prune beside it."""
    model, optimizer = student
    pruner = make_pruner(model, optimizer, criterion="dead")
    kill(model, DEAD)
    train_step(model, optimizer, pruner)
    with torch.inference_mode():
        model(example())
        assert pruner.prune().neurons_pruned == len(DEAD)
    before = model[0].weight.clone()
    train_step(model, optimizer, pruner)
    assert not torch.equal(model[0].weight, before)
    assert pruner.statistics["0"].rows == 6


def test_a_pruner_that_was_made_and_restored_in_inference_mode_observes_outside(student):
    model, optimizer = student
    with torch.inference_mode():
        pruner = make_pruner(model, optimizer)
        pruner.load_state_dict(pruner.state_dict())
    train_step(model, optimizer, pruner)
    assert pruner.statistics["0"].rows == 6


def test_a_history_replayed_in_inference_mode_leaves_a_model_that_trains(student):
    model, optimizer = student
    history = PruningHistory({"0": 8})
    history.add_step({"0": DEAD})
    with torch.inference_mode():
        history.replay(model, (example(),))
    model(example()).sum().backward()
    optimizer.step()
    assert model[0].weight.grad.shape == model[0].weight.shape == (6, 5)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("reconstruction_samples", [0, 256])
def test_a_default_device_changes_nothing(reconstruction_samples):
    """ "meta" in the place of a GPU: what lands there has no numbers."""
    widths = []
    for device in (None, "meta"):
        model = nn.Sequential(nn.Conv1d(2, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
        for number, parameter in enumerate(model.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        inputs = torch.randn(40, 2, 4, generator=torch.Generator().manual_seed(9))
        with default_device(device):
            options = {"threshold": 0.5, "reconstruction_samples": reconstruction_samples}
            pruner = make_pruner(model, example_inputs=(inputs[:2],), **options)
            model(inputs)
            pruner.activations.observe()
            preview, report = pruner.preview(), pruner.prune()
        assert preview.layers[0].width_after == report.layers[0].width_after
        assert all(parameter.device.type == "cpu" for parameter in model.parameters())
        widths.append(pruner.widths["0"])
    assert widths[0] == widths[1] < 12


def test_a_criterion_of_ones_own_sees_statistics_under_a_default_device():
    pruner = make_pruner(make_model(), criterion=lambda statistics, outgoing: statistics.mean_abs, threshold=1e-6)
    observe(pruner)
    with default_device("meta"):
        assert pruner.prune().neurons_pruned == 0
