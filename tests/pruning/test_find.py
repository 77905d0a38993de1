"""Tracing finds the neurons of every structure, and exactly the entries that belong to each of them."""

import copy

import pytest
import torch
from pruner_cases import assert_sizes, halves, plain, recipe, silence
from pruning.zoo import STRUCTURES
from pruning.zoo.groups import GROUPS, WITH_NORMS
from pruning.zoo.traces import as_traced, build, cast, traced
from torch import nn

from kddp_ext.pruning.compaction import Removal, plan_compaction
from kddp_ext.pruning.tracing.find import find_neurons

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)
LAYERS = (nn.Linear, nn.modules.conv._ConvNd, *NORMS)
PRUNED = [name for name in STRUCTURES if name != "one neuron"]  # which cannot go


def described(found):
    """As the tables have it: for each group its name, width and, if there are several, the number of its writers."""
    groups = found.groups.values()
    return [f"{each.name} {each.width}" + f"x{len(each.producers)}" * (len(each.producers) > 1) for each in groups]


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_groups_are_those_of_the_table(name):
    assert described(traced(name)) == GROUPS[name]


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_layer_is_found_or_refused_with_a_reason(name):
    found, model = traced(name), build(name)
    pruned = {stored.module for stored in found.neurons.slices} | {
        layer for group in found.neurons.groups for layer in group.producers
    }
    layers = {key for key, module in model.named_modules() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))}
    assert layers <= pruned | found.refused.keys()
    assert all(len(reason) > 10 for reason in found.refused.values())
    assert found.refused.keys().isdisjoint(layer for group in found.neurons.groups for layer in group.producers)


