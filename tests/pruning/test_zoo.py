"""Over networks that users have: what is found, how far a NaN reaches, and what removing dead neurons changes."""

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
def test_finds_the_layers(name):
    found, layers = traced(name), ZOO[name][2]
    assert list(found.groups) == layers
    parts = {module for group in found.groups.values() for module in group.modules}
    all_layers = {n for n, m in make(name).named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    assert all_layers - parts <= found.refused.keys()  # every layer is pruned, or refused with a reason
    assert not parts & found.refused.keys()


def poisoned_features(model, x):
    """Of each layer, along the dimension of its features, which entries of its input are NaN somewhere."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, LAYERS):
            continue

        def hook(module, args, name=name):
            axis = args[0].dim() - 1 if isinstance(module, nn.Linear | nn.LayerNorm) else 1
            nan = args[0].isnan().movedim(axis, 0).flatten(1)
            seen[name] = (nan.any(1).nonzero().flatten(), nan.shape[0])

        handles.append(module.register_forward_pre_hook(hook))
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name in ZOO for layer in ZOO[name][2]])
def test_a_nan_reaches_what_the_trace_says(name, layer):
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
                    wanted = expected[module]
                    wanted = type(wanted)(0, wanted.outer, wanted.inner).indices(torch.tensor([neuron]), group.width)
                    assert features.tolist() == wanted.tolist(), module
                else:  # before the neurons, or behind a layer that sums over them
                    assert len(features) in (0, count), module


@pytest.mark.parametrize("name", ZOO)
def test_removing_dead_neurons_changes_neither_outputs_nor_the_next_step(name):
    """Neurons that nothing reads; in every group at once, with gradients, moments and statistics."""
    whole, x = make(name, torch.float64), example(name, torch.float64)
    for module in whole.modules():  # a mask is drawn by the number of entries
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    groups = traced(name).groups.values()
    optimizer = torch.optim.Adam(whole.parameters(), lr=1e-3)
    step(whole, optimizer, x)
    keep = {group.name: torch.arange(1, group.width - 1) for group in groups}
    with torch.no_grad():
        for group in groups:
            dead = torch.tensor([0, group.width - 1])
            for reader in group.readers:
                columns = reader.layout.indices(dead, group.width)
                whole.get_submodule(reader.module).weight[:, columns] = 0
    pruned = copy.deepcopy(whole)
    pruned_optimizer = torch.optim.Adam(pruned.parameters(), lr=1e-3)
    pruned_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    frozen = next(pruned.parameters()).requires_grad_(False)
    next(whole.parameters()).requires_grad_(False)
    trained = [parameter.requires_grad for parameter in whole.parameters()]
    calls = []
    pruned.get_submodule(ZOO[name][2][0]).register_forward_hook(lambda *_: calls.append(1))
    odd = next(module for module in pruned.modules() if not list(module.children())).eval()
    modes = [module.training for module in pruned.modules()]

    plan_compaction(pruned, [Removal(group, keep[group.name]) for group in groups], [pruned_optimizer]).apply()

    assert [module.training for module in pruned.modules()] == modes
    assert not odd.training
    assert not frozen.requires_grad
    assert [parameter.requires_grad for parameter in pruned.parameters()] == trained
    for training in (False, True):
        torch.testing.assert_close(pruned.train(training)(x), whole.train(training)(x), rtol=1e-9, atol=1e-11)
    assert len(calls) == 2
    step(pruned, pruned_optimizer, x)
    step(whole, optimizer, x)
    assert_slices_agree(pruned, whole, groups, keep)


def step(model, optimizer, x):
    optimizer.zero_grad()
    model.train()(x).square().sum().backward()
    optimizer.step()


def assert_slices_agree(pruned, whole, groups, keep):
    expected = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    for group in groups:
        for slices in group.slices:
            name, layout = slices.stored.name, slices.layout
            kept = layout.indices(keep[group.name], group.width)
            expected[name] = expected[name].index_select(layout.axis, kept)
    for name, tensor in pruned.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
