"""The groups of every structure: the name, the width and, where there are several, the number of writers."""

import textwrap


def _table(text):
    """The groups by structure. Indented lines continue the one before."""
    lines = textwrap.dedent(text).strip().replace("\n    ", " ").splitlines()
    entries = (line.split(":") for line in lines)
    return {name: [group.strip() for group in groups.split(",") if group.strip()] for name, groups in entries}


GROUPS = _table(
    """
    ResNet-20, option A: 0.0 8x10, 1.branch.0.0 8, 2.branch.0.0 8, 3.branch.0.0 8, 4.branch.0.0 12,
        5.branch.0.0 12, 6.branch.0.0 12, 7.branch.0.0 20, 8.branch.0.0 20, 9.branch.0.0 20
    ResNet, basic blocks: 0.0.0 8x2, 1.branch.0.0 8, 2.branch.0.0 12, 2.branch.1.0 12x3, 3.branch.0.0 12,
        4.branch.0.0 20, 4.branch.1.0 20x2
    ResNet, bottlenecks: 0.0.0 8, 1.branch.0.0 6, 1.branch.1.0 6, 1.branch.2.0 24x3, 2.branch.0.0 6,
        2.branch.1.0 6, 3.branch.0.0 10, 3.branch.1.0 10, 3.branch.2.0 28x2
    pre-activation ResNet: 0 8x2, 1.conv1 8, 2.shortcut.0 12x3, 2.conv1 12, 3.conv1 12, 4.shortcut.0 20x2,
        4.conv1 20
    ResNeXt: 0.0.0 8, 1.branch.0.0 4, 1.branch.1.0 4, 1.branch.2.0 20x3, 2.branch.0.0 4, 2.branch.1.0 4,
        3.branch.0.0 6, 3.branch.1.0 6, 3.branch.2.0 28x2
    SE-ResNet: 0.0 8x3, 1.branch.0.0 14, 1.branch.2.fc.0 5
    RegNet: 0.0 12, 1.branch.0.0 5, 1.branch.1.0 5x2, 1.branch.2.fc1 3, 1.branch.3.0 24x3, 2.branch.0.0 6,
        2.branch.1.0 6x2, 2.branch.2.fc1 7, 3.branch.0.0 7, 3.branch.1.0 7x2, 3.branch.2.fc1 5,
        3.branch.3.0 32x2
    RepVGG: 0.rbr_dense.0 8x2, 1.rbr_dense.0 12x4, 3.rbr_dense.0 20x2
    NFNet: 1.gate.fc1 5, 2.gate.fc1 5, 3 60
    DenseNet: features.0.0 8, features.2.0.0.2 10, features.2.0.1.2 6, features.2.1.0.2 10, features.2.1.1.2 6,
        features.2.2.0.2 10, features.2.2.1.2 6, features.3.2 13, features.5.0.0.2 9, features.5.0.1.2 5,
        features.5.1.0.2 9, features.5.1.1.2 5
    GoogLeNet: 0.0 8, 2.branches.0.0 6, 2.branches.1.0.0 5, 2.branches.1.1.0 10, 2.branches.2.0.0 4,
        2.branches.2.1.0 7, 2.branches.3.1.0 3, 3.branches.0.0 9, 4.branches.0.0 11, 4.branches.1.0.0 12,
        4.branches.1.1.branches.0 8, 4.branches.1.1.branches.1 8, 4.branches.2.1.0 5
    SqueezeNet: 0 8, 2.0 4, 2.2.branches.0.0 6, 2.2.branches.1.0 10, 4.0 5, 4.2.branches.0.0 9,
        4.2.branches.1.0 11
    U-Net: inc.0 4, inc.3 8, down1.0 10, down1.3 12, down2.0 18, down2.3 20, up1 14, conv1.0 22, conv1.3 16,
        up2 6, conv2.0 24, conv2.3 10
    U-Net, GroupNorm: inc.0 2, inc.3 4, down1.0 5, down1.3 6, down2.0 9, down2.3 10, up1 14, conv1.0 11,
        conv1.3 8, up2 6, conv2.0 12, conv2.3 5
    YOLO: fine.0.0 8, fine.1.cv1.0 6x3, fine.1.m.0.0.0 4, fine.1.m.1.0.0 5, fine.1.cv2.0 14, coarse.0.0 20,
        coarse.1.cv1.0 9x2, coarse.1.m.0.0.0 4, coarse.1.cv2.0 18, neck.cv1.0 7x2, neck.m.0.0.0 4, neck.cv2.0 16
    MobileNetV2: 0.0 8, 1.1.0 6, 2.0.0 20, 2.2.0 10x2, 3.branch.0.0 28, 4.0 24
    MobileNetV3: 0.0 8x3, 1.branch.1.fc1 4, 2.0.0 20, 2.2.0 12x2, 3.branch.0.0 28x2, 3.branch.2.fc1 7, 4.0 32,
        5.2 24
    EfficientNet: 0.0 10x2, 1.1.fc1 3, 1.2.0 8, 2.0.0 20x2, 2.2.conv_reduce 2, 2.3.0 12x2, 3.branch.0.0 28x2,
        3.branch.2.conv_reduce 3, 4.0 32
    ShuffleNetV2: features.0.0 6, features.2.branch1.1.0 2x4, features.2.branch2.0.0 8,
        features.3.branch2.0.0 8, features.4.branch2.0.0 8, features.5.branch1.1.0 6x3,
        features.5.branch2.0.0 12, features.6.branch2.0.0 12, features.7.0 20
    depthwise multiplier: 0.0 8, 2.0 12, 4.0 20
    ConvNeXt: 2.block.3 40, 3.block.3 36, 6.block.3 44
    ViT, torchvision: layers.0.mixer.attention.in_proj_weight 4, layers.0.mlp.0 40,
        layers.1.mixer.attention.in_proj_weight 4, layers.1.mlp.0 36
    ViT, torch.nn: layers.0.self_attn.in_proj_weight 4, layers.0.linear1 40,
        layers.1.self_attn.in_proj_weight 4, layers.1.linear1 36
    ViT, timm: blocks.0.mixer.qkv 4, blocks.0.mlp.0 40, blocks.1.mixer.qkv 4, blocks.1.mlp.0 36
    ViT, transformers: layer.0.mixer.q_proj 4x3, layer.0.mlp.0 40, layer.1.mixer.q_proj 4x3, layer.1.mlp.0 36
    Swin, torchvision: 3.mlp.0 28, 4.mlp.0 36, 6.mlp.0 44, 7.mlp.0 52
    Swin, timm: 3.mlp.0 28, 4.mlp.0 36, 6.mlp.0 44, 7.mlp.0 52
    LeViT: stem.0.0 8, stem.2.0 20x3, stages.0.branch.qkv.0 4, stages.1.branch.0.0 36, stages.2.kv.0 5x2,
        stages.2.proj.1.0 28x4, stages.3.branch.0.0 44, stages.4.branch.qkv.0 4, stages.5.branch.0.0 52
    PVT: blocks.0.mlp.0 40, blocks.1.mlp.0 36
    Mixer: blocks.0.mixer.0 10, blocks.0.mlp.0 36, blocks.1.mixer.0 12, blocks.1.mlp.0 44
    BERT: layers.0.attention.query 4x3, layers.0.intermediate 40, layers.1.attention.query 4x3,
        layers.1.intermediate 36, pooler 32
    ALBERT: layer.attention.query 4x3, layer.intermediate 40, pooler 32
    GPT-2: h.0.c_attn 4, h.0.c_fc 40, h.1.c_attn 4, h.1.c_fc 36
    GPT-2, classifier: h.0.c_attn 4, h.0.c_fc 40, h.1.c_attn 4, h.1.c_fc 36
    Llama: embed_tokens 20x5, layers.0.1.q_proj 2x3, layers.0.3.gate_proj 36x2, layers.1.1.q_proj 2x3,
        layers.1.3.gate_proj 28x2
    Qwen3: embed_tokens 20x5, layers.0.1.q_proj 2x3, layers.0.3.gate_proj 36x2, layers.1.1.q_proj 2x3,
        layers.1.3.gate_proj 28x2
    Phi-3: embed_tokens 20x5, layers.0.3.gate_up_proj 36, layers.1.3.gate_up_proj 28
    T5: shared 20x11, encoder.block.0.1.q 4x7, encoder.block.0.3.wi 36, encoder.block.1.3.wi 28,
        decoder.block.0.1.q 4x7, decoder.block.0.3.q 5x3, decoder.block.0.5.wi 44, decoder.block.1.3.q 5x3,
        decoder.block.1.5.wi 32
    T5 v1.1: shared 20x11, encoder.block.0.1.q 4x7, encoder.block.0.3.gate 36x2, encoder.block.1.3.gate 28x2,
        decoder.block.0.1.q 4x7, decoder.block.0.3.q 5x3, decoder.block.0.5.gate 44x2, decoder.block.1.3.q 5x3,
        decoder.block.1.5.gate 32x2
    gated convolutions: embedding 12, fc1 10x2, convs.1 14
    style transfer, InstanceNorm: 0.1 8, 2.1 12x2, 4.branch.0.1 20, 5.conv 24
    style transfer, GroupNorm: 0.1 4, 2.1 4x2, 4.branch.0.1 4, 5.conv 4
    super-resolution: head 12x3, blocks.0.0 16, blocks.1.0 20, conv 10
    TCN: first 8x2, blocks.0.net.0 10, blocks.1.net.0 16, blocks.1.net.4 12x3, blocks.2.net.0 14
    video: 0.0 8, 0.3 12x2, 2.branch.0.0 14, 2.branch.0.3 10, 2.branch.2.0 18, 4.0 16, 4.3 20
    kddp_ext's teacher: whitening 8, blocks.0.layers.0 5, blocks.0.layers.4 5, blocks.1.layers.0 4,
        blocks.1.layers.4 4
    kddp_ext's student: features.0 5, features.4 4, hidden 6
    convolutions: 0 5, 4 4, 8 6
    convolutions of one dimension: 0 5, 3 4
    permuted flatten: conv 5
    flatten: 0 5
    flatten, norm: 0 5
    channels last: 0 5
    no activation: 0 8
    without bias: 0 8
    norm before: 0 8
    norms on both sides: 0 8
    norm without running statistics: 0 8
    norm without batch counter: 0 8
    a slope for each: 0 8
    one slope: 0 8
    activations: 0 8
    other activations: 0 8
    nested: 1.0 8, 1.2 3
    one neuron: 0 1
    functional: first 8, second 7
    two heads: first 8
    keeps its shape: first 8
    swish by hand: first 8
    casts: first 8
    masked: first 8
    """
)

