"""The networks of the workflow. All take normalised images (N, C, S, S) and return logits (N, classes)."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import kddp_ext
from kddp_ext.workflow.config import RunConfig, StudentArchitecture, StudentConfig, TeacherArchitecture, TeacherConfig
from kddp_ext.workflow.datasets import DatasetInfo
from kddp_ext.workflow.errors import OptionError, WorkflowError
from kddp_ext.workflow.networks import build_own, renormalised

_RESNET_DEPTHS = {"resnet20": 20, "resnet56": 56, "resnet110": 110}

# The default channels, those of the papers.
_CHANNELS: dict[TeacherArchitecture | StudentArchitecture, tuple[int, ...]] = {
    "fast": (64, 256, 256),
    "cnn": (32, 64, 128),
    "vgg11": (64, 128, 256, 256, 512, 512, 512, 512),
    "resnet20": (16, 32, 64),
    "resnet56": (16, 32, 64),
    "resnet110": (16, 32, 64),
}


def build_teacher(config: RunConfig, info: DatasetInfo) -> nn.Module:
    """The teacher of a run. `config.teacher.seed` determines the initial weights."""
    model = _build(config.teacher, config.teacher.seed, info)
    return renormalised(model, config.teacher, info) if config.teacher.network else model


def build_student(config: RunConfig, info: DatasetInfo) -> nn.Module:
    """The student of a run before any pruning. `config.seed` determines the initial weights."""
    return _build(config.student, config.seed, info)


def _build(network: TeacherConfig | StudentConfig, seed: int, info: DatasetInfo) -> nn.Module:
    architecture, channels = network.architecture, network.channels or _CHANNELS[network.architecture]
    with torch.random.fork_rng(devices=[]):  # keeps the caller's random state
        torch.manual_seed(seed)
        if network.network:
            return build_own("--teacher" if isinstance(network, TeacherConfig) else "--student", network.network, info)
        if architecture in _RESNET_DEPTHS:
            return PreActivationResNet(info.channels, info.classes, _RESNET_DEPTHS[architecture], channels)
        if architecture == "fast":
            return FastTeacher(info.channels, info.classes, channels)
        assert isinstance(network, StudentConfig)
        student = PlainStudent if architecture == "cnn" else VGG11
        return student(info.channels, info.size, info.classes, channels, network.width)


def check_networks(config: RunConfig, info: DatasetInfo) -> None:
    """Raise WorkflowError unless `config`'s networks can be built for the data set, and pruned as configured."""
    for name, network in (("teacher", config.teacher), ("student", config.student)):
        architecture, channels = network.architecture, network.channels
        if config.augment and network.shift >= info.size:
            raise OptionError(f"{name}.shift", f"less than the image size {info.size}", network.shift)
        if network.network:
            continue
        if channels and architecture not in ("fast", "cnn") and len(channels) != len(_CHANNELS[architecture]):
            expected = f"{len(_CHANNELS[architecture])} numbers for {architecture}, or none for its default"
            raise OptionError(f"{name}.channels", expected, channels)
        # Each entry of these two is followed by a pooling; the whitening of 2x2 patches removes one pixel before.
        size = info.size - 1 if architecture == "fast" else info.size
        if architecture in ("fast", "cnn") and size >> len(channels) == 0:
            raise WorkflowError(
                f"--{name}.channels: expected fewer channels: {len(channels)} poolings leave no pixel of "
                f"{info.size}x{info.size} images"
            )
    if not config.has_hidden_layer and config.pruning.layers == "hidden":
        student = config.student.network or f"--student.architecture {config.student.architecture}"
        raise WorkflowError(f"--pruning.layers: expected all for {student}, which has no hidden layer; got hidden")


def check_own_networks(config: RunConfig, info: DatasetInfo) -> None:
    """Raise WorkflowError unless the user's own networks in `config` can be built, and the student pruned."""
    if config.teacher.network:
        build_teacher(config, info)
    if config.student.network:
        example = torch.zeros(2, info.channels, info.size, info.size)
        try:
            kddp_ext.DynamicPruner(build_student(config, info), None, example_inputs=(example,)).close()
        except (ValueError, kddp_ext.UnsupportedModelError) as error:
            if isinstance(error, WorkflowError):
                raise
            reason = " ".join(str(error).split())
            raise WorkflowError(f"--student {config.student.network}: it cannot be pruned: {reason}") from error


