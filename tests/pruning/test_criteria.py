"""Which neurons count as inactive, and what compensation leaves behind."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kddp_ext.activations.statistics import NeuronStatistics
from kddp_ext.pruning.pruner import DynamicPruner
from kddp_ext.pruning.selection import _FUNCTIONS as CRITERIA
from kddp_ext.pruning.selection import outgoing_norms


def observed(*batches):
    statistics = NeuronStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.observe(batch)
    return statistics


def test_formulas():
    h = torch.tensor([[0.0, 1.0, -2.0, 5.0], [0.0, 3.0, 0.0, 5.0], [0.0, -1.0, 2.0, 5.0]], dtype=torch.float64)
    weights = [torch.tensor([[1.0, 2.0, 0.5, 9.0]]), torch.tensor([[0.0, 0.0, 2.0, 1.0], [3.0, 1.0, 0.0, 1.0]])]
    outgoing = outgoing_norms(weights)
    torch.testing.assert_close(outgoing, torch.cat(weights).double().norm(dim=0))
    statistics = observed(h[:1], h[1:])
    contribution = outgoing * h.std(0, unbiased=False)
    torch.testing.assert_close(CRITERIA["contribution"](statistics, outgoing), contribution / contribution.max())
    torch.testing.assert_close(CRITERIA["mean_activation"](statistics, outgoing), h.abs().mean(0) / 5)
    expected = torch.tensor([0, 1, 2 / 3, 1], dtype=torch.float64)
    torch.testing.assert_close(CRITERIA["apoz"](statistics, outgoing), expected)
    assert CRITERIA["dead"](statistics, outgoing).tolist() == [0, 1, 1, 1]


@settings(deadline=None)
@given(scales=st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5), seed=st.integers(0, 100))
def test_contribution_is_blind_to_scale_between_layers(scales, seed):
    """Shrinking W1 and growing W2 cheats the penalty and mean activations, not this."""
    generator = torch.Generator().manual_seed(seed)
    h, weight = torch.randn(20, 5, generator=generator).double(), torch.randn(3, 5, generator=generator).double()
    scale = torch.tensor(scales, dtype=torch.float64)
    plain = CRITERIA["contribution"](observed(h), outgoing_norms([weight]))
    scaled = CRITERIA["contribution"](observed(h * scale), outgoing_norms([weight / scale]))
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("criterion", ["contribution", "mean_activation"])
def test_a_layer_without_any_activity_is_left_alone(criterion):
    activity = CRITERIA[criterion](observed(torch.zeros(4, 3)), torch.ones(3, dtype=torch.float64))
    assert activity.tolist() == [1, 1, 1]


@pytest.mark.parametrize("flat", [False, True])
def test_outgoing_weights_of_channels(flat):
    """‖W2[:,j]‖ over all that a channel is read by: filters, or the columns of its flattened positions."""
    behind = [nn.Flatten(), nn.Linear(5 * 16, 3)] if flat else [nn.Conv2d(5, 4, 3)]
    model, x = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), *behind), torch.randn(4, 2, 6, 6)
    seen = []

    def spy(statistics, outgoing):
        seen.append(outgoing)
        return torch.ones(5)

    pruner = DynamicPruner(model, example_inputs=(x,), criterion=spy)
    model(x)
    pruner.activations.observe()
    pruner.prune()
    weight = model[-1].weight.detach().double()
    squares = weight.square().view(3, 5, 16).sum((0, 2)) if flat else weight.square().sum((0, 2, 3))
    torch.testing.assert_close(seen[0], squares.sqrt())


# --- the user's own criterion


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def pruner_by(criterion, **options):
    model, x = small_model(), torch.randn(20, 4, dtype=torch.float64)
    pruner = DynamicPruner(model, example_inputs=(x,), criterion=criterion, patience=1, **options)
    model(x)
    pruner.activations.observe()
    return pruner


def test_a_function_is_given_what_the_criteria_are():
    seen = []

    def by_hand(statistics, outgoing):
        seen.append((statistics, outgoing))
        return CRITERIA["contribution"](statistics, outgoing)

    own, named = (pruner_by(criterion, threshold=0.6) for criterion in (by_hand, "contribution"))
    statistics = {name: (each.values.clone(), each.rows) for name, each in own.statistics.items()}
    norms = [own.model[index].weight.detach().norm(dim=0) for index in (2, 4)]
    reports = [own.prune(), named.prune()]
    assert reports[0] == reports[1]
    assert reports[0].neurons_pruned > 0
    for (values, rows), norm, (received, outgoing) in zip(statistics.values(), norms, seen, strict=True):
        assert torch.equal(received.values, values)
        assert received.rows == rows
        assert outgoing.dtype == torch.float64
        torch.testing.assert_close(outgoing, norm)


def test_the_activities_of_a_function_are_absolute():
    """Any positive threshold, any finite activities, of any real dtype."""
    pruner = pruner_by(lambda statistics, outgoing: 100 * torch.arange(statistics.width), threshold=150.0)
    report = pruner.prune()
    assert [layer.pruned for layer in report.layers] == [(0, 1), (0, 1)]


def test_what_a_function_does_to_its_arguments_changes_nothing():
    def spoils(statistics, outgoing):
        activity = CRITERIA["contribution"](statistics, outgoing)
        statistics.values.fill_(7)
        outgoing.fill_(7)
        return activity

    own, named = (pruner_by(criterion, threshold=0.6) for criterion in (spoils, "contribution"))
    assert own.preview() == named.preview()
    assert own.prune() == named.prune()
    for a, b in zip(own.model.parameters(), named.model.parameters(), strict=True):
        assert torch.equal(a, b)


def only_the_second(value):
    """A criterion whose result for the second layer, which has 5 neurons, is `value`."""
    return lambda statistics, outgoing: torch.ones(6) if statistics.width == 6 else value


@pytest.mark.parametrize(
    ("value", "error", "reason"),
    [
        ([1.0] * 5, TypeError, "criterion: expected a tensor of activities for 2, got list"),
        (torch.ones(6), ValueError, r"for each of the 5 neurons of 2, got torch.float32 of shape \(6,\)"),
        (torch.ones(5, 1), ValueError, r"the 5 neurons of 2, got torch.float32 of shape \(5, 1\)"),
        (torch.ones(5, dtype=torch.complex64), ValueError, "one real activity .* got torch.complex64"),
        (torch.tensor([1, 1, torch.nan, 1, 1]), ValueError, "finite activities of at least 0 for 2, got nan"),
        (torch.tensor([1, 1, torch.inf, 1, 1]), ValueError, "finite activities of at least 0 for 2, got inf"),
        (torch.tensor([1, -2, 1, 1, 1]), ValueError, "finite activities of at least 0 for 2, got -2"),
    ],
)
def test_what_is_no_activity_is_refused(value, error, reason):
    pruner = pruner_by(only_the_second(value))
    before = pruner._state
    values = {name: each.values.clone() for name, each in pruner.statistics.items()}
    with pytest.raises(error, match=reason):
        pruner.prune()
    assert pruner._state is before
    for name, each in pruner.statistics.items():
        assert torch.equal(each.values, values[name])


# --- compensation


def constant_neuron(*behind):
    """Two of the five neurons put out a constant that is not zero; then `behind`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), *behind).double()
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = torch.tensor([0.3, -2.0]).double()
    return model


