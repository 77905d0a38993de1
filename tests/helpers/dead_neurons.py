"""A model some of whose neurons have just died, and the slices that remain without them."""

import torch
from pruner_cases import observed_pruner
from torch import nn

INPUTS, WIDTH, CLASSES = 6, 9, 4
DEAD = [0, 3, 8]
ALIVE = [1, 2, 4, 5, 6, 7]

NORMS = {"none": (False, False), "before": (True, False), "after": (False, True), "both": (True, True)}


def build(optimizer, norms, dtype=torch.float64, prepare=lambda model: None):
    """A model after three training steps, in which the neurons DEAD have just died."""
    torch.manual_seed(1)
    before, after = norms
    model = nn.Sequential(
        nn.Linear(INPUTS, WIDTH, bias=not before),  # in front of a norm its gradient would be rounding noise
        nn.BatchNorm1d(WIDTH) if before else nn.Identity(),
        nn.ReLU(),
        nn.BatchNorm1d(WIDTH) if after else nn.Identity(),
        nn.Linear(WIDTH, 7),
        nn.Tanh(),
        nn.Linear(7, CLASSES),
    ).to(dtype)
    prepare(model)
    optimizer = optimizer(model.parameters())
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        step(model, optimizer, batch(generator, dtype))
    with torch.no_grad():
        if before:
            model[1].weight[DEAD] = 0
            model[1].bias[DEAD] = -1
        else:
            model[0].weight[DEAD] = 0
            model[0].bias[DEAD] = -1
        if after:
            model[3].bias[DEAD] = 0
            model[3].running_mean[DEAD] = 0
    return model, optimizer, generator


def batch(generator, dtype=torch.float64):
    x = torch.randn(16, INPUTS, generator=generator).to(dtype)
    return x, torch.randint(CLASSES, (16,), generator=generator)


def step(model, optimizer, batch):
    x, labels = batch
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    optimizer.step()


def prune_dead(model, optimizer, x, **options):
    # Behind a batch norm dead neurons are constant, which the default criterion detects.
    training = model.training
    with torch.no_grad():
        pruner = observed_pruner(model.train(), x, optimizer, layers=["0"], **options)
    report = pruner.prune()
    pruner.close()
    model.train(training)
    return report


def sliced(name, tensor):
    axis = {"0.weight": 0, "0.bias": 0, "1": 0, "3": 0, "4.weight": 1}
    for prefix, dimension in axis.items():
        if name == prefix or (name.split(".")[0] == prefix and tensor.dim() == 1):
            return tensor.index_select(dimension, torch.tensor(ALIVE))
    return tensor
