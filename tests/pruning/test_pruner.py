"""The pruner in a training loop: what it observes, when it prunes, what it refuses, how it resumes."""

import copy
import dataclasses
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from pruner_cases import INPUTS, example, kill, make_model, make_pruner, observe
from torch import nn

import kddp_ext
from kddp_ext.pruning.pruner import DynamicPruner
from kddp_ext.pruning.selection import KeptBy
from kddp_ext.saving.student_file import load_student, save_student

# --- what is observed


def test_activations_are_what_the_next_linear_reads_before_its_dropout():
    model = make_model(dropout=0.5)
    pruner = make_pruner(model)
    x = example()
    logits = model.train()(x)
    (activation,) = pruner.activations
    assert torch.equal(activation, F.relu(F.linear(x, model[0].weight, model[0].bias)))
    (gradient,) = torch.autograd.grad(logits.sum(), activation)
    assert gradient.shape == activation.shape


class SharedDropout(nn.Module):
    """One dropout module in three places, in one of them not in front of a reader."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.first, self.second, self.last = nn.Linear(INPUTS, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = self.drop(self.first(self.drop(x)).relu())
        return self.last(F.relu(self.drop(self.second(x)), inplace=True))


def test_a_shared_dropout_is_told_apart():
    model, seen = SharedDropout(), {}
    pruner = make_pruner(model)
    assert list(pruner.widths) == ["first", "second"]
    model.first.register_forward_hook(lambda module, args, output: seen.update(first=output))
    model.last.register_forward_pre_hook(lambda module, args: seen.update(second=args[0]))
    model(example())
    first, second = pruner.activations
    assert torch.equal(first, seen["first"].relu())
    assert second is seen["second"]


def test_functional_and_in_place_dropouts_are_read_behind():
    model = make_model(dropout=0.5)
    model[2].inplace = True
    pruner = make_pruner(model)
    model.train()(example())
    assert (pruner.activations[0] == 0).any()


def test_positions_of_a_sequence_are_samples():
    model = make_model()
    pruner = make_pruner(model, example_inputs=(torch.randn(2, 3, INPUTS),))
    model(torch.randn(4, 3, INPUTS))
    assert pruner.activations[0].shape == (4, 3, 8)
    pruner.activations.observe()
    assert pruner.statistics["0"].rows == 12


def test_the_loss_fills_the_statistics_and_a_validation_pass_does_not():
    model = make_model()
    pruner = make_pruner(model)
    x, labels = example(), torch.zeros(6, dtype=torch.int64)
    kddp_ext.fused_kd_l1_loss(model(x), None, labels, pruner.activations, alpha=0.0, l1_weight=1e-3)
    with torch.no_grad():
        kddp_ext.fused_kd_l1_loss(model(x), None, labels, pruner.activations, alpha=0.0, l1_weight=1e-3)
    statistics = pruner.statistics["0"]
    assert statistics.rows == 6
    expected = F.relu(F.linear(x, model[0].weight, model[0].bias)).double().sum(0)
    torch.testing.assert_close(statistics.sum, expected)


def test_activations_need_a_forward():
    model = make_model()
    pruner = make_pruner(model)
    with pytest.raises(RuntimeError, match=r"activations: no forward pass has reached 0 .*call the model first"):
        _ = pruner.activations
    observe(pruner)
    pruner.prune()
    with pytest.raises(RuntimeError, match="no forward pass"):
        _ = pruner.activations


def test_prune_needs_statistics():
    model = make_model()
    pruner = make_pruner(model)
    model(example())
    with pytest.raises(
        RuntimeError, match=r"no statistics of 0 .* fused_kd_l1_loss .* pruner\.activations\.observe\(\)"
    ):
        pruner.prune()
    observe(pruner)
    pruner.prune()
    with pytest.raises(RuntimeError, match="no statistics"):
        pruner.prune()


# --- when it prunes


def test_patience_counts_checks_in_a_row():
    model = make_model()
    pruner = make_pruner(model, patience=3, criterion="dead")
    alive = copy.deepcopy(model.state_dict())
    pruned = []
    for dead in ([2], [2], [], [2, 4], [2, 4], [2]):
        model.load_state_dict(alive)
        kill(model, dead)
        observe(pruner)
        before = pruner.state_dict()["inactive_checks"]["0"][2]
        report = pruner.prune()
        pruned.append(report.layers[0].pruned)
        assert pruner.widths["0"] == 8 - report.neurons_pruned
        assert report.layers[0].waiting == len(dead) - report.neurons_pruned
        assert before <= 2
    assert pruned == [(), (), (), (), (), (2,)]


def test_statistics_start_afresh_after_a_check():
    model = make_model()
    pruner = make_pruner(model, criterion="dead")
    observe(pruner)
    assert pruner.prune().neurons_pruned == 0
    kill(model, [1, 6])  # alive before the check, dead since
    observe(pruner)
    assert pruner.prune().layers[0].pruned == (1, 6)


def test_reports_original_indices():
    model = make_model()
    pruner = make_pruner(model, criterion="dead")
    kill(model, [0, 5])
    observe(pruner)
    assert pruner.prune().layers[0].pruned == (0, 5)
    kill(model, [0, 5])  # by now the original neurons 1 and 7
    observe(pruner)
    report = pruner.prune()
    assert report.layers[0].pruned == (1, 7)
    assert pruner.history.steps == [{"0": [0, 5]}, {"0": [1, 7]}]
    assert pruner.widths == pruner.history.widths == {"0": 4}
    assert (model[0].out_features, model[3].in_features) == (4, 4)


def test_pruning_again_at_once_prunes_nothing():
    model = make_model(width=40)
    pruner = make_pruner(model, threshold=0.4, reconstruction_samples=0)  # which moves the outgoing weights
    observe(pruner, 50)
    assert pruner.prune().neurons_pruned > 0
    observe(pruner, 50)
    report = pruner.prune()
    assert report.neurons_pruned == 0
    assert str(report).startswith("pruned 0 neurons (0: ")


def test_guards_are_reported():
    model = make_model()
    pruner = make_pruner(model, criterion="dead", round_to=4, minimum_width=2)
    kill(model, [0, 1, 2])
    observe(pruner)
    report = pruner.prune()
    assert report.neurons_pruned == 0
    assert report.layers[0].kept_by == KeptBy(round_to=3)
    assert str(report) == "pruned 0 neurons (0: 8); parameters 75; 3 kept by round_to"
    kill(model, [0, 1, 2, 3, 4, 5, 6, 7])
    observe(pruner)
    report = pruner.prune()
    assert report.layers[0].pruned == (4, 5, 6, 7)
    assert report.layers[0].kept_by == KeptBy(minimum_width=2, round_to=2)
    assert "2 kept by minimum_width; 2 kept by round_to; warning: layer 0 has collapsed" in str(report)
    assert pruner.widths == {"0": 4}


def test_no_more_than_a_share_goes_at_once():
    model = make_model()
    pruner = make_pruner(model, criterion="dead", maximum_share=0.4)
    for width, gone in ((8, 3), (5, 2), (3, 1), (2, 0)):
        kill(model, list(range(width)))
        observe(pruner)
        report = pruner.prune()
        assert report.neurons_pruned == gone
        assert report.layers[0].kept_by.total == width - gone
    assert pruner.history.steps == [{"0": [5, 6, 7]}, {"0": [3, 4]}, {"0": [2]}]


def test_settings_can_be_replaced_between_checks():
    model = make_model(width=40)
    pruner = make_pruner(model, threshold=1e-9)
    observe(pruner, 50)
    assert pruner.prune().neurons_pruned == 0
    with pytest.raises(ValueError, match="threshold: expected more than 0"):
        dataclasses.replace(pruner.settings, threshold=0)
    pruner.settings = dataclasses.replace(pruner.settings, threshold=0.4)
    observe(pruner, 50)
    assert pruner.prune().neurons_pruned > 0


def test_report_counts_parameters():
    model = make_model()
    pruner = make_pruner(model, criterion="dead")
    kill(model, [3])
    observe(pruner)
    report = pruner.prune()
    assert report.parameters_before == 8 * INPUTS + 8 + 3 * 8 + 3
    assert (report.macs_before, report.macs_after) == (8 * INPUTS + 3 * 8, 7 * INPUTS + 3 * 7)
    assert report.parameters_after == 7 * INPUTS + 7 + 3 * 7 + 3 == sum(p.numel() for p in model.parameters())
    assert str(report) == "pruned 1 neuron (0: 8 → 7); parameters 75 → 66 (-12.0%)"


def test_only_the_layers_asked_for():
    model = nn.Sequential(nn.Linear(INPUTS, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    assert list(make_pruner(model).widths) == ["0", "2"]
    pruner = make_pruner(model, layers=["2"])
    assert list(pruner.widths) == ["2"]
    assert pruner.refused.keys() == {"4"}


def test_the_training_loop_of_the_readme():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(INPUTS, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3))
    teacher = nn.Linear(INPUTS, 3)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    pruner = DynamicPruner(student, optimizer, example_inputs=(example(2),), threshold=0.05)
    for _ in range(6):
        for _ in range(15):
            x = torch.randn(32, INPUTS)
            logits = student(x)
            with torch.no_grad():
                teacher_logits = teacher(x)
            loss = kddp_ext.fused_kd_l1_loss(
                logits, teacher_logits, teacher_logits.argmax(1), pruner.activations, l1_weight=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        pruner.prune()
    assert pruner.widths["0"] < 30
    assert (student(x).argmax(1) == teacher(x).argmax(1)).float().mean() > 0.8


# --- hooks


def test_copies_and_pickles_of_the_model_are_plain():
    model = make_model(dropout=0.1)
    pruner = make_pruner(model)
    observe(pruner)
    seen = pruner.activations[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(example())
        assert pruner.activations[0] is seen


def test_a_pruner_that_is_dropped_takes_its_hooks_along():
    model = make_model(dropout=0.1)
    pruner = make_pruner(model)
    observe(pruner)
    reference = weakref.ref(pruner)
    del pruner
    gc.collect()
    assert reference() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_close():
    model = make_model(dropout=0.1)
    pruner = make_pruner(model)
    observe(pruner)
    pruner.close()
    pruner.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="prune: the pruner is closed"):
        pruner.prune()
    with pytest.raises(RuntimeError, match="activations: the pruner is closed"):
        _ = pruner.activations
    with pytest.raises(RuntimeError, match="step: the pruner is closed"):
        pruner.step()
    with pytest.raises(RuntimeError, match="preview: the pruner is closed"):
        pruner.preview()
    assert pruner.history.widths == {"0": 8}


def test_a_second_pruner_does_not_disturb_the_first():
    model = make_model()
    first = make_pruner(model)
    observe(first)
    value = first.activations[0]
    make_pruner(model)
    assert first.activations[0] is value


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiled_model_is_pruned_and_runs_on(wrapped, tmp_path):
    model = make_model(dropout=0.1)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    optimizer = torch.optim.Adam(model.parameters())
    pruner = make_pruner(compiled if wrapped else model, optimizer, criterion="dead")
    assert pruner.widths == {"0": 8}
    for dead, width in (([2], 7), ([0, 1], 5)):
        kill(model, dead)
        logits = compiled(example())
        loss = kddp_ext.fused_kd_l1_loss(
            logits, None, torch.zeros(6, dtype=torch.int64), pruner.activations, alpha=0.0, l1_weight=1e-3
        )
        loss.backward()
        optimizer.step()
        pruner.prune()
        assert pruner.widths == {"0": width}
    compiled(example())
    assert len(graphs) == 3  # once, and once more after each prune
    torch.testing.assert_close(compiled.eval()(example()), model.eval()(example()))
    save_student(tmp_path / "student", compiled, pruner.history)
    loaded = load_student(tmp_path / "student", make_model, (example(),))
    assert torch.equal(loaded.eval()(example()), model(example()))


def test_the_model_can_be_exported_while_it_is_pruned():
    model = make_model().eval()
    pruner = make_pruner(model)
    observe(pruner)
    value = pruner.activations[0]
    program = torch.export.export(model, (example(),))
    torch.testing.assert_close(program.module()(example()), model(example()))
    model(example())
    assert type(pruner.activations[0]) is type(value)
