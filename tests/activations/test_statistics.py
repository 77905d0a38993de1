"""The neurons' statistics: summed by the loss in its own pass, over any number of batches."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from loss_cases import DTYPES, LAYOUTS, laid_out

import kddp_ext
from kddp_ext import NeuronStatistics, TrackedActivations, ops
from kddp_ext.activations.layout import NeuronMatrix
from kddp_ext.ops import reference


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 700),
    neurons=st.integers(1, 1100),
    dtype=st.sampled_from([*DTYPES.values(), torch.float64]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)
def test_sums_equal_the_reference(rows, neurons, dtype, layout, seed):
    activation = torch.randn(rows, neurons, generator=torch.Generator().manual_seed(seed))
    activation = laid_out(torch.where(activation > 1, 0, activation).to(dtype), layout if rows else "contiguous")
    truth = reference.neuron_statistics(activation)
    sums = ops.neuron_statistics(activation)
    # In what the loss computes in over eight rows, then in float64; sums and squares around one of the activations.
    rounding = 1e-14 if dtype == torch.float64 else 3e-7
    torch.testing.assert_close(sums[0], truth[0], rtol=rounding, atol=0)
    assert ((sums[1] - truth[1]).abs() <= rounding * (truth[0] + rows * truth[4])).all()
    assert ((sums[2] - truth[2]).abs() <= rounding * (truth[2] + rows * truth[4] ** 2)).all()
    assert torch.equal(sums[3:], truth[3:])


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("first", [1.0, 1e20, float("inf"), float("nan")])
@pytest.mark.parametrize("later", [2.0, 1e25, float("-inf"), float("nan")])
def test_squares_where_float_has_none(rows, first, later):
    """A column of an infinity, of a NaN and of squares that float32 does not hold, between ordinary ones."""
    activation = torch.randn(rows, 19, generator=torch.Generator().manual_seed(rows))
    activation[0, 7], activation[-1, 7] = first, later
    sums, truth = ops.neuron_statistics(activation), reference.neuron_statistics(activation)
    torch.testing.assert_close(sums[:3], truth[:3], rtol=1e-6, atol=1e-3, equal_nan=True)


def test_a_small_deviation_around_a_large_mean():
    """Squares summed as they are would have lost it: 1e-3 around 1e3 is what float32 still holds."""
    activation = 1e3 + 1e-2 * torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    statistics = NeuronStatistics(64)
    statistics.observe(activation)
    torch.testing.assert_close(statistics.std, activation.double().std(0, unbiased=False), rtol=1e-4, atol=0)


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield [torch.relu(torch.randn(300, width, generator=generator)) for width in (40, 7)]


def loss_of(activations):
    logits = torch.zeros(300, 5, requires_grad=True)
    labels = torch.zeros(300, dtype=torch.int64)
    return kddp_ext.fused_kd_l1_loss(logits, logits.detach(), labels, activations, l1_weight=0.1)


@pytest.mark.parametrize("through_the_loss", [True, False])
def test_batches_add_up(through_the_loss):
    statistics = [NeuronStatistics(40), NeuronStatistics(7)]
    for batch in batches():
        tracked = TrackedActivations(batch, statistics)
        if through_the_loss:
            loss_of(tracked)
        else:
            tracked.observe()
    for number, of_layer in enumerate(statistics):
        together = torch.cat([batch[number] for batch in batches()]).double()
        assert of_layer.rows == 900
        torch.testing.assert_close(of_layer.mean, together.mean(0))
        torch.testing.assert_close(of_layer.mean_abs, together.abs().mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(of_layer.std, together.std(0, unbiased=False))
        torch.testing.assert_close(of_layer.active_fraction, (together != 0).double().mean(0))
        assert torch.equal(of_layer.max_abs, together.abs().amax(0))


def test_the_loss_is_the_same_with_and_without_statistics():
    for batch in batches(1):
        tracked = TrackedActivations(batch, [NeuronStatistics(40), NeuronStatistics(7)])
        torch.testing.assert_close(loss_of(tracked), loss_of(batch), rtol=1e-6, atol=0)


def test_validation_leaves_no_trace():
    statistics = [NeuronStatistics(40), NeuronStatistics(7)]
    with torch.no_grad():
        for batch in batches():
            loss_of(TrackedActivations(batch, statistics))
    assert statistics[0].rows == 0
    assert not statistics[0].values.any()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e3, 1e-6, -123.456])
def test_a_constant_neuron_has_no_deviation(value):
    statistics = NeuronStatistics(3)
    for rows in (1, 7, 128, 1000):
        statistics.observe(torch.full((rows, 3), value))
    assert not statistics.std.any()
    torch.testing.assert_close(statistics.mean, torch.full((3,), float(torch.tensor(value)), dtype=torch.float64))


def test_nothing_observed_is_not_a_number():
    statistics = NeuronStatistics(2)
    for value in (statistics.mean, statistics.mean_abs, statistics.std, statistics.active_fraction):
        assert value.isnan().all()


def test_state_selection_and_reset():
    statistics = NeuronStatistics(40)
    statistics.observe(next(batches())[0])
    restored = NeuronStatistics(40)
    restored.load_state_dict(statistics.state_dict())
    assert torch.equal(restored.values, statistics.values)
    assert restored.rows == 300
    keep = torch.tensor([3, 1, 39])
    assert torch.equal(statistics.select(keep).mean, statistics.mean[keep])
    statistics.reset()
    assert statistics.rows == 0
    assert restored.rows == 300


def test_sums_of_another_layer_are_refused():
    statistics = NeuronStatistics(4)
    with pytest.raises(ValueError, match=r"sums: expected shape \(5, 4\)"):
        statistics.update(torch.zeros(5, 3, dtype=torch.float64), NeuronMatrix(torch.zeros(1, 3), 1))
    with pytest.raises(ValueError, match="state: expected statistics of 4 neurons"):
        statistics.load_state_dict(NeuronStatistics(5).state_dict())
    with pytest.raises(ValueError, match="statistics: expected one for each of 2 activations, got 1"):
        TrackedActivations([torch.zeros(1, 4)] * 2, [statistics])
    assert statistics.rows == 0
