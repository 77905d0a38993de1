"""Which neurons are removed: criteria, limits of one layer, and a budget for the whole model."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruner_cases import observed_pruner
from torch import nn

from kddp_ext import KeptBy, NeuronStatistics
from kddp_ext.pruning.selection import ModelSize, activities, affordable, decide, outgoing_norms, removable
from kddp_ext.pruning.tracing.find import find_neurons

pytestmark = pytest.mark.usefixtures("one_trace_each")


# --- criteria


def observed(*batches):
    statistics = NeuronStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.observe(batch)
    return statistics


def activity(criterion, statistics, outgoing):
    return activities(criterion, statistics, outgoing, layer="0")


def test_criteria_follow_their_formulas():
    h = torch.tensor([[0.0, 1.0, -2.0, 5.0], [0.0, 3.0, 0.0, 5.0], [0.0, -1.0, 2.0, 5.0]], dtype=torch.float64)
    weights = [torch.tensor([[1.0, 2.0, 0.5, 9.0]]), torch.tensor([[0.0, 0.0, 2.0, 1.0], [3.0, 1.0, 0.0, 1.0]])]
    outgoing = outgoing_norms(weights)
    torch.testing.assert_close(outgoing, torch.cat(weights).double().norm(dim=0))
    statistics = observed(h[:1], h[1:])
    contribution = outgoing * h.std(0, unbiased=False)
    torch.testing.assert_close(activity("contribution", statistics, outgoing), contribution / contribution.max())
    torch.testing.assert_close(activity("mean_activation", statistics, outgoing), h.abs().mean(0) / 5)
    expected = torch.tensor([0, 1, 2 / 3, 1], dtype=torch.float64)
    torch.testing.assert_close(activity("apoz", statistics, outgoing), expected)
    assert activity("dead", statistics, outgoing).tolist() == [0, 1, 1, 1]


@settings(deadline=None)
@given(scales=st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5), seed=st.integers(0, 100))
def test_contribution_is_invariant_to_rescaling_between_layers(scales, seed):
    generator = torch.Generator().manual_seed(seed)
    h, weight = torch.randn(20, 5, generator=generator).double(), torch.randn(3, 5, generator=generator).double()
    scale = torch.tensor(scales, dtype=torch.float64)
    plain = activity("contribution", observed(h), outgoing_norms([weight]))
    scaled = activity("contribution", observed(h * scale), outgoing_norms([weight / scale]))
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("criterion", ["contribution", "mean_activation"])
def test_no_neuron_of_a_silent_layer_is_less_active_than_the_others(criterion):
    silent = activity(criterion, observed(torch.zeros(4, 3)), torch.ones(3, dtype=torch.float64))
    assert silent.tolist() == [1, 1, 1]


@pytest.mark.parametrize("flat", [False, True])
def test_outgoing_norms_of_channels_cover_filters_or_flattened_positions(flat):
    behind = [nn.Flatten(), nn.Linear(5 * 16, 3)] if flat else [nn.Conv2d(5, 4, 3)]
    model, x = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), *behind), torch.randn(4, 2, 6, 6)
    seen = []

    def spy(statistics, outgoing):
        seen.append(outgoing)
        return torch.ones(5)

    observed_pruner(model, x, criterion=spy).prune()
    weight = model[-1].weight.detach().double()
    squares = weight.square().view(3, 5, 16).sum((0, 2)) if flat else weight.square().sum((0, 2, 3))
    torch.testing.assert_close(seen[0], squares.sqrt())


def pruner_by(criterion, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return observed_pruner(model, torch.randn(20, 4, dtype=torch.float64), criterion=criterion, **options)


def test_a_function_gets_copies_of_statistics_and_norms():
    seen = []

    def spoiling(statistics, outgoing):
        seen.append((statistics.values.clone(), outgoing.clone()))
        result = activity("contribution", statistics, outgoing)
        statistics.values.fill_(7)
        outgoing.fill_(7)
        return result

    own, named = (pruner_by(criterion, threshold=0.6) for criterion in (spoiling, "contribution"))
    norms = [own.model[index].weight.detach().norm(dim=0) for index in (2, 4)]
    values = [each.values.clone() for each in own.statistics.values()]
    reports = own.prune(), named.prune()
    assert reports[0] == reports[1]
    assert reports[0].neurons_pruned > 0
    for expected, norm, (received, outgoing) in zip(values, norms, seen, strict=True):
        assert torch.equal(received, expected)
        torch.testing.assert_close(outgoing, norm)
    for a, b in zip(own.model.parameters(), named.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_activities_of_a_function_are_absolute():
    pruner = pruner_by(lambda statistics, outgoing: 100 * torch.arange(statistics.width), threshold=150.0)
    assert [layer.pruned for layer in pruner.prune().layers] == [(0, 1), (0, 1)]


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
def test_invalid_activities_are_refused_and_nothing_changes(value, error, reason):
    pruner = pruner_by(lambda statistics, outgoing: torch.ones(6) if statistics.width == 6 else value)
    before = pruner._state
    with pytest.raises(error, match=reason):
        pruner.prune()
    assert pruner._state is before


# --- the limits of one layer


@st.composite
def marked_neurons(draw):
    marked = draw(st.lists(st.booleans(), min_size=1, max_size=70))
    levels = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    values = draw(st.lists(levels, min_size=len(marked), max_size=len(marked)))
    return torch.tensor(marked), torch.tensor(values, dtype=torch.float64)


@settings(deadline=None)
@given(
    neurons=marked_neurons(),
    minimum_width=st.integers(1, 80),
    maximum_share=st.sampled_from([1.0, 0.5, 0.25, 1 / 3]),
    round_to=st.sampled_from([1, 2, 3, 8, 16, 100]),
)
def test_limits_hold_and_as_many_as_possible_go_weakest_first(neurons, minimum_width, maximum_share, round_to):
    marked, values = neurons
    going, kept_by = removable(
        marked, values, minimum_width=minimum_width, maximum_share=maximum_share, round_to=round_to
    )
    width, left = len(marked), len(marked) - len(going)
    gone = torch.zeros(width, dtype=torch.bool)
    gone[going] = True
    assert int(gone.sum()) == len(going)  # no repeated indices
    assert not bool(gone[~marked].any())  # only marked neurons go
    assert left >= min(minimum_width, width)
    assert len(going) <= maximum_share * width + 1e-9
    assert left == width or left % round_to == 0
    assert kept_by.total == int(marked.sum()) - len(going)
    # The next smaller multiple breaks one of the rules.
    smaller = left - round_to
    assert smaller < max(minimum_width, int((~marked).sum()), width * (1 - maximum_share) - 1e-9)
    assert bool((values[going].diff() >= 0).all())
    spared = values[~gone & marked]
    if len(going) and len(spared):
        assert values[going].max() <= spared.min()


@pytest.mark.parametrize(
    ("options", "going", "kept_by"),
    [
        ({}, [5, 4, 2, 0, 7], KeptBy()),
        ({"minimum_width": 6}, [5, 4, 2, 0], KeptBy(minimum_width=1)),
        ({"maximum_share": 0.3}, [5, 4, 2], KeptBy(maximum_share=2)),
        ({"round_to": 4}, [5, 4], KeptBy(round_to=3)),
        ({"minimum_width": 6, "maximum_share": 0.3, "round_to": 4}, [5, 4], KeptBy(1, 1, 1)),
        ({"round_to": 16}, [], KeptBy(round_to=5)),
    ],
)
def test_each_limit_counts_what_the_limits_before_it_let_go(options, going, kept_by):
    """Ten neurons; among equals, the last goes first."""
    values = torch.tensor([0.2, 1, 0.1, 1, 0, 0, 1, 0.5, 1, 1], dtype=torch.float64)
    found, kept = removable(values < 1, values, **options)
    assert found.tolist() == going
    assert kept == kept_by


@pytest.mark.parametrize(("width", "share", "count"), [(100, 0.29, 29), (30, 0.1, 3), (9, 0.1, 0)])
def test_a_share_that_is_whole_in_decimals_is_not_rounded_down(width, share, count):
    marked, values = torch.ones(width, dtype=torch.bool), torch.zeros(width, dtype=torch.float64)
    assert len(removable(marked, values, maximum_share=share)[0]) == count


# --- the size of a model

WIDTHS = (12, 10, 9)


def make_model(widths=WIDTHS):
    torch.manual_seed(0)
    first, second, third = widths
    return nn.Sequential(
        nn.Linear(6, first), nn.BatchNorm1d(first), nn.ReLU(), nn.Linear(first, second, bias=False), nn.PReLU(second),
        nn.Linear(second, third), nn.ReLU(), nn.Linear(third, 4),
    )  # fmt: skip


def example():
    return torch.randn(30, 6, generator=torch.Generator().manual_seed(1))


@functools.cache
def traced():
    return find_neurons(make_model(), (example(),))


def size_of(model):
    return ModelSize(model, list(traced().groups.values()), traced().positions)


def built_size(widths):
    model = make_model(widths)
    macs = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return sum(p.numel() for p in model.parameters()), macs


@settings(deadline=None)
@given(widths=st.tuples(*(st.integers(1, width) for width in WIDTHS)))
def test_sizes_equal_those_of_a_model_built_at_these_widths(widths):
    assert size_of(make_model()).at(widths) == built_size(widths)


def test_sizes_of_convolutions_and_flattened_channels():
    def make(first=6, second=8, hidden=10):
        return nn.Sequential(
            nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3), nn.ReLU(), nn.Flatten(), nn.Linear(second * 4, hidden), nn.ReLU(),
            nn.Linear(hidden, 4),
        )  # fmt: skip

    found = find_neurons(make(), (torch.randn(5, 3, 8, 8),))
    size = ModelSize(make(), list(found.groups.values()), found.positions)
    for first, second, hidden in ((6, 8, 10), (5, 3, 1), (1, 7, 4)):
        macs = 64 * 27 * first + 4 * 9 * first * second + 4 * second * hidden + hidden * 4
        parameters = sum(p.numel() for p in make(first, second, hidden).parameters())
        assert size.at([first, second, hidden]) == (parameters, macs)


def test_a_missing_weight_is_named():
    model = make_model()
    model[7] = nn.Identity()
    with pytest.raises(ValueError, match=r"model: it no longer has 7\.weight; make a new pruner"):
        size_of(model)


# --- the budget


def one_by_one(values, widths, round_to, fits):
    """Remove the weakest group until the model fits; a group reaches the next multiple, and ranks as its strongest."""
    gone = [0] * len(widths)
    while not fits([width - count for width, count in zip(widths, gone, strict=True)]):
        groups = []
        for layer, (activity, width, count) in enumerate(zip(values, widths, gone, strict=True)):
            after = count + ((width - count) % round_to or round_to)
            if after <= len(activity):
                groups.append((float(activity[after - 1]), -layer, after))
        if not groups:
            break
        _, layer, after = min(groups)
        gone[-layer] = after
    return gone


@st.composite
def removables(draw):
    widths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    levels = st.sampled_from([0.0, 0.1, 0.1, 0.2, 0.5])
    values = [sorted(draw(st.lists(levels, max_size=width - 1))) for width in widths]
    return widths, [torch.tensor(each, dtype=torch.float64) for each in values]


@settings(deadline=None)
@given(layers=removables(), target=st.integers(0, 150), round_to=st.integers(1, 4))
def test_as_few_as_possible_go_weakest_first(layers, target, round_to):
    widths, values = layers

    def fits(left):  # the elements of the weights between neighbouring layers
        return sum(a * b for a, b in zip([2, *left], [*left, 3], strict=True)) <= target

    assert affordable(values, widths, round_to, fits) == one_by_one(values, widths, round_to, fits)


def budgeted(**options):
    return observed_pruner(make_model(), example(), threshold=0.999, **options)


def ranked(pruner):
    """(activity, -layer, -neuron) of all neurons, in the order of removal."""
    size = ModelSize(pruner.model, pruner._state.groups, {})
    decisions = decide(pruner._state.observe(pruner.model, caller="test"), pruner.settings, size)
    return sorted(
        (float(value), -layer, -neuron)
        for layer, decision in enumerate(decisions)
        for neuron, value in enumerate(decision.activity)
    )


@pytest.mark.parametrize(("option", "which"), [("target_parameters", 0), ("target_macs", 1)])
def test_pruning_stops_at_the_target(option, which):
    whole = budgeted().prune()
    smallest, largest = (whole.parameters_after, whole.macs_after)[which], built_size(WIDTHS)[which]
    for target in (smallest, (smallest + largest) // 2, largest - 1):
        pruner = budgeted(**{option: target})
        order = ranked(pruner)
        report = pruner.prune()
        size = built_size(tuple(pruner.widths.values()))
        assert budgeted(**{option: size[which]}).prune() == report  # meeting the target exactly is enough
        assert size == (report.parameters_after, report.macs_after)
        assert size[0] == sum(p.numel() for p in pruner.model.parameters())
        assert size[which] <= target
        # The weakest neurons of all layers went, and one fewer would miss the target.
        gone = {(layer, neuron) for layer, each in enumerate(report.layers) for neuron in each.pruned}
        assert gone == {(-layer, -neuron) for _, layer, neuron in order[: len(gone)]}
        widths = list(pruner.widths.values())
        widths[-order[len(gone) - 1][1]] += 1
        assert built_size(tuple(widths))[which] > target


def test_a_model_that_is_small_enough_keeps_its_neurons():
    report = budgeted(target_parameters=built_size(WIDTHS)[0]).prune()
    assert report.neurons_pruned == 0
    assert [layer.kept_by for layer in report.layers] == [KeptBy(budget=width - 1) for width in WIDTHS]
    assert str(report).endswith(f"{sum(WIDTHS) - 3} kept by budget")


def test_two_targets_must_both_be_met_and_unreachable_ones_prune_everything_removable():
    parameters, macs = built_size(WIDTHS)
    targets = {"target_parameters": parameters - 60}, {"target_macs": macs - 120}
    first, second, both = (budgeted(**options).prune() for options in (*targets, targets[0] | targets[1]))
    assert both.neurons_pruned == max(first.neurons_pruned, second.neurons_pruned)
    assert first.neurons_pruned != second.neurons_pruned
    assert budgeted(target_parameters=1).prune() == budgeted().prune()


def test_budget_and_rounding_together():
    target = built_size(WIDTHS)[1] * 6 // 10
    report = budgeted(target_macs=target, round_to=4).prune()
    assert report.macs_after <= target < report.macs_before
    assert all(layer.width_after in (layer.width_before, 4, 8, 12) for layer in report.layers)
    assert any(layer.kept_by.budget for layer in report.layers)
