"""Networks that concatenate channels, or split them."""

import torch
import torch.nn.functional as F
from torch import nn

from .layers import CLASSES, conv_norm, pooled_head


def norm_conv(inputs, outputs, kernel):
    """BatchNorm2d, ReLU in place, Conv2d."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv)


class DenseBlock(nn.ModuleList):
    """Each layer reads the concatenation of a list of all features before it, as in torchvision."""

    def __init__(self, layers, inputs, hidden, growth):
        widths = (inputs + i * growth for i in range(layers))
        super().__init__(nn.Sequential(norm_conv(width, hidden, 1), norm_conv(hidden, growth, 3)) for width in widths)

    def forward(self, x):
        features = [x]
        for layer in self:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Huang et al. 2017 (arXiv:1608.06993)."""

    def __init__(self):
        super().__init__()
        transition = norm_conv(26, 13, 1), nn.AvgPool2d(2, 2)
        blocks = DenseBlock(3, 8, 10, 6), *transition, DenseBlock(2, 13, 9, 5), nn.BatchNorm2d(23)
        self.features = nn.Sequential(conv_norm(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1), *blocks)
        self.classifier = nn.Linear(23, CLASSES)

    def forward(self, x):
        out = F.relu(self.features(x), inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        return self.classifier(torch.flatten(out, 1))


class Concatenated(nn.Module):
    """The outputs of branches side by side."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def inception(inputs, single, reduce3, out3, reduce5, out5, pooled):
    """GoogLeNet's block of four branches, one of which starts with pooling."""
    branch3 = nn.Sequential(conv_norm(inputs, reduce3, 1), conv_norm(reduce3, out3, 3))
    branch5 = nn.Sequential(conv_norm(inputs, reduce5, 1), conv_norm(reduce5, out5, 3))
    pool = nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True)
    return Concatenated(
        conv_norm(inputs, single, 1), branch3, branch5, nn.Sequential(pool, conv_norm(inputs, pooled, 1))
    )


def googlenet():
    """Szegedy et al. 2014 (arXiv:1409.4842), with two blocks of Inception v3 (2015, arXiv:1512.00567).

    In one a branch is the pooled input itself, in the other a branch forks into a concatenation of its own.
    """
    reduction = Concatenated(conv_norm(26, 9, 3, 2), nn.MaxPool2d(3, 2, 1))
    fork = Concatenated(nn.Conv2d(12, 8, (1, 3), padding=(0, 1)), nn.Conv2d(12, 8, (3, 1), padding=(1, 0)))
    pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_norm(35, 5, 1))
    forked = Concatenated(conv_norm(35, 11, 1), nn.Sequential(conv_norm(35, 12, 1), fork, nn.ReLU()), pooled)
    stem = conv_norm(3, 8, 3, 2), nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(*stem, inception(8, 6, 5, 10, 4, 7, 3), reduction, forked, pooled_head(32, nn.Dropout(0.2)))


def fire(inputs, squeezed, expand1, expand3):
    """One layer squeezes, two expand and are concatenated."""
    expand1x1 = nn.Sequential(nn.Conv2d(squeezed, expand1, 1), nn.ReLU(inplace=True))
    expand3x3 = nn.Sequential(nn.Conv2d(squeezed, expand3, 3, padding=1), nn.ReLU(inplace=True))
    squeeze = nn.Conv2d(inputs, squeezed, 1), nn.ReLU(inplace=True)
    return nn.Sequential(*squeeze, Concatenated(expand1x1, expand3x3))


def squeezenet():
    """Iandola et al. 2016 (arXiv:1602.07360): the classifier is a convolution."""
    features = nn.Conv2d(3, 8, 3, 2), nn.ReLU(inplace=True), fire(8, 4, 6, 10), nn.MaxPool2d(3, 2), fire(16, 5, 9, 11)
    classifier = nn.Dropout(0.5), nn.Conv2d(20, CLASSES, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
    return nn.Sequential(*features, *classifier, nn.Flatten())


class UNet(nn.Module):
    """Ronneberger et al. 2015 (arXiv:1505.04597): skips are concatenated with what comes up, padded to their size."""

    def __init__(self, norm):
        super().__init__()

        def double(inputs, hidden, outputs):
            first = nn.Conv2d(inputs, hidden, 3, padding=1), norm(hidden), nn.ReLU(inplace=True)
            return nn.Sequential(*first, nn.Conv2d(hidden, outputs, 3, padding=1), norm(outputs), nn.ReLU(inplace=True))

        self.inc, self.pool = double(3, 4, 8), nn.MaxPool2d(2)
        self.down1, self.down2 = double(8, 10, 12), double(12, 18, 20)
        self.up1, self.conv1 = nn.ConvTranspose2d(20, 14, 2, stride=2), double(26, 22, 16)
        self.up2, self.conv2 = nn.ConvTranspose2d(16, 6, 2, stride=2), double(14, 24, 10)
        self.outc = nn.Conv2d(10, CLASSES, 1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(self.pool(x1))
        x = self.down2(self.pool(x2))
        for skip, up, conv in ((x2, self.up1, self.conv1), (x1, self.up2, self.conv2)):
            x = up(x)
            rows, columns = skip.size()[2] - x.size()[2], skip.size()[3] - x.size()[3]
            x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            x = conv(torch.cat([skip, x], dim=1))
        return self.outc(x)


def unet_of_group_norms():
    """Groups of two channels; diffusion models have U-Nets with GroupNorm."""
    return UNet(lambda channels: nn.GroupNorm(channels // 2, channels))


class SplitBottlenecks(nn.Module):
    """The C2f block of YOLOv8: halves of a convolution, and bottlenecks in a chain that starts at the second half."""

    def __init__(self, inputs, half, outputs, depth):
        super().__init__()
        self.cv1 = conv_norm(inputs, 2 * half, 1, act=nn.SiLU)
        self.cv2 = conv_norm((2 + depth) * half, outputs, 1, act=nn.SiLU)
        pairs = ((conv_norm(half, 4 + i, act=nn.SiLU), conv_norm(4 + i, half, act=nn.SiLU)) for i in range(depth))
        self.m = nn.ModuleList(nn.Sequential(*pair) for pair in pairs)

    def forward(self, x):
        parts = list(self.cv1(x).chunk(2, 1))
        for bottleneck in self.m:
            parts.append(parts[-1] + bottleneck(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Yolo(nn.Module):
    """Two scales in the way of YOLOv8: the coarse one is upsampled and concatenated with the fine one."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(conv_norm(3, 8, 3, 2, act=nn.SiLU), SplitBottlenecks(8, 6, 14, 2))
        self.coarse = nn.Sequential(conv_norm(14, 20, 3, 2, act=nn.SiLU), SplitBottlenecks(20, 9, 18, 1))
        self.up, self.neck = nn.Upsample(scale_factor=2.0, mode="nearest"), SplitBottlenecks(32, 7, 16, 1)
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x):
        fine = self.fine(x)
        return self.head(self.neck(torch.cat([self.up(self.coarse(fine)), fine], 1)))
