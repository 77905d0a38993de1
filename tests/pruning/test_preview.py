"""A preview: what it says comes true, and saying it changes nothing."""

import copy

import pytest
import torch
from pruner_cases import example, make_model, make_pruner, observe
from torch import nn

import kddp_ext
from kddp_ext.pruning.selection import KeptBy


def trained():
    """A network that has learnt what another one computes of white noise: its neurons are nearly uncorrelated."""
    torch.manual_seed(3)
    x = torch.randn(800, 40)
    targets = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 12))(x).detach()
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = None
    for _ in range(60):
        loss = nn.functional.mse_loss(model(x), targets)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 2
    return model.double(), x.double()


def outputs_of(model, reader, x):
    seen = []
    handle = model.get_submodule(reader).register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    handle.remove()
    return seen[0].detach()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize(("layer", "reader", "threshold"), [("0", "2", 0.7), ("2", "4", 0.4), ("2", "4", 0.6)])
def test_the_prediction_comes_true(layer, reader, threshold, compensate):
    model, x = trained()
    pruner = make_pruner(model, example_inputs=(x[:2],), layers=[layer], threshold=threshold, compensate=compensate)
    before = outputs_of(model, reader, x)
    pruner.activations.observe()
    preview = pruner.preview()
    report = pruner.prune()
    change = (outputs_of(model, reader, x) - before).square().mean().sqrt()
    actual = float(change / (before - before.mean(0)).square().mean().sqrt())
    assert report.neurons_pruned > 3
    assert actual / 2 < preview.layers[0].output_change < actual * 2


def test_the_prediction_is_exact_for_neurons_without_correlation():
    """Each neuron passes one coordinate on, and the samples are a full factorial design."""
    x = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).double()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([1.0, 0.1, 0.2, 2.0])))
        model[0].bias.copy_(torch.tensor([0.0, 0.3, 0.0, 0.0]))
        model[1].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 1.0], [2.0, 1.0, 1.0, 0.0], [0.0, 2.0, -1.0, 1.0]]))
    for compensate in (True, False):
        pruned = copy.deepcopy(model)
        pruner = make_pruner(pruned, example_inputs=(x,), layers=["0"], threshold=0.4, compensate=compensate)
        before = pruned(x).detach()
        pruner.activations.observe()
        predicted = pruner.preview().layers[0].output_change
        assert pruner.prune().layers[0].pruned == (1, 2)
        varies = (before - before.mean(0)).square().sum().sqrt()
        assert predicted == pytest.approx(float((pruned(x).detach() - before).square().sum().sqrt() / varies), rel=1e-9)


def test_what_a_reader_cannot_take_up_counts_in_full():
    """Of two readers one has a bias: the mean of a pruned neuron is lost in the other alone."""

    class TwoReaders(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 1, bias=False)

        def forward(self, x):
            h = self.body(x)
            return torch.cat([self.left(h), self.right(h)], 1)

    model, x = TwoReaders().double(), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    with torch.no_grad():
        model.body.weight.copy_(torch.eye(2))
        model.body.bias.copy_(torch.tensor([0.0, 3.0]))
        model.left.weight.copy_(torch.tensor([[2.0, 5.0]]))
        model.right.weight.copy_(torch.tensor([[1.0, 0.5]]))
    pruner = make_pruner(model, example_inputs=(x,))
    model(x)
    pruner.activations.observe()
    assert pruner.preview().layers[0].output_change == pytest.approx(3 * 0.5 / 5**0.5)


def test_says_what_a_prune_does_and_changes_nothing():
    model, x = trained()
    optimizer = torch.optim.Adam(model.parameters())
    pruner = make_pruner(model, optimizer, example_inputs=(x[:2],), threshold=0.7, patience=3, round_to=4)
    model(x).square().mean().backward()
    optimizer.step()
    pruner.activations.observe()
    state, weights = copy.deepcopy(pruner.state_dict()), copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())
    settings, before, activations = pruner.settings, pruner._state, pruner.activations
    previews = [pruner.preview(), pruner.preview(0.4), pruner.preview()]
    assert previews[0] == previews[2]
    assert pruner._state is before
    assert pruner.settings is settings
    assert same(activations, pruner.activations)
    assert same(pruner.state_dict(), state)
    assert same(model.state_dict(), weights)
    assert same(optimizer.state_dict(), moments)

    model.load_state_dict(weights)
    impatient = make_pruner(model, example_inputs=(x[:2],), threshold=0.7, patience=1, round_to=4)
    impatient.load_state_dict(state)
    report = impatient.prune()
    for said, done in zip(previews[0].layers, report.layers, strict=True):
        assert (said.name, said.width, said.width_after) == (done.name, done.width_before, done.width_after)
        assert said.kept_by == done.kept_by
        assert said.inactive == len(done.pruned) + done.kept_by.total
    assert report.neurons_pruned > 0
    assert (previews[0].parameters_before, previews[0].parameters_after) == (
        report.parameters_before,
        report.parameters_after,
    )
    assert (previews[0].macs_before, previews[0].macs_after) == (report.macs_before, report.macs_after)
    assert previews[1].threshold == 0.4
    for lower, higher in zip(previews[1].layers, previews[0].layers, strict=True):
        assert lower.inactive < higher.inactive


def test_a_table():
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


def test_constant_outputs_that_would_change():
    """Nothing varies, and without compensation something is lost: no share of the variation says how much."""
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    pruner = make_pruner(model, criterion="mean_activation", threshold=0.5, compensate=False)
    observe(pruner)
    preview = pruner.preview()
    assert preview.layers[0].output_change == float("inf")
    assert str(preview).splitlines()[2].endswith(" inf")


def test_wrong_thresholds_and_missing_statistics_are_named():
    pruner = make_pruner(make_model())
    pruner.model(example())
    with pytest.raises(RuntimeError, match="preview: there are no statistics of 0"):
        pruner.preview()
    observe(pruner)
    with pytest.raises(ValueError, match="threshold: expected more than 0 and at most 1, got 2"):
        pruner.preview(2)
    pruner.model[0] = nn.Linear(5, 9)
    with pytest.raises(ValueError, match=r"model: 0.weight was traced with 8 neurons of 0 .* make a new pruner"):
        pruner.preview()
