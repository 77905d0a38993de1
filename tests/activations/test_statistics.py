"""The neurons' statistics: summed by the loss in its own pass over any number of batches; copies, states, errors."""

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from loss_cases import DTYPES, LAYOUTS, with_layout

import kddp_ext
from kddp_ext import NeuronStatistics, TrackedActivations, ops
from kddp_ext.activations.layout import NeuronMatrix
from kddp_ext.ops import reference


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 700),
    neurons=st.integers(1, 1100),
    dtype=st.sampled_from([*DTYPES.values(), torch.float64]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)
def test_sums_equal_the_reference(rows, neurons, dtype, layout, seed):
    activation = draw(rows, neurons, seed=seed)
    activation = with_layout(torch.where(activation > 1, 0, activation).to(dtype), layout if rows else "contiguous")
    sums, truth = ops.neuron_statistics(activation), reference.neuron_statistics(activation)
    # The kernels sum eight rows in the dtype of the loss, relative to one of the activations, then in float64.
    rounding = 1e-14 if dtype == torch.float64 else 3e-7
    torch.testing.assert_close(sums[0], truth[0], rtol=rounding, atol=0)
    assert ((sums[1] - truth[1]).abs() <= rounding * (truth[0] + rows * truth[4])).all()
    assert ((sums[2] - truth[2]).abs() <= rounding * (truth[2] + rows * truth[4] ** 2)).all()
    assert torch.equal(sums[3:], truth[3:])


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("first", [1.0, 1e20, float("inf"), float("nan")])
@pytest.mark.parametrize("later", [2.0, 1e25, float("-inf"), float("nan")])
def test_sums_of_numbers_whose_squares_float32_cannot_hold(rows, first, later):
    activation = draw(rows, 19, seed=rows)
    activation[0, 7], activation[-1, 7] = first, later
    sums, truth = ops.neuron_statistics(activation), reference.neuron_statistics(activation)
    torch.testing.assert_close(sums[:3], truth[:3], rtol=1e-6, atol=1e-3, equal_nan=True)


def test_a_small_deviation_around_a_large_mean_is_exact():
    activation = 1e3 + 1e-2 * draw(4096, 64)
    statistics = NeuronStatistics(64)
    statistics.observe(activation)
    torch.testing.assert_close(statistics.std, activation.double().std(0, unbiased=False), rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e3, 1e-6, -123.456])
def test_a_constant_neuron_has_no_deviation(value):
    statistics = NeuronStatistics(3)
    for rows in (1, 7, 128, 1000):
        statistics.observe(torch.full((rows, 3), value))
    assert not statistics.std.any()
    torch.testing.assert_close(statistics.mean, torch.full((3,), float(torch.tensor(value)), dtype=torch.float64))


WIDTHS = (40, 7)
BATCHES = [[draw(300, width, seed=width + batch).relu().requires_grad_() for width in WIDTHS] for batch in range(3)]


def statistics_of_layers():
    return [NeuronStatistics(width) for width in WIDTHS]


def loss_of(activations):
    logits, labels = torch.zeros(300, 5, requires_grad=True), torch.zeros(300, dtype=torch.int64)
    return kddp_ext.fused_kd_l1_loss(logits, logits.detach(), labels, activations, l1_weight=0.1)


