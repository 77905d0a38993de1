"""What each aten operation does to the labels of the tensors that it reads.

An operation that only moves entries is run on the labels themselves. An elementwise operation makes labels equal. The
others have a handler each; an operation without one freezes everything that it reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kddp_ext.pruning.tracing.flow import NeuronFlow, used_operations
from kddp_ext.pruning.tracing.operations import elementwise, layers, movements, normalisation
from kddp_ext.pruning.tracing.recording import Operation


def _factory(flow: NeuronFlow, operation: Operation) -> None:
    """zeros, empty, rand and similar: all entries are alike, and sizes may follow from other tensors."""
    for output in operation.outputs:
        flow.labels.set(output, [flow.labels.new(size) for size in output.shape])


Handler = Callable[[NeuronFlow, Operation], None]

FACTORIES = """
    zeros ones full empty empty_strided empty_permuted new_zeros new_ones new_empty new_full new_empty_strided
    rand randn scalar_tensor
""".split()  # noqa: SIM905 - a list would be a page long
_POINTWISE = """
    _to_copy detach alias lift_fresh copy fill zero hardswish _prelu_kernel log_sigmoid_forward
    native_dropout dropout bernoulli uniform normal exponential
    zeros_like ones_like empty_like full_like rand_like randn_like
""".split()  # noqa: SIM905
_MOVEMENTS = """
    view _unsafe_view reshape permute transpose t squeeze unsqueeze flip repeat pixel_shuffle pixel_unshuffle unfold
""".split()  # noqa: SIM905
_POOLS = [
    *(f"{kind}{n}d" for n in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_max_pool", "reflection_pad",
      "_adaptive_avg_pool", "adaptive_avg_pool", "replication_pad", "upsample_nearest", "_upsample_nearest_exact")),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "upsample_linear1d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
]  # fmt: skip
_BATCH_NORMS = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    miopen_batch_norm batch_norm _batch_norm_with_update _batch_norm_no_update
""".split()  # noqa: SIM905
_ATTENTIONS = """
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable
""".split()  # noqa: SIM905
LAYERS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "embedding")

HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_POINTWISE, elementwise.pointwise),
    **dict.fromkeys([*_MOVEMENTS, *movements.PARTS], movements.movement),
    **dict.fromkeys(_POOLS, elementwise.pool),
    **dict.fromkeys(_BATCH_NORMS, normalisation.batch_norm),
    **dict.fromkeys(_ATTENTIONS, layers.attention),
    **dict.fromkeys(FACTORIES, _factory),
    **dict.fromkeys(["_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "topk"],
                    elementwise.one_dimension),
    **dict.fromkeys(["mean", "sum", "amax", "amin", "var", "var_mean", "std", "std_mean", "logsumexp", "prod", "all",
                     "any", "max", "min", "linalg_vector_norm", "argmax", "argmin"], elementwise.reduction),
    **dict.fromkeys(["mm", "addmm", "bmm", "baddbmm", "linear"], layers.product),
    "as_strided": movements.strided,
    "channel_shuffle": movements.channel_shuffle,
    "native_channel_shuffle": movements.channel_shuffle,
    "roll": movements.roll,
    "stack": movements.stack,
    "cat": movements.concatenation,
    "constant_pad_nd": movements.padding,
    "convolution": layers.convolution,
    "embedding": layers.embedding,
    "expand": movements.expand,
    "glu": movements.glu,
    "index": movements.index,
    "index_select": movements.index_select,
    "native_group_norm": normalisation.group_norm,
    "native_layer_norm": normalisation.layer_norm,
}  # fmt: skip


def follow(flow: NeuronFlow) -> None:
    """Follow all operations, and freeze what the model returns."""
    for fake in flow.recording.fakes:
        flow.origins[id(fake)] = flow.recording.stored[id(fake)]
    used = used_operations(flow.recording)
    for operation, is_used in zip(flow.recording.operations, used, strict=True):
        flow.labels.is_used = is_used
        labelled = any(label is not None for each in operation.inputs for label in flow.labels.of(each))
        if not labelled and operation.name not in (*FACTORIES, *LAYERS):
            continue
        handler = HANDLERS.get(operation.name)
        if handler is None and torch.Tag.pointwise in operation.target.tags:
            handler = elementwise.pointwise
        if handler is None:
            flow.labels.freeze_all(
                operation.inputs,
                f"the pruner does not know whether the operation {operation.title} in {flow.place(operation)} "
                "keeps neurons separate; leave this layer unpruned or move the operation behind the next layer",
            )
            continue
        handler(flow, operation)
    flow.labels.is_used = True
    for output in flow.recording.outputs:
        if not flow.keep_norm_statistics and id(output) in flow.recording.additional:
            continue
        for labels in flow.labels.of(output):
            flow.labels.freeze(labels, "its neurons are outputs of the model", foremost=True)
