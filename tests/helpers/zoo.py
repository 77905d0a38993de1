"""Networks of the families that users prune, and small ones of many spellings, small enough to probe each neuron."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from kddp_ext.workflow.models import FastTeacher, PlainStudent

CLASSES = 3


class Recipe(nn.Module):
    """The given modules, and a function `recipe(model, x)` as the forward."""

    def __init__(self, recipe, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.recipe = recipe

    def forward(self, x):
        return self.recipe(self, x)


def recipe(forward, width=8, **modules):
    """A constructor of a network with layers `first`, `second` and `last`, and other modules."""
    layers = {"first": partial(nn.Linear, 6, width), "second": partial(nn.Linear, width, width)}
    layers["last"] = partial(nn.Linear, width, CLASSES)
    return lambda: Recipe(forward, **{name: make() for name, make in (layers | modules).items()})


def chain(*between, width=8, bias=True):
    """A constructor of Linear, the modules that the functions `between` make, Linear."""
    return lambda: nn.Sequential(
        nn.Linear(6, width, bias=bias), *(make() for make in between), nn.Linear(width, CLASSES)
    )


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += shortcut
        return self.relu(out)


def resnet():
    """He et al. 2015 (arXiv:1512.03385), with two blocks."""
    stem = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    return nn.Sequential(*stem, BasicBlock(4, 4, 1), BasicBlock(4, 8, 2), *head)


class InvertedResidual(nn.Module):
    """MobileNetV2: expand, filter each channel, project."""

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        layers = []
        if expansion != 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)]
        layers += [nn.ReLU6(inplace=True), nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


def mobilenet():
    """Sandler et al. 2018 (arXiv:1801.04381), with fewer blocks."""
    stem = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True)
    blocks = InvertedResidual(6, 4, 1, 1), InvertedResidual(4, 5, 2, 2), InvertedResidual(5, 5, 1, 2)
    last = nn.Conv2d(5, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*stem, *blocks, *last, nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, CLASSES))


class ViT(nn.Module):
    """Dosovitskiy et al. 2020 (arXiv:2010.11929), with the transformer block of torch.nn."""

    def __init__(self, width=8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width) * 0.02)
        settings = {"dropout": 0.1, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(width, 2, 12, **settings) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class SwiGLU(nn.Module):
    """Shazeer 2020 (arXiv:2002.05202): of two projections up, one gates the other."""

    def __init__(self, width=6, hidden=7):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, CLASSES, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ChannelsLastFlatten(nn.Module):
    """Its Linear layer reads the channels of each position side by side."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 5, 3), nn.Linear(5 * 4 * 4, CLASSES)

    def forward(self, x):
        return self.last(F.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1))


def conv_classifier(*between):
    """A convolution whose flattened channels a Linear layer reads."""
    return nn.Sequential(nn.Conv2d(3, 5, 3), *between, nn.Flatten(), nn.Linear(5 * 4 * 4, CLASSES))


def conv_chain():
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Conv2d(5, 4, 3, padding=1), nn.PReLU(4), nn.AvgPool2d(2), nn.Dropout2d(0.1)),
        *(nn.Conv2d(4, 6, 1), nn.SiLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)),
    )


def conv1d():
    return nn.Sequential(
        nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    )


def images(size, rows=3, channels=3):
    return torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(3))


