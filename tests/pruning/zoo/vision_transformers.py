"""Transformers over patches of images, and ConvNeXt and Mixer, which share their blocks' shape."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .layers import CLASSES, Mlp, Permute, Residual, StochasticDepth

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class Block(nn.Module):
    """What mixes tokens, and an MLP; both are added to the stream, behind the modules that `after(width)` makes."""

    def __init__(self, width, mixer, hidden, after=nn.Identity):
        super().__init__()
        self.norm1, self.mixer, self.after1 = LayerNorm(width), mixer, after(width)
        self.norm2, self.mlp, self.after2 = LayerNorm(width), Mlp(width, hidden), after(width)

    def forward(self, x):
        x = x + self.after1(self.mixer(self.norm1(x)))
        return x + self.after2(self.mlp(self.norm2(x)))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention, as in torchvision."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention, self.dropout = nn.MultiheadAttention(width, heads, batch_first=True), nn.Dropout(0.1)

    def forward(self, x):
        x, _ = self.attention(query=x, key=x, value=x, need_weights=False)
        return self.dropout(x)


def torchvision_block(width, heads, hidden):
    return Block(width, SelfAttention(width, heads), hidden)


def torch_block(width, heads, hidden):
    """The block of torch.nn, whose eval mode has a fused path."""
    return nn.TransformerEncoderLayer(width, heads, hidden, 0.1, "gelu", batch_first=True, norm_first=True)


class ViT(nn.Module):
    """Dosovitskiy et al. 2020 (arXiv:2010.11929) as in torchvision: reshape by an attribute, class token, positions."""

    def __init__(self, block=torchvision_block):
        super().__init__()
        self.hidden_dim = 24
        self.conv_proj = nn.Conv2d(3, 24, 4, 4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 24))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, 24) * 0.02)
        self.layers = nn.Sequential(block(24, 4, 40), block(24, 4, 36))
        self.ln, self.head = LayerNorm(24), nn.Linear(24, CLASSES)

    def forward(self, x):
        n, _, h, w = x.shape
        x = self.conv_proj(x).reshape(n, self.hidden_dim, (h // 4) * (w // 4)).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1) + self.pos_embedding
        return self.head(self.ln(self.layers(x))[:, 0])


class LayerScale(nn.Module):
    """Touvron et al. 2021 (arXiv:2103.17239)."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x):
        return x * self.gamma


class PackedAttention(nn.Module):
    """timm's: one Linear layer for queries, keys and values, per-head norms, and fused attention."""

    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, head_dim, heads * head_dim
        self.qkv, self.proj = nn.Linear(width, self.attn_dim * 3), nn.Linear(self.attn_dim, width)
        self.q_norm, self.k_norm = LayerNorm(head_dim), LayerNorm(head_dim)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).reshape(b, n, self.attn_dim))


def scaled(width):
    """LayerScale and stochastic depth in front of each sum."""
    return nn.Sequential(LayerScale(width), StochasticDepth())


class TimmViT(nn.Module):
    """Dosovitskiy et al. 2020 as in timm; the heads are wider than the stream and the tokens are averaged."""

    def __init__(self):
        super().__init__()
        self.proj, self.pos_embed = nn.Conv2d(3, 20, 4, 4), nn.Parameter(torch.randn(1, 16, 20) * 0.02)
        blocks = (Block(20, PackedAttention(20, 4, 6), hidden, scaled) for hidden in (40, 36))
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), LayerNorm(20), nn.Linear(20, CLASSES)

    def forward(self, x):
        x = self.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class SeparateAttention(nn.Module):
    """transformers' ViT: three Linear layers, views that infer the number of heads, unfused attention."""

    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.head_dim, self.scaling = head_dim, head_dim**-0.5
        self.q_proj, self.k_proj = nn.Linear(width, heads * head_dim), nn.Linear(width, heads * head_dim)
        self.v_proj, self.o_proj = nn.Linear(width, heads * head_dim), nn.Linear(heads * head_dim, width)

    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.head_dim)
        query = self.q_proj(x).view(shape).transpose(1, 2)
        key = self.k_proj(x).view(shape).transpose(1, 2)
        value = self.v_proj(x).view(shape).transpose(1, 2)
        weights = F.softmax(torch.matmul(query, key.transpose(2, 3)) * self.scaling, dim=-1)
        weights = F.dropout(weights, p=0.1, training=self.training)
        out = torch.matmul(weights, value).transpose(1, 2).contiguous()
        return self.o_proj(out.reshape(*x.shape[:-1], -1).contiguous())


