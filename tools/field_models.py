"""The models that tools/coverage_of_models.py measures: of torchvision, timm and transformers, with random weights.

Nothing is downloaded. Models have the libraries' own defaults, except the language models whose default configuration
has billions of parameters: those have four layers of width 512.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_CLASSES, TEXT_CLASSES = 1000, 10
CHANNELS = 3
IMAGES, SEQUENCES, TOKENS = 2, 8, 32
LARGER_BY = 32  # pixels
LONGER_BY = 9  # tokens

TORCHVISION = (
    "alexnet vgg11_bn vgg16 resnet18 resnet50 wide_resnet50_2 resnext50_32x4d densenet121 googlenet inception_v3 "
    "squeezenet1_1 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet1_0 shufflenet_v2_x1_0 efficientnet_b0 "
    "efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny vit_b_16 swin_t maxvit_t"
)
TIMM = (
    "repvgg_a0 levit_128s vit_small_patch16_224 deit3_small_patch16_224 mixer_s32_224 resmlp_12_224 poolformer_s12 "
    "convnextv2_atto convmixer_768_32 mobilevit_s mobileone_s0 ghostnet_100 dla34 hrnet_w18_small cspresnet50 "
    "ese_vovnet19b_dw res2net50_26w_4s rexnet_100 pvt_v2_b0 eva02_tiny_patch14_224 tf_efficientnetv2_b0 skresnet18 "
    "resnetv2_50 nfnet_l0"
)

# The class, and what differs from its configuration's defaults.
_SMALL = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 8000}
_LLAMA = {**_SMALL, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1408, "pad_token_id": 0}
_BLOOM = {"hidden_size": 512, "n_layer": 4, "n_head": 8, "vocab_size": 8000, "pad_token_id": 0}
_MIXTRAL = {**_LLAMA, "num_local_experts": 4}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertForSequenceClassification", {}),
    "Roberta": ("RobertaForSequenceClassification", {}),
    "DistilBert": ("DistilBertForSequenceClassification", {}),
    "Electra": ("ElectraForSequenceClassification", {}),
    "Albert": ("AlbertForSequenceClassification", {**_SMALL, "intermediate_size": 2048}),
    "Deberta-v2": ("DebertaV2ForSequenceClassification", {**_SMALL, "intermediate_size": 2048}),
    "GPT-2": ("GPT2ForSequenceClassification", {"pad_token_id": 0}),
    "GPT-NeoX": ("GPTNeoXForSequenceClassification", {**_SMALL, "intermediate_size": 2048, "pad_token_id": 0}),
    "OPT": ("OPTForSequenceClassification", {}),
    "Bloom": ("BloomForSequenceClassification", _BLOOM),
    "Llama": ("LlamaForSequenceClassification", _LLAMA),
    "Mistral": ("MistralForSequenceClassification", _LLAMA),
    "Mixtral": ("MixtralForSequenceClassification", _MIXTRAL),
    "Qwen3": ("Qwen3ForSequenceClassification", _LLAMA),
    "Gemma": ("GemmaForSequenceClassification", _LLAMA),
    "Phi": ("PhiForSequenceClassification", {**_SMALL, "intermediate_size": 2048, "pad_token_id": 0}),
    "Phi-3": ("Phi3ForSequenceClassification", {**_SMALL, "intermediate_size": 1408, "pad_token_id": 0}),
    "T5": ("T5ForConditionalGeneration", {}),
    "ViT": ("ViTForImageClassification", {}),
    "DeiT": ("DeiTForImageClassification", {}),
    "Swin": ("SwinForImageClassification", {}),
    "Dinov2": ("Dinov2ForImageClassification", {}),
}

Inputs = tuple[tuple[Tensor, ...], dict[str, Tensor]]  # positional and keyword arguments of the forward pass


@dataclass(frozen=True)
class FieldModel:
    """A model of a library.

    `inputs(seed, other)` are random arguments of its forward pass; with `other` they have another shape: another number
    of samples, and larger images or longer sequences.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, bool], Inputs]

    def build(self) -> nn.Module:
        """The model with the same random weights at each call."""
        torch.manual_seed(0)
        return self.make()


def _images(size: int) -> Callable[[int, bool], Inputs]:
    def inputs(seed: int, other: bool) -> Inputs:
        side = size + LARGER_BY * other
        shape = (IMAGES + other, CHANNELS, side, side)
        return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)),), {}

    return inputs


def _tokens(vocabulary: int, *, decoder: bool) -> Callable[[int, bool], Inputs]:
    def inputs(seed: int, other: bool) -> Inputs:
        shape = (SEQUENCES + other, TOKENS + LONGER_BY * other)
        generator = torch.Generator().manual_seed(seed)
        # Low numbers are special tokens, such as padding.
        tokens, others = (torch.randint(10, vocabulary, shape, generator=generator) for _ in range(2))
        return (tokens,), {"decoder_input_ids": others} if decoder else {}

    return inputs


def _of_torchvision(name: str) -> FieldModel:
    # As in Torch-Pruning's example: without the auxiliary classifiers, which are used in training only.
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}

    def make() -> nn.Module:
        return getattr(importlib.import_module("torchvision.models"), name)(weights=None, **options)

    return FieldModel(name, "torchvision", make, _images(299 if name == "inception_v3" else 224))


def _of_timm(name: str) -> FieldModel:
    timm = importlib.import_module("timm")

    def make() -> nn.Module:
        return timm.create_model(name, pretrained=False)

    return FieldModel(name, "timm", make, _images(timm.get_pretrained_cfg(name).input_size[-1]))


def _of_transformers(name: str) -> FieldModel:
    kind = getattr(importlib.import_module("transformers"), TRANSFORMERS[name][0])
    config = kind.config_class(**TRANSFORMERS[name][1])
    images = getattr(config, "image_size", None)
    config.num_labels = IMAGE_CLASSES if images else TEXT_CLASSES
    inputs = _images(images) if images else _tokens(config.vocab_size, decoder=name == "T5")
    return FieldModel(name, "transformers", lambda: kind(config), inputs)


def names() -> Iterator[str]:
    yield from (*TORCHVISION.split(), *TIMM.split(), *TRANSFORMERS)


def find(name: str) -> FieldModel:
    """The model of this name; a KeyError where there is none."""
    if name in TORCHVISION.split():
        return _of_torchvision(name)
    return _of_timm(name) if name in TIMM.split() else _of_transformers(name)
