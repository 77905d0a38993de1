"""Which neurons are removed: criteria, limits of one layer, and a budget for the whole model."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruner_cases import observed_pruner
from torch import nn

from kddp_ext import KeptBy, NeuronStatistics
from kddp_ext.activations.layout import Layout
from kddp_ext.pruning.model_size import ModelSize
from kddp_ext.pruning.ranking import rank
from kddp_ext.pruning.saliency import Saliency
from kddp_ext.pruning.selection import Observation, activities, decide, outgoing_norms, removable
from kddp_ext.pruning.tracing.find import find_neurons
from kddp_ext.pruning.tracing.structure import NeuronGroup, PrunableNeurons, Reader, ReadValue, StoredTensor

pytestmark = pytest.mark.usefixtures("one_trace_each")


# --- criteria


def observation(*values):
    """One of the neurons of a layer; each value is its samples (N, H) and the weights (outputs, H) that read it."""
    width, read, readers, statistics, outgoing = values[0][0].shape[1], [], [], [], []
    for h, *weights in values:
        statistics.append(NeuronStatistics(width))
        for half in h.split(len(h) // 2):
            statistics[-1].observe(half)
        for weight in weights:
            name = f"reader{len(readers)}"
            readers.append(Reader(name, StoredTensor(name, "weight"), 1, len(read), None))
            outgoing.append(outgoing_norms(weight))
        read.append(ReadValue(readers[-1].module, Layout(1), 2, torch.arange(width)))
    neurons = PrunableNeurons(
        (NeuronGroup("0", ("0",), 0, width),), {}, values=tuple(read), readers=tuple(readers)
    )  # fmt: skip
    checks, original = torch.zeros(width, dtype=torch.int64), (torch.arange(width),)
    record = neurons, tuple(statistics), checks, None, Saliency(width), (0, 0)
    return Observation(*record, outgoing=tuple(outgoing), original=original)


def test_criteria_follow_their_formulas():
    h = torch.tensor([[0, 1, -2, 5], [0, 3, 0, 5], [0, 0, 0, 5], [0, -1, 2, 5]], dtype=torch.float64)
    weights = [torch.tensor([[1.0, 2.0, 0.5, 9.0]]), torch.tensor([[0.0, 0.0, 2.0, 1.0], [3.0, 1.0, 0.0, 1.0]])]
    seen = observation((h, *weights))
    torch.testing.assert_close(seen.norms, torch.cat(weights).double().norm(dim=0))
    expected = seen.norms * h.std(0, unbiased=False)
    torch.testing.assert_close(activities("contribution", seen), expected / expected.max())
    torch.testing.assert_close(activities("mean_activation", seen), h.abs().mean(0) / 5)
    torch.testing.assert_close(activities("apoz", seen), torch.tensor([0, 0.75, 0.5, 1], dtype=torch.float64))
    assert activities("dead", seen).tolist() == [0, 1, 1, 1]


def test_neurons_that_are_read_at_several_places_have_the_activity_of_all():
    """As in a residual stream: each block reads another function of the same neurons."""
    first, second = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).double()
    first[:, 0] = second[:, 1] = 0
    first[:3, 2] = 0
    weights = [torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 0.5, 2.0], [1.0, 0.0, 1.0]])]
    seen = observation((first, weights[0]), (second, weights[1]))
    parts = [w.double().norm(dim=0) * h.std(0, unbiased=False) for h, w in zip((first, second), weights, strict=True)]
    expected = torch.stack(parts).norm(dim=0)
    torch.testing.assert_close(activities("contribution", seen), expected / expected.max())
    expected = torch.stack([first.abs().mean(0), second.abs().mean(0)]).amax(0)
    torch.testing.assert_close(activities("mean_activation", seen), expected / expected.max())
    assert activities("apoz", seen).tolist() == [1, 1, 1]
    assert activities("dead", seen).tolist() == [1, 1, 1]
    asked = activities(lambda statistics, outgoing: statistics.mean_abs * outgoing, seen)
    parts = [w.double().norm(dim=0) * h.abs().mean(0) for h, w in zip((first, second), weights, strict=True)]
    torch.testing.assert_close(asked, torch.stack(parts).amax(0))  # the highest of the answers counts


@settings(deadline=None)
@given(scales=st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5), seed=st.integers(0, 100))
def test_contribution_is_invariant_to_rescaling_between_layers(scales, seed):
    generator = torch.Generator().manual_seed(seed)
    h, weight = torch.randn(20, 5, generator=generator).double(), torch.randn(3, 5, generator=generator).double()
    scale = torch.tensor(scales, dtype=torch.float64)
    plain, scaled = (
        activities("contribution", observation(each)) for each in ((h, weight), (h * scale, weight / scale))
    )
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("criterion", ["contribution", "mean_activation"])
def test_no_neuron_of_a_silent_layer_is_less_active_than_the_others(criterion):
    assert activities(criterion, observation((torch.zeros(4, 3), torch.ones(1, 3)))).tolist() == [1, 1, 1]


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
        result = statistics.std * outgoing
        result /= result.max()
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
    return ModelSize(model, traced().neurons, traced().positions)


def keep(neurons, widths):
    """A mask that keeps the first neurons of each layer."""
    mask = torch.ones(neurons.number, dtype=torch.bool)
    for group, width in zip(neurons.groups, widths, strict=True):
        mask[group.numbers][width:] = False
    return mask


def built_size(widths):
    model = make_model(widths)
    macs = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return sum(p.numel() for p in model.parameters()), macs


@settings(deadline=None)
@given(widths=st.tuples(*(st.integers(1, width) for width in WIDTHS)))
def test_sizes_equal_those_of_a_model_built_at_these_widths(widths):
    assert size_of(make_model()).at(keep(traced().neurons, widths)) == built_size(widths)


def test_sizes_of_convolutions_and_flattened_channels():
    def make(first=6, second=8, hidden=10):
        return nn.Sequential(
            nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3), nn.ReLU(), nn.Flatten(), nn.Linear(second * 4, hidden), nn.ReLU(),
            nn.Linear(hidden, 4),
        )  # fmt: skip

    found = find_neurons(make(), (torch.randn(5, 3, 8, 8),))
    size = ModelSize(make(), found.neurons, found.positions)
    for first, second, hidden in ((6, 8, 10), (5, 3, 1), (1, 7, 4)):
        macs = 64 * 27 * first + 4 * 9 * first * second + 4 * second * hidden + hidden * 4
        parameters = sum(p.numel() for p in make(first, second, hidden).parameters())
        assert size.at(keep(found.neurons, (first, second, hidden))) == (parameters, macs)


def test_a_missing_weight_is_named():
    model = make_model()
    model[7] = nn.Identity()
    with pytest.raises(ValueError, match=r"model: it no longer has 7\.weight; make a new pruner"):
        size_of(model)


# --- the budget


def one_by_one(values, orders, size, round_to, resource, target):
    """Remove the step of the lowest score until the target is met; every size is that of the whole model."""
    widths = [group.width for group in size.neurons.groups]

    def measure(gone):
        mask = torch.ones(size.neurons.number, dtype=torch.bool)
        for group, order, count in zip(size.neurons.groups, orders, gone, strict=True):
            mask[group.numbers][order[:count]] = False
        return size.at(mask)

    gone = [0] * len(widths)
    while measure(gone)[1] > target:
        steps = []
        for layer, (activity, width, count) in enumerate(zip(values, widths, gone, strict=True)):
            after = count + ((width - count) % round_to or round_to)
            if after > len(activity):
                continue
            score, spent = float(activity[after - 1]), float(activity[count:after].sum())
            if resource is not None:
                before, less = measure(gone), measure([*gone[:layer], after, *gone[layer + 1 :]])
                saved = {"parameters": before[0] - less[0], "macs": before[1] - less[1]}
                saved["a function"] = after - count
                score = spent / saved[resource]
            steps.append((score, -layer, after))
        if not steps:
            break
        _, layer, after = min(steps)
        gone[-layer] = after
    return gone


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    removable=st.tuples(*(st.integers(0, width - 1) for width in WIDTHS)),
    resource=st.sampled_from([None, "parameters", "macs", "a function"]),
    round_to=st.integers(1, 4),
    target=st.integers(0, built_size(WIDTHS)[1]),
)
def test_the_ranking_takes_the_lowest_score_at_each_step(seed, removable, resource, round_to, target):
    size, generator = size_of(make_model()), torch.Generator().manual_seed(seed)
    orders = [
        torch.randperm(width, generator=generator)[:count] for width, count in zip(WIDTHS, removable, strict=True)
    ]
    values = [torch.rand(count, generator=generator, dtype=torch.float64).sort().values for count in removable]
    remaining = size.removing(orders)
    function = (lambda widths: sum(widths.values())) if resource == "a function" else resource
    steps = rank(values, remaining, round_to, function, lambda left: left.macs <= target)
    assert remaining.gone == one_by_one(values, orders, size, round_to, resource, target)
    kept = keep(size.neurons, WIDTHS)
    for group, order, count in zip(size.neurons.groups, orders, remaining.gone, strict=True):
        kept[group.numbers][order[:count]] = False
    assert (steps[-1].parameters, steps[-1].macs) == size.at(kept)
    spent = sum(float(value[:count].sum()) for value, count in zip(values, remaining.gone, strict=True))
    assert steps[-1].activity == pytest.approx(spent)


def test_the_ranking_stops_before_it_exceeds_the_budget():
    size = size_of(make_model())
    orders = [torch.arange(width - 1) for width in WIDTHS]
    values = [torch.linspace(0, 1, width - 1, dtype=torch.float64) for width in WIDTHS]
    everything = rank(values, size.removing(orders), 1, "macs", lambda left: False)
    half = everything[len(everything) // 2].activity
    assert (
        rank(values, size.removing(orders), 1, "macs", lambda left: False, half)
        == everything[: len(everything) // 2 + 1]
    )


def budgeted(**options):
    return observed_pruner(make_model(), example(), threshold=0.999, **options)


def ranked(pruner):
    """(activity, -layer, -neuron) of all neurons, in the order of removal."""
    size = ModelSize(pruner.model, pruner._state.neurons, {})
    decision = decide(pruner._state.observe(pruner.model, caller="test"), pruner.settings, size)
    return sorted(
        (float(value), -layer, -neuron)
        for layer, each in enumerate(decision.layers)
        for neuron, value in enumerate(each.activity)
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
