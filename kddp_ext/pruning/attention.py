"""nn.MultiheadAttention with any number of heads.

The forward of nn.MultiheadAttention needs embed_dim = heads · head_dim, so it cannot lose a head. The subclass here has
the same parameters and computes the same function, with as many heads as its weights have.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose number of heads is that of its weights; `head_dim` stays."""

    # TransformerEncoderLayer asks for it before it takes a fused path that does not call this module.
    _qkv_same_embed_dim = property(lambda self: False)

    @property
    def embed_dim(self) -> int:
        """Present number of channels of the query and of the output."""
        return self.out_proj.weight.shape[0]

    @property
    def num_heads(self) -> int:
        """Present number of heads."""
        return self.out_proj.weight.shape[1] // int(self.head_dim)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickled model needs this package only if it has lost heads or channels."""
        if self.__dict__["embed_dim"] == self.embed_dim and self.__dict__["num_heads"] == self.num_heads:
            return copyreg._reconstructor, (nn.MultiheadAttention, object, None), self.__dict__  # type: ignore[attr-defined]
        return super().__reduce_ex__(protocol)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As that of nn.MultiheadAttention. `is_causal` is only a hint there, and is not needed."""
        batched = query.dim() == 3
        projected = self._project(query, key, value)
        if not batched:
            projected = tuple(each.unsqueeze(0) for each in projected)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            projected = tuple(each.transpose(0, 1) for each in projected)
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in projected)
        mask = _combined_mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout)
            result = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        result = self.out_proj(result.transpose(1, 2).flatten(2))
        if not batched:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return result if self.batch_first else result.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v before they are split into heads."""
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        return tuple(F.linear(*each) for each in zip(inputs, weights, biases, strict=True))


def _combined_mask(attn_mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
    """Both masks as values that are added to the scores, (N or 1, heads or 1, L or 1, S)."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (len(like), -1)) if attn_mask.dim() == 3 else attn_mask)
    if padding is not None:
        masks.append(padding[:, None, None])
    for index, mask in enumerate(masks):
        if mask.dtype == torch.bool:
            masks[index] = like.new_zeros(()).masked_fill(mask, -torch.inf)
    return None if not masks else sum(masks[1:], masks[0])


@contextmanager
def with_removable_heads(*models: nn.Module) -> Iterator[None]:
    """Give each nn.MultiheadAttention of the models the class above; after an error inside, the class is as before."""
    changed = [
        module
        for model in models
        for module in model.modules()
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn
    ]
    try:
        for module in changed:
            module.__class__ = MultiheadAttention
        yield
    except BaseException:
        for module in changed:
            module.__class__ = nn.MultiheadAttention
        raise
