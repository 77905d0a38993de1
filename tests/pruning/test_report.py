"""Reports and previews: what they predict comes true, and they warn of collapse and of rescaling."""

import copy

import pytest
import torch
from pruner_cases import (
    INPUTS,
    check,
    kill,
    make_model,
    make_pruner,
    observe,
    observed_pruner,
    recipe,
    state_of,
)
from torch import nn

import kddp_ext
from kddp_ext import KeptBy

# --- what a report says


def test_a_report_counts_parameters_and_macs():
    model = make_model()
    pruner = make_pruner(model, criterion="dead")
    report = check(pruner, [3])
    assert report.parameters_before == 8 * INPUTS + 8 + 3 * 8 + 3
    assert (report.macs_before, report.macs_after) == (8 * INPUTS + 3 * 8, 7 * INPUTS + 3 * 7)
    assert report.parameters_after == 7 * INPUTS + 7 + 3 * 7 + 3 == sum(p.numel() for p in model.parameters())
    assert str(report) == "pruned 1 neuron (0: 8 → 7); parameters 75 → 66 (-12.0%)"
    assert (report.warnings, report.collapsed) == ((), ())


def test_a_report_names_the_limits_that_keep_neurons():
    pruner = make_pruner(make_model(), criterion="dead", round_to=4, minimum_width=2)
    report = check(pruner, [0, 1, 2])
    assert report.layers[0].kept_by == KeptBy(round_to=3)
    assert str(report) == "pruned 0 neurons (0: 8); parameters 75; 3 kept by round_to"
    report = check(pruner, range(8))
    assert report.layers[0].pruned == (4, 5, 6, 7)
    assert report.layers[0].kept_by == KeptBy(minimum_width=2, round_to=2)
    assert "2 kept by minimum_width; 2 kept by round_to; warning: layer 0 has collapsed" in str(report)


# --- collapse


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({}, "dead"),
        ({"criterion": "dead", "patience": 2}, "dead"),
        ({"criterion": "mean_activation"}, "dead"),
        ({"criterion": lambda statistics, outgoing: statistics.mean_abs, "threshold": 50.0}, "inactive"),
    ],
)
def test_a_collapsed_layer_is_reported_with_its_likely_cause(options, cause):
    pruner, dead = make_pruner(make_model(), **options), []
    if cause == "dead":
        assert not check(pruner, range(1, 8)).collapsed  # one active neuron is enough
        dead = range(pruner.widths["0"])
    report = check(pruner, dead)
    assert report.collapsed == ("0",)
    assert report.layers[0].collapsed
    (warning,) = report.warnings
    assert warning.startswith("layer 0 has collapsed: all of its activations are zero or below the threshold")
    assert "l1_weight or the learning rate is too high; lower them" in warning
    assert str(report).endswith(f"; warning: {warning}")


# --- a penalty met by rescaling


def rescale(model, activations, outgoing):
    with torch.no_grad():
        model[0].weight *= activations
        model[0].bias *= activations
        model[3].weight *= outgoing


@pytest.mark.parametrize(
    ("activations", "outgoing", "rescaled"),
    [(0.1, 10.0, True), (0.1, 1.0, False), (1.0, 10.0, False), (0.6, 1 / 0.6, False), (10.0, 0.1, False)],
)
def test_shrunk_activations_under_larger_weights_are_rescaling(activations, outgoing, rescaled):
    model = make_model()
    pruner = make_pruner(model)
    (first,) = check(pruner).layers
    assert (first.activation_scale, first.outgoing_scale) == (None, None)
    rescale(model, activations, outgoing)
    report = check(pruner)
    assert report.layers[0].activation_scale == pytest.approx(activations, rel=1e-5)
    assert report.layers[0].outgoing_scale == pytest.approx(outgoing, rel=1e-5)
    assert report.layers[0].is_rescaled == rescaled
    said = "warning: the L1 penalty on 0 is met by rescaling instead of sparsity: activations shrank to 0.1x while the"
    assert (said in str(report)) == rescaled == bool(report.warnings)


def test_every_check_is_compared_with_the_first_also_after_a_checkpoint():
    model = make_model()
    pruner = make_pruner(model)
    rescaled = []
    for number in range(3):
        report = check(pruner)
        rescaled.append(report.layers[0].is_rescaled)
        assert number == 0 or report.layers[0].activation_scale == pytest.approx(0.6**number, rel=1e-5)
        rescale(model, 0.6, 1 / 0.6)
    assert rescaled == [False, False, True]
    resumed = make_pruner(copy.deepcopy(model))
    resumed.load_state_dict(pruner.state_dict())
    observe(pruner)
    observe(resumed)
    assert resumed.prune().layers == pruner.prune().layers


def test_only_remaining_neurons_are_compared():
    model = make_model()
    with torch.no_grad():
        model[0].bias[2] = 100
        model[3].weight[:, 2] = 100
    pruner = make_pruner(model, criterion="dead")
    kill(model, [0])
    for dead in ([0], [1], []):  # the second is the neuron with the large weights
        report = check(pruner, dead)
        assert report.neurons_pruned == len(dead)
    assert pruner.history.pruned("0") == [0, 2]
    assert report.layers[0].activation_scale == pytest.approx(1)
    assert report.layers[0].outgoing_scale == pytest.approx(1)


