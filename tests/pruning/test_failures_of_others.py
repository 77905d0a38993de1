"""Ten ways in which pruning goes wrong elsewhere: each shown on a step written by hand, then absent from ours.

Threads are cited as repository#number; what they say is told in our words.
"""

import pytest
import torch
from pruner_cases import INPUTS, example, kill, make_model, make_pruner, observe
from torch import nn

from kddp_ext import DynamicPruner, PruningHistory, UnsupportedModelError

DEAD = [1, 4, 6]
KEPT = [0, 2, 3, 5, 7]


def prune_by_hand(model, neurons, last=3):
    """What a small tool does: new parameters with fewer rows here and fewer columns there."""
    keep = [j for j in range(model[0].out_features) if j not in neurons]
    model[0].weight = nn.Parameter(model[0].weight.detach()[keep])
    model[0].bias = nn.Parameter(model[0].bias.detach()[keep])
    model[last].weight = nn.Parameter(model[last].weight.detach()[:, keep])
    model[0].out_features = model[last].in_features = len(keep)


def train_step(model, optimizer):
    optimizer.zero_grad()
    model(example()).square().mean().backward()
    optimizer.step()


def trained(make_optimizer=torch.optim.Adam):
    """A model after a few steps, its optimizer, and neurons that have been dead all along."""
    model = make_model()
    kill(model, DEAD)
    optimizer = make_optimizer(model.parameters(), lr=0.01)
    for _ in range(3):
        train_step(model, optimizer)
    return model, optimizer


def prune(model, optimizer=None, **settings):
    pruner = make_pruner(model, optimizer, **{"criterion": "dead", **settings})
    observe(pruner)
    return pruner, pruner.prune()


def test_the_optimizer_goes_on_with_the_old_tensors():
    """The pruned layers get new parameters; the optimizer holds the old ones, and training does nothing more.

    microsoft/nni#4521: nothing is updated when the pruned model is finetuned; the advice is another optimizer.
    FasterAI-Labs/fasterai#92: after the first prune the optimizer held one of eight live parameters.
    """
    model, optimizer = trained()
    prune_by_hand(model, DEAD)
    before = model[0].weight.clone()
    train_step(model, optimizer)
    assert torch.equal(model[0].weight, before)

    model, optimizer = trained()
    _, report = prune(model, optimizer)
    assert report.neurons_pruned == len(DEAD)
    before = [parameter.clone() for parameter in model.parameters()]
    train_step(model, optimizer)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert not torch.equal(parameter, value)


def test_the_moments_of_adam_are_lost():
    """Another optimizer for the new parameters starts with empty moments and at step 0.

    VainF/Torch-Pruning#140: momentum cannot be pruned, so the optimizer has to be made anew; #120 asks how to
    carry it over. FasterAI-Labs/fasterai#93: a gradual schedule restarted the optimizer cold at every prune.
    """
    whole, optimizer = trained()
    train_step(whole, optimizer)  # what a step makes of the neurons that are not dead

    model, _ = trained()
    prune_by_hand(model, DEAD)
    train_step(model, torch.optim.Adam(model.parameters(), lr=0.01))
    assert not torch.allclose(model[0].weight, whole[0].weight[KEPT])

    model, optimizer = trained()
    prune(model, optimizer)
    train_step(model, optimizer)
    torch.testing.assert_close(model[0].weight, whole[0].weight[KEPT])
    torch.testing.assert_close(model[3].weight, whole[3].weight[:, KEPT])
    assert optimizer.state[model[0].weight]["step"] == 4


def test_the_model_is_left_in_evaluation_mode():
    """Tracing a model in evaluation mode, and leaving it there: no dropout, frozen statistics from then on.

    Torch-Pruning 1.6.1 calls `eval()` on the model when it builds its graph, and does not undo it (read in its
    source; no thread was found). Calling `train()` afterwards would thaw what the user had frozen.
    """
    model = make_model(dropout=0.5)
    model.eval()
    model(example())  # the trace
    prune_by_hand(model, DEAD)
    assert not model[2].training

    model = make_model(dropout=0.5)
    kill(model, DEAD)
    model[1].eval()  # of the user's choice
    pruner, report = prune(model)
    assert report.neurons_pruned == len(DEAD)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]

    fresh = make_model(dropout=0.5)
    pruner.history.replay(fresh, (example(),))
    assert all(module.training for module in fresh.modules())


