"""NeuronStatistics and TrackedActivations as objects of a user's: what they accept, copies, pickles, restoring."""

import copy
import pickle

import pytest
import torch

from kddp_ext import NeuronStatistics, TrackedActivations


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (2, 3, 5, 4)])
def test_an_axis_counted_from_the_last(shape):
    from_first, from_last = NeuronStatistics(4, samples=8), NeuronStatistics(4, samples=8)
    from_first.observe(drawn(*shape), len(shape) - 1)
    from_last.observe(drawn(*shape), -1)
    assert from_last.rows == from_first.rows == drawn(*shape).numel() // 4
    assert torch.equal(from_last.values, from_first.values)
    assert torch.equal(from_last.ring.samples, from_first.ring.samples)


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
def test_what_is_no_activation_of_the_layer(activation, axis, error, message):
    statistics = NeuronStatistics(4)
    with pytest.raises(error, match=message):
        statistics.observe(activation, axis)
    assert statistics.rows == 0


def test_values_of_before_are_gone_where_the_restored_state_has_none():
    """A state of a pruner that kept no samples: regressions must not see what another layer computed."""
    statistics, other = NeuronStatistics(4), NeuronStatistics(4, samples=8)
    statistics.observe(drawn(5, 4))
    other.observe(100 + drawn(5, 4))
    other.load_state_dict(statistics.state_dict())
    assert other.rows == 5
    assert other.ring.filled == 0


def test_a_state_without_a_count_changes_nothing():
    statistics, other = NeuronStatistics(4), NeuronStatistics(4)
    statistics.observe(drawn(5, 4))
    state = statistics.state_dict()
    del state["rows"]
    with pytest.raises(KeyError):
        other.load_state_dict(state)
    assert not other.values.any()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_of_activations_keep_their_statistics_and_axes(copied):
    activations = TrackedActivations([drawn(5, 4), drawn(5, 2, 3)], [NeuronStatistics(4), NeuronStatistics(3)], [1, 2])
    activations.observe()
    other = copied(activations)
    assert isinstance(other, TrackedActivations)
    assert all(torch.equal(a, b) for a, b in zip(activations, other, strict=True))
    assert other.axes == (1, 2)
    assert [each.rows for each in other.statistics] == [5, 10]
