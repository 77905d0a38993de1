"""What cannot be proven is refused, with the layer, the operation and the reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kddp_ext.pruning.pruner import DynamicPruner
from kddp_ext.pruning.tracing.find import UnsupportedModelError, find_neurons

INPUTS = 6


class Model(nn.Module):
    """Three Linear layers; the test says how they are put together."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(INPUTS, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        for name, module in modules.items():
            setattr(self, name, module)
        self.recipe = forward

    def forward(self, x):
        return self.recipe(self, x)


def tied():
    model = Model(lambda m, x: m.last(m.second(m.first(x)).relu() + m.other(x)), other=nn.Linear(INPUTS, 8))
    model.other.weight = model.first.weight
    return model


def view_of_another():
    model = Model(lambda m, x: m.last(m.second(m.first(x).relu()).relu()))
    flat = torch.zeros(INPUTS * 8 + 8)
    model.first.weight = nn.Parameter(flat[:-8].view(8, INPUTS))
    model.first.bias = nn.Parameter(flat[-8:])
    return model


def parametrized():
    model = Model(lambda m, x: m.last(m.first(x).relu()))
    nn.utils.parametrizations.weight_norm(model.first)
    return model


def parametrized_reader():
    model = Model(lambda m, x: m.last(m.first(x).relu()))
    nn.utils.parametrizations.orthogonal(model.last)
    return model


def only_in_training(m, x):
    h = m.first(x).relu()
    return (m.last(h), m.second(h)) if m.training else m.last(h)


