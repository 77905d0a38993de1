"""Layers that cannot be proven prunable are refused, with the layer, the operation and the reason."""

import pytest
import torch
import torch.nn.functional as F
from pruner_cases import changed, recipe
from pruning.zoo.layers import CLASSES
from torch import nn

from kddp_ext.pruning.pruner import DynamicPruner
from kddp_ext.pruning.tracing.find import find_neurons
from kddp_ext.pruning.tracing.recording import UnsupportedModelError

INPUTS = 6


def share_memory(m):
    flat = torch.zeros(INPUTS * 8 + 8)
    m.first.weight = nn.Parameter(flat[:-8].view(8, INPUTS))
    m.first.bias = nn.Parameter(flat[-8:])


def evaluates(m, x):
    h = m.first(x).relu()
    return m.last(h) if m.training else m.last(h) + m.other(h)


def asserts(m, x):
    h = m.first(x)
    assert h.shape[1] == 8, "eight"
    return m.last(h)


def overwrites(m, x):
    h = m.first(x)
    h[:, 0] = 0
    return m.last(h)


PLAIN = recipe(lambda m, x: m.last(m.first(x).relu()))

# A constructor, the layer that is refused, and a part of the reason.
REFUSED = {
    "the last": (PLAIN, "last", "its neurons are outputs of the model"),
    "also an output": (
        recipe(lambda m, x: ((h := m.first(x).relu()), m.last(h))), "first", "its neurons are outputs of the model"
    ),
    "returned beside logits": (
        recipe(lambda m, x: {"hidden": (h := m.first(x).relu()), "logits": m.last(h)}),
        "first", "its neurons are outputs of the model",
    ),
    "unknown operation": (
        recipe(lambda m, x: m.last(m.first(x).cumsum(1))), "first", "cumsum in the forward of Recipe computes with all"
    ),
    "overwritten in part": (recipe(overwrites), "first", "select in .* takes single entries of them"),
    "every second": (
        recipe(lambda m, x: m.last(m.first(x)[:, ::2].repeat(1, 2))), "first", "slice in .* takes every second of them"
    ),
    "shifted": (recipe(lambda m, x: m.last(m.first(x).roll(1, 1))), "first", "roll in .* shifts them"),
    "the largest": (
        recipe(lambda m, x: m.last(m.first(x).topk(4, 1).values.repeat(1, 2))), "first", "topk in .* with all of them"
    ),
    "softmax": (recipe(lambda m, x: m.last(m.first(x).softmax(1))), "first", "softmax in .* computes with all of them"),
    "layer norm": (
        recipe(lambda m, x: m.last(m.norm(m.first(x))), norm=lambda: nn.LayerNorm(8)),
        "first", r"layer_norm in norm \(LayerNorm\) .* would change the others \(streams='all' accepts that\)",
    ),
    "norm over positions": (
        recipe(lambda m, x: m.last(m.norm(m.first(x.view(-1, 2, INPUTS)))), norm=lambda: nn.BatchNorm1d(2)),
        "first", r"batch_norm in norm \(BatchNorm1d\) .* would change the others",
    ),
    "maximum with another": (
        recipe(lambda m, x: m.last(m.first(x).maximum(x.repeat(1, 2)[:, :8]))),
        "first", "maximum in .* combines them with a tensor that cannot be narrowed",
    ),
    "gated by inputs": (
        recipe(lambda m, x: m.last(m.first(x).sigmoid() * x.repeat(1, 2)[:, :8])),
        "first", "mul in .* multiplies them by a tensor that cannot be narrowed",
    ),
    "gated by what is an output": (
        recipe(lambda m, x: ((g := m.up(x)), m.last(m.first(x) * g)), up=lambda: nn.Linear(INPUTS, 8)),
        "first", "its neurons are outputs of the model",
    ),
    "a view of another": (
        changed(PLAIN, share_memory), "first", "first.weight shares its memory with another parameter or buffer"
    ),
    "read twice in different shapes": (
        recipe(lambda m, x: m.last(m.first(x)) + m.last(m.first(x).unsqueeze(1)).squeeze(1)),
        "first", "last.weight reads them 2 times in one forward pass, which differ in shape or place, or by the mode",
    ),
    "read once more in training": (
        recipe(lambda m, x: sum(m.last(m.first(x)) for _ in range(1 + m.training))),
        "first", "last.weight reads them 2 times in one forward pass",
    ),
    "weight read elsewhere": (
        recipe(lambda m, x: m.last(m.first(x).relu()) + m.first.weight.square().sum()),
        "first", "sum in .* computes with all of them",
    ),
    "parametrized": (
        changed(PLAIN, lambda m: nn.utils.parametrizations.weight_norm(m.first)),
        "first", "its weight is computed in the forward pass, so it cannot be sliced",
    ),
    "tied to an embedding": (
        changed(
            recipe(lambda m, x: m.last(m.table(x[:, 0].long())), table=lambda: nn.Embedding(CLASSES, 8)),
            lambda m: setattr(m.table, "weight", m.last.weight),
        ),
        "last", "its neurons are outputs of the model",
    ),
    "parametrized reader": (
        changed(PLAIN, lambda m: nn.utils.parametrizations.orthogonal(m.last)),
        "first", "last .* its weight is computed in the forward pass",
    ),
    "reader called as a function": (
        recipe(lambda m, x: F.linear(m.first(x).relu(), m.last.weight, m.last.bias)),
        "first", "reads them by a function call with last.weight; use a module",
    ),
    "hard-coded width": (
        recipe(lambda m, x: m.last(m.first(x).view(-1, 8))), "first", "with one neuron fewer, .* RuntimeError: "
    ),
    "hard-coded width that happens to divide": (
        recipe(lambda m, x: m.last(m.first(x.repeat(2, 1)).view(-1, 8))), "first", "with one neuron fewer, .*"
    ),
    "hard-coded parts": (
        recipe(lambda m, x: m.last(m.first(x).view(-1, 4, 2).relu().reshape(-1, 8))),
        "first", "with one neuron fewer, .* RuntimeError: ",
    ),
    "asserted width": (recipe(asserts), "first", "with one neuron fewer, .* AssertionError: eight"),
    "scaled by their number": (
        recipe(lambda m, x: m.last((h := m.first(x)) / h.shape[1])),
        "first", "with one neuron fewer, div in .* computes with another number, so the model depends on the number",
    ),
    "scaled by their number, as a tensor": (
        recipe(lambda m, x: m.last(m.first(x) * torch.tensor(m.first.out_features**-0.5))),
        "first", "with one neuron fewer, mul in .* computes with another constant tensor",
    ),
    "another path for another number": (
        recipe(lambda m, x: m.last(m.first(x).relu() if m.last.in_features == 8 else m.first(x).tanh())),
        "first", "with one neuron fewer, relu in .* becomes tanh",
    ),
    "as a weight": (
        recipe(lambda m, x: (F.linear((h := m.first(x)), m.second(h)), m.last(h))),
        "second", "multiplies activations and sums over the neurons",
    ),
    "summed over": (
        recipe(lambda m, x: m.last(m.first(x).sum(1, keepdim=True).expand(-1, 8))),
        "first", "sum in .* computes with all of them",
    ),
    "pooled over": (
        recipe(lambda m, x: m.last(F.max_pool1d(m.first(x), 3, 1, 1))), "first", "max_pool2d in .* pools over them"
    ),
    "unreached": (recipe(lambda m, x: m.last(m.first(x))), "second", "the forward pass does not reach it as a Linear"),
    "unread": (
        recipe(lambda m, x: (m.first(x), m.last(m.second(x.repeat(1, 2)[:, :8])))[1]),
        "first", "nothing reads its neurons",
    ),
    "read in evaluation mode only": (
        recipe(evaluates, other=lambda: nn.Linear(8, 3)), "first", "other.weight reads them in evaluation mode only"
    ),
    "single sample": (recipe(lambda m, x: m.last(m.first(x[0]))), "first", "last .* without a batch dimension"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "layer", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_layers_are_refused_with_the_reason(make, layer, reason):
    with pytest.raises(UnsupportedModelError, match=rf"(?s)layers: {layer} cannot be pruned: .*({reason})"):
        DynamicPruner(make(), example_inputs=(torch.randn(4, INPUTS),), layers=[layer])


class AsFilter(nn.Module):
    def forward(self, x):
        return F.conv2d(torch.zeros(2, 8, 3, 3), x.mean(0).unsqueeze(1), groups=8)


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.filters = nn.Parameter(torch.ones(8, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.filters, groups=8)


CONVOLUTIONS = {
    "grouped and transposed": (
        lambda: (nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1)),
        "has 2 groups of channels, which must keep equal sizes",
    ),
    "several outputs a channel": (
        lambda: (nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 1, groups=8)), "its neurons are outputs of the model"
    ),
    "channels of the inputs": (
        lambda: (nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 8, 1)), "its channels are those of the model's inputs"
    ),
    "spectral norm": (
        lambda: (nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 1)), nn.Conv2d(8, 8, 1)),
        "its weight is computed in the forward pass, so it cannot be sliced",
    ),
    "channels as samples": (
        lambda: (nn.Conv2d(4, 8, 1), nn.Flatten(2), nn.Flatten(0, 1), nn.Linear(9, 9), nn.Linear(9, 2)),
        "its neurons are outputs of the model",
    ),
    "as a filter": (
        lambda: (nn.Conv2d(4, 8, 1), AsFilter(), nn.Conv2d(8, 8, 1)),
        r"convolution in 1 \(AsFilter\) has a weight that is computed in the forward pass",
    ),
    "a hard-coded number of groups": (
        lambda: (nn.Conv2d(4, 8, 1), Depthwise(), nn.Conv2d(8, 8, 1)), "with one neuron fewer, .* groups=8"
    ),
    "the only layer": (lambda: (nn.Conv2d(4, 2, 3),), "its neurons are outputs of the model"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_convolutions_are_refused_with_the_reason(make, reason):
    with pytest.raises(UnsupportedModelError, match=rf"(?s)({reason})"):
        DynamicPruner(nn.Sequential(*make()), example_inputs=(torch.randn(2, 4, 3, 3),), layers=["0"])


def test_a_depthwise_convolution_is_named_with_the_layer_whose_channels_it_filters():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 2, 1))
    with pytest.raises(UnsupportedModelError, match=r"layers: 1 cannot be pruned: it has the neurons of 0 .* name 0 "):
        DynamicPruner(model, example_inputs=(torch.randn(2, 4, 3, 3),), layers=["1"])