@pytest.mark.parametrize("update", [loss_of, TrackedActivations.observe])
def test_statistics_cover_all_batches(update):
    statistics = statistics_of_layers()
    for batch in BATCHES:
        update(TrackedActivations(batch, statistics))
    for of_layer, *batches in zip(statistics, *BATCHES, strict=True):
        values = torch.cat(batches).double()
        assert of_layer.rows == 900
        torch.testing.assert_close(of_layer.mean, values.mean(0))
        torch.testing.assert_close(of_layer.mean_abs, values.abs().mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(of_layer.std, values.std(0, unbiased=False))
        torch.testing.assert_close(of_layer.active_fraction, (values != 0).double().mean(0))
        assert torch.equal(of_layer.max_abs, values.abs().amax(0))


def test_the_loss_is_the_same_with_and_without_statistics():
    tracked = TrackedActivations(BATCHES[0], statistics_of_layers())
    torch.testing.assert_close(loss_of(tracked), loss_of(BATCHES[0]), rtol=1e-6, atol=0)


def test_statistics_do_not_change_without_gradients():
    statistics = statistics_of_layers()
    with torch.no_grad():
        loss_of(TrackedActivations(BATCHES[0], statistics))
    assert statistics[0].rows == 0
    assert not statistics[0].values.any()


def test_statistics_without_samples_are_nan():
    statistics = NeuronStatistics(2)
    for value in (statistics.mean, statistics.mean_abs, statistics.std, statistics.active_fraction):
        assert value.isnan().all()


def test_state_selection_reset_and_joining():
    statistics, restored = (NeuronStatistics(4, positions=6, samples=8) for _ in range(2))
    statistics.observe(draw(50, 3, 4, 2), 2)
    restored.load_state_dict(statistics.state_dict())
    for name in ("values", "position_sums"):
        assert torch.equal(getattr(restored, name), getattr(statistics, name))
    assert torch.equal(restored.ring.samples, statistics.ring.samples)
    assert restored.rows == 300
    keep = torch.tensor([3, 1])
    selected = statistics.select(keep)
    assert torch.equal(selected.mean, statistics.mean[keep])
    assert torch.equal(selected.position_mean, statistics.position_mean[keep])
    joined = NeuronStatistics.joined([statistics, restored])
    assert joined.rows == 600
    torch.testing.assert_close(joined.std, statistics.std)
    assert torch.equal(joined.position_sums, 2 * statistics.position_sums)
    assert joined.ring.filled == min(8, 2 * statistics.ring.filled)
    statistics.reset()
    assert (statistics.rows, statistics.ring.filled) == (0, 0)
    assert not statistics.position_sums.any()
    assert restored.rows == 300


def test_a_state_without_samples_empties_the_ring():
    statistics, other = NeuronStatistics(4), NeuronStatistics(4, samples=8)
    statistics.observe(draw(5, 4))
    other.observe(100 + draw(5, 4))
    other.load_state_dict(statistics.state_dict())
    assert (other.rows, other.ring.filled) == (5, 0)


def test_a_state_that_does_not_fit_changes_nothing():
    statistics, other = NeuronStatistics(4), NeuronStatistics(4)
    statistics.observe(draw(5, 4))
    state = statistics.state_dict()
    del state["rows"]
    with pytest.raises(KeyError):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"sums: expected shape \(5, 4\)"):
        other.update(torch.zeros(5, 3, dtype=torch.float64), NeuronMatrix(torch.zeros(1, 3), 1))
    with pytest.raises(ValueError, match="state: expected statistics of 4 neurons"):
        other.load_state_dict(NeuronStatistics(5).state_dict())
    assert other.rows == 0
    assert not other.values.any()
    with pytest.raises(ValueError, match="statistics: expected one for each of 2 activations, got 1"):
        TrackedActivations([torch.zeros(1, 4)] * 2, [statistics])


@pytest.mark.parametrize(
    ("activation", "axis", "error", "message"),
    [
        (torch.ones(3, 4, dtype=torch.int64), 1, TypeError, "activation: expected dtype float32, .* got torch.int64"),
        (torch.ones(()), 1, ValueError, r"activation: expected at least 2 dimensions, and 4 neurons .* got shape \(\)"),
        (torch.ones(4), 0, ValueError, r"activation: expected at least 2 dimensions.* got shape \(4,\)"),
        (torch.ones(3, 5), 1, ValueError, r"activation: .*4 neurons along dimension 1, got shape \(3, 5\)"),
        (torch.ones(3, 4), 2, ValueError, r"activation: .*4 neurons along dimension 2, got shape \(3, 4\)"),
    ],
)
def test_invalid_activations_raise_and_change_nothing(activation, axis, error, message):
    statistics = NeuronStatistics(4)
    with pytest.raises(error, match=message):
        statistics.observe(activation, axis)
    assert statistics.rows == 0


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_of_activations_keep_their_statistics_and_axes(copied):
    activations = TrackedActivations([draw(5, 4), draw(5, 2, 3)], [NeuronStatistics(4), NeuronStatistics(3)], [1, 2])
    activations.observe()
    other = copied(activations)
    assert isinstance(other, TrackedActivations)
    assert all(torch.equal(a, b) for a, b in zip(activations, other, strict=True))
    assert other.axes == (1, 2)
    assert [each.rows for each in other.statistics] == [5, 10]
