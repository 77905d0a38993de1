"""Transformers over text, as the transformers library writes them."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .layers import CLASSES, VOCABULARY


def causal_mask(x):
    """0 on and below the diagonal, the most negative number above, as (length, length)."""
    return x.new_full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1)


class BertSelfAttention(nn.Module):
    """Views of stored sizes: num_attention_heads, attention_head_size, all_head_size."""

    def __init__(self, width, heads, head_size):
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, head_size
        self.all_head_size = heads * head_size
        self.query, self.key = nn.Linear(width, self.all_head_size), nn.Linear(width, self.all_head_size)
        self.value, self.dropout = nn.Linear(width, self.all_head_size), nn.Dropout(0.1)

    def transpose_for_scores(self, x):
        return x.view((*x.size()[:-1], self.num_attention_heads, self.attention_head_size)).permute(0, 2, 1, 3)

    def forward(self, x, mask):
        query, key, value = (self.transpose_for_scores(layer(x)) for layer in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        probabilities = self.dropout(F.softmax(scores + mask, dim=-1))
        context = torch.matmul(probabilities, value).permute(0, 2, 1, 3).contiguous()
        return context.view((*context.size()[:-2], self.all_head_size))


class BertLayer(nn.Module):
    """LayerNorm after each sum."""

    def __init__(self, width, hidden):
        super().__init__()
        self.attention, self.attention_output = BertSelfAttention(width, 4, 6), nn.Linear(24, width)
        self.attention_norm, self.output_norm = nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)
        self.intermediate, self.output, self.dropout = (
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
            nn.Dropout(0.1),
        )

    def forward(self, x, mask):
        x = self.attention_norm(self.dropout(self.attention_output(self.attention(x, mask))) + x)
        return self.output_norm(self.dropout(self.output(F.gelu(self.intermediate(x)))) + x)


class Bert(nn.Module):
    """Devlin et al. 2018 (arXiv:1810.04805): three embeddings, a padding mask, a pooler on the first token."""

    def __init__(self):
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, 28, padding_idx=0)
        self.position_embeddings, self.token_type_embeddings = nn.Embedding(20, 28), nn.Embedding(2, 28)
        self.register_buffer("position_ids", torch.arange(20).expand((1, -1)), persistent=False)
        self.norm, self.dropout = nn.LayerNorm(28, 1e-12), nn.Dropout(0.1)
        self.layers = nn.ModuleList([BertLayer(28, 40), BertLayer(28, 36)])
        self.pooler, self.classifier = nn.Linear(28, 32), nn.Linear(32, CLASSES)

    def forward(self, ids, attention_mask):
        x = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids))
        x = x + self.position_embeddings(self.position_ids[:, : ids.size(1)])
        x = self.dropout(self.norm(x))
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, mask)
        return self.classifier(self.dropout(torch.tanh(self.pooler(x[:, 0]))))


class Albert(nn.Module):
    """Lan et al. 2019 (arXiv:1909.11942): one layer, called several times, behind embeddings of fewer channels."""

    def __init__(self):
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(VOCABULARY, 12), nn.Embedding(20, 12)
        self.norm, self.embedding_hidden_mapping_in = nn.LayerNorm(12, 1e-12), nn.Linear(12, 28)
        self.layer, self.pooler, self.classifier = BertLayer(28, 40), nn.Linear(28, 32), nn.Linear(32, CLASSES)

    def forward(self, ids):
        positions = self.position_embeddings(torch.arange(ids.shape[1]))
        x = self.embedding_hidden_mapping_in(self.norm(self.word_embeddings(ids) + positions))
        for _ in range(3):
            x = self.layer(x, torch.zeros(()).to(x))
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


def gelu_new(x):
    """GELU of single operations."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is (inputs, outputs), and the output's size is that of an attribute."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.2), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        out = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return out.view((*x.size()[:-1], self.nf))


class GPT2Block(nn.Module):
    """Queries, keys and values of one Conv1D, split by an attribute."""

    def __init__(self, width, head_dim, hidden):
        super().__init__()
        self.split_size, self.head_dim = width, head_dim
        self.ln_1, self.c_attn, self.c_proj = nn.LayerNorm(width), Conv1D(3 * width, width), Conv1D(width, width)
        self.ln_2, self.c_fc, self.mlp_proj = nn.LayerNorm(width), Conv1D(hidden, width), Conv1D(width, hidden)
        self.dropout = nn.Dropout(0.1)

    def attention(self, x):
        query, key, value = self.c_attn(x).split(self.split_size, dim=2)
        shape = (*key.shape[:-1], -1, self.head_dim)
        query, key, value = (states.view(shape).transpose(1, 2) for states in (query, key, value))
        dropout = 0.1 if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True).transpose(1, 2)
        return self.dropout(self.c_proj(out.reshape(*out.shape[:-2], -1).contiguous()))

    def forward(self, x):
        x = self.attention(self.ln_1(x)) + x
        h = self.c_fc(self.ln_2(x))
        return x + self.dropout(self.mlp_proj(gelu_new(h)))


