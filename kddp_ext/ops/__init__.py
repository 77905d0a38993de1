"""The native operations as PyTorch operators. Only this folder takes addresses of tensors.

Each operator allocates its outputs and its workspace with torch and passes their addresses to `_core` or `_cuda`. No
operator changes its inputs. The shapes of outputs depend on the shapes of inputs alone, so the operators work under
torch.compile and torch.export.
"""

from kddp_ext.ops.gather_slices import gather_slices
from kddp_ext.ops.gradient_products import gradient_products
from kddp_ext.ops.kd_l1_loss import kd_l1_loss, native_derivatives, neuron_statistics
from kddp_ext.ops.library import ELEMENT_TYPES, build_info, is_native, storage_key, why_not_native
from kddp_ext.ops.linear_kd_loss import linear_kd_loss

__all__ = [
    "ELEMENT_TYPES",
    "build_info",
    "gather_slices",
    "gradient_products",
    "is_native",
    "kd_l1_loss",
    "linear_kd_loss",
    "native_derivatives",
    "neuron_statistics",
    "storage_key",
    "why_not_native",
]
