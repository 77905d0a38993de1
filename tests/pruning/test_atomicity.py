"""A prune that fails, wherever it fails, leaves everything as it was, bit for bit."""

import copy

import pytest
import torch
from torch import nn

from kddp_ext.pruning import compaction
from kddp_ext.pruning.pruner import DynamicPruner

pytestmark = pytest.mark.usefixtures("one_trace_each")


class InjectedError(Exception):
    pass


class FailsAt:
    """Calls through to a function, but raises once: before or after its k-th call."""

    def __init__(self, function, call, after, error=InjectedError):
        self.function, self.call, self.after, self.error, self.calls = function, call, after, error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.call and not self.after:
            raise self.error
        result = self.function(*args, **kwargs)
        if self.calls == self.call and self.after:
            raise self.error
        return result


class Trained:
    """A model with a norm, its optimizer and a pruner that is about to prune both hidden layers."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.PReLU(6), nn.Linear(6, 3)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.x = torch.randn(12, 5)
        self.pruner = DynamicPruner(
            self.model, self.optimizer, example_inputs=(self.x,), criterion="mean_activation", threshold=0.9, patience=1
        )
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.pruner.activations.observe()

    def snapshot(self):
        tensors = [*self.model.parameters(), *self.model.buffers()]
        attributes = [
            {key: value for key, value in module.__dict__.items() if isinstance(value, int | float | bool)}
            for module in self.model.modules()
        ]
        state = {key: dict(value) for key, value in self.optimizer.state.items()}
        statistics = {name: (s.values.clone(), s.rows) for name, s in self.pruner.statistics.items()}
        return {
            "identities": [(id(t), t.data_ptr(), t.shape, id(t.grad)) for t in tensors],
            "values": [t.detach().clone() for t in tensors],
            "gradients": [None if t.grad is None else t.grad.clone() for t in tensors],
            "attributes": attributes,
            "state identities": [(id(p), k, id(v)) for p, values in state.items() for k, v in values.items()],
            "state": [copy.deepcopy(v) for values in state.values() for v in values.values()],
            "statistics": list(statistics.values()),
            "pruner": (self.pruner.widths, self.pruner.history.to_json(), list(self.pruner.statistics)),
            "counters": self.pruner.state_dict()["inactive_checks"],
        }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key in ("identities", "attributes", "state identities", "pruner"):
        assert before[key] == after[key], key
    for key in ("values", "gradients", "state"):
        for a, b in zip(before[key], after[key], strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b), key
    for (a, rows_a), (b, rows_b) in zip(before["statistics"], after["statistics"], strict=True):
        assert torch.equal(a, b)
        assert rows_a == rows_b
    for name, counter in before["counters"].items():
        assert torch.equal(counter, after["counters"][name])


def count(monkeypatch, owner, name):
    """How often a prune calls a function."""
    trained = Trained()
    counter = FailsAt(getattr(owner, name), -1, False)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counter)
        trained.pruner.prune()
    assert all(width < whole for width, whole in zip(trained.pruner.widths.values(), (8, 6), strict=True))
    assert counter.calls > 0
    return counter.calls


PLACES = {
    "gather": (compaction.ops, "gather_slices"),
    "set data": (compaction, "set_data"),
    "state": (compaction, "sliceable_state"),
    "allocation": (torch, "empty"),
}


@pytest.mark.parametrize(("after", "error"), [(False, InjectedError), (True, KeyboardInterrupt)])
@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_a_failure_at_any_call_changes_nothing(monkeypatch, place, after, error):
    owner, name = place
    trained = Trained()
    before = trained.snapshot()
    for call in range(1, count(monkeypatch, owner, name) + 1):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, FailsAt(getattr(owner, name), call, after, error))
            with pytest.raises(error):
                trained.pruner.prune()
        assert_same(before, trained.snapshot())
    assert trained.pruner.prune().neurons_pruned > 0  # nothing stands in the way of the next


ATTRIBUTES = [
    (nn.Linear, "out_features"),
    (nn.Linear, "in_features"),
    (nn.BatchNorm1d, "num_features"),
    (nn.PReLU, "num_parameters"),
    (DynamicPruner, "_state"),
]


@pytest.mark.parametrize(("owner", "attribute"), ATTRIBUTES, ids=[attribute for _, attribute in ATTRIBUTES])
def test_a_failure_at_an_attribute_changes_nothing(monkeypatch, owner, attribute):
    trained = Trained()
    before = trained.snapshot()
    plain = owner.__setattr__
    failures = []

    def refuse_once(self, name, value):
        if name == attribute and not failures:
            failures.append(name)
            raise InjectedError
        plain(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "__setattr__", refuse_once)
        with pytest.raises(InjectedError):
            trained.pruner.prune()
    assert failures
    assert_same(before, trained.snapshot())
    assert trained.pruner.prune().neurons_pruned > 0


def spoil_state_shape(trained):
    trained.optimizer.state[trained.model[3].weight]["exp_avg"] = torch.zeros(3, 2)


def spoil_state_kind(trained):
    trained.optimizer.state[trained.model[5].weight]["history"] = [torch.zeros(3)]


def replace_layer(trained):
    trained.model[5] = nn.Linear(7, 3)


def poison_statistics(trained):
    trained.pruner.statistics["3"].values[0, 2] = torch.nan


def poison_weight(trained):
    with torch.no_grad():
        trained.model[5].weight[0, 0] = torch.inf


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_state_shape, r"optimizer: AdamW keeps 'exp_avg' of 3.weight, a tensor of shape \(3, 2\)"),
        (spoil_state_kind, "optimizer: AdamW keeps 'history' of 5.weight, list, .* nothing was pruned"),
        (replace_layer, "model: 5.weight was traced with 6 neurons of 3 along dimension 1"),
        (poison_statistics, "some activations of 3 were infinite or NaN"),
        (poison_weight, "the weights that read 3 are infinite or NaN"),
    ],
)
def test_bad_tensors_are_named_and_nothing_changes(spoil, reason):
    trained = Trained()
    spoil(trained)
    before = {key: value for key, value in trained.snapshot().items() if not key.startswith("state")}
    values = copy.deepcopy(trained.model.state_dict())
    with pytest.raises(ValueError, match=reason):
        trained.pruner.prune()
    after = trained.snapshot()
    assert before["identities"] == after["identities"]
    assert before["pruner"] == after["pruner"]
    assert before["attributes"] == after["attributes"]
    for name, value in trained.model.state_dict().items():
        torch.testing.assert_close(value, values[name], rtol=0, atol=0, equal_nan=True)
