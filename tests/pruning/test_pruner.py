"""The pruner in a training loop: what it observes, when it prunes, its state, its hooks, and PyTorch's modes."""

import contextlib
import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from pruner_cases import INPUTS, check, example, kill, make_model, make_pruner, observe, recipe
from torch import nn

import kddp_ext
from kddp_ext import PruningHistory

# --- what is observed


def test_activations_are_what_the_next_layer_reads_before_its_dropout():
    model = make_model(dropout=0.5)
    pruner = make_pruner(model)
    x = example()
    logits = model.train()(x)
    (activation,) = pruner.activations
    assert torch.equal(activation, F.relu(F.linear(x, model[0].weight, model[0].bias)))
    (gradient,) = torch.autograd.grad(logits.sum(), activation)
    assert gradient.shape == activation.shape


def test_a_dropout_that_is_shared_or_in_place():
    def shared(m, x):
        x = m.drop(m.first(m.drop(x)).relu())
        return m.last(F.relu(m.drop(m.second(x)), inplace=True))

    model, seen, x = recipe(shared, drop=lambda: nn.Dropout(0.5))(), {}, torch.randn(4, 6)
    pruner = make_pruner(model, example_inputs=(x,))
    assert list(pruner.widths) == ["first", "second"]
    model.first.register_forward_hook(lambda module, args, output: seen.update(first=output))
    model.last.register_forward_pre_hook(lambda module, args: seen.update(second=args[0]))
    model(x)
    first, second = pruner.activations
    assert torch.equal(first, seen["first"].relu())
    assert second is seen["second"]

    model = make_model(dropout=0.5)
    model[2].inplace = True
    pruner = make_pruner(model)
    model.train()(example())
    assert (pruner.activations[0] == 0).any()  # taken after an in-place dropout


def test_positions_of_a_sequence_are_samples():
    model = make_model()
    pruner = make_pruner(model, example_inputs=(torch.randn(2, 3, INPUTS),))
    model(torch.randn(4, 3, INPUTS))
    assert pruner.activations[0].shape == (4, 3, 8)
    pruner.activations.observe()
    assert pruner.statistics["0"].rows == 12
    model(torch.randn(4, INPUTS))
    with pytest.raises(RuntimeError, match=r"activations: 3 was traced with an input of 3 dim.* shape is \(4, 8\)"):
        _ = pruner.activations


def loss_of(model, pruner):
    labels = torch.zeros(6, dtype=torch.int64)
    return kddp_ext.fused_kd_l1_loss(model(example()), None, labels, pruner.activations, alpha=0.0, l1_weight=1e-3)


def test_the_loss_adds_to_the_statistics_and_a_validation_pass_does_not():
    model = make_model()
    pruner = make_pruner(model)
    loss_of(model, pruner)
    with torch.no_grad():
        loss_of(model, pruner)
    assert pruner.statistics["0"].rows == 6
    expected = F.relu(F.linear(example(), model[0].weight, model[0].bias)).double().sum(0)
    torch.testing.assert_close(pruner.statistics["0"].sum, expected)


def test_activations_need_a_forward_pass_and_prune_needs_statistics():
    model = make_model()
    pruner = make_pruner(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"activations: no forward pass has reached 0 .*call the model first"):
            _ = pruner.activations
        with pytest.raises(RuntimeError, match=r"no statistics of 0 .* fused_kd_l1_loss .*activations\.observe\(\)"):
            pruner.prune()
        check(pruner)


# --- when it prunes


def test_patience_counts_consecutive_checks():
    model = make_model()
    pruner = make_pruner(model, patience=3, criterion="dead")
    alive = copy.deepcopy(model.state_dict())
    pruned = []
    for dead in ([2], [2], [], [2, 4], [2, 4], [2]):
        model.load_state_dict(alive)
        report = check(pruner, dead)
        pruned.append(report.layers[0].pruned)
        assert pruner.widths["0"] == 8 - report.neurons_pruned
        assert report.layers[0].waiting == len(dead) - report.neurons_pruned
    assert pruned == [(), (), (), (), (), (2,)]


def test_reports_and_history_have_original_indices():
    model = make_model()
    pruner = make_pruner(model, criterion="dead")
    for pruned in ((0, 5), (1, 7)):  # the second pair has indices 0 and 5 among the remaining neurons
        assert check(pruner, [0, 5]).layers[0].pruned == pruned
    assert pruner.history.steps == [{"0": [0, 5]}, {"0": [1, 7]}]
    assert pruner.widths == pruner.history.widths == {"0": 4}
    assert (model[0].out_features, model[3].in_features) == (4, 4)
    assert repr(pruner) == "DynamicPruner(0 4; criterion='dead', threshold=0.01)"


