"""Small networks of the many ways to write the same: activations, norms, ways to flatten, the functional API."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .layers import CLASSES


def chain(*between, width=8, bias=True):
    """A constructor of Linear, the modules that the functions `between` make, Linear."""
    return lambda: nn.Sequential(
        nn.Linear(6, width, bias=bias), *(make() for make in between), nn.Linear(width, CLASSES)
    )


class Recipe(nn.Module):
    """Layers `first` and `last`, the given modules, and a function `recipe(model, x)` as the forward."""

    def __init__(self, recipe, **modules):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, CLASSES)
        for name, module in modules.items():
            setattr(self, name, module)
        self.recipe = recipe

    def forward(self, x):
        return self.recipe(self, x)


def functional(model, x):
    """The functional API, with scalar operations and reshapes between the layers."""
    x = F.dropout(F.relu(model.first(x)) * 2 + 1, 0.2, model.training)
    x = F.gelu(model.second(x)) * model.scale
    return model.last(x.flatten(1).view(x.shape[0], -1))


def casts(model, x):
    h = model.first(x).double()
    F.relu_(h)
    return model.last(h.clamp(max=3).type_as(x).clone().contiguous())


def two_heads(model, x):
    h = torch.tanh(model.norm(model.first(x)))
    return torch.cat([model.last(model.drop(h)), model.right(h)], 1)


def masked(model, x):
    """Masks by value, in three spellings, and a sum of three operands."""
    h = model.first(x)
    h = torch.where(h > 0, h, 0.1 * h)
    h = torch.addcmul(h, torch.sigmoid(h), h, value=0.5)
    return model.last(h.masked_fill(h < -1, -1.0).view_as(h))


class ChannelsLastFlatten(nn.Module):
    """Its Linear layer reads the channels of each position side by side."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 5, 3), nn.Linear(5 * 4 * 4, CLASSES)

    def forward(self, x):
        return self.last(F.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1))


def conv_classifier(*between):
    """A constructor of a convolution whose flattened channels a Linear layer reads."""
    return lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), *(make() for make in between), nn.Flatten(), nn.Linear(5 * 4 * 4, CLASSES)
    )


def conv_chain():
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Conv2d(5, 4, 3, padding=1), nn.PReLU(4), nn.AvgPool2d(2), nn.Dropout2d(0.1)),
        *(nn.Conv2d(4, 6, 1), nn.SiLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)),
    )


def conv1d():
    layers = nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 4, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2))


norm = partial(partial, nn.BatchNorm1d, 8)
VECTORS = {
    "no activation": chain(),
    "without bias": chain(nn.ReLU, bias=False),
    "norm before": chain(norm(), partial(nn.ReLU, inplace=True), partial(nn.Dropout, 0.5)),
    "norms on both sides": chain(norm(), nn.SiLU, nn.Flatten, norm()),
    "norm without running statistics": chain(norm(affine=False, track_running_stats=False), nn.Tanh),
    "norm without batch counter": chain(norm(momentum=None), nn.ReLU),
    "a slope for each": chain(partial(nn.PReLU, 8)),
    "one slope": chain(nn.PReLU),
    "activations": chain(nn.LeakyReLU, nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Mish, nn.Softsign),
    "other activations": chain(nn.Identity, nn.ReLU6, nn.SELU, nn.CELU, nn.LogSigmoid, nn.Tanhshrink),
    "nested": lambda: nn.Sequential(nn.ModuleDict({"a": nn.Identity()})["a"], chain(nn.ReLU)(), nn.Linear(CLASSES, 2)),
    "one neuron": chain(nn.ReLU, width=1),
    "functional": lambda: Recipe(
        functional, second=nn.Linear(8, 7), last=nn.Linear(7, CLASSES), scale=nn.Parameter(torch.tensor([0.7]))
    ),
    "two heads": lambda: Recipe(
        two_heads, norm=nn.BatchNorm1d(8), drop=nn.Dropout(0.3), right=nn.Linear(8, 2, bias=False)
    ),
    "keeps its shape": lambda: Recipe(
        lambda m, x: m.last((h := m.first(x)).reshape(h.shape).view(h.size(0), h.size(1)))
    ),
    "swish by hand": lambda: Recipe(lambda m, x: m.last(F.softsign((h := m.first(x)) * torch.sigmoid(h)))),
    "casts": lambda: Recipe(casts),
    "masked": lambda: Recipe(masked),
}
IMAGES = {
    "permuted flatten": ChannelsLastFlatten,
    "flatten": conv_classifier(),
    "flatten, norm": conv_classifier(nn.Flatten, partial(nn.BatchNorm1d, 80), nn.Dropout),
    "channels last": lambda: conv_classifier()().to(memory_format=torch.channels_last),
}
