"""The traced slices are exactly a neuron's own: shown by perturbing them, on models of many spellings."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kddp_ext.pruning.tracing.find import find_neurons

INPUTS = 6


class Functional(nn.Module):
    """Everything in functional spelling, with control flow and scalars on the way."""

    def __init__(self, deep=True):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(INPUTS, 8), nn.Linear(8, 7), nn.Linear(7 if deep else 8, 3)
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.deep = deep

    def forward(self, x):
        x = F.dropout(F.relu(self.first(x)) * 2 + 1, 0.2, self.training)
        if self.deep:
            x = F.gelu(self.second(x)) * self.scale
        return self.last(x.flatten(1).view(x.shape[0], -1))


class TwoHeads(nn.Module):
    """One value read by two Linear layers, one of them through a dropout."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 2, bias=False)

    def forward(self, x):
        h = torch.tanh(self.norm(self.body(x)))
        return self.left(self.drop(h)), self.right(h)


class SwishByHand(nn.Module):
    """A value multiplied by a function of itself: entry by entry all the same."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(F.softsign(h * torch.sigmoid(h)))


class Cast(nn.Module):
    """Casts, an in-place activation, and copies."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x).double()
        F.relu_(h)
        return self.last(h.clamp(max=3).type_as(x).clone().contiguous())


class Tokens(nn.Module):
    """The MLP of a block that works along a sequence."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(INPUTS, 2, dim_feedforward=8, batch_first=True)
        self.last = nn.Linear(INPUTS, 3)

    def forward(self, x):
        return self.last(self.block(x[:, None, :].expand(-1, 2, -1)).mean(1))


class KeepsItsShape(nn.Module):
    """Sizes taken from the value itself."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(h.reshape(h.shape).view(h.size(0), h.size(1)))


def sequential(*between, width=8, bias=True):
    return nn.Sequential(nn.Linear(INPUTS, width, bias=bias), *between, nn.Linear(width, 3))


# Each with the layers that are to be found.
ZOO = {
    "plain": (lambda: sequential(nn.ReLU()), ["0"]),
    "no activation": (lambda: sequential(), ["0"]),
    "without bias": (lambda: sequential(nn.ReLU(), bias=False), ["0"]),
    "norm before": (lambda: sequential(nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5)), ["0"]),
    "norm after": (lambda: sequential(nn.Dropout(0.5), nn.GELU(), nn.BatchNorm1d(8)), ["0"]),
    "norms on both sides": (lambda: sequential(nn.BatchNorm1d(8), nn.SiLU(), nn.BatchNorm1d(8)), ["0"]),
    "norm without affine": (lambda: sequential(nn.BatchNorm1d(8, affine=False), nn.ELU()), ["0"]),
    "norm without running statistics": (
        lambda: sequential(nn.BatchNorm1d(8, affine=False, track_running_stats=False), nn.Tanh()),
        ["0"],
    ),
    "norm without batch counter": (lambda: sequential(nn.BatchNorm1d(8, momentum=None), nn.ReLU()), ["0"]),
    "slope for each": (lambda: sequential(nn.PReLU(8)), ["0"]),
    "one slope": (lambda: sequential(nn.PReLU()), ["0"]),
    "activations": (
        lambda: sequential(nn.LeakyReLU(), nn.Softplus(), nn.Hardswish(), nn.Hardtanh(), nn.Mish(), nn.Softsign()),
        ["0"],
    ),
    "other activations": (
        lambda: sequential(nn.Identity(), nn.ReLU6(), nn.SELU(), nn.CELU(), nn.LogSigmoid(), nn.Tanhshrink()),
        ["0"],
    ),
    "flatten": (lambda: sequential(nn.ReLU(), nn.Flatten()), ["0"]),
    "nested": (
        lambda: nn.Sequential(nn.ModuleDict({"a": nn.Identity()})["a"], sequential(nn.ReLU()), nn.Linear(3, 2)),
        ["1.0", "1.2"],
    ),
    "functional": (Functional, ["first", "second"]),
    "functional, other branch": (lambda: Functional(deep=False), ["first"]),
    "two heads": (TwoHeads, ["body"]),
    "keeps its shape": (KeepsItsShape, ["first"]),
    "one neuron": (lambda: sequential(nn.ReLU(), width=1), ["0"]),
    "swish by hand": (SwishByHand, ["first"]),
    "casts": (Cast, ["first"]),
    "tokens": (Tokens, ["block.linear1"]),
}


def example(rows=5):
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(3))


def make(constructor):
    torch.manual_seed(0)
    model = constructor()
    with torch.no_grad():  # let no statistics be the trivial ones
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return model


def reader_input(model, reader):
    """What the Linear `reader` reads, in evaluation mode."""
    seen = []
    handle = model.get_submodule(reader).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model.eval()(example())
    handle.remove()
    return seen[0]


def outputs(model):
    result = model.eval()(example())
    return torch.cat([part.flatten() for part in (result if isinstance(result, tuple) else (result,))]).detach()


@functools.cache
def traced(name):
    return find_neurons(make(ZOO[name][0]), (example(),))


GROUPS = [pytest.param(name, layer, id=f"{name}-{layer}") for name, (_, layers) in ZOO.items() for layer in layers]


@pytest.mark.parametrize("name", ZOO)
def test_finds_the_layers(name):
    found, layers = traced(name), ZOO[name][1]
    assert list(found.groups) == layers
    assert not found.refused.keys() & set(layers)


@pytest.mark.parametrize(("name", "layer"), GROUPS)
def test_nan_in_a_slice_reaches_its_neuron_alone(name, layer):
    model, group = make(ZOO[name][0]), traced(name).groups[layer]
    readers = {reader.weight for reader in group.readers}
    for slices in group.slices:
        stored, axis = slices.stored, slices.layout.axis
        if stored in readers:
            continue
        for neuron in range(group.width):
            probed = copy.deepcopy(model)
            tensor = getattr(probed.get_submodule(stored.module), stored.attribute)
            tensor.data.select(axis, neuron).fill_(torch.nan)
            for reader in group.readers:
                poisoned = reader_input(probed, reader.module).isnan().flatten(0, -2)
                assert poisoned.any(0).nonzero().flatten().tolist() == [neuron]


@pytest.mark.parametrize(("name", "layer"), GROUPS)
def test_zeroed_columns_cut_a_neuron_off(name, layer):
    model, group = make(ZOO[name][0]), traced(name).groups[layer]
    for neuron in range(group.width):
        for reader in group.readers:
            model.get_submodule(reader.module).weight.data[:, neuron] = 0
        before = outputs(model)
        model.get_submodule(layer).weight.data[neuron] += 10
        assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("training", [True, False])
def test_tracing_changes_nothing(training):
    model = make(TwoHeads).train(training)
    model.norm.eval()  # a module in a mode of its own
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    identities = [id(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    find_neurons(model, (example(),))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [id(tensor) for tensor in [*model.parameters(), *model.buffers()]] == identities
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.steps, self.seen = 0, None

    def forward(self, x):
        self.steps += 1
        self.seen = x * 2
        self.calls = self.calls + 1
        return self.last(self.first(x).relu())


def test_tracing_leaves_no_trace_in_the_module():
    model = Remembers()
    calls = model.calls
    find_neurons(model, (example(),))
    assert model.steps == 0
    assert model.seen is None
    assert model.calls is calls
    assert float(calls) == 0


def test_tracing_under_no_grad_finds_the_same():
    with torch.no_grad():
        assert list(find_neurons(make(Tokens), (example(),)).groups) == ["block.linear1"]
