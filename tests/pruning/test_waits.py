"""How often a prune makes the host wait for the device: three times, for any number of layers."""

import itertools

import pytest
import torch
from device_waits import Waits, on_device
from torch import nn
from torch.testing import assert_close

import kddp_ext
from kddp_ext.pruning import compaction
from kddp_ext.pruning.pruner import DynamicPruner


def trained(layers, **settings):
    """A network of `layers` convolutions and twice as many Linear layers, its optimizer and its pruner."""
    torch.manual_seed(0)
    widths = [1] + [4] * layers
    convolutions = [
        module
        for inputs, outputs in itertools.pairwise(widths)
        for module in (nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
    ]
    hidden = [module for _ in range(layers) for module in (nn.Linear(12, 12), nn.ReLU())]
    first = nn.Linear(4 * 4 * 4, 12)
    model = nn.Sequential(*convolutions, nn.Flatten(), first, nn.ReLU(), *hidden, nn.Linear(12, 3))
    optimizer = torch.optim.Adam(model.parameters())
    x, labels = torch.randn(32, 1, 4, 4), torch.randint(0, 3, (32,))
    pruner = DynamicPruner(model, optimizer, example_inputs=(x[:2],), patience=1, **settings)
    for _ in range(3):
        loss = kddp_ext.fused_kd_l1_loss(model(x), None, labels, pruner.activations, alpha=0.0, l1_weight=0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pruner.saliency  # noqa: B018  # adds the last pass
    return model, optimizer, pruner


def move_to_device(model, optimizer, pruner):
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            moved, state = on_device(parameter), optimizer.state.pop(parameter)
            optimizer.state[moved] = {key: on_device(value) if value.dim() else value for key, value in state.items()}
            for group in optimizer.param_groups:
                group["params"] = [moved if each is parameter else each for each in group["params"]]
            setattr(module, name, moved)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, on_device(buffer) if buffer.dim() else buffer)
    state = pruner._state
    for holder in (state.saliency, *state.statistics, *(each.ring for each in state.statistics if each.ring)):
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                setattr(holder, name, on_device(value))


@pytest.fixture
def planned(monkeypatch):
    """The new values of each tensor, in place of giving the tensor these values."""
    values = []
    monkeypatch.setattr(compaction, "set_data", lambda _tensor, data, grad: values.append((data, grad)))
    return values


@pytest.mark.parametrize("samples", [0, 64])
@pytest.mark.parametrize("settings", [{"threshold": 0.5}, {"criterion": "saliency", "target_parameters": 0.5}])
def test_a_prune_waits_for_statistics_indices_and_a_check(planned, settings, samples):
    for layers in (1, 3):
        *_, pruner = trained(layers, reconstruction_samples=samples, **settings)
        expected = pruner.prune()
        on_cpu = planned.copy()
        planned.clear()
        model, optimizer, pruner = trained(layers, reconstruction_samples=samples, **settings)
        move_to_device(model, optimizer, pruner)
        with Waits() as waits:
            report = pruner.prune()
        assert waits.names == ["_to_copy"] * 3
        assert [each.pruned for each in report.layers] == [each.pruned for each in expected.layers]
        assert sum(bool(each.pruned) for each in report.layers) > layers
        for (values, gradient), (by_device, its_gradient) in zip(on_cpu, planned, strict=True):
            assert_close(by_device.value, values)
            assert gradient is None or torch.equal(its_gradient.value, gradient)
        planned.clear()


def test_the_waits_of_operations_are_counted():
    x = on_device(torch.arange(4.0))
    for wait in (float, bool, torch.Tensor.cpu, torch.nonzero, lambda each: each[each > 1]):
        with Waits() as waits:
            wait(x[:1] + 1)
        assert waits.names, wait
    with Waits() as waits:
        x.add_(1).sum().isfinite().all()
    assert not waits.names
