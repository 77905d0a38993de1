"""The pruner's state: saved, restored, and refused where it is of another student."""

import copy
import io
import pickle

import pytest
import torch
from pruner_cases import example, kill, make_model, make_pruner, observe

from kddp_ext.pruning.history import PruningHistory


def test_state_resumes_in_a_rebuilt_student():
    model = make_model()
    pruner = make_pruner(model, criterion="dead", patience=2)
    for dead in ([1, 2], [1, 2], [0, 3]):
        kill(model, dead)
        observe(pruner)
        pruner.prune()
    observe(pruner)
    for _ in range(3):
        pruner.step()
    buffer = io.BytesIO()
    torch.save({"pruner": pruner.state_dict(), "model": model.state_dict()}, buffer)
    buffer.seek(0)
    checkpoint = torch.load(buffer, weights_only=True)

    rebuilt = make_model()
    PruningHistory.from_json(checkpoint["pruner"]["history"]).replay(rebuilt, (example(),))
    rebuilt.load_state_dict(checkpoint["model"])
    resumed = make_pruner(rebuilt, criterion="dead", patience=2)
    resumed.load_state_dict(checkpoint["pruner"])
    assert resumed.history == pruner.history
    assert torch.equal(resumed.statistics["0"].values, pruner.statistics["0"].values)
    reports = [each.prune() for each in (pruner, resumed)]
    assert reports[0] == reports[1]
    assert reports[0].neurons_pruned == 2
    assert reports[0].layers[0].activation_scale is not None
    assert resumed.state_dict()["steps"] == 3
    for a, b in zip(model.parameters(), rebuilt.parameters(), strict=True):
        assert torch.equal(a, b)


def spoiled(key, value):
    def spoil(state):
        return {**state, key: value}

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoiled("version", 99), "state: expected the state of a DynamicPruner, version 1 or 2, got 99"),
        (lambda state: [], "state: expected the state of a DynamicPruner"),
        (lambda state: {"version": 1}, "state: history, inactive_checks, statistics missing"),
        (lambda state: {"version": 2}, "state: first_scales, history, inactive_checks, statistics, steps missing"),
        (spoiled("steps", -1), "state: expected steps as a whole number of at least 0, got -1"),
        (spoiled("first_scales", {"0": torch.zeros(2, 3)}), "expected two first scales for each of the 8 neurons of 0"),
        (spoiled("history", "nonsense"), "expected the JSON of a pruning history"),
        (spoiled("statistics", {}), "expected statistics and counters of the 8 neurons of 0"),
        (spoiled("inactive_checks", {"0": torch.zeros(3)}), "expected statistics and counters of the 8 neurons of 0"),
        (
            lambda state: {**state, "statistics": {"0": {"values": torch.zeros(5, 3), "rows": 1}}},
            "statistics of 8 neurons",
        ),
    ],
)
def test_a_bad_state_changes_nothing(spoil, reason):
    pruner = make_pruner(make_model())
    observe(pruner)
    before = pruner._state
    with pytest.raises(ValueError, match=reason):
        pruner.load_state_dict(spoil(pruner.state_dict()))
    assert pruner._state is before


def test_a_state_of_another_width_is_refused():
    state = make_pruner(make_model(width=7)).state_dict()
    with pytest.raises(ValueError, match=r"state: it is of a model with widths {'0': 7}, .* {'0': 8}; replay"):
        make_pruner(make_model(width=8)).load_state_dict(state)


def test_a_state_of_version_1_is_loaded():
    """It has neither steps nor first scales: those begin with the next check."""
    state = make_pruner(make_model()).state_dict()
    state["inactive_checks"]["0"][3] = 1
    old = {key: value for key, value in state.items() if key in ("history", "statistics", "inactive_checks")}
    model = make_model()
    pruner = make_pruner(model, criterion="dead", patience=2)
    pruner.load_state_dict({"version": 1, **old})
    assert pruner.state_dict()["steps"] == 0
    kill(model, [3, 4])
    for pruned, known in (((3,), False), ((4,), True)):
        observe(pruner)
        (layer,) = pruner.prune().layers
        assert layer.pruned == pruned
        assert (layer.activation_scale is not None) == known
        kill(model, [3])  # the former 4


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda pruner: pickle.loads(pickle.dumps(pruner))])
def test_a_copy_is_closed_and_says_so(copied):
    model = make_model()
    pruner = make_pruner(model)
    observe(pruner)
    other = copied(pruner)
    assert other.widths == pruner.widths
    assert other.history == pruner.history
    with pytest.raises(RuntimeError, match="activations: the pruner is closed; copies of a pruner are always closed"):
        _ = other.activations
    with pytest.raises(RuntimeError, match="prune: the pruner is closed"):
        other.prune()
    other.close()
    observe(pruner)  # the original's hooks are where they were
    assert pruner.statistics["0"].rows == 12
