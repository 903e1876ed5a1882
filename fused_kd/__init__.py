"""Fused knowledge-distillation losses for large vocabularies."""

from .functional import KDLossParts, kd_loss
from .linear import linear_kd_loss
from .modules import KDLoss, LinearKDLoss
from .version import __version__

__all__ = [
    "KDLoss",
    "KDLossParts",
    "LinearKDLoss",
    "__version__",
    "kd_loss",
    "linear_kd_loss",
]
