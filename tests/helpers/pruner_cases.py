"""A small student, its pruner, and a snapshot of everything that a prune may change."""

import torch
from torch import nn

from kddp_ext.pruning.pruner import DynamicPruner

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