class HuggingFaceViT(nn.Module):
    """Dosovitskiy et al. 2020 as in transformers, whose positions are interpolated for images of other sizes."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 28))
        self.projection, self.position_embeddings = nn.Conv2d(3, 28, 4, 4), nn.Parameter(torch.randn(1, 17, 28))
        self.layer = nn.Sequential(*(Block(28, SeparateAttention(28, 4, 6), hidden) for hidden in (40, 36)))
        self.layernorm, self.classifier = LayerNorm(28), nn.Linear(28, CLASSES)

    def positions(self, x, height, width):
        if x.shape[1] == self.position_embeddings.shape[1]:
            return self.position_embeddings
        dim = x.shape[-1]
        patches = self.position_embeddings[:, 1:].reshape(1, 4, 4, dim).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(height // 4, width // 4), mode="bicubic", align_corners=False)
        return torch.cat((self.position_embeddings[:, :1], patches.permute(0, 2, 3, 1).view(1, -1, dim)), dim=1)

    def forward(self, images):
        x = self.projection(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self.positions(x, *images.shape[2:])
        return self.classifier(self.layernorm(self.layer(x))[:, 0, :])


def relative_positions(size):
    """The offset of each pair of cells of a square, as (pairs, pairs, 2)."""
    cells = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    return (cells[:, :, None] - cells[:, None, :]).permute(1, 2, 0)


class WindowAttention(nn.Module):
    """torchvision's attention within shifted windows: heads of `width // heads`, functional linear layers.

    timm infers the size of a head instead.
    """

    def __init__(self, width, heads, window, shift, inferred):
        super().__init__()
        self.num_heads, self.window, self.shift, self.inferred = heads, window, shift, inferred
        self.scale = (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, width * 3), nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        offsets = relative_positions(window) + window - 1
        index = offsets[..., 0] * (2 * window - 1) + offsets[..., 1]
        self.register_buffer("relative_position_index", index.flatten())

    def bias(self):
        table = self.relative_position_bias_table[self.relative_position_index]
        return table.view(self.window**2, self.window**2, -1).permute(2, 0, 1).contiguous().unsqueeze(0)

    def mask(self, x, height, width):
        """−100 between cells of a window that the shift has brought together."""
        w = self.window
        regions, parts = x.new_zeros((height, width)), ((0, -w), (-w, -self.shift), (-self.shift, None))
        for i, rows in enumerate(parts):
            for j, columns in enumerate(parts):
                regions[slice(*rows), slice(*columns)] = 3 * i + j
        regions = regions.view(height // w, w, width // w, w).permute(0, 2, 1, 3).reshape(-1, w * w)
        regions = regions.unsqueeze(1) - regions.unsqueeze(2)
        return regions.masked_fill(regions != 0, -100.0).masked_fill(regions == 0, 0.0)

    def attend(self, x, mask):
        """Over windows (windows of all samples, tokens, channels)."""
        n, t, c = x.shape
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        if self.inferred:
            q, k, v = qkv.reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            q = q * self.scale
        else:
            qkv = qkv.reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0] * (c // self.num_heads) ** -0.5, qkv[1], qkv[2]
        attn = q.matmul(k.transpose(-2, -1)) + self.bias()
        if mask is not None:
            attn = attn.view(n // len(mask), len(mask), self.num_heads, t, t) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, t, t)
        x = F.softmax(attn, dim=-1).matmul(v).transpose(1, 2).reshape(n, t, -1 if self.inferred else c)
        return F.linear(x, self.proj.weight, self.proj.bias)

    def forward(self, x):
        b, h, w, c = x.shape
        side, shift = self.window, self.shift
        x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        if side >= x.shape[1]:
            shift = 0
        mask = None
        if shift:
            x, mask = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2)), self.mask(x, rows * side, columns * side)
        x = x.view(b, rows, side, columns, side, c)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(b * rows * columns, side * side, c)
        x = self.attend(x, mask).view(b, rows, columns, side, side, c)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(b, rows * side, columns * side, c)
        if shift:
            x = torch.roll(x, shifts=(shift, shift), dims=(1, 2))
        return x[:, :h, :w, :].contiguous()


class PatchMerging(nn.Module):
    """The four cells of a square side by side."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm, self.reduction = LayerNorm(4 * inputs), nn.Linear(4 * inputs, outputs, bias=False)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[-2] % 2, 0, x.shape[-3] % 2))
        x0, x1 = x[..., 0::2, 0::2, :], x[..., 1::2, 0::2, :]
        x2, x3 = x[..., 0::2, 1::2, :], x[..., 1::2, 1::2, :]
        return self.reduction(self.norm(torch.cat([x0, x1, x2, x3], -1)))


