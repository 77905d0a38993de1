"""Tracing finds exactly the slices of each neuron: over networks that users have, and many spellings of small ones."""

import copy
import functools

import pytest
import torch
from torch import nn
from zoo import ZOO

from kddp_ext.pruning.compaction import Removal, plan_compaction
from kddp_ext.pruning.tracing.find import find_neurons

LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.PReLU, nn.LayerNorm)


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = ZOO[name][0]().to(dtype)
    with torch.no_grad():  # let no statistics be the trivial ones
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return model


def example(name, dtype=torch.float32):
    return ZOO[name][1]().to(dtype)


@functools.cache
def traced(name):
    return find_neurons(make(name), (example(name),))


@pytest.mark.parametrize("name", ZOO)
def test_every_layer_is_found_or_refused_with_a_reason(name):
    found, layers = traced(name), ZOO[name][2]
    assert list(found.groups) == layers
    parts = {module for group in found.groups.values() for module in group.modules}
    all_layers = {n for n, m in make(name).named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    assert all_layers - parts <= found.refused.keys()
    assert not parts & found.refused.keys()


def poisoned_features(model, x):
    """For each layer, which entries of its input's feature dimension are NaN somewhere, and how many there are."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, LAYERS) or not any(tensor.numel() > 1 for tensor in module.state_dict().values()):
            continue  # it has no entry for each neuron

        def hook(module, args, name=name):
            axis = args[0].dim() - 1 if isinstance(module, nn.Linear | nn.LayerNorm) else 1
            nan = args[0].isnan().movedim(axis, 0).flatten(1)
            seen[name] = (nan.any(1).nonzero().flatten(), nan.shape[0])

        handles.append(module.register_forward_pre_hook(hook))
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return seen


def entries(layout, neuron, width):
    return layout.indices(torch.tensor([neuron]), width).tolist()


GROUPS = [pytest.param(name, layer, id=f"{name}-{layer}") for name in ZOO for layer in ZOO[name][2]]


@pytest.mark.parametrize(("name", "layer"), GROUPS)
def test_a_nan_in_a_neuron_reaches_the_traced_entries_only(name, layer):
    group = traced(name).groups[layer]
    expected = {}
    for slices in group.slices:
        if slices.stored.module not in group.producers or slices.layout.axis == 1:
            expected[slices.stored.module] = slices.layout
    for producer in group.producers:
        for neuron in range(group.width):
            model = make(name)
            with torch.no_grad():
                model.get_submodule(producer).weight[neuron] = torch.nan
            for module, (features, count) in poisoned_features(model, example(name)).items():
                if module in expected:
                    assert features.tolist() == entries(expected[module], neuron, group.width), module
                else:  # in front of the neurons, or behind a layer that sums over them
                    assert len(features) in (0, count), module


@pytest.mark.parametrize(("name", "layer"), GROUPS)
def test_a_nan_in_any_sliced_tensor_reaches_its_neuron_only(name, layer):
    """Biases, norms and slopes, for the last neuron."""
    group = traced(name).groups[layer]
    weights = {reader.weight for reader in group.readers}
    for slices in group.slices:
        if slices.stored in weights:
            continue
        model, neuron = make(name), group.width - 1
        slices.stored.of(model).data[entries(slices.layout, neuron, group.width)] = torch.nan
        found = poisoned_features(model, example(name))
        for reader in group.readers:
            features, _ = found[reader.module]
            assert features.tolist() == entries(reader.layout, neuron, group.width), slices.stored.name


@pytest.mark.parametrize("name", ZOO)
def test_removing_unread_neurons_changes_neither_outputs_nor_the_next_step(name):
    """In every group at once, with gradients, moments, statistics, modes and hooks."""
    whole, x = make(name, torch.float64), example(name, torch.float64)
    for module in whole.modules():  # a dropout mask depends on the number of entries
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    groups = [group for group in traced(name).groups.values() if group.width > 2]
    optimizer = torch.optim.Adam(whole.parameters(), lr=1e-3)
    step(whole, optimizer, x)
    keep = {group.name: torch.arange(1, group.width - 1) for group in groups}
    with torch.no_grad():
        for group in groups:
            for reader in group.readers:
                columns = reader.layout.indices(torch.tensor([0, group.width - 1]), group.width)
                whole.get_submodule(reader.module).weight[:, columns] = 0
    pruned = copy.deepcopy(whole)
    pruned_optimizer = torch.optim.Adam(pruned.parameters(), lr=1e-3)
    pruned_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model in (whole, pruned):
        next(model.parameters()).requires_grad_(False)
    trained = [parameter.requires_grad for parameter in whole.parameters()]
    calls = []
    pruned.get_submodule(ZOO[name][2][0]).register_forward_hook(lambda *_: calls.append(1))
    next(module for module in pruned.modules() if not list(module.children())).eval()
    modes = [module.training for module in pruned.modules()]

    plan_compaction(pruned, [Removal(group, keep[group.name]) for group in groups], [pruned_optimizer]).apply()

    assert [module.training for module in pruned.modules()] == modes
    assert [parameter.requires_grad for parameter in pruned.parameters()] == trained
    for training in (False, True):
        torch.testing.assert_close(pruned.train(training)(x), whole.train(training)(x), rtol=1e-9, atol=1e-11)
    assert len(calls) == 2
    step(pruned, pruned_optimizer, x)
    step(whole, optimizer, x)
    expected = {key: tensor.clone() for key, tensor in whole.state_dict().items()}
    for group in groups:
        for slices in group.slices:
            key, layout = slices.stored.name, slices.layout
            expected[key] = expected[key].index_select(layout.axis, layout.indices(keep[group.name], group.width))
    for key, tensor in pruned.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-8, atol=1e-10, msg=lambda m, n=key: f"{n}: {m}")


def step(model, optimizer, x):
    optimizer.zero_grad()
    model.train()(x).square().sum().backward()
    optimizer.step()


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(6, 8), nn.Linear(8, 3), nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(()))
        self.steps, self.seen = 0, None

    def forward(self, x):
        self.steps += 1
        self.seen = x * 2
        self.calls = self.calls + 1
        return self.last(self.norm(self.first(x)).relu())


@pytest.mark.parametrize(("training", "grad"), [(True, False), (False, True)])
def test_tracing_changes_nothing(training, grad):
    model = Remembers().train(training)
    model.norm.eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    identities = [id(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    random = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        found = find_neurons(model, (torch.randn(5, 6, generator=torch.Generator()),))
    assert list(found.groups) == ["first"]
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [id(tensor) for tensor in [*model.parameters(), *model.buffers()]] == identities
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert (model.steps, model.seen) == (0, None)
