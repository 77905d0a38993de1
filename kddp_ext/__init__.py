"""Knowledge distillation with dynamic pruning: one fused native loss, neurons removed while the student trains."""

from kddp_ext.loss import FusedKDL1Loss, LossTerms, fused_kd_l1_loss
from kddp_ext.ops import build_info
from kddp_ext.statistics import NeuronStatistics, TrackedActivations

__version__ = "0.1.0"

__all__ = [
    "FusedKDL1Loss",
    "LossTerms",
    "NeuronStatistics",
    "TrackedActivations",
    "build_info",
    "fused_kd_l1_loss",
]
