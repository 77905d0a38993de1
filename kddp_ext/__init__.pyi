"""The public names. Python, type checkers and editors all read them from here."""

from kddp_ext.activations.statistics import NeuronStatistics, TrackedActivations
from kddp_ext.loss.fisher import fisher_loss
from kddp_ext.loss.functional import LossTerms, fused_kd_l1_loss
from kddp_ext.loss.fused_linear import fused_linear_kd_loss
from kddp_ext.loss.module import FusedKDL1Loss
from kddp_ext.loss.settings import LossSettings
from kddp_ext.ops import build_info
from kddp_ext.pruning.distributed import rewrap
from kddp_ext.pruning.history import PruningHistory
from kddp_ext.pruning.pruner import DynamicPruner
from kddp_ext.pruning.ranking import RankedStep, Resource
from kddp_ext.pruning.report import LayerPreview, LayerReport, Preview, PruneReport
from kddp_ext.pruning.selection import KeptBy
from kddp_ext.pruning.settings import Criterion
from kddp_ext.pruning.tracing.recording import UnsupportedModelError
from kddp_ext.saving.onnx import export_onnx
from kddp_ext.saving.student_file import load_student, read_student_header, save_student

__version__: str

__all__ = [
    "Criterion",
    "DynamicPruner",
    "FusedKDL1Loss",
    "KeptBy",
    "LayerPreview",
    "LayerReport",
    "LossSettings",
    "LossTerms",
    "NeuronStatistics",
    "Preview",
    "PruneReport",
    "PruningHistory",
    "RankedStep",
    "Resource",
    "TrackedActivations",
    "UnsupportedModelError",
    "build_info",
    "export_onnx",
    "fisher_loss",
    "fused_kd_l1_loss",
    "fused_linear_kd_loss",
    "load_student",
    "read_student_header",
    "rewrap",
    "save_student",
]