# How the model is made, the layer that is refused, and what the reason says.
REFUSED = {
    "the last": (lambda: Model(lambda m, x: m.last(m.first(x))), "last", "its neurons are the model's outputs"),
    "also an output": (
        lambda: Model(lambda m, x: ((h := m.first(x).relu()), m.last(h))),
        "first",
        "is also an output of the model",
    ),
    "unknown operation": (
        lambda: Model(lambda m, x: m.last(m.first(x).cumsum(1))),
        "first",
        "does not know whether the operation cumsum in the forward of Model",
    ),
    "permuted": (lambda: Model(lambda m, x: m.last(m.first(x).flip(1))), "first", "operation flip"),
    "sorted": (lambda: Model(lambda m, x: m.last(m.first(x).sort(1).values)), "first", "operation sort"),
    "overwritten in part": (lambda: Model(overwrites), "first", "operation (slice|select|index_put|copy)"),
    "softmax": (lambda: Model(lambda m, x: m.last(m.first(x).softmax(1))), "first", "softmax in .* from all of them"),
    "layer norm": (
        lambda: Model(lambda m, x: m.last(m.norm(m.first(x))), norm=nn.LayerNorm(8)),
        "first",
        r"layer_norm in norm \(LayerNorm\) .* use BatchNorm",
    ),
    "residual sum": (
        lambda: Model(lambda m, x: m.last((h := m.first(x)) + m.second(h.relu()))),
        "first",
        r"add in .* adds another tensor to them \(a residual sum\?\)",
    ),
    "gated by inputs": (
        lambda: Model(lambda m, x: m.last(m.first(x).sigmoid() * x.repeat(1, 2)[:, :8])),
        "first",
        "multiplied by the result of slice .* not an elementwise function",
    ),
    "gated by a sum": (
        lambda: Model(lambda m, x: m.last(m.first(x) * m.up(x).softmax(1)), up=nn.Linear(INPUTS, 8)),
        "first",
        "multiplied by the result of softmax",
    ),
    "gated by what is an output": (
        lambda: Model(lambda m, x: ((g := m.up(x)), m.last(m.first(x) * g)), up=nn.Linear(INPUTS, 8)),
        "first",
        "is also an output of the model|are the model's outputs",
    ),
    "scaled by a vector": (
        lambda: Model(lambda m, x: m.last(m.first(x) * m.scale), scale=nn.Parameter(torch.ones(8))),
        "first",
        "multiplies them by another tensor",
    ),
    "scaled by their norm": (
        lambda: Model(lambda m, x: m.last((h := m.first(x)) / h.norm(dim=1, keepdim=True))),
        "first",
        "operation linalg_vector_norm|operation norm",
    ),
    "tied": (tied, "first", r"shared \(tied\) between first.weight and other.weight"),
    "a view of another": (view_of_another, "first", "shared .*first.bias and first.weight"),
    "called twice": (
        lambda: Model(lambda m, x: m.last(m.second(m.second(m.first(x)).relu()))),
        "second",
        "weight is used 2 times in one forward pass",
    ),
    "read by a layer called twice": (
        lambda: Model(lambda m, x: m.last(m.second(m.second(m.first(x)).relu()))),
        "first",
        "weight of second is used 2 times",
    ),
    "weight read elsewhere": (
        lambda: Model(lambda m, x: m.last(m.first(x).relu()) + m.first.weight.square().sum()),
        "first",
        "weight is used 2 times",
    ),
    "parametrized": (parametrized, "first", "the weight is computed in the forward pass"),
    "parametrized reader": (parametrized_reader, "first", "the weight of last is computed in the forward pass"),
    "a weight without a module": (
        lambda: Model(lambda m, x: m.last(F.linear(x, m.bare)), bare=nn.Parameter(torch.zeros(8, INPUTS))),
        "bare",
        "the weight bare belongs to no nn.Linear",
    ),
    "reader applied by hand": (
        lambda: Model(lambda m, x: F.linear(m.first(x).relu(), m.last.weight, m.last.bias)),
        "first",
        "is a function call that reads last.weight",
    ),
    "norm applied by hand": (
        lambda: Model(
            lambda m, x: m.last(F.batch_norm(m.first(x), None, None, m.gain, None, True)),
            gain=nn.Parameter(torch.ones(8)),
        ),
        "first",
        "batch_norm in .* is a function call; use nn.BatchNorm1d",
    ),
    "spelled-out width": (
        lambda: Model(lambda m, x: m.last(m.first(x).view(-1, 8))),
        "first",
        "with one neuron fewer, .* RuntimeError: shape",
    ),
    "spelled-out width that happens to divide": (
        lambda: Model(lambda m, x: m.last(m.first(x.repeat(2, 1)).view(-1, 8))),
        "first",
        "with one neuron fewer, .*",
    ),
    "an assertion of the width": (lambda: Model(asserts), "first", "with one neuron fewer, .* AssertionError: eight"),
    "scaled by their number": (
        lambda: Model(lambda m, x: m.last((h := m.first(x)) / h.shape[1])),
        "first",
        "with one neuron fewer, div in .* another number: the model depends on their number",
    ),
    "scaled by their number, as a tensor": (
        lambda: Model(lambda m, x: m.last(m.first(x) * torch.tensor(m.first.out_features**-0.5))),
        "first",
        "with one neuron fewer, it computes with another constant tensor",
    ),
    "another path for another number": (
        lambda: Model(lambda m, x: m.last(m.first(x).relu() if m.last.in_features == 8 else m.first(x).tanh())),
        "first",
        "with one neuron fewer, relu in .* becomes tanh",
    ),
    "rearranged": (
        lambda: Model(lambda m, x: m.last(m.first(x).view(-1, 4, 2).relu().reshape(-1, 8))),
        "first",
        "view in .* rearranges the neurons",
    ),
    "flattened with positions": (
        lambda: Model(lambda m, x: m.last(m.first(x.view(-1, 2, INPUTS)).flatten(1)[:, :8])),
        "first",
        "the operation slice",
    ),
    "broadcast": (
        lambda: Model(lambda m, x: m.last(m.first(x) + torch.zeros(1, 1, 1))),
        "first",
        "broadcasts the neurons",
    ),
    "as a weight": (
        lambda: Model(lambda m, x: (F.linear((h := m.first(x)), m.second(h)), m.last(h))),
        "second",
        "linear in .* uses the neurons as its weight or bias",
    ),
    "two forms": (
        lambda: Model(lambda m, x: (m.last((h := m.first(x)).relu()), m.second(h.tanh()))),
        "first",
        "last and second read different functions of its neurons",
    ),
    "norm over positions": (
        lambda: Model(lambda m, x: m.last(m.norm(m.first(x.view(-1, 2, INPUTS)))), norm=nn.BatchNorm1d(2)),
        "first",
        "batch_norm in norm .* along another",
    ),
    "unreached": (lambda: Model(lambda m, x: m.last(m.first(x))), "second", "the forward pass does not reach it"),
    "unread": (
        lambda: Model(lambda m, x: (m.first(x), m.last(m.second(x.repeat(1, 2)[:, :8])))[1]),
        "first",
        "nothing",
    ),
    "another head in training": (lambda: Model(only_in_training), "first", "differently|is also an output|outputs"),
    "without gradient": (
        lambda: Model(lambda m, x: m.last(no_grad_relu(m.first(x)))),
        "first",
        "wrap_with_set_grad_enabled",
    ),
    "single sample": (lambda: Model(lambda m, x: m.last(m.first(x[0]))), "first", "without a batch dimension"),
}


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