class GPT2(nn.Module):
    """Radford et al. 2019; a language model whose head is the embedding, or a classifier of the last token."""

    def __init__(self, classes=None):
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(VOCABULARY, 24), nn.Embedding(20, 24), nn.Dropout(0.1)
        self.h, self.ln_f = nn.Sequential(GPT2Block(24, 6, 40), GPT2Block(24, 6, 36)), nn.LayerNorm(24)
        self.head = nn.Linear(24, classes or VOCABULARY, bias=False)
        self.last_only = classes is not None
        if classes is None:
            self.head.weight = self.wte.weight

    def forward(self, ids):
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        x = self.ln_f(self.h(self.drop(self.wte(ids) + self.wpe(positions))))
        logits = self.head(x)
        return logits[torch.arange(len(ids), device=ids.device), -1] if self.last_only else logits


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019 (arXiv:1910.07467), without the library's cast to float32."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def repeat_kv(x, repeats):
    """(batch, key/value heads, length, dim) to (batch, heads, length, dim)."""
    batch, heads, length, dim = x.shape
    return x[:, :, None, :, :].expand(batch, heads, repeats, length, dim).reshape(batch, heads * repeats, length, dim)


class LlamaAttention(nn.Module):
    """Grouped queries (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions and unfused attention."""

    def __init__(self, width, heads, kv_heads, head_dim, qk_norm):
        super().__init__()
        self.head_dim, self.num_key_value_groups, self.scaling = head_dim, heads // kv_heads, head_dim**-0.5
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(head_dim) if qk_norm else nn.Identity() for _ in range(2))

    def project(self, x):
        """Queries, keys and values, each (batch, length, heads × dim)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attend(self, query, key, value, mask):
        key, value = repeat_kv(key, self.num_key_value_groups), repeat_kv(value, self.num_key_value_groups)
        weights = torch.matmul(query, key.transpose(2, 3)) * self.scaling + mask
        weights = F.dropout(F.softmax(weights, dim=-1), p=0.1, training=self.training)
        return torch.matmul(weights, value)

    def forward(self, x, cos, sin, mask):
        shape = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (states.view(shape) for states in self.project(x))
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        query, key = query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin
        out = self.attend(query, key, value.transpose(1, 2), mask).transpose(1, 2).contiguous()
        return self.o_proj(out.reshape(*x.shape[:-1], -1).contiguous())


class PackedLlamaAttention(LlamaAttention):
    """Phi-3's: slices of one layer, by the numbers of heads; fused attention repeats the key/value heads itself."""

    def __init__(self, width, heads, kv_heads, head_dim, qk_norm):
        super().__init__(width, heads, kv_heads, head_dim, qk_norm)
        self.num_heads, self.num_key_value_heads = heads, kv_heads
        self.qkv_proj = nn.Linear(width, (heads + 2 * kv_heads) * head_dim, bias=False)
        del self.q_proj, self.k_proj, self.v_proj

    def project(self, x):
        qkv, queries = self.qkv_proj(x), self.num_heads * self.head_dim
        keys = queries + self.num_key_value_heads * self.head_dim
        return qkv[..., :queries], qkv[..., queries:keys], qkv[..., keys:]

    def attend(self, query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class LlamaMLP(nn.Module):
    """SwiGLU, Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PackedLlamaMLP(nn.Module):
    """Phi-3's: chunks of one layer."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * F.silu(gate))


class Llama(nn.Module):
    """Touvron et al. 2023 (arXiv:2307.09288), with the per-head norms of Qwen3 or the packed layers of Phi-3."""

    def __init__(self, tied=False, qk_norm=False, packed=False):
        super().__init__()
        attention, mlp = (PackedLlamaAttention, PackedLlamaMLP) if packed else (LlamaAttention, LlamaMLP)
        self.embed_tokens = nn.Embedding(VOCABULARY, 20)
        self.layers = nn.ModuleList(
            nn.ModuleList([RMSNorm(20), attention(20, 6, 2, 8, qk_norm), RMSNorm(20), mlp(20, hidden)])
            for hidden in (36, 28)
        )
        self.norm, self.lm_head = RMSNorm(20), nn.Linear(20, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8), persistent=False)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        angles = positions[..., None].to(self.inv_freq.dtype) * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        cos, sin, mask = angles.cos().to(x.dtype), angles.sin().to(x.dtype), causal_mask(x)
        for input_layernorm, attention, post_attention_layernorm, mlp in self.layers:
            x = x + attention(input_layernorm(x), cos, sin, mask)
            x = x + mlp(post_attention_layernorm(x))
        return self.lm_head(self.norm(x))