# Those that differ where neurons that are normalised together are removed too, with streams="all".
WITH_NORMS = _table(
    """
    ConvNeXt: 0 12x3, 2.block.3 40, 3.block.3 36, 5 20x2, 6.block.3 44
    ViT, torchvision: conv_proj 24x5, layers.0.mixer.attention.in_proj_weight 4, layers.0.mlp.0 40,
        layers.1.mixer.attention.in_proj_weight 4, layers.1.mlp.0 36
    ViT, torch.nn: conv_proj 24x5, layers.0.self_attn.in_proj_weight 4, layers.0.linear1 40,
        layers.1.self_attn.in_proj_weight 4, layers.1.linear1 36
    ViT, timm: proj 20x5, blocks.0.mixer.qkv 4, blocks.0.mlp.0 40, blocks.1.mixer.qkv 4, blocks.1.mlp.0 36
    ViT, transformers: projection 28x5, layer.0.mixer.q_proj 4x3, layer.0.mlp.0 40, layer.1.mixer.q_proj 4x3,
        layer.1.mlp.0 36
    Mixer: stem 20x3, blocks.0.mixer.0 10, blocks.0.mlp.0 36, blocks.1.mixer.0 12, blocks.1.mlp.0 44
    BERT: word_embeddings 28x7, layers.0.attention.query 4x3, layers.0.intermediate 40,
        layers.1.attention.query 4x3, layers.1.intermediate 36, pooler 32
    PVT: proj 4x11, blocks.0.mlp.0 40, blocks.1.mlp.0 36
    NFNet: 0 8, 1.downsample.1 12x5, 1.conv1 3, 1.conv2 3, 1.gate.fc1 5, 2.conv1 4, 2.conv2 4, 2.gate.fc1 5, 3 60
    ALBERT: position_embeddings 12x2, embedding_hidden_mapping_in 28x3, layer.attention.query 4x3,
        layer.intermediate 40, pooler 32
    GPT-2: wte 24x6, h.0.c_attn 4, h.0.c_fc 40, h.1.c_attn 4, h.1.c_fc 36
    GPT-2, classifier: wte 24x6, h.0.c_attn 4, h.0.c_fc 40, h.1.c_attn 4, h.1.c_fc 36
    """
)
