"""Small networks of every structure of the field, in plain PyTorch, with the operations of the original code."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kddp_ext.workflow.models import FastTeacher, PlainStudent

from . import concatenations, mobile, others, resnets, spellings
from . import language_models as text
from . import vision_transformers as vit
from .layers import CLASSES, VOCABULARY

Inputs = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Structure:
    """A network and two sets of arguments: other_inputs has another batch and, where allowed, other sizes."""

    build: Callable[[], nn.Module]  # the caller seeds torch
    inputs: Inputs
    other_inputs: Inputs


def randomise_(model: nn.Module, seed: int) -> None:
    """Gives running statistics and every parameter that is constant when built random values.

    Zeros (biases, tokens, tables) become normal, other constants (norms, LayerScale) uniform in [0.5, 1.5]. Running
    statistics are near those of layers that PyTorch has initialised: with larger ones many ReLUs would never be active,
    and the outputs of deep networks would not depend on the inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.min() == parameter.max() == 0:
                parameter.normal_(0, 0.15, generator=generator)
            elif parameter.min() == parameter.max():
                parameter.uniform_(0.5, 1.5, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.05, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.05, 0.3, generator=generator)


def features(*shape: int) -> Inputs:
    return lambda: (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))),)


def token_ids(rows: int, *lengths: int) -> Inputs:
    """One tensor of ids (rows, length) for each length; 0 is padding and does not occur."""

    def make() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(rows)
        return tuple(torch.randint(1, VOCABULARY, (rows, length), generator=generator) for length in lengths)

    return make


def padded(rows: int, length: int) -> Inputs:
    """Ids and their mask, which is 0 for the last three tokens of the first row."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, -3:] = 0
    return lambda: (*token_ids(rows, length)(), mask.clone())


def of_images(build: Callable[[], nn.Module], size: int = 16, other: int = 24) -> Structure:
    return Structure(build, features(2, 3, size, size), features(3, 3, other, other))


def of_text(build: Callable[[], nn.Module]) -> Structure:
    return Structure(build, token_ids(2, 16), token_ids(3, 11))


STRUCTURES: dict[str, Structure] = {
    # streams
    "ResNet-20, option A": of_images(resnets.resnet20),
    "ResNet, basic blocks": of_images(resnets.resnet_basic, 32, 40),
    "ResNet, bottlenecks": of_images(resnets.resnet_bottleneck, 32, 40),
    "pre-activation ResNet": of_images(resnets.preactivation_resnet),
    "ResNeXt": of_images(resnets.resnext, 32, 40),
    "SE-ResNet": of_images(resnets.se_resnet),
    "RegNet": of_images(resnets.regnet, 24, 32),
    "RepVGG": of_images(resnets.repvgg, 24, 32),
    "NFNet": of_images(resnets.nfnet),
    # concatenations
    "DenseNet": of_images(concatenations.DenseNet, 32, 40),
    "GoogLeNet": of_images(concatenations.googlenet, 24, 32),
    "SqueezeNet": of_images(concatenations.squeezenet, 24, 32),
    "U-Net": of_images(partial(concatenations.UNet, nn.BatchNorm2d), 16, 22),
    "U-Net, GroupNorm": of_images(concatenations.unet_of_group_norms, 16, 22),
    "YOLO": of_images(concatenations.Yolo),
    # depthwise convolutions
    "MobileNetV2": of_images(mobile.mobilenet_v2),
    "MobileNetV3": of_images(mobile.mobilenet_v3),
    "EfficientNet": of_images(mobile.efficientnet),
    "ShuffleNetV2": of_images(mobile.ShuffleNetV2, 32, 40),
    "depthwise multiplier": of_images(mobile.depthwise_multiplier),
    "ConvNeXt": of_images(vit.convnext),
    # attention over images
    "ViT, torchvision": of_images(vit.ViT, other=16),
    "ViT, torch.nn": of_images(partial(vit.ViT, vit.torch_block), other=16),
    "ViT, timm": of_images(vit.TimmViT, other=16),
    "ViT, transformers": of_images(vit.HuggingFaceViT),
    "Swin, torchvision": of_images(vit.swin, other=12),
    "Swin, timm": of_images(partial(vit.swin, inferred=True), other=12),
    "LeViT": of_images(vit.LeViT, other=16),
    "PVT": of_images(vit.Pyramid, other=24),
    "Mixer": of_images(vit.Mixer, other=16),
    # attention over text
    "BERT": Structure(text.Bert, padded(2, 16), padded(3, 11)),
    "ALBERT": of_text(text.Albert),
    "GPT-2": of_text(text.GPT2),
    "GPT-2, classifier": of_text(partial(text.GPT2, CLASSES)),
    "Llama": of_text(text.Llama),
    "Qwen3": of_text(partial(text.Llama, tied=True, qk_norm=True)),
    "Phi-3": of_text(partial(text.Llama, packed=True)),
    "T5": Structure(text.T5, token_ids(2, 16, 9), token_ids(3, 11, 13)),
    "T5 v1.1": Structure(partial(text.T5, gated=True), token_ids(2, 16, 9), token_ids(3, 11, 13)),
    # other domains
    "gated convolutions": of_text(others.GatedConvolutions),
    "style transfer, InstanceNorm": of_images(others.instance_norms),
    "style transfer, GroupNorm": of_images(others.group_norms),
    "super-resolution": of_images(others.SuperResolution, 12, 16),
    "TCN": Structure(others.TemporalConvolutions, features(2, 5, 16), features(3, 5, 11)),
    "video": Structure(others.video, features(2, 3, 4, 16, 16), features(3, 3, 3, 12, 12)),
    # what kddp_ext trains, and spellings
    "kddp_ext's teacher": Structure(
        partial(FastTeacher, 1, CLASSES, (5, 4)), features(2, 1, 9, 9), features(3, 1, 9, 9)
    ),
    "kddp_ext's student": of_images(partial(PlainStudent, 3, 8, CLASSES, (5, 4), 6), 8, 8),
    "convolutions": of_images(spellings.conv_chain, 8, 12),
    "convolutions of one dimension": Structure(spellings.conv1d, features(2, 3, 6), features(3, 3, 6)),
    **{name: of_images(build, 6, 6) for name, build in spellings.IMAGES.items()},
    **{name: Structure(build, features(5, 6), features(3, 6)) for name, build in spellings.VECTORS.items()},
}
