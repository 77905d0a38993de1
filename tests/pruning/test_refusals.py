"""Layers that cannot be proven prunable are refused, with the layer, the operation and the reason."""

import pytest
import torch
import torch.nn.functional as F
from pruner_cases import changed
from torch import nn
from zoo import recipe

from kddp_ext.pruning.pruner import DynamicPruner
from kddp_ext.pruning.tracing.find import UnsupportedModelError, find_neurons

INPUTS = 6


def tie(m):
    m.other.weight = m.first.weight


def share_memory(m):
    flat = torch.zeros(INPUTS * 8 + 8)
    m.first.weight = nn.Parameter(flat[:-8].view(8, INPUTS))
    m.first.bias = nn.Parameter(flat[-8:])


def only_in_training(m, x):
    h = m.first(x).relu()
    return (m.last(h), m.second(h)) if m.training else m.last(h)


def asserts(m, x):
    h = m.first(x)
    assert h.shape[1] == 8, "eight"
    return m.last(h)


def overwrites(m, x):
    h = m.first(x)
    h[:, 0] = 0
    return m.last(h)


def no_grad_relu(x):
    with torch.no_grad():
        return x.relu()


PLAIN = recipe(lambda m, x: m.last(m.first(x).relu()))
TWICE = recipe(lambda m, x: m.last(m.second(m.second(m.first(x)).relu())))

