"""The order in which neurons go where the others take over what they did: the greedy choice, step by step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruner_cases import make_pruner
from pruning.zoo.resnets import StandardisedConv
from torch import nn

from kddp_ext.pruning.elimination import eliminate, shrunk_correlation
from kddp_ext.pruning.selection import correlation_of


def drawn(width, samples, seed):
    """Correlated values of neurons, (samples, width), and what their removal costs, (width,)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return values @ mixing, torch.rand(width, generator=generator, dtype=torch.float64)


def total_cost(correlation, increases, gone):
    """Σ of the increases of `gone`, times the share of their variances that the other neurons do not express."""
    gone, kept = sorted(gone), [each for each in range(len(increases)) if each not in gone]
    between = correlation[gone][:, kept]
    left = correlation[gone][:, gone] - between @ torch.linalg.solve(correlation[kept][:, kept], between.T)
    return float(increases[gone] @ left.diagonal())


@settings(deadline=None)
@given(width=st.integers(1, 12), seed=st.integers(0, 1000))
def test_each_removal_is_the_cheapest_and_costs_what_the_definition_says(width, seed):
    values, increases = drawn(width, 40, seed)
    correlation = shrunk_correlation(values)
    order, costs = eliminate(correlation, increases)
    gone, spent = [], 0.0
    for neuron in order.tolist():
        totals = {each: total_cost(correlation, increases, [*gone, each]) for each in range(width) if each not in gone}
        assert totals[neuron] == pytest.approx(min(totals.values()), rel=1e-9)
        gone.append(neuron)
        assert spent + float(costs[neuron]) == pytest.approx(totals[neuron], rel=1e-9)
        spent = totals[neuron]
    assert spent == pytest.approx(float(increases.sum()))  # without any neuron left, each is replaced by its mean


def test_blocks_of_removals_do_not_change_the_result(monkeypatch):
    values, increases = drawn(150, 400, 0)
    correlation = shrunk_correlation(values)
    found = []
    for block in (1, 64, 150):
        monkeypatch.setattr("kddp_ext.pruning.elimination._BLOCK", block)
        found.append(eliminate(correlation, increases))
    for order, costs in found[1:]:
        assert order.tolist() == found[0][0].tolist()
        torch.testing.assert_close(costs, found[0][1], rtol=1e-9, atol=0)
    assert eliminate(torch.zeros(0, 0).double(), torch.zeros(0).double())[0].tolist() == []


def test_one_of_two_equal_neurons_goes_for_nothing_and_the_other_for_both():
    values, _ = drawn(4, 500, 0)
    values[:, 3] = -2 * values[:, 1]
    order, costs = eliminate(shrunk_correlation(values), torch.tensor([1.0, 0.5, 1.0, 0.25], dtype=torch.float64))
    assert order[0] in (1, 3)
    assert costs[order[0]] < 0.01
    assert costs[4 - int(order[0])] > 0.3  # 1 and 3: the other one


def test_the_correlation_is_shrunk_as_schaefer_and_strimmer_say():
    values, _ = drawn(5, 30, 0)
    values[:, 4] = 0  # a constant
    scaled = values / values.square().mean(0).sqrt().clamp(min=1e-300)
    products = scaled[:, :, None] * scaled[:, None, :]
    plain, off_diagonal = products.mean(0), ~torch.eye(5, dtype=torch.bool)
    noise = products.var(0) / 30
    shrinkage = noise[off_diagonal].sum() / plain[off_diagonal].square().sum()
    expected = torch.where(off_diagonal, (1 - shrinkage) * plain, 1.0)
    torch.testing.assert_close(shrunk_correlation(values.float()), expected, rtol=1e-6, atol=1e-7)
    independent = torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
    assert shrunk_correlation(independent)[0, 1:].abs().max() < 0.1  # what 20 samples seem to show is noise
    assert torch.equal(shrunk_correlation(torch.zeros(20, 3)), torch.eye(3, dtype=torch.float64))