def test_a_frozen_parameter_thaws():
    """A new parameter requires a gradient, whatever the old one did; frozen layers begin to train.

    FasterAI-Labs/fasterai#92: layers of a frozen group that a prune touched started training silently, for
    torch-pruning makes their parameters anew with gradients on.
    """
    model, _ = trained()
    model[0].weight.requires_grad_(False)
    prune_by_hand(model, DEAD)
    assert model[0].weight.requires_grad

    model, optimizer = trained()
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = None
    frozen = model[0].weight[KEPT].clone()
    prune(model, optimizer)
    train_step(model, optimizer)
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]
    assert torch.equal(model[0].weight, frozen)


def test_a_history_is_replayed_twice():
    """Indices of the whole network, applied to one that is pruned already, remove its healthy neurons.

    VainF/Torch-Pruning#139 brought the record of what was pruned; its replay compares no widths. In #3 a ratio
    was applied twice by mistake: 32 channels were left of 64 where 45 were meant to be.
    """
    model = make_model()
    kill(model, DEAD)
    for _ in range(2):
        prune_by_hand(model, DEAD)
    assert model[0].out_features == 3  # two healthy ones are gone, and nothing was said

    model = make_model()
    kill(model, DEAD)
    pruner, _ = prune(model)
    fresh = make_model()
    pruner.history.replay(fresh, (example(),))
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(ValueError, match="model: 0 has 5 neurons but the history starts from 8; replay it once"):
        pruner.history.replay(fresh, (example(),))
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize(
    ("indices", "reason"),
    [
        ([1, 1, 4], "neuron 1 of 0 is pruned twice"),
        ([1, 8], "0 has neurons 0 to 7, got 8"),
        ([-1, 4], "0 has neurons 0 to 7, got -1"),
    ],
)
def test_indices_that_are_repeated_or_out_of_range(indices, reason):
    """Kept neurons by set difference, the width by subtraction: with such indices the two disagree.

    VainF/Torch-Pruning#61 and #8: negative numbers of channels after pruning; #342 and #263: an index that is
    out of bounds by one.
    """
    model = make_model()
    keep = sorted(set(range(8)) - set(indices))
    weight, out_features = model[0].weight[keep], model[0].out_features - len(indices)
    assert len(weight) != out_features

    history = PruningHistory({"0": 8})
    with pytest.raises(ValueError, match=reason):
        history.add_step({"0": indices})
    text = PruningHistory({"0": 8}).to_json().replace('"steps": []', f'"steps": [{{"0": {indices}}}]')
    with pytest.raises(ValueError, match=reason):
        PruningHistory.from_json(text)
    assert history.widths == {"0": 8}