@pytest.mark.parametrize(("make", "layer", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_refuses(make, layer, reason):
    model, x = make(), torch.randn(4, INPUTS)
    with pytest.raises(UnsupportedModelError, match=rf"(?s)layers: {layer} cannot be pruned: .*({reason})"):
        DynamicPruner(model, example_inputs=(x,), layers=[layer])


def test_dependence_on_one_width_spares_the_other_layers():
    model = Model(lambda m, x: m.last(m.second((h := m.first(x)).relu() / h.shape[1]).relu()))
    found = find_neurons(model, (torch.randn(4, INPUTS),))
    assert list(found.groups) == ["second"]
    assert "another number" in found.refused["first"]


def test_lists_every_reason_when_nothing_can_be_pruned():
    model = Model(lambda m, x: m.last(m.first(x).cumsum(1)))
    with pytest.raises(
        UnsupportedModelError, match=r"(?s)no layer that can be pruned.*first: .*cumsum.*last: its neurons"
    ):
        DynamicPruner(model, example_inputs=(torch.randn(4, INPUTS),))


def test_a_model_without_linear_layers():
    with pytest.raises(UnsupportedModelError, match="its neurons are the model's outputs"):
        DynamicPruner(nn.Sequential(nn.Conv2d(1, 2, 3)), example_inputs=(torch.randn(2, 1, 5, 5),))


def test_what_is_no_layer_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(UnsupportedModelError, match="layers: 1 cannot be pruned: it is a ReLU; only Linear layers and"):
        DynamicPruner(model, example_inputs=(torch.randn(2, 3),), layers=["1"])


CONVOLUTIONS = {
    "grouped": (lambda: (nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=2)), "0", "has 2 groups of channels"),
    "grouped itself": (lambda: (nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 8, 1)), "0", "its 2 groups of channels"),
    "several filters a channel": (lambda: (nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 1, groups=8)), "0", "has 8 groups"),
    "depthwise": (lambda: (nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 8, 1)), "0", "pruned with the layer in front"),
    "group norm": (
        lambda: (nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)),
        "0",
        "group_norm in .* from all of them",
    ),
    "pixel shuffle": (lambda: (nn.Conv2d(4, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 8, 1)), "0", "pixel_shuffle"),
    "spectral norm": (
        lambda: (nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 1)), nn.Conv2d(8, 8, 1)),
        "0",
        "could not be traced|computed in the forward pass",
    ),
    "a Linear over positions": (
        lambda: (nn.Conv2d(4, 8, 1), nn.Flatten(2), nn.Flatten(0, 1), nn.Linear(9, 9), nn.Linear(9, 2)),
        "0",
        "sums over another dimension",
    ),
}


@pytest.mark.parametrize(("make", "layer", "reason"), CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_refuses_convolutions(make, layer, reason):
    with pytest.raises(UnsupportedModelError, match=rf"(?s)({reason})"):
        DynamicPruner(nn.Sequential(*make()), example_inputs=(torch.randn(2, 4, 3, 3),), layers=[layer])


def test_names_the_layers_there_are():
    model = Model(lambda m, x: m.last(m.first(x)))
    with pytest.raises(UnsupportedModelError, match=r"layers: fc9 .* no such module; .* are first"):
        DynamicPruner(model, example_inputs=(torch.randn(4, INPUTS),), layers=["fc9"])


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 5), "RuntimeError"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(1, 3), "more than 1 value"),
        (Model(lambda m, x: m.last(m.first(x)) if x.sum().item() > 0 else m.second(x)), torch.randn(2, INPUTS), ""),
    ],
    ids=["wrong size", "one sample for a norm", "depends on the data"],
)
def test_a_forward_that_cannot_be_traced(model, inputs, reason):
    with pytest.raises(
        UnsupportedModelError, match=rf"could not be traced in training mode with example_inputs: .*{reason}"
    ):
        find_neurons(model, (inputs,))
