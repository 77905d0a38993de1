"""A penalty that is met by rescaling is noticed."""

import copy

import pytest
import torch
from pruner_cases import INPUTS, kill, make_model, make_pruner, observe
from torch import nn

import kddp_ext


def rescale(model, factor):
    """What the network computes stays; its activations become `factor` times as large."""
    with torch.no_grad():
        model[0].weight *= factor
        model[0].bias *= factor
        model[3].weight /= factor


def test_a_network_rescaled_by_hand_is_warned_of():
    model = make_model()
    pruner = make_pruner(model)
    observe(pruner)
    (first,) = pruner.prune().layers
    assert (first.activation_scale, first.outgoing_scale) == (None, None)
    rescale(model, 0.1)
    observe(pruner)
    report = pruner.prune()
    assert report.layers[0].activation_scale == pytest.approx(0.1, rel=1e-5)
    assert report.layers[0].outgoing_scale == pytest.approx(10, rel=1e-5)
    assert report.layers[0].is_rescaled
    assert report.warnings[0].startswith("the L1 penalty on 0 is met by rescaling")
    assert "activations shrank to 0.1x while the weights that read them grew 10x" in str(report)


def test_every_check_compares_with_the_first():
    model = make_model()
    pruner = make_pruner(model)
    rescaled = []
    for check in range(3):
        observe(pruner)
        report = pruner.prune()
        rescaled.append(report.layers[0].is_rescaled)
        assert check == 0 or report.layers[0].activation_scale == pytest.approx(0.6**check, rel=1e-5)
        rescale(model, 0.6)
    assert rescaled == [False, False, True]


@pytest.mark.parametrize(("activations", "outgoing"), [(0.1, 1.0), (1.0, 10.0), (0.6, 1 / 0.6), (10.0, 0.1)])
def test_one_of_the_two_alone_is_not(activations, outgoing):
    model = make_model()
    pruner = make_pruner(model)
    observe(pruner)
    pruner.prune()
    with torch.no_grad():
        model[0].weight *= activations
        model[0].bias *= activations
        model[3].weight *= outgoing
    observe(pruner)
    report = pruner.prune()
    assert report.layers[0].activation_scale == pytest.approx(activations, rel=1e-5)
    assert report.layers[0].outgoing_scale == pytest.approx(outgoing, rel=1e-5)
    assert not report.layers[0].is_rescaled
    assert "activations" not in str(report)


def test_only_neurons_that_stay_are_compared():
    """The loss of the largest neuron, and of those at the first check, is no change of scale."""
    model = make_model()
    with torch.no_grad():
        model[0].bias[2] = 100
        model[3].weight[:, 2] = 100
    pruner = make_pruner(model, criterion="dead")
    kill(model, [0])
    for dead in ([0], [1], []):  # then the large one, by its index of that time
        kill(model, dead)
        observe(pruner)
        report = pruner.prune()
        assert report.neurons_pruned == len(dead)
    assert pruner.history.pruned("0") == [0, 2]
    assert report.layers[0].activation_scale == pytest.approx(1)
    assert report.layers[0].outgoing_scale == pytest.approx(1)


def test_the_comparison_survives_a_checkpoint():
    model = make_model()
    pruner = make_pruner(model)
    observe(pruner)
    pruner.prune()
    resumed = make_pruner(copy.deepcopy(model))
    resumed.load_state_dict(pruner.state_dict())
    for each in (pruner, resumed):
        rescale(each.model, 0.2)
        observe(each)
    assert resumed.prune().layers == pruner.prune().layers


def test_neurons_that_were_all_dead_have_no_scale():
    model = make_model()
    with torch.no_grad():
        model[0].bias -= 1000
    pruner = make_pruner(model)
    for _ in range(2):
        observe(pruner)
        (layer,) = pruner.prune().layers
    assert layer.activation_scale is None
    assert layer.outgoing_scale == pytest.approx(1)
    assert not layer.is_rescaled


def test_a_network_that_is_trained_with_weight_decay_is_not_warned_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 20), nn.ReLU(), nn.Dropout(0.0), nn.Linear(20, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1.0)
    pruner = make_pruner(model, optimizer, interval=20)
    teacher = nn.Linear(INPUTS, 3)
    x = torch.randn(200, INPUTS)
    labels = teacher(x).argmax(1)
    reports = []
    for _ in range(100):
        loss = kddp_ext.fused_kd_l1_loss(model(x), None, labels, pruner.activations, alpha=0.0, l1_weight=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reports += [report for report in [pruner.step()] if report is not None]
    assert len(reports) == 5
    assert reports[-1].layers[0].activation_scale is not None
    assert not any(layer.is_rescaled for report in reports for layer in report.layers)
    assert "activations shrank" not in str(reports[-1])