def swin(inferred=False):
    """Liu et al. 2021 (arXiv:2103.14030); channels are last until the head."""

    def block(width, heads, window, shift, hidden):
        attention = WindowAttention(width, heads, window, shift, inferred)
        return Block(width, attention, hidden, lambda _: StochasticDepth())

    return nn.Sequential(
        *(nn.Conv2d(3, 24, 2, 2), Permute(0, 2, 3, 1), LayerNorm(24)),
        *(block(24, 4, 4, 0, 28), block(24, 4, 4, 2, 36), PatchMerging(24, 40)),
        *(block(40, 5, 2, 0, 44), block(40, 5, 2, 1, 52), LayerNorm(40)),
        *(Permute(0, 3, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(40, CLASSES)),
    )


class ReducedAttention(nn.Module):
    """timm's for pyramids: keys and values of fewer positions; the heads are as wide together as the stream."""

    def __init__(self, width, heads):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.sr, self.norm = nn.Conv2d(width, width, 2, 2), nn.LayerNorm(width)

    def forward(self, x):
        b, n, c = x.shape
        side = int(n**0.5)
        q = self.q(x).reshape(b, n, self.num_heads, -1).permute(0, 2, 1, 3)
        x = self.sr(x.permute(0, 2, 1).reshape(b, c, side, side)).reshape(b, c, -1).permute(0, 2, 1)
        kv = self.kv(self.norm(x)).reshape(b, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, *kv.unbind(0))
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Pyramid(nn.Module):
    """Wang et al. 2021 (arXiv:2106.13797), PVT v2, of one stage."""

    def __init__(self):
        super().__init__()
        self.proj, self.norm, self.head = nn.Conv2d(3, 24, 4, 4), LayerNorm(24), nn.Linear(24, CLASSES)
        self.blocks = nn.Sequential(*(Block(24, ReducedAttention(24, 4), hidden) for hidden in (40, 36)))

    def forward(self, x):
        x = self.blocks(self.proj(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(dim=1))


class LinearNorm(nn.Sequential):
    """BatchNorm1d over all tokens."""

    def __init__(self, inputs, outputs):
        super().__init__(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs))

    def forward(self, x):
        x = self[0](x)
        return self[1](x.flatten(0, 1)).reshape_as(x)


class LeViTAttention(nn.Module):
    """Values are wider than keys; biases by distance are cached in eval mode; a stride leaves fewer queries."""

    def __init__(self, inputs, outputs, heads, key_dim, val_dim, size, stride=1):
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim, self.scale = heads, key_dim, val_dim, key_dim**-0.5
        self.val_attn_dim, self.size, self.stride = val_dim * heads, size, stride
        if stride == 1:
            self.qkv = LinearNorm(inputs, self.val_attn_dim + 2 * key_dim * heads)
        else:
            self.kv = LinearNorm(inputs, self.val_attn_dim + key_dim * heads)
            self.q = LinearNorm(inputs, key_dim * heads)
        self.proj = nn.Sequential(nn.Hardswish(), LinearNorm(self.val_attn_dim, outputs))
        self.attention_biases = nn.Parameter(torch.zeros(heads, size**2))
        distance = relative_positions(size).abs().view(size, size, size**2, 2)[::stride, ::stride].flatten(0, 1)
        index = distance[..., 0] * size + distance[..., 1]
        self.register_buffer("attention_bias_idxs", index, persistent=False)
        self.attention_bias_cache = {}

    @torch.no_grad()
    def train(self, mode=True):
        if mode:
            self.attention_bias_cache = {}
        return super().train(mode)

    def biases(self, device):
        if self.training:
            return self.attention_biases[:, self.attention_bias_idxs]
        if str(device) not in self.attention_bias_cache:
            self.attention_bias_cache[str(device)] = self.attention_biases[:, self.attention_bias_idxs]
        return self.attention_bias_cache[str(device)]

    def forward(self, x):
        b, n, c = x.shape
        if self.stride == 1:
            sizes = [self.key_dim, self.key_dim, self.val_dim]
            q, k, v = self.qkv(x).view(b, n, self.num_heads, -1).split(sizes, dim=3)
        else:
            k, v = self.kv(x).view(b, n, self.num_heads, -1).split([self.key_dim, self.val_dim], dim=3)
            x = x.view(b, self.size, self.size, c)[:, :: self.stride, :: self.stride].reshape(b, -1, c)
            q = self.q(x).view(b, -1, self.num_heads, self.key_dim)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        attn = q @ k * self.scale + self.biases(x.device)
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, -1, self.val_attn_dim)
        return self.proj(x)


