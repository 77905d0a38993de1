"""Small networks with one peculiarity each are narrowed exactly."""

import pytest
import torch
import torch.nn.functional as F
from pruner_cases import changed, exactly_narrowed, halves, recipe
from torch import nn

from kddp_ext.pruning.compaction import Removal, plan_compaction

INPUTS = 6


def tie(m):
    m.other.weight = m.first.weight


def overwrites(m, x):
    h = m.first(x)
    h += m.second(h.relu())
    return m.last(h)


def another_head(m, x):
    h = m.first(x).relu()
    return (m.last(h), m.second(h)) if m.training else m.last(h)


def no_grad_relu(x):
    with torch.no_grad():
        return x.relu()


def other():
    return nn.Linear(INPUTS, 8)


class Shaped(nn.Module):
    """Has the shape of its scale as a tuple."""

    def __init__(self):
        super().__init__()
        self.scale, self.shape = nn.Parameter(torch.randn(8)), (1, 8)

    def forward(self, x):
        return x * self.scale.view(self.shape)


class Functional(nn.Module):
    """Calls a function with the weights of another module."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(x.unsqueeze(1), self.inner.weight, self.inner.bias).squeeze(1)


class Halves(nn.Module):
    """Computes the size of its parts from an attribute."""

    def __init__(self):
        super().__init__()
        self.width = 8

    def forward(self, x):
        return torch.mul(*x.split(self.width // 2, 1))


# A constructor, and the layers that write the neurons of its group.
VECTORS = {
    "residual sum": (recipe(lambda m, x: m.last((h := m.first(x)) + m.second(h.relu()))), ["first", "second"]),
    "residual sum in place": (recipe(overwrites), ["first", "second"]),
    "maximum of two layers": (
        recipe(lambda m, x: m.last(m.first(x).maximum(m.other(x))), other=other),
        ["first", "other"],
    ),
    "gated by another layer": (
        recipe(lambda m, x: m.last(m.first(x).sigmoid() * m.other(x)), other=other),
        ["first", "other"],
    ),
    "gated by the other half": (
        recipe(
            lambda m, x: m.last(torch.mul(*m.first(x).sigmoid().chunk(2, 1))), last=lambda: nn.Linear(4, 3)
        ), ["first"],
    ),
    "split at half of an attribute": (
        recipe(lambda m, x: m.last(m.halves(m.first(x))), halves=Halves, last=lambda: nn.Linear(4, 3)), ["first"]
    ),
    "scaled by a vector": (
        recipe(lambda m, x: m.last(m.first(x) * m.scale), scale=lambda: nn.Parameter(torch.randn(8))), ["first"]
    ),
    "scaled by a vector of a stored shape": (
        recipe(lambda m, x: m.last(m.shaped(m.first(x))), shaped=Shaped), ["first"]
    ),
    "stacked": (
        recipe(lambda m, x: m.last(torch.stack([m.first(x), m.other(x)], 1).sum(1)), other=other), ["first", "other"]
    ),
    "tied": (
        changed(recipe(lambda m, x: m.last(m.first(x).relu() + m.other(x)), other=other), tie), ["first", "other"]
    ),
    "called twice": (recipe(lambda m, x: m.last(m.first(x).relu() + m.first(x.square()))), ["first"]),
    "read by a function": (recipe(lambda m, x: m.last(m.f(m.first(x)).relu()), f=Functional), ["first"]),
    "read twice": (recipe(lambda m, x: m.last(m.second(m.second(m.first(x)).relu()))), ["first", "second"]),
    "a weight without a module": (
        recipe(lambda m, x: m.last(F.linear(x, m.bare)), bare=lambda: nn.Parameter(torch.randn(8, INPUTS))), ["bare"]
    ),
    "norm called as a function": (
        recipe(
            lambda m, x: m.last(F.batch_norm(m.first(x), None, None, m.gain, None, True)),
            gain=lambda: nn.Parameter(torch.randn(8)),
        ),
        ["first"],
    ),
    "concatenated with the inputs": (
        recipe(lambda m, x: m.last(torch.cat([x, m.first(x)], 1)), last=lambda: nn.Linear(INPUTS + 8, 3)), ["first"]
    ),
    "in pairs": (
        recipe(lambda m, x: m.last((h := m.first(x)).view(-1, h.shape[1] // 2, 2).relu().flatten(1))), ["first"]
    ),
    "shuffled halves": (
        recipe(lambda m, x: m.last((h := m.first(x)).view(-1, 2, h.shape[1] // 2).transpose(1, 2).relu().flatten(1))),
        ["first"],
    ),
    "flattened with positions": (
        recipe(
            lambda m, x: m.last(m.first(x.view(-1, 2, INPUTS)).transpose(1, 2).flatten(1)),
            last=lambda: nn.Linear(16, 3),
        ),
        ["first"],
    ),
    "broadcast": (recipe(lambda m, x: m.last(m.first(x) + torch.ones(1, 1, 1).to(x))), ["first"]),
    "two functions of them": (
        recipe(lambda m, x: (m.last((h := m.first(x)).relu()), m.second(h.tanh()))), ["first"]
    ),
    "slopes of positions": (
        recipe(lambda m, x: m.last(m.slopes(m.first(x.view(-1, 2, INPUTS)))), slopes=lambda: nn.PReLU(2)), ["first"]
    ),
    "slopes from another layer": (
        recipe(lambda m, x: m.last(F.prelu(m.first(x), m.other(x).mean(0))), other=other), ["first", "other"]
    ),
    "another head in training": (recipe(another_head), ["first"]),
    "without gradient": (recipe(lambda m, x: m.last(no_grad_relu(m.first(x)))), ["first"]),
}  # fmt: skip


@pytest.mark.parametrize(("make", "producers"), VECTORS.values(), ids=list(VECTORS))
def test_linear_layers_are_narrowed_exactly(make, producers):
    torch.manual_seed(0)
    x = torch.randn(6, INPUTS, dtype=torch.float64)
    for layer in producers:
        _, neurons = exactly_narrowed(make(), (x,), layer=layer)
        assert [list(group.producers) for group in neurons.groups] == [producers]


class MaxAndIndices(nn.Module):
    def forward(self, x):
        values, indices = F.max_pool2d(x, 2, return_indices=True)
        return values * (1 + indices)


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.filters = nn.Parameter(torch.randn(8, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.filters, groups=x.shape[1])


def then(*between, channels=8):
    """A convolution of 8 channels, the modules, and another convolution."""
    return lambda: nn.Sequential(nn.Conv2d(4, 8, 1), *(make() for make in between), nn.Conv2d(channels, 3, 1))


# A constructor, and the number of neurons of layer 0.
CHANNELS = {
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 6, 1, groups=2)), 4),
    "grouped itself": (lambda: nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 3, 1)), 4),
    "depthwise": (then(lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), lambda: nn.BatchNorm2d(8)), 8),
    "depthwise with several filters": (then(lambda: nn.Conv2d(8, 16, 3, groups=8), channels=16), 8),
    "depthwise called as a function": (then(Depthwise), 8),
    "group norm": (then(lambda: nn.GroupNorm(4, 8)), 4),
    "channel shuffle": (then(lambda: nn.ChannelShuffle(2)), 4),
    "pixel shuffle": (then(lambda: nn.PixelShuffle(2), channels=2), 2),
    "pooling indices": (then(MaxAndIndices), 8),
}


@pytest.mark.parametrize(("make", "width"), CHANNELS.values(), ids=list(CHANNELS))
def test_convolutions_are_narrowed_exactly(make, width):
    torch.manual_seed(0)
    _, neurons = exactly_narrowed(make(), (torch.randn(3, 4, 6, 6, dtype=torch.float64),), layer="0")
    assert [group.width for group in neurons.groups] == [width]


class GemmaNorm(nn.Module):
    """Multiplies by 1 + weight, as Gemma's norm does."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(8)), 0.1

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