class FastTeacher(nn.Module):
    """A convolutional network that trains in few epochs. Each block halves height and width.

    It follows David Page ("How to train your ResNet", 2018) and Keller Jordan ("94% on CIFAR-10 in 3.29 seconds on a
    single GPU", 2024): wide and shallow, pooling before normalisation, global max pooling before the classifier, and
    logits scaled down so that a large learning rate is stable. The weights of the first layer are not trained. They
    decorrelate the 2x2 patches of the images (`whiten`), which saves epochs.
    """

    logit_scale = 1 / 9
    # Computing this bias's gradient takes a tenth of each step, and it converges early (Jordan 2024).
    frozen_from: ClassVar[dict[str, int]] = {"whitening.bias": 3}

    def __init__(self, image_channels: int, classes: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        patch = 4 * image_channels
        self.whitening = nn.Conv2d(image_channels, 2 * patch, 2)
        self.whitening.weight.requires_grad_(False)
        nn.init.zeros_(cast(Tensor, self.whitening.bias))
        widths = (2 * patch, *channels)
        self.blocks = nn.Sequential(*(FastBlock(a, b) for a, b in zip(widths, channels, strict=False)))
        self.classifier = nn.Linear(channels[-1], classes, bias=False)

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Set the first layer's filters to the principal components of the images' patches, scaled to variance 1."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
        variances, components = torch.linalg.eigh(patches.double().T.cov())
        # The constant limits the scale of components that hardly vary.
        filters = (components / (variances + 5e-4).sqrt()).T.reshape(-1, *self.whitening.weight.shape[1:])
        self.whitening.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(nn.functional.gelu(self.whitening(images)))
        logits: Tensor = self.classifier(features.amax(dim=(2, 3))) * self.logit_scale
        return logits


class FastBlock(nn.Module):
    """Two 3x3 convolutions of the fast teacher. The first is pooled to half the sides before it is normalised.

    The convolutions start as identities, as far as their numbers of channels allow, and the normalisations have no
    trainable scale. Both make so shallow a network learn in fewer epochs (Jordan 2024, Page 2018).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(channels, outputs, 3, padding=1, bias=False) for channels in (inputs, outputs)]
        # A high momentum: in so few epochs, older batches are those of a different network.
        norms = [nn.BatchNorm2d(outputs, momentum=0.4) for _ in range(2)]
        for convolution, norm in zip(convolutions, norms, strict=True):
            with torch.no_grad():
                nn.init.dirac_(convolution.weight[: convolution.in_channels])
            norm.weight.requires_grad_(False)
        first, second = zip(convolutions, norms, strict=True)
        self.layers = nn.Sequential(first[0], nn.MaxPool2d(2), first[1], nn.GELU(), *second, nn.GELU())

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.layers(features)
        return output


class HiddenLayerNetwork(nn.Module):
    """`features`, which return `inputs` values for an image, a hidden layer, which KDDP prunes, and a classifier."""

    def __init__(self, features: list[nn.Module], inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*features, nn.Flatten())
        self.hidden = nn.Linear(inputs, width)
        self.activation = nn.ReLU()
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.activation(self.hidden(self.features(images))))
        return logits


class PlainStudent(HiddenLayerNetwork):
    """A plain convolutional network with one hidden layer. Each convolution is followed by 2x2 pooling.

    With three convolutions it has five layers with weights. We call it `cnn5`. It is the closest public analogue of the
    students of the KDDP paper, which could not be obtained.
    """

    def __init__(
        self, image_channels: int, image_size: int, classes: int, channels: tuple[int, ...], width: int
    ) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in zip((image_channels, *channels), channels, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.MaxPool2d(2)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        side = image_size // 2 ** len(channels)
        super().__init__(layers, channels[-1] * side * side, width, classes)


class VGG11(HiddenLayerNetwork):
    """VGG-11 with batch normalisation, for small images.

    Configuration A of Simonyan and Zisserman (2015) as it is used on images of 32x32: one hidden layer instead of two,
    and only as many of its poolings as the image size allows.
    """

    def __init__(
        self, image_channels: int, image_size: int, classes: int, channels: tuple[int, ...], width: int
    ) -> None:
        layers: list[nn.Module] = []
        side, inputs = image_size, image_channels
        for number, outputs in enumerate(channels):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            if number in (0, 1, 3, 5, 7) and side > 1:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            inputs = outputs
        super().__init__(layers, inputs * side * side, width, classes)


class PreActivationResNet(nn.Module):
    """A pre-activation residual network for small images (He, Zhang, Ren, Sun 2016).

    A 3x3 convolution, three stages of blocks, and a linear classifier; the second and the third stage halve the sides.
    The layout is that for CIFAR of He et al. (2015, section 4.2). `depth` is 6n + 2, the number of layers with weights
    along the main path, for n blocks in a stage. The initial weights follow "Delving deep into rectifiers" (2015).
    """

    def __init__(self, image_channels: int, classes: int, depth: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(image_channels, channels[0], 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        inputs = channels[0]
        for stage, outputs in enumerate(channels):
            for number in range((depth - 2) // 6):
                blocks.append(PreActivationBlock(inputs, outputs, stride=2 if stage and number == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.blocks(self.conv(images))))
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


class PreActivationBlock(nn.Module):
    """Normalisation, ReLU and convolution, twice, added to the input (He et al. 2016, figure 1b).

    Where sides or channels change, the shortcut is a 1x1 convolution of the first rectified values. The channels
    between the two convolutions belong to this block alone, so they can be pruned. The shortcut strides by a slice,
    because the weight's gradient of a strided 1x1 convolution with fewer than 8 input channels writes beyond its memory
    on CPUs without AVX-512 (torch 2.13, oneDNN 3.12).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if changes else None

    def forward(self, features: Tensor) -> Tensor:
        rectified = torch.relu(self.norm1(features))
        residual = features
        if self.shortcut is not None:
            down, right = self.conv1.stride
            residual = self.shortcut(rectified[:, :, ::down, ::right])
        output: Tensor = residual + self.conv2(torch.relu(self.norm2(self.conv1(rectified))))
        return output