def test_dead_neurons_have_no_activation_scale():
    pruner = make_pruner(make_model())
    for _ in range(2):
        (layer,) = check(pruner, range(8)).layers
    assert layer.activation_scale is None
    assert layer.outgoing_scale == pytest.approx(1)
    assert not layer.is_rescaled


# --- previews


@pytest.mark.parametrize("compensate", [True, False])
def test_the_prediction_is_exact_for_uncorrelated_neurons(compensate):
    """Each neuron passes one coordinate on, and the samples are a full factorial design."""
    x = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).double()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([1.0, 0.1, 0.2, 2.0])))
        model[0].bias.copy_(torch.tensor([0.0, 0.3, 0.0, 0.0]))
        model[1].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 1.0], [2.0, 1.0, 1.0, 0.0], [0.0, 2.0, -1.0, 1.0]]))
    pruner = observed_pruner(model, x, layers=["0"], threshold=0.4, compensate=compensate)
    before = model(x).detach()
    predicted = pruner.preview().layers[0].output_change
    assert pruner.prune().layers[0].pruned == (1, 2)
    varies = (before - before.mean(0)).square().sum().sqrt()
    assert predicted == pytest.approx(float((model(x).detach() - before).square().sum().sqrt() / varies), rel=1e-9)


def test_a_mean_that_a_reader_cannot_absorb_counts_in_full():
    """Only one of two readers has a bias, so the mean of a removed neuron is lost in the other."""

    def two_readers(m, x):
        h = m.first(x)
        return torch.cat([m.last(h), m.right(h)], 1)

    layers = {"last": lambda: nn.Linear(2, 1), "right": lambda: nn.Linear(2, 1, bias=False)}
    model = recipe(two_readers, first=lambda: nn.Linear(2, 2), **layers)().double()
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(2))
        model.first.bias.copy_(torch.tensor([0.0, 3.0]))
        model.last.weight.copy_(torch.tensor([[2.0, 5.0]]))
        model.right.weight.copy_(torch.tensor([[1.0, 0.5]]))
    pruner = observed_pruner(model, x)
    assert pruner.preview().layers[0].output_change == pytest.approx(3 * 0.5 / 5**0.5)


def test_a_preview_says_what_a_prune_does_and_changes_nothing():
    torch.manual_seed(0)
    x = torch.randn(200, 40)
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 12))
    optimizer = torch.optim.Adam(model.parameters())
    pruner = make_pruner(model, optimizer, example_inputs=(x[:2],), threshold=0.7, patience=3, round_to=4)
    model(x).square().mean().backward()
    optimizer.step()
    pruner.activations.observe()
    before = state_of(model, optimizer=optimizer, pruner=pruner)
    previews = [pruner.preview(), pruner.preview(0.4), pruner.preview()]
    assert previews[0] == previews[2]
    assert state_of(model, optimizer=optimizer, pruner=pruner) == before
    assert [previews[0].threshold, previews[1].threshold] == [pruner.settings.threshold, 0.4] == [0.7, 0.4]
    for lower, higher in zip(previews[1].layers, previews[0].layers, strict=True):
        assert lower.inactive < higher.inactive

    impatient = make_pruner(model, example_inputs=(x[:2],), threshold=0.7, patience=1, round_to=4)
    impatient.load_state_dict(pruner.state_dict())
    report = impatient.prune()
    assert report.neurons_pruned > 0
    for said, done in zip(previews[0].layers, report.layers, strict=True):
        assert (said.name, said.width, said.width_after) == (done.name, done.width_before, done.width_after)
        assert said.kept_by == done.kept_by
        assert said.inactive == len(done.pruned) + done.kept_by.total
    for size in ("parameters_before", "parameters_after", "macs_before", "macs_after"):
        assert getattr(previews[0], size) == getattr(report, size)


def test_a_preview_is_a_table():
    model = make_model()
    with torch.no_grad():
        model[0].weight[[1, 2, 5]] = 0
    pruner = make_pruner(model, round_to=2)
    observe(pruner)
    preview = pruner.preview()
    assert preview.layers == (kddp_ext.LayerPreview("0", 8, 3, 6, KeptBy(round_to=1), 0.0),)
    assert str(preview).splitlines() == [
        "a prune at threshold 0.01, patience 1:",
        "layer  neurons  inactive  kept  left  output change",
        "0            8         3     1     6          0.00%",
        "parameters 75 → 57 (-24.0%); MACs 64 → 48 (-25.0%); output changes are predicted for uncorrelated neurons",
    ]


def test_a_change_of_constant_outputs_is_infinite():
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    pruner = make_pruner(model, criterion="mean_activation", threshold=0.5, compensate=False)
    observe(pruner)
    preview = pruner.preview()
    assert preview.layers[0].output_change == float("inf")
    assert str(preview).splitlines()[2].endswith(" inf")


def test_wrong_thresholds_missing_statistics_and_changed_models_are_named():
    pruner = make_pruner(make_model())
    with pytest.raises(RuntimeError, match="preview: there are no statistics of 0"):
        pruner.preview()
    observe(pruner)
    with pytest.raises(ValueError, match="threshold: expected more than 0 and at most 1, got 2"):
        pruner.preview(2)
    pruner.model[0] = nn.Linear(5, 9)
    with pytest.raises(ValueError, match=r"model: 0.weight was traced with shape \(8, 5\) .* make a new pruner"):
        pruner.preview()
