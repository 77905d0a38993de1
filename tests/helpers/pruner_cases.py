"""A small student, and the pruner that the tests observe it with."""

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


def kill(model, neurons):
    with torch.no_grad():
        model[0].weight[neurons] = 0
        model[0].bias[neurons] = -1


def observe(pruner, rows=6):
    pruner.model(example(rows))
    pruner.activations.observe()