# A constructor, the layer that is refused, and a part of the reason.
REFUSED = {
    "the last": (PLAIN, "last", "its neurons are the model's outputs"),
    "also an output": (
        recipe(lambda m, x: ((h := m.first(x).relu()), m.last(h))), "first", "is also an output of the model"
    ),
    "unknown operation": (
        recipe(lambda m, x: m.last(m.first(x).cumsum(1))),
        "first", "does not know whether the operation cumsum in the forward of Recipe keeps neurons separate",
    ),
    "overwritten in part": (recipe(overwrites), "first", "operation (slice|select|index_put|copy)"),
    "softmax": (recipe(lambda m, x: m.last(m.first(x).softmax(1))), "first", "softmax in .* from all of them"),
    "layer norm": (
        recipe(lambda m, x: m.last(m.norm(m.first(x))), norm=lambda: nn.LayerNorm(8)),
        "first", r"layer_norm in norm \(LayerNorm\) .* use BatchNorm",
    ),
    "residual sum": (
        recipe(lambda m, x: m.last((h := m.first(x)) + m.second(h.relu()))),
        "first", r"add in .* adds another tensor to them \(a residual sum\?\)",
    ),
    "maximum with another": (
        recipe(lambda m, x: m.last(m.first(x).maximum(x.repeat(1, 2)[:, :8]))), "first", "combines them with another"
    ),
    "gated by inputs": (
        recipe(lambda m, x: m.last(m.first(x).sigmoid() * x.repeat(1, 2)[:, :8])),
        "first", "multiplied by the result of slice .* not an elementwise function",
    ),
    "gated by what is an output": (
        recipe(lambda m, x: ((g := m.up(x)), m.last(m.first(x) * g)), up=lambda: nn.Linear(INPUTS, 8)),
        "first", "is also an output of the model|are the model's outputs",
    ),
    "scaled by a vector": (
        recipe(lambda m, x: m.last(m.first(x) * m.scale), scale=lambda: nn.Parameter(torch.ones(8))),
        "first", "multiplies them by another tensor",
    ),
    "tied": (
        changed(recipe(lambda m, x: m.last(m.first(x).relu() + m.other(x)), other=lambda: nn.Linear(INPUTS, 8)), tie),
        "first", r"shared \(tied\) between first.weight and other.weight",
    ),
    "a view of another": (changed(PLAIN, share_memory), "first", "shared .*first.bias and first.weight"),
    "called twice": (TWICE, "second", "weight is used 2 times in one forward pass"),
    "read by a layer called twice": (TWICE, "first", "weight of second is used 2 times"),
    "weight read elsewhere": (
        recipe(lambda m, x: m.last(m.first(x).relu()) + m.first.weight.square().sum()), "first", "is used 2 times"
    ),
    "parametrized": (
        changed(PLAIN, lambda m: nn.utils.parametrizations.weight_norm(m.first)),
        "first", "the weight is computed in the forward pass",
    ),
    "parametrized reader": (
        changed(PLAIN, lambda m: nn.utils.parametrizations.orthogonal(m.last)),
        "first", "the weight of last is computed in the forward pass",
    ),
    "a weight without a module": (
        recipe(lambda m, x: m.last(F.linear(x, m.bare)), bare=lambda: nn.Parameter(torch.zeros(8, INPUTS))),
        "bare", "the weight bare belongs to no nn.Linear",
    ),
    "reader called as a function": (
        recipe(lambda m, x: F.linear(m.first(x).relu(), m.last.weight, m.last.bias)),
        "first", "is a function call that reads last.weight",
    ),
    "norm called as a function": (
        recipe(
            lambda m, x: m.last(F.batch_norm(m.first(x), None, None, m.gain, None, True)),
            gain=lambda: nn.Parameter(torch.ones(8)),
        ),
        "first", "batch_norm in .* is a function call; use a BatchNorm module",
    ),
    "hard-coded width": (
        recipe(lambda m, x: m.last(m.first(x).view(-1, 8))), "first", "with one neuron fewer, .* RuntimeError: shape"
    ),
    "hard-coded width that happens to divide": (
        recipe(lambda m, x: m.last(m.first(x.repeat(2, 1)).view(-1, 8))), "first", "with one neuron fewer, .*"
    ),
    "asserted width": (recipe(asserts), "first", "with one neuron fewer, .* AssertionError: eight"),
    "scaled by their number": (
        recipe(lambda m, x: m.last((h := m.first(x)) / h.shape[1])),
        "first", "with one neuron fewer, div in .* another number: the model depends on their number",
    ),
    "scaled by their number, as a tensor": (
        recipe(lambda m, x: m.last(m.first(x) * torch.tensor(m.first.out_features**-0.5))),
        "first", "with one neuron fewer, it computes with another constant tensor",
    ),
    "another path for another number": (
        recipe(lambda m, x: m.last(m.first(x).relu() if m.last.in_features == 8 else m.first(x).tanh())),
        "first", "with one neuron fewer, relu in .* becomes tanh",
    ),
    "rearranged": (
        recipe(lambda m, x: m.last(m.first(x).view(-1, 4, 2).relu().reshape(-1, 8))),
        "first", "view in .* rearranges the neurons",
    ),
    "broadcast": (
        recipe(lambda m, x: m.last(m.first(x) + torch.zeros(1, 1, 1))), "first", "broadcasts the neurons"
    ),
    "as a weight": (
        recipe(lambda m, x: (F.linear((h := m.first(x)), m.second(h)), m.last(h))),
        "second", "linear in .* uses the neurons as its weight or bias",
    ),
    "two functions of them": (
        recipe(lambda m, x: (m.last((h := m.first(x)).relu()), m.second(h.tanh()))),
        "first", "last and second read different functions of its neurons",
    ),
    "norm over positions": (
        recipe(lambda m, x: m.last(m.norm(m.first(x.view(-1, 2, INPUTS)))), norm=lambda: nn.BatchNorm1d(2)),
        "first", "batch_norm in norm .* along another",
    ),
    "slopes from them": (
        recipe(lambda m, x: m.last(F.prelu(m.first(x), m.second(x.repeat(1, 2)[:, :8]).mean(0)))),
        "first", "prelu in .* is a function call; use a PReLU module",
    ),
    "slopes of positions": (
        recipe(lambda m, x: m.last(m.slopes(m.first(x.view(-1, 2, INPUTS)))), slopes=lambda: nn.PReLU(2)),
        "first", r"prelu in slopes \(PReLU\) has a slope for each entry of another dimension",
    ),
    "summed over": (recipe(lambda m, x: m.last(m.first(x).sum(1, keepdim=True).expand(-1, 8))), "first", "sums over"),
    "pooled over": (
        recipe(lambda m, x: m.last(F.max_pool1d(m.first(x), 3, 1, 1))), "first", "pools over the neurons"
    ),
    "read as another dimension": (
        recipe(lambda m, x: m.last(m.first(x.view(-1, 2, INPUTS)).transpose(1, 2).reshape(-1, 8))),
        "first", "rearranges",
    ),
    "unreached": (recipe(lambda m, x: m.last(m.first(x))), "second", "the forward pass does not reach it as a Linear"),
    "unread": (recipe(lambda m, x: (m.first(x), m.last(m.second(x.repeat(1, 2)[:, :8])))[1]), "first", "nothing"),
    "another head in training": (recipe(only_in_training), "first", "differently|is also an output|outputs"),
    "without gradient": (recipe(lambda m, x: m.last(no_grad_relu(m.first(x)))), "first", "wrap_with_set_grad_enabled"),
    "single sample": (recipe(lambda m, x: m.last(m.first(x[0]))), "first", "without a batch dimension"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "layer", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_layers_are_refused_with_the_reason(make, layer, reason):
    with pytest.raises(UnsupportedModelError, match=rf"(?s)layers: {layer} cannot be pruned: .*({reason})"):
        DynamicPruner(make(), example_inputs=(torch.randn(4, INPUTS),), layers=[layer])


class MaxAndIndices(nn.Module):
    def forward(self, x):
        values, indices = F.max_pool2d(x, 1, return_indices=True)
        return values * indices


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
    "grouped": (lambda: (nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=2)), "has 2 groups of channels"),
    "grouped itself": (lambda: (nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 8, 1)), "its 2 groups of channels"),
    "several filters a channel": (lambda: (nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 1, groups=8)), "has 8 groups"),
    "depthwise": (lambda: (nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 8, 1)), "pruned with the layer in front"),
    "group norm": (
        lambda: (nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)), "group_norm in .* from all of them"
    ),
    "pixel shuffle": (lambda: (nn.Conv2d(4, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 8, 1)), "pixel_shuffle"),
    "spectral norm": (
        lambda: (nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 1)), nn.Conv2d(8, 8, 1)),
        "could not be traced|computed in the forward pass",
    ),
    "a Linear over positions": (
        lambda: (nn.Conv2d(4, 8, 1), nn.Flatten(2), nn.Flatten(0, 1), nn.Linear(9, 9), nn.Linear(9, 2)),
        "sums over another dimension",
    ),
    "pooling indices": (lambda: (nn.Conv2d(4, 8, 1), MaxAndIndices(), nn.Conv2d(8, 8, 1)), "indices of the pooling"),
    "as a filter": (lambda: (nn.Conv2d(4, 8, 1), AsFilter(), nn.Conv2d(8, 8, 1)), "uses the neurons as its weight"),
    "depthwise called as a function": (
        lambda: (nn.Conv2d(4, 8, 1), Depthwise(), nn.Conv2d(8, 8, 1)), "is a function call; use a ConvNd module"
    ),
    "the only layer": (lambda: (nn.Conv2d(4, 2, 3),), "its neurons are the model's outputs"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_convolutions_are_refused_with_the_reason(make, reason):
    with pytest.raises(UnsupportedModelError, match=rf"(?s)({reason})"):
        DynamicPruner(nn.Sequential(*make()), example_inputs=(torch.randn(2, 4, 3, 3),), layers=["0"])


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