def flattening():
    """Four channels at nine positions, flattened into a Linear; channel 2 does nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    with torch.no_grad():
        model[0].bias += 1
        model[0].weight[2], model[0].bias[2] = 0, -1
    return model.to(memory_format=torch.channels_last)


def test_the_columns_behind_a_flatten_with_channels_last():
    """In memory the channels of a channels_last image alternate; `flatten` still lays them out one after another.

    Who takes a channel's columns where its values lie in memory, or one column a channel, takes wrong ones.
    Eric-mingjie/rethinking-network-pruning#39: columns chosen by the channels' numbers, 8 left where 288 were
    needed; VainF/Torch-Pruning#50, Eric-mingjie/network-slimming#12: from convolution to Linear.
    """
    images = torch.randn(5, 2, 5, 5).to(memory_format=torch.channels_last)
    model = flattening()
    outputs, values = model(images), model[:2](images)
    assert values.is_contiguous(memory_format=torch.channels_last)
    in_memory = values[0].permute(1, 2, 0).flatten()
    assert not torch.equal(in_memory, values[0].flatten())
    weight = model[3].weight.detach().clone()
    weight[:, 2::4] = 0  # channel 2, by the order in memory
    assert not torch.allclose(nn.functional.linear(values.flatten(1), weight, model[3].bias), outputs)

    optimizer = torch.optim.Adam(model.parameters())
    pruner = DynamicPruner(model, optimizer, example_inputs=(images,), criterion="dead", patience=1, layers=["0"])
    model(images)
    pruner.activations.observe()
    assert pruner.prune().layers[0].pruned == (2,)
    assert (model[0].out_channels, model[3].in_features) == (3, 27)
    torch.testing.assert_close(model(images), outputs)


def test_tied_weights_are_untied():
    """A weight that two layers share is replaced in one of them: from then on each trains its own.

    huggingface/transformers#16283 asks how to prune an embedding whose weights the output layer shares.
    """

    def tied():
        torch.manual_seed(0)
        layers = [nn.Linear(INPUTS, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)]
        layers[2].weight = layers[1].weight
        return nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])

    model = tied()
    prune_by_hand(model, DEAD, last=2)
    assert model[4].weight is not model[2].weight

    model = tied()
    with pytest.raises(UnsupportedModelError, match=r"shared \(tied\) between 2\.weight and 4\.weight"):
        make_pruner(model, layers=["2"])
    pruner = make_pruner(model, threshold=1.0)  # all but the most active
    observe(pruner)
    assert pruner.prune().neurons_pruned > 0
    assert pruner.widths == {"6": 1}  # what the tied layers compute and read stays
    assert model[4].weight is model[2].weight


def test_statistics_of_the_last_batch_only():
    """A hook keeps the latest activations: a neuron for samples of the first batch is dead by the last.

    JJGO/shrinkbench#11: masks come from a single batch. microsoft/nni#2187: what was collected for each layer lay
    in the same memory.
    """

    def only_for_positive_inputs():
        model = make_model()
        with torch.no_grad():
            model[0].weight[3], model[0].bias[3] = 0, 0
            model[0].weight[3, 0] = 1
        kill(model, [5])
        return model

    batches = [torch.full((4, INPUTS), value) for value in (1.0, -1.0, -1.0)]
    model, latest = only_for_positive_inputs(), {}
    model[1].register_forward_hook(lambda module, args, output: latest.update(value=output))
    for batch in batches:
        model(batch)
    assert {3, 5} <= set((latest["value"] == 0).all(0).nonzero().flatten().tolist())

    model = only_for_positive_inputs()
    pruner = make_pruner(model, criterion="dead")
    for batch in batches:
        model(batch)
        pruner.activations.observe()
    assert pruner.prune().layers[0].pruned == (5,)


def test_a_rounding_that_prunes_nothing_without_a_word():
    """Widths in multiples of 8, and 3 of 8 neurons to go: none goes, and nobody is told.

    VainF/Torch-Pruning#416 and FasterAI-Labs/fasterai#63: a model comes back as it was, with no message;
    VainF/Torch-Pruning#38 is where rounding came from.
    """

    def prune_rounded(model, neurons, multiple):
        width = model[0].out_features
        left = -(-(width - len(neurons)) // multiple) * multiple
        prune_by_hand(model, neurons[: width - left])

    model = make_model()
    assert prune_rounded(model, DEAD, 8) is None
    assert model[0].out_features == 8

    model = make_model()
    kill(model, DEAD)
    _, report = prune(model, round_to=8)
    assert report.neurons_pruned == 0
    assert str(report).startswith("pruned 0 neurons (0: 8)")
    assert "3 kept by round_to" in str(report)
    _, report = prune(model, round_to=4)
    assert report.neurons_pruned == 0  # 5 are wanted, 8 is the next multiple
    _, report = prune(model, round_to=5)
    assert report.layers[0].pruned == tuple(DEAD)
