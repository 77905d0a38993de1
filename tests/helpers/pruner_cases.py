"""A small student, its pruner, and a snapshot of everything that a prune may change."""

import copy
from functools import partial

import torch
from pruning.zoo.layers import CLASSES
from pruning.zoo.spellings import Recipe
from torch import nn

from kddp_ext.pruning.compaction import Removal, plan_compaction
from kddp_ext.pruning.pruner import DynamicPruner
from kddp_ext.pruning.tracing.find import find_neurons
from kddp_ext.pruning.tracing.recording import tensors_in

INPUTS = 5


def make_model(width=8, dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 3))
    with torch.no_grad():
        model[0].bias += 1  # no neuron is dead unless a test kills it
    return model


def example(rows=6):
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(1))


def make_pruner(model, optimizer=None, **options):
    return DynamicPruner(model, optimizer, **{"example_inputs": (example(),), "patience": 1, **options})


def observed_pruner(model, x, optimizer=None, **options):
    """A pruner that has observed the activations of one forward pass of `x`."""
    pruner = make_pruner(model, optimizer, **{"example_inputs": (x,), **options})
    model(x)
    pruner.activations.observe()
    return pruner


def kill(model, neurons):
    with torch.no_grad():
        model[0].weight[list(neurons)] = 0
        model[0].bias[list(neurons)] = -1


def observe(pruner, rows=6):
    pruner.model(example(rows))
    pruner.activations.observe()


def recipe(forward, width=8, **modules):
    """A constructor of a network with layers `first`, `second` and `last`, other modules, and this forward."""
    layers = {"first": partial(nn.Linear, 6, width), "second": partial(nn.Linear, width, width)}
    layers["last"] = partial(nn.Linear, width, CLASSES)
    return lambda: Recipe(forward, **{name: make() for name, make in (layers | modules).items()})


def changed(make, change):
    """A constructor of what `make` returns, after the function `change` has changed it."""

    def make_changed():
        made = make()
        change(made)
        return made

    return make_changed


def check(pruner, dead=()):
    """The report of a prune in which the neurons `dead` are dead."""
    kill(pruner.model, dead)
    observe(pruner)
    return pruner.prune()


def state_of(*modules, optimizer=None, pruner=None):
    """Everything that a prune may change, in a form that `==` compares exactly."""
    tensors = [tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]]
    attributes = [
        {key: value for key, value in each.__dict__.items() if isinstance(value, int | float | bool)}
        for module in modules
        for each in module.modules()
    ]
    kept = {} if optimizer is None else {id(tensor): dict(state) for tensor, state in optimizer.state.items()}
    known = None if pruner is None else (pruner.state_dict(), pruner.widths)
    return {
        "identities": [(id(tensor), tensor.data_ptr(), id(tensor.grad)) for tensor in tensors],
        "values": plain([tensors, [tensor.grad for tensor in tensors], attributes, kept, known]),
    }


def assert_same_state(one, other):
    assert plain(one) == plain(other)


def assert_narrows_every(interval, widths):
    """The first width decreases after `interval` steps; later ones decrease after multiples of it."""
    narrowed = [i for i in range(1, len(widths)) if widths[i] < widths[i - 1]]
    assert narrowed[0] == interval
    assert all(i % interval == 0 for i in narrowed)


def plain(value):
    """Nested values in which each tensor is replaced by its shape, dtype and bytes, so that `==` compares exactly."""
    if isinstance(value, torch.Tensor):
        content = value.detach().clone().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return tuple(value.shape), value.dtype, content
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def halves(neurons):
    """A mask that keeps every second neuron of each group, from the first on."""
    keep = torch.ones(neurons.number, dtype=torch.bool)
    for group in neurons.groups:
        keep[group.numbers][1::2] = False
    return keep


@torch.no_grad()
def silence(model, neurons, keep):
    """Zero the weights that read the neurons that are not in `keep`: the model then computes as without them."""
    for reader in neurons.readers:
        value = neurons.values[reader.value]
        layout, gone = value.layout, (value.neurons >= 0) & ~keep[value.neurons.clamp(min=0)]
        gone = gone.view(1, -1, 1).expand(layout.outer, -1, layout.inner).reshape(reader.groups, -1)
        weight = reader.weight.of(model)
        parts = weight.chunk(reader.groups) if reader.groups > 1 else [weight.transpose(0, reader.axis)]
        for part, entries in zip(parts, gone, strict=True):
            (part.transpose(0, 1) if reader.groups > 1 else part)[entries] = 0
    for norm in neurons.norms:  # it reads what enters the neurons, too
        normalised = torch.zeros_like(keep)
        normalised[neurons.slices[norm.weight][0]] = True
        for stored, by_axis in neurons.slices.items():
            for axis, numbers in by_axis.items():
                gone = (numbers >= 0) & (normalised & ~keep)[numbers.clamp(min=0)]
                stored.of(model).transpose(0, axis)[gone] = 0


def exactly_narrowed(model, inputs, *, layer=None, **options):
    """A float64 model without every second neuron, and its neurons before.

    Its outputs in both modes are asserted to be those of the silenced model, and its modules' sizes to be right. All
    groups are narrowed, or the one that `layer` belongs to.
    """
    model = model.double()
    neurons = find_neurons(model, inputs, **options).neurons
    if layer is not None:
        neurons = neurons.only([group for group in neurons.groups if layer in group.producers])
    assert neurons.groups, f"{layer or 'no layer'} is not pruned"
    keep = halves(neurons)
    silence(model, neurons, keep)
    narrow = copy.deepcopy(model)
    plan_compaction(narrow, Removal(neurons, keep)).apply()
    assert_sizes(narrow)
    for training in (False, True):
        with torch.no_grad():
            expected, got = (list(tensors_in(each.train(training)(*inputs))) for each in (model, narrow))
        for a, b in zip(expected, got, strict=True):
            assert a.abs().max() > 1e-6
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    return narrow, neurons


def assert_sizes(model):
    """Assert that the attributes of the model's layers equal the sizes of their tensors."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape, name
        elif isinstance(module, nn.modules.conv._ConvNd):
            sizes = [module.in_channels, module.out_channels]
            if not module.transposed:
                sizes.reverse()
            sizes[1] //= module.groups
            assert tuple(sizes) == module.weight.shape[:2], name
        elif isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            assert module.num_features == module.running_mean.numel(), name
