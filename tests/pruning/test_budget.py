"""Sizes at widths that a model does not have, and pruning that stops where it is small enough."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kddp_ext.pruning.pruner import DynamicPruner
from kddp_ext.pruning.selection import KeptBy, ModelSize, affordable, decide
from kddp_ext.pruning.tracing.find import find_neurons

pytestmark = pytest.mark.usefixtures("one_trace_each")

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


def make_pruner(model, **options):
    return DynamicPruner(model, example_inputs=(example(),), patience=1, **options)


@functools.cache
def traced():
    return find_neurons(make_model(), (example(),))


def groups():
    return list(traced().groups.values())


def built_size(widths):
    model = make_model(widths)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return sum(p.numel() for p in model.parameters()), sum(linear.weight.numel() for linear in linears)


@settings(deadline=None)
@given(widths=st.tuples(*(st.integers(1, width) for width in WIDTHS)))
def test_sizes_are_those_of_the_model_if_it_were_built(widths):
    size = ModelSize(make_model(), groups(), traced().positions)
    assert (size.parameters(), size.macs()) == built_size(WIDTHS)
    assert (size.parameters(widths), size.macs(widths)) == built_size(widths)


def make_convolutions(channels=(6, 8), hidden=10):
    first, second = channels
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3), nn.ReLU(), nn.Flatten(), nn.Linear(second * 4, hidden), nn.ReLU(),
        nn.Linear(hidden, 4),
    )  # fmt: skip


def test_sizes_of_convolutions_and_of_what_reads_them_flattened():
    images = torch.randn(5, 3, 8, 8)
    found = find_neurons(make_convolutions(), (images,))
    size = ModelSize(make_convolutions(), list(found.groups.values()), found.positions)
    for first, second, hidden in ((6, 8, 10), (5, 3, 1), (1, 7, 4)):
        built = make_convolutions((first, second), hidden)
        macs = 64 * 27 * first + 4 * 9 * first * second + 4 * second * hidden + hidden * 4
        assert size.macs([first, second, hidden]) == macs
        assert size.parameters([first, second, hidden]) == sum(p.numel() for p in built.parameters())


def test_a_convolutional_network_shrinks_to_its_target():
    torch.manual_seed(0)
    model, images = make_convolutions(), torch.randn(5, 3, 8, 8)
    pruner = DynamicPruner(model, example_inputs=(images,), threshold=0.999, patience=1, target_macs=11_000)
    model(images)
    pruner.activations.observe()
    report = pruner.prune()
    assert report.macs_before == 64 * 27 * 6 + 4 * 9 * 48 + 4 * 80 + 40
    assert 0 < report.macs_after <= 11_000
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert sum(layer.kept_by.budget for layer in report.layers) > 0
    assert model(images).shape == (5, 4)


def test_a_weight_counts_as_often_as_it_is_applied():
    model = make_model()
    size = ModelSize(model, groups(), {"0.weight": 7, "7.weight": 2})
    assert size.macs() == 7 * 6 * 12 + 2 * 9 * 4
    assert size.macs([6, 10, 3]) == 7 * 6 * 6 + 2 * 3 * 4


def test_a_weight_that_is_gone_is_named():
    model = make_model()
    model[7] = nn.Identity()
    with pytest.raises(ValueError, match=r"model: it no longer has 7\.weight; make a new pruner"):
        ModelSize(model, groups(), traced().positions)


# --- how many go


def one_by_one(activities, widths, fits):
    """Take the weakest away, one after another, until it fits: what `affordable` must find, for round_to 1."""
    gone = [0] * len(widths)
    while not fits([width - count for width, count in zip(widths, gone, strict=True)]):
        left = [
            (float(activity[count]), -layer)
            for layer, (activity, count) in enumerate(zip(activities, gone, strict=True))
            if count < len(activity)
        ]
        if not left:
            break
        gone[-min(left)[1]] += 1
    return gone


@st.composite
def removables(draw):
    widths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    levels = st.sampled_from([0.0, 0.1, 0.1, 0.2, 0.5])
    activities = [sorted(draw(st.lists(levels, max_size=width - 1))) for width in widths]
    return widths, [torch.tensor(each, dtype=torch.float64) for each in activities]


@settings(deadline=None)
@given(layers=removables(), target=st.integers(0, 150))
def test_as_few_as_possible_go_and_the_weakest_first(layers, target):
    widths, activities = layers

    def fits(left):  # neighbours' product: what a weight between two layers has
        return sum(a * b for a, b in zip([2, *left], [*left, 3], strict=True)) <= target

    assert affordable(activities, widths, 1, fits) == one_by_one(activities, widths, fits)


@settings(deadline=None)
@given(layers=removables(), target=st.integers(0, 40), round_to=st.sampled_from([2, 3, 4]))
def test_what_is_left_is_a_multiple(layers, target, round_to):
    widths, activities = layers
    activities = [  # only as many as the guards of one layer let go
        activity[: max([n for n in range(len(activity) + 1) if (width - n) % round_to == 0], default=0)]
        for width, activity in zip(widths, activities, strict=True)
    ]
    asked = []

    def fits(left):
        asked.append(left)
        return sum(left) <= target

    gone = affordable(activities, widths, round_to, fits)
    for left in [*asked, [width - count for width, count in zip(widths, gone, strict=True)]]:
        assert all(now == width or now % round_to == 0 for now, width in zip(left, widths, strict=True))
    if sum(widths) - sum(map(len, activities)) <= target:
        assert sum(widths) - sum(gone) <= target
    if sum(widths) <= target:
        assert not any(gone)


def test_of_equals_the_first_stay():
    activities = [torch.tensor([0.1, 0.2]).double(), torch.tensor([0.1, 0.1, 0.3]).double()]
    for number, gone in enumerate([[0, 0], [0, 1], [0, 2], [1, 2], [2, 2], [2, 3], [2, 3]]):
        assert affordable(activities, [5, 5], 1, lambda left, n=number: 10 - sum(left) >= n) == gone


def test_what_goes_together_ranks_as_its_strongest():
    """The first layer has the weakest neuron, and the pair that it would go with is the strongest."""
    activities = [torch.tensor([0.0, 0.9]).double(), torch.tensor([0.3, 0.4]).double()]
    assert affordable(activities, [6, 6], 2, lambda left: sum(left) <= 10) == [0, 2]
    assert affordable(activities, [6, 6], 1, lambda left: sum(left) <= 10) == [1, 1]


# --- a pruner with a budget


def observed(**options):
    model = make_model()
    pruner = make_pruner(model, threshold=0.999, **options)
    model(example())
    pruner.activations.observe()
    return pruner


def ranked(pruner):
    """(activity, layer, neuron) of all neurons, the first to go first."""
    size = ModelSize(pruner.model, pruner._state.groups, {})
    decisions = decide(pruner._state.observe(pruner.model, caller="test"), pruner.settings, size)
    return sorted(
        (float(activity), -layer, -neuron)
        for layer, decision in enumerate(decisions)
        for neuron, activity in enumerate(decision.activity)
    )


@pytest.mark.parametrize(("option", "which"), [("target_parameters", 0), ("target_macs", 1)])
def test_pruning_stops_at_the_target(option, which):
    whole = observed().prune()
    smallest = (whole.parameters_after, whole.macs_after)[which]
    largest = built_size(WIDTHS)[which]
    for target in (smallest, (smallest + largest) // 2, largest - 1):
        pruner = observed(**{option: target})
        order = ranked(pruner)
        report = pruner.prune()
        size = built_size(tuple(pruner.widths.values()))
        assert all(list(layer.pruned) == sorted(layer.pruned) for layer in report.layers)
        assert observed(**{option: size[which]}).prune() == report  # at the target is small enough
        assert size == (report.parameters_after, report.macs_after)
        assert size[0] == sum(p.numel() for p in pruner.model.parameters())
        assert size[which] <= target
        # The weakest of all layers went, and with one fewer the target would be missed.
        gone = {(layer, neuron) for layer, each in enumerate(report.layers) for neuron in each.pruned}
        assert gone == {(-layer, -neuron) for _, layer, neuron in order[: len(gone)]}
        layer = -order[len(gone) - 1][1]
        widths = list(pruner.widths.values())
        widths[layer] += 1
        assert built_size(tuple(widths))[which] > target


def test_once_small_enough_nothing_more_goes():
    pruner = observed(target_parameters=built_size(WIDTHS)[0])
    report = pruner.prune()
    assert report.neurons_pruned == 0
    assert [layer.kept_by for layer in report.layers] == [KeptBy(budget=width - 1) for width in WIDTHS]
    assert str(report).endswith(f"{sum(WIDTHS) - 3} kept by budget")


def test_with_two_targets_both_must_hold():
    parameters, macs = built_size(WIDTHS)
    reports = [
        observed(**options).prune()
        for options in (
            {"target_parameters": parameters - 60},
            {"target_macs": macs - 120},
            {"target_parameters": parameters - 60, "target_macs": macs - 120},
        )
    ]
    assert reports[2].neurons_pruned == max(report.neurons_pruned for report in reports[:2])
    assert reports[0].neurons_pruned != reports[1].neurons_pruned


def test_a_target_out_of_reach_prunes_what_there_is():
    free, bound = observed(), observed(target_parameters=1)
    assert free.prune() == bound.prune()


def test_budget_and_rounding_together():
    pruner = observed(target_macs=built_size(WIDTHS)[1] * 6 // 10, round_to=4)
    report = pruner.prune()
    assert report.macs_after <= built_size(WIDTHS)[1] * 6 // 10
    assert report.macs_after < report.macs_before
    assert all(layer.width_after in (layer.width_before, 4, 8, 12) for layer in report.layers)
    assert any(layer.kept_by.budget for layer in report.layers)