def test_pruning_again_at_once_prunes_nothing():
    model = make_model(width=40)
    pruner = make_pruner(model, threshold=0.4, reconstruction_samples=0)  # reconstruction changes outgoing weights
    observe(pruner, 50)
    assert pruner.prune().neurons_pruned > 0
    observe(pruner, 50)
    assert pruner.prune().neurons_pruned == 0


# --- hooks


def has_hooks(model):
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._load_state_dict_pre_hooks
        for module in model.modules()
    )


def test_copies_of_the_model_a_second_pruner_and_an_export_do_not_disturb_the_pruner():
    model = make_model(dropout=0.1).eval()
    pruner = make_pruner(model)
    observe(pruner)
    seen = pruner.activations[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(example())
    make_pruner(model)
    program = torch.export.export(model, (example(),))
    torch.testing.assert_close(program.module()(example()), model[3](seen))
    assert pruner.activations[0] is seen


def test_a_dropped_or_closed_pruner_removes_its_hooks():
    model = make_model(dropout=0.1)
    pruner = make_pruner(model)
    observe(pruner)
    reference = weakref.ref(pruner)
    del pruner
    gc.collect()
    assert reference() is None
    assert not has_hooks(model)
    pruner = make_pruner(model)
    observe(pruner)
    for _ in range(2):
        pruner.close()
    assert not has_hooks(model)
    for method in ("prune", "step", "preview"):
        with pytest.raises(RuntimeError, match=f"{method}: the pruner is closed"):
            getattr(pruner, method)()
    with pytest.raises(RuntimeError, match="activations: the pruner is closed"):
        _ = pruner.activations
    assert pruner.history.widths == {"0": 8}


def test_loading_a_state_of_other_widths_names_pruning():
    model, original = make_model(), make_model()
    pruner = make_pruner(model)
    wide = {name: value.clone() for name, value in model.state_dict().items()}
    check(pruner, [0, 1, 2])
    pruned, outer, seen = copy.deepcopy(model), nn.ModuleDict({"student": model}), "a DynamicPruner prunes this model: "
    for load, sizes in (
        (lambda: model.load_state_dict(wide), r"0.weight is \(5, 5\) here and \(8, 5\)"),
        (lambda: model.load_state_dict(wide, strict=False), r"0.weight is \(5, 5\)"),
        (lambda: outer.load_state_dict({f"student.{n}": v for n, v in wide.items()}), r"student.0.weight is \(5, 5\)"),
    ):
        with pytest.raises(RuntimeError, match=seen + sizes) as failure:
            load()
        assert "PruningHistory.replay" in str(failure.value)
        assert "copies=[ema]" in str(failure.value)
    second = make_pruner(original)
    with pytest.raises(RuntimeError, match=seen + r"0.weight is \(8, 5\) here and \(5, 5\)"):
        original.load_state_dict(model.state_dict())
    assert model.load_state_dict(pruned.state_dict()).missing_keys == []
    second.close()
    for silent in (original, pruned, pickle.loads(pickle.dumps(model))):
        state = model.state_dict() if silent is original else wide
        with pytest.raises(RuntimeError, match="size mismatch") as failure:
            silent.load_state_dict(state)
        assert "DynamicPruner" not in str(failure.value)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda pruner: pickle.loads(pickle.dumps(pruner))])
def test_a_copy_of_a_pruner_is_closed(copied):
    pruner = make_pruner(make_model())
    observe(pruner)
    other = copied(pruner)
    assert other.widths == pruner.widths
    assert other.history == pruner.history
    with pytest.raises(RuntimeError, match="prune: the pruner is closed; copies of a pruner are always closed"):
        other.prune()
    other.close()
    observe(pruner)  # the original still has its hooks
    assert pruner.statistics["0"].rows == 12


# --- its state


def test_state_resumes_in_a_rebuilt_student():
    model = make_model()
    pruner = make_pruner(model, criterion="dead", patience=2)
    for dead in ([1, 2], [1, 2], [0, 3]):
        check(pruner, dead)
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


