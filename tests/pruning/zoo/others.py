"""Convolutional networks for audio, text, video and images as outputs."""

import math

import torch.nn.functional as F
from torch import nn

from .layers import CLASSES, VOCABULARY, Residual


class GatedConvolutions(nn.Module):
    """Dauphin et al. 2017 (arXiv:1612.08083) and Gehring et al. 2017 (arXiv:1705.03122): halves gate each other."""

    def __init__(self):
        super().__init__()
        self.embedding, self.fc1 = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 10)
        self.convs = nn.ModuleList([nn.Conv1d(10, 20, 3, padding=1), nn.Conv1d(10, 28, 3, padding=1)])
        self.fc2 = nn.Linear(14, CLASSES)

    def forward(self, ids):
        x = self.fc1(self.embedding(ids)).transpose(1, 2)
        x = (F.glu(self.convs[0](x), dim=1) + x) * math.sqrt(0.5)
        x = F.glu(self.convs[1](x), dim=1)
        return self.fc2(x.max(dim=2)[0])


class UpsampleConv(nn.Module):
    """Nearest neighbours, a border of mirrored pixels, a convolution."""

    def __init__(self, inputs, outputs, kernel):
        super().__init__()
        self.pad, self.conv = nn.ReflectionPad2d(kernel // 2), nn.Conv2d(inputs, outputs, kernel)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(self.pad(x))


def style_transfer(norm):
    """Johnson et al. 2016 (arXiv:1603.08155): images to images, with a norm over each sample."""

    def conv(inputs, outputs, kernel, stride=1):
        return nn.Sequential(nn.ReflectionPad2d(kernel // 2), nn.Conv2d(inputs, outputs, kernel, stride), norm(outputs))

    block = Residual(nn.Sequential(conv(12, 20, 3), nn.ReLU(), conv(20, 12, 3)))
    down = conv(3, 8, 5), nn.ReLU(), conv(8, 12, 3, 2), nn.ReLU()
    up = UpsampleConv(12, 24, 3), norm(24), nn.ReLU(), nn.ReflectionPad2d(2), nn.Conv2d(24, 3, 5)
    return nn.Sequential(*down, block, *up)


def instance_norms():
    return style_transfer(lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True))


def group_norms():
    return style_transfer(lambda channels: nn.GroupNorm(4, channels))


class SuperResolution(nn.Module):
    """Lim et al. 2017 (arXiv:1707.02921), EDSR: scaled residual blocks, and channels that become pixels."""

    def __init__(self):
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(10, 3, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, hidden, 3, padding=1), nn.ReLU(True), nn.Conv2d(hidden, 12, 3, padding=1))
            for hidden in (16, 20)
        )
        self.conv, self.shuffle = nn.Conv2d(12, 10 * 4, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x):
        skip = x = self.head(x)
        for block in self.blocks:
            x = block(x).mul(0.1) + x
        return self.tail(self.shuffle(self.conv(x + skip)))


class Chomp(nn.Module):
    """Cuts off what padding has added at the end."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x[:, :, : -self.size].contiguous()


class TemporalBlock(nn.Module):
    """Two dilated causal convolutions and a 1×1 convolution where the width changes."""

    def __init__(self, inputs, hidden, outputs, dilation):
        super().__init__()
        first = nn.Conv1d(inputs, hidden, 3, padding=2 * dilation, dilation=dilation), Chomp(2 * dilation), nn.ReLU()
        second = nn.Conv1d(hidden, outputs, 3, padding=2 * dilation, dilation=dilation), Chomp(2 * dilation), nn.ReLU()
        self.net = nn.Sequential(*first, nn.Dropout(0.2), *second, nn.Dropout(0.2))
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        out = self.net(x)
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class TemporalConvolutions(nn.Module):
    """Bai et al. 2018 (arXiv:1803.01271), behind a layer that pads on the left alone; the last step is classified."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(5, 8, 3)
        blocks = TemporalBlock(8, 10, 8, 1), TemporalBlock(8, 16, 12, 2), TemporalBlock(12, 14, 12, 4)
        self.blocks, self.linear = nn.Sequential(*blocks), nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.first(F.pad(x, (2, 0)))
        return self.linear(self.blocks(x)[:, :, -1])


def video():
    """Tran et al. 2018 (arXiv:1711.11248), R(2+1)D: convolutions over space and over time in turn."""

    def factored(inputs, hidden, outputs, stride=1):
        space = nn.Conv3d(inputs, hidden, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        time = nn.Conv3d(hidden, outputs, (3, 1, 1), 1, (1, 0, 0), bias=False)
        return nn.Sequential(space, nn.BatchNorm3d(hidden), nn.ReLU(inplace=True), time, nn.BatchNorm3d(outputs))

    block = Residual(nn.Sequential(factored(12, 14, 10), nn.ReLU(), factored(10, 18, 12)), act=nn.ReLU(inplace=True))
    last = nn.MaxPool3d((1, 2, 2)), factored(12, 16, 20), nn.ReLU(), nn.AdaptiveAvgPool3d((1, 1, 1)), nn.Flatten()
    return nn.Sequential(factored(3, 8, 12, 2), nn.ReLU(), block, *last, nn.Linear(20, CLASSES))