BEHIND = {
    "bias": lambda: [nn.Linear(5, 3)],
    "bias and norm": lambda: [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)],
    "norm without bias": lambda: [nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)],
    "norm without bias or affine": lambda: [
        nn.Linear(5, 6, bias=False),
        nn.BatchNorm1d(6, affine=False),
        nn.Linear(6, 3),
    ],
}
SHIFTED = {
    "bias": "2.bias",
    "bias and norm": "2.bias",
    "norm without bias": "3.running_mean",
    "norm without bias or affine": "3.running_mean",
}


@pytest.mark.parametrize("name", BEHIND)
def test_compensation_replaces_a_constant_neuron_exactly(name):
    model = constant_neuron(*BEHIND[name]())
    x = torch.randn(50, 4, dtype=torch.float64)
    model.train()(x)
    whole = copy.deepcopy(model)
    pruner = DynamicPruner(model, example_inputs=(x,), patience=1, layers=["0"])
    model.eval()(x)
    pruner.activations.observe()
    report = pruner.prune()
    assert report.layers[0].pruned == (1, 4)
    assert report.layers[0].compensated == (SHIFTED[name],)
    torch.testing.assert_close(model.eval()(x), whole.eval()(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.train()(x), whole.train()(x), rtol=1e-12, atol=1e-12)


def test_compensation_reaches_every_reader():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.left, self.right = constant_neuron(), nn.Linear(5, 3).double(), nn.Linear(5, 2).double()

        def forward(self, x):
            h = self.body(x)
            return torch.cat([self.left(h), self.right(h)], 1)

    model, x = TwoHeads(), torch.randn(20, 4, dtype=torch.float64)
    expected = model(x)
    pruner = DynamicPruner(model, example_inputs=(x,), patience=1)
    model(x)
    pruner.activations.observe()
    assert pruner.prune().layers[0].compensated == ("left.bias", "right.bias")
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_says_where_compensation_is_impossible():
    model, x = constant_neuron(nn.Linear(5, 3, bias=False)), torch.randn(20, 4, dtype=torch.float64)
    pruner = DynamicPruner(model, example_inputs=(x,), patience=1)
    model(x)
    pruner.activations.observe()
    report = pruner.prune()
    assert report.layers[0].uncompensated == ("2",)
    assert "not compensated, because they have no bias: 2" in str(report)


def test_compensation_can_be_turned_off():
    model, x = constant_neuron(nn.Linear(5, 3)), torch.randn(20, 4, dtype=torch.float64)
    bias = model[2].bias.detach().clone()
    pruner = DynamicPruner(model, example_inputs=(x,), patience=1, compensate=False)
    model(x)
    pruner.activations.observe()
    assert pruner.prune().layers[0].compensated == ()
    assert torch.equal(model[2].bias, bias)


@pytest.mark.parametrize("compensate", [True, False])
def test_compensation_keeps_the_mean_of_the_next_layer(compensate):
    """Of neurons that vary, what varies is lost and the mean stays; without it, both are lost."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 64), nn.Softplus(), nn.Linear(64, 4)).double()
    x = torch.randn(500, 8, dtype=torch.float64)
    pruner = DynamicPruner(
        model, example_inputs=(x[:2],), threshold=0.5, patience=1, compensate=compensate, reconstruction_samples=0
    )
    before = model(x).detach()
    h, outgoing = pruner.activations[0].detach(), model[2].weight.detach().clone()
    pruner.activations.observe()
    pruned = list(pruner.prune().layers[0].pruned)
    assert len(pruned) > 5
    lost = (h - h.mean(0) if compensate else h)[:, pruned] @ outgoing[:, pruned].T
    torch.testing.assert_close(before - model(x).detach(), lost, rtol=1e-10, atol=1e-12)
    assert (float(lost.mean(0).abs().max()) < 1e-12) == compensate
