"""Residual networks: what the blocks compute is added to a stream of channels."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from .layers import CLASSES, Residual, SqueezeExcitation, conv_norm, pooled_head


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2015: every other pixel, and zero channels on both sides."""

    def __init__(self, added):
        super().__init__()
        self.added = added

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2), "constant", 0)


def shortcut(inputs, outputs, stride):
    """A projection where the shape changes."""
    return None if stride == 1 and inputs == outputs else conv_norm(inputs, outputs, 1, stride, act=None)


def basic_block(inputs, outputs, stride, padded=False):
    branch = nn.Sequential(conv_norm(inputs, outputs, 3, stride), conv_norm(outputs, outputs, act=None))
    skip = PaddedShortcut(outputs - inputs) if padded and stride > 1 else shortcut(inputs, outputs, stride)
    return Residual(branch, skip, nn.ReLU(inplace=True))


def bottleneck(inputs, hidden, outputs, stride, groups=1, gate=None):
    """1×1, 3×3 (grouped in ResNeXt and RegNet), a gate on what comes out of it in RegNet, 1×1."""
    layers = [conv_norm(inputs, hidden, 1), conv_norm(hidden, hidden, 3, stride, groups)]
    layers += [] if gate is None else [gate]
    branch = nn.Sequential(*layers, conv_norm(hidden, outputs, 1, act=None))
    return Residual(branch, shortcut(inputs, outputs, stride), nn.ReLU(inplace=True), in_place=gate is None)


class PoolBySize(nn.Module):
    """The head of the CIFAR networks: pools by the image's size and flattens with view."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


def resnet20():
    """He et al. 2015 (arXiv:1512.03385), for CIFAR: 20 layers, shortcuts without parameters."""
    widths = [8, 8, 8, 8, 12, 12, 12, 20, 20, 20]
    blocks = (basic_block(a, b, 1 if a == b else 2, True) for a, b in pairwise(widths))
    return nn.Sequential(conv_norm(3, 8), *blocks, PoolBySize(20))


def stem(width):
    return nn.Sequential(conv_norm(3, width, 7, 2), nn.MaxPool2d(3, 2, 1))


def resnet_basic():
    """He et al. 2015 (arXiv:1512.03385), with the blocks of ResNet-18."""
    blocks = basic_block(8, 8, 1), basic_block(8, 12, 2), basic_block(12, 12, 1), basic_block(12, 20, 2)
    return nn.Sequential(stem(8), *blocks, pooled_head(20))


def resnet_bottleneck():
    """He et al. 2015 (arXiv:1512.03385), with the blocks of ResNet-50."""
    blocks = bottleneck(8, 6, 24, 1), bottleneck(24, 6, 24, 1), bottleneck(24, 10, 28, 2)
    return nn.Sequential(stem(8), *blocks, pooled_head(28))


def resnext():
    """Xie et al. 2017 (arXiv:1611.05431): the 3×3 convolutions have groups."""
    blocks = bottleneck(8, 12, 20, 1, 3), bottleneck(20, 12, 20, 1, 3), bottleneck(20, 24, 28, 2, 4)
    return nn.Sequential(stem(8), *blocks, pooled_head(28))


def regnet():
    """Radosavovic et al. 2020 (arXiv:2003.13678), RegNetY: grouped convolutions and gates."""
    blocks = (
        bottleneck(12, 20, 24, 2, 4, SqueezeExcitation(20, 3)),
        bottleneck(24, 18, 24, 1, 3, SqueezeExcitation(18, 7)),
        bottleneck(24, 28, 32, 2, 4, SqueezeExcitation(28, 5)),
    )
    return nn.Sequential(conv_norm(3, 12, 3, 2), *blocks, pooled_head(32))


class GateOfVectors(nn.Module):
    """Squeeze-and-excitation as in its authors' code: Linear layers on pooled vectors, expand_as."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        squeeze = nn.Linear(channels, squeezed, bias=False), nn.ReLU(inplace=True)
        self.fc = nn.Sequential(*squeeze, nn.Linear(squeezed, channels, bias=False), nn.Sigmoid())

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x)


def se_resnet():
    """Hu et al. 2018 (arXiv:1709.01507): the gate is at the end of the branch, so that it reads stream channels."""
    branch = conv_norm(8, 14, 3), conv_norm(14, 8, 3, act=None), GateOfVectors(8, 5)
    return nn.Sequential(conv_norm(3, 8, 3, 2), Residual(nn.Sequential(*branch), act=nn.ReLU()), pooled_head(8))


class PreActivationBlock(nn.Module):
    """Normalisation and ReLU in front of each convolution; a projection reads what they give."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        skip = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += skip
        return out


def preactivation_resnet():
    """He et al. 2016 (arXiv:1603.05027): the stream itself is normalised for each block and for the head."""
    blocks = (PreActivationBlock(*shape) for shape in ((8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 20, 2)))
    head = nn.BatchNorm2d(20), nn.ReLU(), PoolBySize(20)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), *blocks, *head)


class StandardisedConv(nn.Conv2d):
    """Scaled weight standardisation as in timm: a batch normalisation of the filters."""

    def __init__(self, inputs, outputs, kernel=1, stride=1, groups=1):
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        self.gain, self.scale = nn.Parameter(torch.ones(outputs, 1, 1, 1)), self.weight[0].numel() ** -0.5

    def forward(self, x):
        gain, filters = (self.gain * self.scale).view(-1), self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(filters, None, None, gain, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, 1, self.groups)


class NormFreeBlock(nn.Module):
    """A scaled activation in front of each convolution and of the projection, and a gate behind the last one."""

    def __init__(self, inputs, hidden, outputs, stride):
        super().__init__()
        self.downsample = None if stride == 1 else nn.Sequential(nn.AvgPool2d(2), StandardisedConv(inputs, outputs))
        self.conv1, self.conv2 = StandardisedConv(inputs, hidden), StandardisedConv(hidden, hidden, 3, stride, 2)
        self.conv3, self.gate = StandardisedConv(hidden, outputs), SqueezeExcitation(outputs, 5, nn.SiLU)

    def forward(self, x):
        out = F.silu(x) * 1.8
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv3(F.silu(self.conv2(F.silu(self.conv1(out)))))
        return 2.0 * self.gate(out) * 0.2 + shortcut


def nfnet():
    """Brock et al. 2021 (arXiv:2101.08692): no norm of activations; behind the stream, channels for the head."""
    blocks = NormFreeBlock(8, 6, 12, 2), NormFreeBlock(12, 8, 12, 1)
    return nn.Sequential(StandardisedConv(3, 8, 3, 2), *blocks, StandardisedConv(12, 60), nn.SiLU(), pooled_head(60))


class RepVGGBlock(nn.Module):
    """The training form: 3×3 and 1×1 convolutions and, where the shape stays, the input, each normalised."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.nonlinearity = nn.ReLU()
        self.rbr_identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.rbr_dense = conv_norm(inputs, outputs, 3, stride, act=None)
        self.rbr_1x1 = conv_norm(inputs, outputs, 1, stride, act=None)

    def forward(self, x):
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.nonlinearity(self.rbr_dense(x) + self.rbr_1x1(x) + id_out)


def repvgg():
    """Ding et al. 2021 (arXiv:2101.03697)."""
    blocks = RepVGGBlock(3, 8, 2), RepVGGBlock(8, 12, 2), RepVGGBlock(12, 12, 1), RepVGGBlock(12, 20, 2)
    return nn.Sequential(*blocks, pooled_head(20))