@pytest.mark.parametrize("norm", [GemmaNorm, lambda: nn.RMSNorm(8, eps=0.1), lambda: nn.RMSNorm(8)])
def test_channels_that_are_zero_leave_a_root_mean_square_norm_exactly(norm):
    """The weight becomes larger by √(D/D'), and ε by D/D'; a gradient becomes smaller as the weight becomes larger."""
    model = nn.Sequential(nn.Linear(INPUTS, 8), norm(), nn.Linear(8, 3)).double()
    narrow, neurons = exactly_narrowed(model, (torch.randn(5, INPUTS, dtype=torch.float64),), layer="0")
    assert [each.width for each in neurons.groups] == [8]
    assert narrow[1].weight.shape == (4,)
    epsilon = model[1].eps or torch.finfo(torch.float64).eps
    assert narrow[1].eps == 2 * epsilon
    model[1].weight.grad = torch.ones_like(model[1].weight)
    plan_compaction(model, Removal(neurons, halves(neurons))).apply()
    torch.testing.assert_close(model[1].weight.grad * 2**0.5, torch.ones(4, dtype=torch.float64))


class Sized(nn.Module):
    """Views its input with the present size, and its output with a stored one."""

    def __init__(self, inputs, width):
        super().__init__()
        self.linear, self.width = nn.Linear(inputs, width), width

    def forward(self, x):
        return self.linear(x.view(-1, x.shape[1])).view(len(x), self.width)


def test_a_stored_size_follows_the_right_neurons_in_each_module():
    """The first module's attribute equals the sizes of two layers, so it is tried with both."""
    model = nn.Sequential(nn.Linear(INPUTS, 8), Sized(8, 8), Sized(8, 6), nn.Linear(6, 3))
    narrow, _ = exactly_narrowed(model, (torch.randn(5, INPUTS, dtype=torch.float64),), layer="1.linear")
    assert (narrow[1].width, narrow[2].width) == (4, 6)
