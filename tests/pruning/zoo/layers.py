"""Layers that several families share."""

import torch
from torch import nn

CLASSES = 3
VOCABULARY = 31


def conv_norm(inputs, outputs, kernel=3, stride=1, groups=1, act=nn.ReLU):
    """Conv2d, BatchNorm2d and, unless it is None, an activation in place."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([] if act is None else [act(inplace=True)]))


def pooled_head(width, *before):
    """Average pooling, the modules `before` the classifier, and the classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), *before, nn.Linear(width, CLASSES))


class Residual(nn.Module):
    """Adds the input, or a shortcut from it, to what a branch computes; in place as in torchvision's ResNet or not."""

    def __init__(self, branch, shortcut=None, act=None, in_place=True):
        super().__init__()
        self.branch, self.shortcut, self.act, self.in_place = branch, shortcut, act, in_place

    def forward(self, x):
        out, skip = self.branch(x), x if self.shortcut is None else self.shortcut(x)
        if self.in_place:
            out += skip
        else:
            out = skip + out
        return out if self.act is None else self.act(out)


class StochasticDepth(nn.Module):
    """Huang et al. 2016 (arXiv:1603.09382), drop path in timm: zeroes whole samples of a branch in training."""

    def __init__(self, p=0.1):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * kept.div_(1 - self.p)


class SqueezeExcitation(nn.Module):
    """Hu et al. 2018 (arXiv:1709.01507) as in torchvision: pooling and two 1×1 convolutions compute the gate."""

    def __init__(self, channels, squeezed, activation=nn.ReLU, scale_activation=nn.Sigmoid):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.activation = nn.Conv2d(channels, squeezed, 1), activation()
        self.fc2, self.scale_activation = nn.Conv2d(squeezed, channels, 1), scale_activation()

    def forward(self, x):
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x


class Permute(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return torch.permute(x, self.dims)


class Mlp(nn.Sequential):
    """Two Linear layers with GELU and dropout, as in vision transformers."""

    def __init__(self, inputs, hidden):
        super().__init__(nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, inputs))
        self.append(nn.Dropout(0.1))
