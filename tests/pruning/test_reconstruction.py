"""The remaining neurons replace the variation of removed ones."""

import copy
import dataclasses

import pytest
import torch
from pruner_cases import observed_pruner
from torch import nn

from kddp_ext.pruning.pruner import DynamicPruner
from kddp_ext.pruning.reconstruction import Samples, reconstruct


def dependent(count=200, rank=6, width=12, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    return hidden + 3 + noise * torch.randn(count, width, generator=generator)


def test_linearly_dependent_neurons_are_reconstructed():
    values, keep, pruned = dependent(), torch.arange(8), torch.arange(8, 12)
    found = reconstruct(Samples(values=values), keep, pruned, torch.ones(12, dtype=torch.float64))
    centred = values.double() - values.double().mean(0)
    torch.testing.assert_close(centred[:, keep] @ (found.left @ found.right).T, centred[:, pruned], rtol=0, atol=1e-3)
    assert found.error < 1e-6
    assert float(found.right.norm(dim=1).max()) <= 1 + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_fitted(seed):
    generator = torch.Generator().manual_seed(seed)
    noise = Samples(values=torch.randn(64, 400, generator=generator))  # more neurons than samples
    assert reconstruct(noise, torch.arange(390), torch.arange(390, 400), torch.ones(400, dtype=torch.float64)) is None


def test_too_few_constant_or_infinite_samples_give_no_reconstruction():
    def found(values, pruned=range(8, 12)):
        keep = torch.tensor([index for index in range(12) if index not in pruned])
        return reconstruct(
            Samples(values=values), keep, torch.tensor(pruned, dtype=torch.int64), torch.ones(12, dtype=torch.float64)
        )

    assert found(dependent()) is not None
    assert found(dependent(15)) is None
    assert found(torch.ones(64, 12)) is None
    broken = dependent()
    broken[3, 2] = torch.inf
    assert found(broken) is None
    assert found(dependent(), pruned=[]) is None
    dead = dependent()
    dead[:, 8:] = 0
    assert found(dead) is None


class Residual(nn.Module):
    """Two layers write a stream, and each of two layers reads it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x):
        h = self.first(x)
        return self.last(h + self.second(h).tanh())


class Concatenation(nn.Module):
    """A layer reads the neurons of two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 24), nn.Linear(6, 4), nn.Linear(28, 5)

    def forward(self, x):
        return self.last(torch.cat([self.first(x), self.second(x)], 1).tanh())


MODELS = {
    "linear": lambda: (nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 5)), (300, 6), "0"),
    "no bias, a norm behind": lambda: (
        nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 5, bias=False), nn.BatchNorm1d(5)), (300, 6), "0"
    ),
    "convolution": lambda: (
        nn.Sequential(nn.Conv2d(3, 20, 1), nn.Tanh(), nn.Conv2d(20, 4, 3)), (40, 3, 6, 6), "0"
    ),
    "flattened": lambda: (
        nn.Sequential(nn.Conv2d(3, 20, 1), nn.Tanh(), nn.Flatten(), nn.Linear(20 * 16, 5)), (60, 3, 4, 4), "0"
    ),
    "transposed convolution": lambda: (
        nn.Sequential(nn.Conv2d(3, 20, 1), nn.Tanh(), nn.ConvTranspose2d(20, 4, 2)), (40, 3, 6, 6), "0"
    ),
    "residual stream": lambda: (Residual(), (300, 6), "first"),
    "concatenation": lambda: (Concatenation(), (300, 6), "first"),
    "no bias": lambda: (nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 5, bias=False)), (300, 6), "0"),
    "tokens": lambda: (nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 5)), (30, 10, 6), "0"),
}  # fmt: skip


def pruned_copy(name, **options):
    """The model before and after its neurons were pruned to 8, inputs, and the report."""
    torch.manual_seed(0)
    model, shape, layer = MODELS[name]()
    model.double()
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        model.train()(x)
    whole = copy.deepcopy(model)
    with torch.no_grad():
        report = observed_pruner(model.eval(), x, layers=[layer], threshold=1.0, minimum_width=8, **options).prune()
    assert report.layers[0].width_after == 8
    return whole.eval(), model.eval(), x, report


@pytest.mark.parametrize("name", MODELS)
def test_outputs_change_less_than_with_the_mean_alone(name):
    errors = []
    for settings in ({"reconstruction_samples": 1024}, {"reconstruction_samples": 0}, {"compensate": False}):
        whole, pruned, x, report = pruned_copy(name, **settings)
        errors.append(float((pruned(x) - whole(x)).detach().norm()))
        assert (report.layers[0].reconstruction_error is not None) == (
            "reconstruction_samples" in settings and settings["reconstruction_samples"] > 0
        )
    assert errors[0] < 0.5 * errors[1] < 0.5 * errors[2] * 1.001


@pytest.mark.parametrize("name", ["linear", "flattened", "tokens"])
def test_the_mean_of_the_outputs_stays(name):
    whole, pruned, x, _ = pruned_copy(name)
    means = [model(x).flatten(0, -2).mean(0) for model in (pruned, whole)]
    torch.testing.assert_close(*means, rtol=1e-6, atol=1e-6)


def test_replaced_settings_take_effect():
    """Without samples only the mean is compensated, at once; more samples are kept after the next check."""
    reports, capacities = {}, {}
    for samples in (256, 0, 512):
        torch.manual_seed(0)
        model, shape, _ = MODELS["linear"]()
        inputs = torch.randn(shape)
        pruner = DynamicPruner(model, example_inputs=(inputs[:2],), patience=1, threshold=1.0, minimum_width=8)
        pruner.settings = dataclasses.replace(pruner.settings, reconstruction_samples=samples)
        model(inputs)
        pruner.activations.observe()
        reports[samples] = pruner.prune().layers[0]
        ring = pruner.statistics["0"].ring
        capacities[samples] = 0 if ring is None else len(ring.values)
    assert reports[256].reconstruction_error is not None
    assert reports[0].reconstruction_error is None
    assert reports[0].pruned == reports[256].pruned
    assert capacities == {256: 256, 0: 0, 512: 512}
