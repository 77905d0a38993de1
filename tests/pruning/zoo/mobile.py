"""Networks of depthwise convolutions for small devices."""

from functools import partial

import torch
from torch import nn

from .layers import CLASSES, Residual, SqueezeExcitation, StochasticDepth, conv_norm, pooled_head


def inverted_residual(inputs, hidden, outputs, stride, act, gate=None, drop=None):
    """Expand, filter each channel, gate, project; with a sum where the shape stays."""
    layers = [] if hidden == inputs else [conv_norm(inputs, hidden, 1, act=act)]
    layers.append(conv_norm(hidden, hidden, 3, stride, groups=hidden, act=act))
    layers += [module for module in (gate, conv_norm(hidden, outputs, 1, act=None), drop) if module is not None]
    branch = nn.Sequential(*layers)
    return Residual(branch, in_place=act is not nn.ReLU6) if stride == 1 and inputs == outputs else branch


def mobilenet_v2():
    """Sandler et al. 2018 (arXiv:1801.04381)."""
    shapes = (8, 8, 6, 1), (6, 20, 10, 2), (10, 28, 10, 1)
    blocks = (inverted_residual(*shape, nn.ReLU6) for shape in shapes)
    last = conv_norm(10, 24, 1, act=nn.ReLU6), pooled_head(24, nn.Dropout(0.2))
    return nn.Sequential(conv_norm(3, 8, 3, 2, act=nn.ReLU6), *blocks, *last)


def mobilenet_v3():
    """Howard et al. 2019 (arXiv:1905.02244): the gates are piecewise linear."""
    act = nn.Hardswish
    blocks = (
        inverted_residual(8, 8, 8, 1, nn.ReLU, SqueezeExcitation(8, 4, scale_activation=nn.Hardsigmoid)),
        inverted_residual(8, 20, 12, 2, nn.ReLU),
        inverted_residual(12, 28, 12, 1, act, SqueezeExcitation(28, 7, scale_activation=nn.Hardsigmoid)),
    )
    head = pooled_head(24, nn.Linear(32, 24), act(inplace=True), nn.Dropout(0.2, inplace=True))
    return nn.Sequential(conv_norm(3, 8, 3, 2, act=act), *blocks, conv_norm(12, 32, 1, act=act), head)


class MeanExcitation(nn.Module):
    """timm's squeeze-and-excitation: a mean over positions instead of a pooling layer."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.conv_reduce, self.act1 = nn.Conv2d(channels, squeezed, 1), nn.SiLU(inplace=True)
        self.conv_expand, self.gate = nn.Conv2d(squeezed, channels, 1), nn.Sigmoid()

    def forward(self, x):
        x_se = x.mean((2, 3), keepdim=True)
        x_se = self.conv_expand(self.act1(self.conv_reduce(x_se)))
        return x * self.gate(x_se)


def efficientnet():
    """Tan and Le 2019 (arXiv:1905.11946): swish, the gates of torchvision and of timm, stochastic depth."""
    act = nn.SiLU
    blocks = (
        inverted_residual(10, 10, 8, 1, act, SqueezeExcitation(10, 3, partial(nn.SiLU, inplace=True))),
        inverted_residual(8, 20, 12, 2, act, MeanExcitation(20, 2)),
        inverted_residual(12, 28, 12, 1, act, MeanExcitation(28, 3), StochasticDepth()),
    )
    head = conv_norm(12, 32, 1, act=act), pooled_head(32, nn.Dropout(0.2, inplace=True))
    return nn.Sequential(conv_norm(3, 10, 3, 2, act=act), *blocks, *head)


def channel_shuffle(x, groups):
    """Interleaves the channels of `groups` equal parts."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, -1, height, width)


class ShuffleUnit(nn.Module):
    """Stride 1 computes half of the channels and passes the other half on; stride 2 computes two branches."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.stride, half = stride, outputs // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(conv_norm(inputs, inputs, 3, stride, inputs, None), conv_norm(inputs, half, 1))
        first = conv_norm(inputs if stride > 1 else half, half, 1)
        self.branch2 = nn.Sequential(first, conv_norm(half, half, 3, stride, half, None), conv_norm(half, half, 1))

    def forward(self, x):
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    """Ma et al. 2018 (arXiv:1807.11164)."""

    def __init__(self):
        super().__init__()
        units = (ShuffleUnit(*shape) for shape in ((6, 16, 2), (16, 16, 1), (16, 16, 1), (16, 24, 2), (24, 24, 1)))
        self.features = nn.Sequential(conv_norm(3, 6, 3, 2), nn.MaxPool2d(3, 2, 1), *units, conv_norm(24, 20, 1))
        self.fc = nn.Linear(20, CLASSES)

    def forward(self, x):
        return self.fc(self.features(x).mean([2, 3]))


def depthwise_multiplier():
    """Chollet 2017 (arXiv:1610.02357), with several filters for each channel, as Keras's depth_multiplier."""

    def separable(inputs, multiplier, outputs):
        hidden = inputs * multiplier
        return conv_norm(inputs, hidden, 3, groups=inputs), conv_norm(hidden, outputs, 1)

    return nn.Sequential(conv_norm(3, 8, 3, 2), *separable(8, 4, 12), *separable(12, 2, 20), pooled_head(20))