class Streams(nn.Module):
    """Heads that are read as a whole, in a residual stream that is read at two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.embed, self.qkv, self.output = 4, nn.Linear(INPUTS, 6), nn.Linear(6, 24), nn.Linear(8, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        h = self.embed(x)
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, 2)).permute(2, 0, 3, 1, 4)
        return self.last(h + self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


def test_streams_and_heads_are_observed_where_they_are_read_and_resume():
    x = torch.randn(8, 5, INPUTS)
    options = {"example_inputs": (x,), "threshold": 1.0, "maximum_share": 0.5, "minimum_width": 2}
    model = Streams()
    pruner = make_pruner(model, **options)
    assert pruner.widths == {"embed": 6, "qkv": 4}
    assert list(pruner.statistics) == ["qkv.input", "qkv", "last.input"]
    seen = []
    for name in ("qkv", "output", "last"):
        model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x).sum().backward()
    stream, heads, end = pruner.activations
    assert stream is seen[0]
    assert end is seen[2]
    assert torch.equal(heads, seen[1].reshape(40, 1, 4, 2))
    assert pruner.activations.axes == (2, 2, 2)
    pruner.activations.observe()
    assert [each.rows for each in pruner.statistics.values()] == [40, 80, 40]
    report = pruner.prune()
    assert [layer.width_after for layer in report.layers] == [3, 2]
    assert model.heads == 2

    rebuilt = Streams()
    pruner.history.replay(rebuilt, (x,))
    rebuilt.load_state_dict(model.state_dict())
    model(x)
    pruner.activations.observe()
    resumed = make_pruner(rebuilt, **options)
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.prune() == pruner.prune()
    for a, b in zip(model.parameters(), rebuilt.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 3}, "state: expected the state of a DynamicPruner, version 4, got 3"),
        ([], "state: expected the state of a DynamicPruner"),
        (
            "version alone",
            "state: checks, first_scales, history, inactive_checks, lowest_loss, original_size, predicted, ",
        ),
        ({"checks": None}, "state: expected checks as a whole number of at least 0, got None"),
        ({"saliency": {}}, r"state: expected saliency\['squares'\] of shape \(8,\), got None"),
        ({"steps": -1}, "state: expected steps as a whole number of at least 0, got -1"),
        ({"first_scales": {"0": torch.zeros(2, 3)}}, r"expected first_scales of the 8 neurons of 0, got \(2, 3\)"),
        ({"history": "nonsense"}, "expected the JSON of a pruning history"),
        ({"history": PruningHistory({"0": 7}).to_json()}, "of a model with widths {'0': 7} .* {'0': 8} .*; replay"),
        ({"history": PruningHistory({"0": 8}, streams="all").to_json()}, "and streams='all', but this .* 'exact'"),
        ({"statistics": {}}, "state: the statistics of 0 are missing"),
        ({"inactive_checks": {"0": torch.zeros(3)}}, r"expected inactive_checks of the 8 neurons of 0, got \(3,\)"),
        ({"statistics": {"0": {"values": torch.zeros(5, 3), "rows": 1}}}, "statistics of 8 neurons"),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(changes, reason):
    pruner = make_pruner(make_model())
    observe(pruner)
    before = pruner._state
    state = {**pruner.state_dict(), **changes} if isinstance(changes, dict) else changes
    if changes == "version alone":
        state = {"version": 4}
    with pytest.raises(ValueError, match=reason):
        pruner.load_state_dict(state)
    assert pruner._state is before


# --- inference mode and default devices


def test_training_continues_after_pruning_or_replaying_in_inference_mode():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    with torch.inference_mode():
        pruner = make_pruner(model, optimizer, criterion="dead")
        pruner.load_state_dict(pruner.state_dict())
    for dead in ([1, 4], [0]):
        kill(model, dead)
        optimizer.zero_grad()
        loss_of(model, pruner).backward()
        optimizer.step()
        assert pruner.statistics["0"].rows == 6
        with torch.inference_mode():
            model(example())
            assert pruner.prune().neurons_pruned == len(dead)
    fresh = make_model()
    with torch.inference_mode():
        pruner.history.replay(fresh, (example(),))
    fresh(example()).sum().backward()
    assert fresh[0].weight.grad.shape == fresh[0].weight.shape == (5, 5)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reconstruction_samples": 0},
        {"criterion": lambda s, outgoing: s.std},
        {"criterion": "saliency", "target_macs": 0.5},
    ],
)
def test_a_default_device_changes_nothing(options):
    """ "meta" stands for a GPU: tensors that are made there by mistake have no values."""
    widths = []
    for device in (None, "meta"):
        model = nn.Sequential(nn.Conv1d(2, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
        for number, parameter in enumerate(model.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        inputs = torch.randn(40, 2, 4, generator=torch.Generator().manual_seed(9))
        with default_device(device):
            pruner = make_pruner(model, example_inputs=(inputs[:2],), threshold=0.5, **options)
            for _ in range(2):
                loss = model(inputs).square().mean()
                pruner.activations.observe()
                loss.backward()
            preview, report = pruner.preview(), pruner.prune()
        assert preview.layers[0].width_after == report.layers[0].width_after
        assert all(parameter.device.type == "cpu" for parameter in model.parameters())
        widths.append(pruner.widths["0"])
    assert widths[0] == widths[1] <= 12