class T5Attention(nn.Module):
    """Scores without a scale; a bias of an Embedding by logarithmic distance, or zeros by the number of heads."""

    def __init__(self, width, heads, head_dim, biased=False, causal=False):
        super().__init__()
        self.n_heads, self.key_value_proj_dim, self.causal = heads, head_dim, causal
        self.q, self.k = nn.Linear(width, heads * head_dim, bias=False), nn.Linear(width, heads * head_dim, bias=False)
        self.v, self.o = nn.Linear(width, heads * head_dim, bias=False), nn.Linear(heads * head_dim, width, bias=False)
        self.relative_attention_bias = nn.Embedding(16, heads) if biased else None

    def compute_bias(self, length, device, buckets=16, furthest=20):
        places = torch.arange(length, device=device)
        offset, bucket = places[None, :] - places[:, None], 0
        if self.causal:
            distance = -torch.min(offset, torch.zeros_like(offset))
        else:
            buckets //= 2
            bucket, distance = (offset > 0).to(torch.long) * buckets, torch.abs(offset)
        exact = buckets // 2
        far = torch.log(distance.clamp(min=1).float() / exact) / math.log(furthest / exact) * (buckets - exact)
        far = torch.min(exact + far.to(torch.long), torch.full_like(distance, buckets - 1))
        bucket = bucket + torch.where(distance < exact, distance, far)
        return self.relative_attention_bias(bucket).permute([2, 0, 1]).unsqueeze(0)

    def forward(self, x, memory=None, position_bias=None):
        read = x if memory is None else memory
        query = self.q(x).view(*x.shape[:-1], -1, self.key_value_proj_dim).transpose(1, 2)
        shape = (*read.shape[:-1], -1, self.key_value_proj_dim)
        key, value = self.k(read).view(shape).transpose(1, 2), self.v(read).view(shape).transpose(1, 2)
        if position_bias is None and self.relative_attention_bias is not None:
            position_bias = self.compute_bias(x.shape[1], x.device)
            if self.causal:
                position_bias = position_bias + causal_mask(x)
        elif position_bias is None:
            position_bias = x.new_zeros((1, self.n_heads, x.shape[1], read.shape[1]))
        weights = F.softmax(torch.matmul(query, key.transpose(3, 2)) + position_bias, dim=-1)
        out = torch.matmul(F.dropout(weights, p=0.1, training=self.training), value)
        return self.o(out.transpose(1, 2).contiguous().view(*x.shape[:-1], -1)), position_bias


class T5MLP(nn.Module):
    def __init__(self, width, hidden, gated):
        super().__init__()
        self.wi, self.wo = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.gate, self.dropout = nn.Linear(width, hidden, bias=False) if gated else None, nn.Dropout(0.1)

    def forward(self, x):
        h = F.relu(self.wi(x)) if self.gate is None else gelu_new(self.gate(x)) * self.wi(x)
        return self.wo(self.dropout(h))


class T5Stack(nn.Module):
    """The first block's bias serves all; a decoder also reads the encoder's output."""

    def __init__(self, embedding, hiddens, gated, decoder):
        super().__init__()
        self.embed_tokens, self.block = embedding, nn.ModuleList()
        for i, hidden in enumerate(hiddens):
            block = [RMSNorm(20), T5Attention(20, 4, 6, biased=i == 0, causal=decoder)]
            block += [RMSNorm(20), T5Attention(20, 5, 6)] if decoder else []
            self.block.append(nn.ModuleList([*block, RMSNorm(20), T5MLP(20, hidden, gated)]))
        self.final_layer_norm, self.dropout = RMSNorm(20), nn.Dropout(0.1)

    def forward(self, ids, memory=None):
        x, bias = self.dropout(self.embed_tokens(ids)), None
        for norm, attention, *cross, mlp_norm, mlp in self.block:
            out, bias = attention(norm(x), position_bias=bias)
            x = x + self.dropout(out)
            if cross:
                x = x + self.dropout(cross[1](cross[0](x), memory)[0])
            x = x + self.dropout(mlp(mlp_norm(x)))
        return self.dropout(self.final_layer_norm(x))


class T5(nn.Module):
    """Raffel et al. 2019 (arXiv:1910.10683): one embedding for all, scaled at the end; v1.1 is gated and not tied."""

    def __init__(self, gated=False):
        super().__init__()
        self.model_dim, self.tied, self.shared = 20, not gated, nn.Embedding(VOCABULARY, 20)
        stacks = ((36, 28), gated, False), ((44, 32), gated, True)
        self.encoder, self.decoder = (T5Stack(self.shared, *stack) for stack in stacks)
        self.lm_head = nn.Linear(20, VOCABULARY, bias=False)
        if self.tied:
            self.lm_head.weight = self.shared.weight

    def forward(self, ids, decoder_ids):
        x = self.decoder(decoder_ids, self.encoder(ids))
        return self.lm_head(x * self.model_dim**-0.5 if self.tied else x)