def front(neurons):
    """A mask that keeps the first half of each group."""
    keep = torch.ones(neurons.number, dtype=torch.bool)
    for group in neurons.groups:
        keep[group.numbers][(group.width + 1) // 2 :] = False
    return keep


def narrowed(name, choose, streams="exact"):
    """The float64 network whose readers ignore half of the neurons of every group, and the one without these."""
    whole, neurons = build(name, torch.float64), traced(name, streams).neurons
    keep = choose(neurons)
    silence(whole, neurons, keep)
    narrow = as_traced(copy.deepcopy(whole))
    plan_compaction(narrow, Removal(neurons, keep)).apply()
    assert_sizes(narrow)
    sizes = [sum(each.numel() for each in model.parameters()) for model in (narrow, whole)]
    assert sizes[0] < 0.9 * sizes[1]
    return whole, narrow


@pytest.mark.parametrize("name", PRUNED)
@torch.no_grad()
def test_half_of_the_neurons_of_every_group_are_removed_exactly(name):
    for choose in (halves, front):
        whole, narrow = (model.eval() for model in narrowed(name, choose))
        for make in (STRUCTURES[name].inputs, STRUCTURES[name].other_inputs):
            inputs = cast(make(), torch.float64)
            expected, got = whole(*inputs), narrow(*inputs)
            assert expected.std() > 1e-3  # the outputs depend on what is left
            assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", WITH_NORMS)
@torch.no_grad()
def test_neurons_that_are_normalised_together_are_removed_on_request(name):
    """The norms' statistics change, so the outputs do."""
    assert described(traced(name, "all")) == WITH_NORMS[name]
    whole, narrow = narrowed(name, halves, "all")
    for make in (STRUCTURES[name].inputs, STRUCTURES[name].other_inputs):
        for training in (True, False):
            inputs = cast(make(), torch.float64)
            expected, got = whole.train(training)(*inputs), narrow.train(training)(*inputs)
            assert got.shape == expected.shape
            assert got.isfinite().all()
            assert got.std() > 1e-3


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_the_size_of_a_norm_follows_its_weight(norm):
    model = nn.Sequential(nn.Linear(5, 8), norm(8), nn.Linear(8, 3))
    neurons = find_neurons(model, (torch.randn(4, 5),), streams="all").neurons
    plan_compaction(model, Removal(neurons, halves(neurons))).apply()
    assert model[1].normalized_shape == model[1].weight.shape == (4,)
    assert model(torch.randn(4, 5)).shape == (4, 3)


def test_hidden_states_beside_logits_become_narrower_on_request():
    model = recipe(lambda m, x: {"hidden": (h := m.first(x).relu()), "logits": m.last(h)})()
    neurons = find_neurons(model, (torch.randn(4, 6),), streams="all").neurons
    plan_compaction(model, Removal(neurons, halves(neurons))).apply()
    assert [each.shape[1] for each in model(torch.randn(4, 6)).values()] == [4, 3]


# --- NaNs as an oracle: whatever a NaN reaches depends on the entry that it is put into


def entrances(model, neurons):
    """By module, the dimension of its first argument that holds neurons, and the number of each entry's neuron."""
    found = {}
    for reader in neurons.readers:
        value = neurons.values[reader.value]
        entries = value.neurons.view(1, -1, 1).expand(value.layout.outer, -1, value.layout.inner)
        found[reader.module] = value.layout.axis, entries.flatten()
    for stored, by_axis in neurons.slices.items():
        module, numbers = model.get_submodule(stored.module), by_axis.get(0)
        if stored.module in found or stored.attribute != "weight" or numbers is None:
            continue
        if isinstance(module, NORMS):
            found[stored.module] = -1 if isinstance(module, nn.LayerNorm) else 1, numbers
        elif isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels:
            found[stored.module] = 1, numbers[:: module.out_channels // module.groups]
    return found


def writers(neurons):
    """The sets of neurons that one NaN in front of a layer makes NaN together."""
    groups = {reader.weight: (reader.axis, reader.groups) for reader in neurons.readers}
    for stored, by_axis in neurons.slices.items():
        for axis, numbers in by_axis.items():
            reads, parts = groups.get(stored, (None, 1))
            if axis != reads:
                yield from (set(part.tolist()) for part in numbers.chunk(parts))


def poisoned(model, inputs, places):
    """In their order, the layers that the forward pass entered, and which entries of the dimension were NaN."""
    seen, handles = [], []
    for name, module in model.named_modules():
        weighted = isinstance(module, LAYERS) and any(each.numel() > 1 for each in module.state_dict().values())
        if name not in places and not weighted:
            continue
        axis = places[name][0] if name in places else -1 if isinstance(module, (nn.Linear, nn.LayerNorm)) else 1

        def hook(module, args, name=name, axis=axis):
            seen.append((name, args[0].isnan().movedim(axis, 0).flatten(1).any(1)))

        handles.append(module.register_forward_pre_hook(hook))
    model.train().eval()(*inputs)  # some networks forget a cache in train()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", PRUNED)
@torch.no_grad()
def test_a_nan_reaches_the_entries_of_its_neuron_only(name):
    model, neurons, inputs = build(name), traced(name).neurons, STRUCTURES[name].inputs()
    normalised = [neurons.slices[norm.weight][0] for norm in neurons.norms]  # a NaN in one reaches the others
    neurons = neurons.only([
        group for group in neurons.groups
        if not any(bool(((each >= group.start) & (each < group.start + group.width)).any()) for each in normalised)
    ])  # fmt: skip
    places, together = entrances(model, neurons), list(writers(neurons))
    read = {(reader.weight, reader.axis) for reader in neurons.readers}
    for group in neurons.groups:
        for neuron in {group.start, group.start + group.width // 2, group.start + group.width - 1}:
            probes = 0
            for stored, by_axis in neurons.slices.items():
                for axis, numbers in by_axis.items():
                    entries = (numbers == neuron).nonzero().flatten()
                    if (stored, axis) in read or not entries.numel():
                        continue
                    tensor = stored.of(model)
                    before = tensor.clone()
                    tensor.index_fill_(axis, entries, torch.nan)
                    assert_reached(poisoned(model, inputs, places), places, neuron, group, together, stored.name)
                    tensor.copy_(before)
                    probes += 1
            assert probes


def assert_reached(seen, places, neuron, group, together, probe):
    reached = False
    for module, nan in seen:
        where = f"{probe}, neuron {neuron - group.start} of {group.name}, at {module}"
        if module not in places:
            assert nan.all() or not nan.any(), where
            continue
        numbers = places[module][1]
        present, wrong = set(numbers.tolist()) - {-1}, set(numbers[nan].tolist()) - {-1}
        if not reached and any(group.start <= each < group.start + group.width for each in wrong):
            mine = (numbers >= group.start) & (numbers < group.start + group.width)
            assert set(numbers[nan & mine].tolist()) == {neuron}, where
            # A layer can read what several writers of a neuron have written, side by side.
            assert len(group.producers) > 1 or torch.equal(nan[mine], numbers[mine] == neuron), where
            reached = True  # behind this layer, other neurons may depend on it
        for each in wrong - {neuron}:
            assert any(each in some and some & present <= wrong for some in together), where
    assert reached, f"{probe} does not reach a reader of neuron {neuron - group.start} of {group.name}"


# --- Tracing leaves no trace


class Remembers(nn.Module):
    """Changes everything of itself that a forward can change."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(6, 8), nn.Linear(8, 3), nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(()))
        self.steps, self.seen, self.cache, self.list = 0, None, {"a": 1}, [1]

    def forward(self, x):
        self.steps += 1
        self.seen = x * 2
        self.cache[self.steps] = x
        self.list.append(x)
        self.calls = self.calls + 1
        return self.last(nn.functional.dropout(self.norm(self.first(x)).relu(), 0.1, self.training))


@pytest.mark.parametrize(("training", "grad"), [(True, False), (False, True)])
def test_tracing_changes_nothing(training, grad):
    model = Remembers().train(training)
    model.norm.eval()  # a mode of its own
    calls = []
    model.first.register_forward_hook(lambda *_: calls.append("forward"))
    model.norm.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.last.register_full_backward_hook(lambda *_: calls.append("backward"))

    def state():
        tensors = [*model.parameters(), *model.buffers()]
        attributes = (model.steps, model.seen, dict(model.cache), list(model.list))
        hooks = [[*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks] for m in model.modules()]
        modes = [m.training for m in model.modules()]
        return [*map(id, tensors)], plain([*tensors, torch.get_rng_state()]), attributes, hooks, modes

    before, x = state(), torch.randn(5, 6, generator=torch.Generator())
    with torch.set_grad_enabled(grad):
        found = find_neurons(model, (x,))
    assert list(found.groups) == ["first"]
    assert state() == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    calls.clear()
    model(x).sum().backward()
    assert calls == ["forward", "before", "backward"]


@pytest.mark.parametrize("name", ["ResNet-20, option A", "GPT-2", "LeViT"])
def test_hooks_of_the_user_do_not_change_the_groups(name):
    model = build(name)
    layers = [module for module in model.modules() if getattr(getattr(module, "weight", None), "ndim", 0) > 1]
    for layer in layers:
        layer.register_full_backward_hook(lambda *_: None)
        layer.register_forward_hook(lambda *_: None)
    assert described(find_neurons(model, STRUCTURES[name].inputs())) == GROUPS[name]
    assert all(len(layer._backward_hooks) == len(layer._forward_hooks) == 1 for layer in layers)