class LeViT(nn.Module):
    """Graham et al. 2021 (arXiv:2104.01136) as in timm: a convolutional stem, no LayerNorm."""

    def __init__(self):
        super().__init__()

        def conv(inputs, outputs):
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs))

        def mlp(width, hidden):
            layers = LinearNorm(width, hidden), nn.Hardswish(), LinearNorm(hidden, width)
            return Residual(nn.Sequential(*layers), in_place=False)

        self.stem = nn.Sequential(conv(3, 8), nn.Hardswish(), conv(8, 20))
        self.stages = nn.Sequential(
            *(Residual(LeViTAttention(20, 20, 4, 6, 10, 4), in_place=False), mlp(20, 36)),
            *(LeViTAttention(20, 28, 5, 6, 14, 4, stride=2), mlp(28, 44)),
            *(Residual(LeViTAttention(28, 28, 4, 8, 12, 2), in_place=False), mlp(28, 52)),
        )
        self.bn, self.head = nn.BatchNorm1d(28), nn.Linear(28, CLASSES)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.bn(self.stages(x).mean(dim=1)))


class LayerNorm2d(nn.LayerNorm):
    """Over channels that come first."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """torchvision's: depthwise convolution, Linear layers over channels that come last, LayerScale as (C, 1, 1)."""

    def __init__(self, width, hidden):
        super().__init__()
        mlp = LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.block = nn.Sequential(depthwise, Permute(0, 2, 3, 1), *mlp, Permute(0, 3, 1, 2))
        self.layer_scale, self.stochastic_depth = nn.Parameter(torch.ones(width, 1, 1) * 1e-6), StochasticDepth()

    def forward(self, x):
        result = self.stochastic_depth(self.layer_scale * self.block(x))
        result += x
        return result


def convnext():
    """Liu et al. 2022 (arXiv:2201.03545)."""
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 4, 4), LayerNorm2d(12, 1e-6), ConvNeXtBlock(12, 40), ConvNeXtBlock(12, 36)),
        *(LayerNorm2d(12, 1e-6), nn.Conv2d(12, 20, 2, 2), ConvNeXtBlock(20, 44)),
        *(nn.AdaptiveAvgPool2d(1), LayerNorm2d(20, 1e-6), nn.Flatten(1), nn.Linear(20, CLASSES)),
    )


class TokenMlp(Mlp):
    """Mixes tokens instead of channels."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Mixer(nn.Module):
    """Tolstikhin et al. 2021 (arXiv:2105.01601), as in timm."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 20, 4, 4), LayerNorm(20), nn.Linear(20, CLASSES)
        self.blocks = nn.Sequential(Block(20, TokenMlp(16, 10), 36), Block(20, TokenMlp(16, 12), 44))

    def forward(self, x):
        x = self.blocks(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(dim=1))
