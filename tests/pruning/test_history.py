"""A history replays once on a fresh model, and refuses contradictions."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kddp_ext import PruningHistory


def make_model(width=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 3)
    )


EXAMPLE = (torch.zeros(2, 5),)


def history():
    result = PruningHistory({"0": 8, "3": 6})
    result.add_step({"0": [2, 7], "3": []})
    result.add_step({"0": [0], "3": [5]})
    return result


def test_widths_and_indices():
    assert history().widths == {"0": 5, "3": 5}
    assert history().pruned("0") == [0, 2, 7]
    assert history().kept("0") == [1, 3, 4, 5, 6]
    assert history().steps == [{"0": [2, 7]}, {"0": [0], "3": [5]}]
    assert repr(history()) == "PruningHistory(0 8→5, 3 6→5; 2 steps)"
    assert history() != "a history"
    assert PruningHistory({"0": 8}) != PruningHistory({"0": 8}, streams="all")


def test_replay_takes_the_kept_slices_and_works_only_once():
    model, whole = make_model(), make_model()
    history().replay(model, EXAMPLE)
    rows, columns = torch.tensor([1, 3, 4, 5, 6]), torch.tensor([0, 1, 2, 3, 4])
    assert torch.equal(model[0].weight, whole[0].weight[rows])
    assert torch.equal(model[1].running_var, whole[1].running_var[rows])
    assert torch.equal(model[3].weight, whole[3].weight[columns][:, rows])
    assert torch.equal(model[3].bias, whole[3].bias[columns])
    assert torch.equal(model[5].weight, whole[5].weight[:, columns])
    assert model(torch.zeros(4, 5)).shape == (4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="model: 0 has 5 neurons but the history starts from 8; replay it once"):
        history().replay(model, EXAMPLE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("widths", "reason"),
    [
        ({"0": 7}, "model: 0 has 8 neurons but the history starts from 7"),
        ({"5": 3}, "model: the history has a layer '5' .*: its neurons are outputs of the model"),
        ({"fc": 3}, "model: the history has a layer 'fc' .*: it has no such layer"),
    ],
)
def test_replay_on_another_architecture_is_refused(widths, reason):
    PruningHistory({"0": 8}).replay(make_model(), EXAMPLE)
    with pytest.raises(ValueError, match=reason):
        PruningHistory(widths).replay(make_model(), EXAMPLE)


def test_replay_finds_the_neurons_that_the_pruner_had():
    """Neurons that are normalised together are prunable only with streams="all"."""
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"a layer '0' that cannot be pruned here: .*layer_norm"):
        PruningHistory({"0": 8}).replay(model, EXAMPLE)
    made = PruningHistory({"0": 8}, streams="all")
    made.add_step({"0": [1, 4]})
    PruningHistory.from_json(made.to_json()).replay(model, EXAMPLE)
    assert model[0].out_features == model[2].in_features == model[1].weight.numel() == 6
    assert model[1].normalized_shape == (6,)
    assert model(torch.zeros(4, 5)).shape == (4, 3)


@given(
    widths=st.dictionaries(st.text(min_size=1, max_size=5), st.integers(2, 30), max_size=4),
    streams=st.sampled_from(["exact", "all"]),
    data=st.data(),
)
def test_json_round_trip(widths, streams, data):
    original = PruningHistory(widths, streams=streams)
    for layer, width in widths.items():
        gone = data.draw(st.lists(st.integers(0, width - 1), unique=True, max_size=width - 1))
        original.add_step({layer: gone[:2]})
        original.add_step({layer: gone[2:]})
    assert PruningHistory.from_json(original.to_json()) == original
    assert all(len(original.kept(layer)) + len(original.pruned(layer)) == width for layer, width in widths.items())


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({"0": [8]}, "0 has neurons 0 to 7, got 8"),
        ({"0": [-1]}, "0 has neurons 0 to 7, got -1"),
        ({"0": [1.0]}, "0 has neurons 0 to 7, got 1.0"),
        ({"0": [True]}, "got True"),
        ({"0": [1, 1]}, "neuron 1 of 0 is pruned twice"),
        ({"0": [2]}, "neuron 2 of 0 is pruned twice"),
        ({"3": [0, 1, 2, 3, 4]}, "3 would lose its 6 neurons"),
        ({"0": [1], "9": [0]}, "no layer '9'"),
    ],
)
def test_wrong_steps_are_refused_as_a_whole(step, reason):
    present = history()
    with pytest.raises(ValueError, match=reason):
        present.add_step(step)
    assert present == history()
    content = json.loads(present.to_json())
    content["steps"].append(step)
    with pytest.raises(ValueError, match=reason):
        PruningHistory.from_json(json.dumps(content))


HEAD = '{"format": "kddp_ext.pruning_history", "version": 1'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected the JSON of a pruning history"),
        (None, "expected the JSON of a pruning history"),
        ("[1, 2]", r"expected JSON with format .* got \[1, 2\]"),
        ('{"format": "other"}', "expected JSON with format 'kddp_ext.pruning_history'"),
        ('{"format": "kddp_ext.pruning_history", "version": 2}', "expected a history of version 1, got 2"),
        (HEAD + ', "original_widths": [], "steps": []}', "original_widths by layer and a list of steps, got .* and"),
        (HEAD + ', "original_widths": {"a": 0}, "steps": []}', "at least 1"),
        (HEAD + ', "original_widths": {}, "steps": [], "streams": "some"}', "streams: expected 'exact' or 'all', got"),
        (HEAD + ', "original_widths": {"a": 2}}', "a list of steps, got .* and None"),
        (HEAD + ', "original_widths": {"a": 2}, "steps": [{"a": 1}]}', "each step to have lists"),
    ],
)
def test_other_text_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        PruningHistory.from_json(text)
