"""The native operations as PyTorch operators. Only this folder takes addresses of tensors.

Each operator allocates its outputs and its workspace with torch and passes their addresses to `_core` or `_cuda`. No
operator changes its inputs, except `scale_gradients_`. The shapes of outputs depend on the shapes of inputs alone, so
the operators work under torch.compile and torch.export.
"""

from kddp_ext.ops.gather_slices import gather_slices
from kddp_ext.ops.gradient_pool import GradientPool, pool
from kddp_ext.ops.kd_l1_loss import kd_l1_loss, kd_l1_loss_operator, neuron_statistics, scale_gradients
from kddp_ext.ops.library import ELEMENT_TYPES, build_info, is_native, scales_natively, storage_key

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