def twins(bias=True):
    """A network whose hidden neurons 0 and 1, and 2 and 3, are equal, up to a factor; and inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=bias)).double()
    with torch.no_grad():
        for one, other in ((0, 1), (2, 3)):
            model[0].weight[other], model[0].bias[other] = 2 * model[0].weight[one], 2 * model[0].bias[one]
    return model, torch.randn(400, 6, dtype=torch.float64)


def measured_pruner(model, x, **options):
    """A pruner of a quarter of the neurons that has seen the loss of random labels."""
    options = {"criterion": "saliency", "target_macs": 6 / 8, "reconstruction_samples": 3200, **options}
    pruner = make_pruner(model, example_inputs=(x,), **options)
    for _ in range(3):  # the first pass measures only means
        loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 3)
        pruner.activations.observe(loss)
        loss.backward()
    return pruner


@pytest.mark.parametrize("bias", [True, False])
def test_a_prune_by_saliency_removes_what_the_others_express(bias):
    """Without a bias a constant cannot be absorbed, so not only the deviations from the means are expressed."""
    model, x = twins(bias)
    before = model(x).detach()
    pruner = measured_pruner(model, x)
    alone = pruner.saliency["0"]
    report = pruner.prune()
    gone = set(report.layers[0].pruned)
    assert len(gone) == 2
    assert len(gone & {0, 1}) == len(gone & {2, 3}) == 1
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-5, atol=1e-5)
    assert 0 <= report.predicted_increase < 0.2 * float(alone[sorted(gone)].sum())


@pytest.mark.parametrize("options", [{"reconstruction_samples": 0}, {"compensate": False}])
def test_saliency_alone_decides_where_nothing_is_reconstructed(options):
    pruner = measured_pruner(*twins(), **options)
    weakest = sorted(pruner.saliency["0"].argsort()[:2].tolist())
    assert sorted(pruner.prune().layers[0].pruned) == weakest


class TwoReaders(nn.Module):
    """A layer whose neurons are read at two places."""

    def __init__(self, second):
        super().__init__()
        self.hidden, self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1), second(4, 3, 1)

    def forward(self, x):
        hidden = self.hidden(x)
        return (self.first(hidden.relu()) + self.second(hidden.tanh())).flatten(1)


@pytest.mark.parametrize("second", [nn.Conv2d, StandardisedConv])
def test_neurons_that_are_read_at_two_places_have_the_mean_of_both_correlations(second):
    """A weight that is computed cannot take over what removed neurons did, so there nothing correlates."""
    torch.manual_seed(0)
    model, x = TwoReaders(second), torch.randn(64, 2, 1, 1)
    observation = measured_pruner(model, x, streams="all", reconstruction_samples=64)._state.observe(
        model, caller="prune"
    )
    samples = [statistics.ring.samples.double() for statistics in observation.statistics]
    parts = [shrunk_correlation(each - each.mean(0)) for each in samples]
    if second is StandardisedConv:
        parts[1] = torch.eye(4, dtype=torch.float64)
    found = correlation_of(observation, observation.neurons.groups[0])
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2)


@pytest.mark.parametrize(("widest", "rows"), [(7, 400), (8, 5)])
def test_very_wide_layers_and_few_samples_are_left_alone(monkeypatch, widest, rows):
    monkeypatch.setattr("kddp_ext.pruning.selection.WIDEST", widest)
    model, x = twins()
    pruner = measured_pruner(model, x[:rows])  # 15 samples are one too few
    observation = pruner._state.observe(model, caller="prune")
    assert correlation_of(observation, observation.neurons.groups[0]) is None
    monkeypatch.undo()
    pruner = measured_pruner(model, x)
    observation = pruner._state.observe(model, caller="prune")
    assert correlation_of(observation, observation.neurons.groups[0]) is not None
