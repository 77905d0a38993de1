"""The native operations as PyTorch operators: the only folder that sees an address.

Every operator allocates its outputs and its workspace with torch, hands their addresses to `_core` or `_cuda`, and
changes none of its inputs (but `scale_gradients_`, which says so). The shapes of the outputs follow from those of the
inputs alone, so the operators trace under torch.compile and torch.export.
"""

from kddp_ext.ops.gather_slices import gather_slices
from kddp_ext.ops.gradient_pool import GradientPool, pool
from kddp_ext.ops.kd_l1_loss import kd_l1_loss, kd_l1_loss_operator, neuron_statistics, scale_gradients
from kddp_ext.ops.library import ELEMENT_TYPES, build_info, is_native, scales_natively
from kddp_ext.ops.memory import storage_key

__all__ = [
    "ELEMENT_TYPES",
    "GradientPool",
    "build_info",
    "gather_slices",
    "is_native",
    "kd_l1_loss",
    "kd_l1_loss_operator",
    "neuron_statistics",
    "pool",
    "scale_gradients",
    "scales_natively",
    "storage_key",
]