def test_a_depthwise_convolution_is_refused_with_the_layer_whose_channels_it_filters():
    layers = {"first": lambda: nn.Conv2d(2, 8, 1), "second": lambda: nn.Conv2d(8, 8, 1, groups=8)}
    make = recipe(
        lambda m, x: m.last((h := m.second(m.first(x))) / h.shape[1]), last=lambda: nn.Conv2d(8, 3, 1), **layers
    )
    refused = find_neurons(make(), (torch.randn(2, 2, 3, 3),)).refused
    assert "another number" in refused["first"]
    assert refused["second"] == refused["first"]
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Softmax(1), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 2, 1))
    refused = find_neurons(model, (torch.randn(2, 4, 3, 3),)).refused
    assert refused["2"] == "convolution in 2 (Conv2d) filters channels that cannot be removed"


def test_dependence_on_one_width_spares_the_other_layers_and_all_reasons_are_listed():
    make = recipe(lambda m, x: m.last(m.second((h := m.first(x)).relu() / h.shape[1]).relu()))
    found = find_neurons(make(), (torch.randn(4, INPUTS),))
    assert list(found.groups) == ["second"]
    assert "another number" in found.refused["first"]
    make = recipe(lambda m, x: m.last(m.first(x).cumsum(1)))
    with pytest.raises(UnsupportedModelError, match=r"(?s)no layer that can be pruned.*first: .*cumsum.*last: its"):
        DynamicPruner(make(), example_inputs=(torch.randn(4, INPUTS),))


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 5), "RuntimeError"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(1, 3), "more than 1 value"),
        (recipe(lambda m, x: m.last(m.first(x)) if x.sum().item() > 0 else m.first(x))(), torch.randn(2, INPUTS), ""),
    ],
    ids=["wrong size", "one sample for a norm", "depends on the data"],
)
def test_a_forward_that_cannot_be_traced_is_refused(model, inputs, reason):
    with pytest.raises(UnsupportedModelError, match=rf"not be traced in training mode with example_inputs: .*{reason}"):
        find_neurons(model, (inputs,))