def features(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def functional(model, x):
    """The functional API, with scalar operations and reshapes between the layers."""
    x = F.dropout(F.relu(model.first(x)) * 2 + 1, 0.0, model.training)  # a mask would depend on the width
    x = F.gelu(model.second(x)) * model.scale
    return model.last(x.flatten(1).view(x.shape[0], -1))


def casts(model, x):
    h = model.first(x).double()
    F.relu_(h)
    return model.last(h.clamp(max=3).type_as(x).clone().contiguous())


def two_heads(model, x):
    h = torch.tanh(model.norm(model.first(x)))
    return torch.cat([model.last(model.drop(h)), model.right(h)], 1)


VECTORS = partial(features, 5, 6)

# A constructor, a function that makes example inputs, and the layers that are to be found.
ZOO = {
    "the workflow's teacher": (
        lambda: FastTeacher(1, CLASSES, (5, 4)), lambda: images(9, channels=1),
        ["whitening", *(f"blocks.{block}.layers.{layer}" for block in (0, 1) for layer in (0, 4))],
    ),
    "the workflow's student": (
        lambda: PlainStudent(3, 8, CLASSES, (5, 4), 6), lambda: images(8), ["features.0", "features.4", "hidden"]
    ),
    "resnet": (resnet, lambda: images(32), ["4.conv1", "5.conv1"]),
    "mobilenet v2": (mobilenet, lambda: images(16), ["0", "3.conv.3", "4.conv.0", "5.conv.0", "6"]),
    "vit": (ViT, lambda: images(16), ["blocks.0.linear1", "blocks.1.linear1"]),
    "swiglu": (SwiGLU, lambda: features(4, 6), ["gate"]),
    "swiglu of tokens": (SwiGLU, lambda: features(3, 5, 6), ["gate"]),
    "permuted flatten": (ChannelsLastFlatten, lambda: images(6), ["conv"]),
    "flatten": (lambda: conv_classifier(nn.ReLU()), lambda: images(6), ["0"]),
    "flatten, norm": (
        lambda: conv_classifier(nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(80), nn.Dropout()), lambda: images(6), ["0"]
    ),
    "channels last": (
        lambda: conv_classifier(nn.ReLU()).to(memory_format=torch.channels_last),
        lambda: images(6).to(memory_format=torch.channels_last), ["0"],
    ),
    "convolutions": (conv_chain, lambda: images(8), ["0", "4", "8"]),
    "convolutions of one dimension": (conv1d, lambda: features(3, 3, 6), ["0", "3"]),
    "no activation": (chain(), VECTORS, ["0"]),
    "without bias": (chain(nn.ReLU, bias=False), VECTORS, ["0"]),
    "norm before": (
        chain(lambda: nn.BatchNorm1d(8), lambda: nn.ReLU(inplace=True), lambda: nn.Dropout(0.5)), VECTORS, ["0"]
    ),
    "norms on both sides": (
        chain(lambda: nn.BatchNorm1d(8), nn.SiLU, nn.Flatten, lambda: nn.BatchNorm1d(8)), VECTORS, ["0"]
    ),
    "norm without running statistics": (
        chain(lambda: nn.BatchNorm1d(8, affine=False, track_running_stats=False), nn.Tanh), VECTORS, ["0"]
    ),
    "norm without batch counter": (chain(lambda: nn.BatchNorm1d(8, momentum=None), nn.ReLU), VECTORS, ["0"]),
    "slope for each": (chain(lambda: nn.PReLU(8)), VECTORS, ["0"]),
    "one slope": (chain(nn.PReLU), VECTORS, ["0"]),
    "activations": (chain(nn.LeakyReLU, nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Mish, nn.Softsign), VECTORS, ["0"]),
    "other activations": (chain(nn.Identity, nn.ReLU6, nn.SELU, nn.CELU, nn.LogSigmoid, nn.Tanhshrink), VECTORS, ["0"]),
    "nested": (
        lambda: nn.Sequential(nn.ModuleDict({"a": nn.Identity()})["a"], chain(nn.ReLU)(), nn.Linear(CLASSES, 2)),
        VECTORS, ["1.0", "1.2"],
    ),
    "functional": (
        recipe(
            functional, second=lambda: nn.Linear(8, 7), last=lambda: nn.Linear(7, 3),
            scale=lambda: nn.Parameter(torch.tensor([0.7])),
        ),
        VECTORS, ["first", "second"],
    ),
    "two heads": (
        recipe(
            two_heads, norm=lambda: nn.BatchNorm1d(8), drop=lambda: nn.Dropout(0.3),
            right=lambda: nn.Linear(8, 2, bias=False),
        ),
        VECTORS, ["first"],
    ),
    "keeps its shape": (
        recipe(lambda m, x: m.last((h := m.first(x)).reshape(h.shape).view(h.size(0), h.size(1)))), VECTORS, ["first"]
    ),
    "one neuron": (chain(nn.ReLU, width=1), VECTORS, ["0"]),
    "swish by hand": (
        recipe(lambda m, x: m.last(F.softsign((h := m.first(x)) * torch.sigmoid(h)))), VECTORS, ["first"]
    ),
    "casts": (recipe(casts), VECTORS, ["first"]),
}  # fmt: skip
