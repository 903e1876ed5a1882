"""Fused knowledge-distillation losses for large vocabularies."""

from .functional import KDLossParts, kd_loss
from .modules import KDLoss
from .version import __version__

__all__ = ["KDLoss", "KDLossParts", "__version__", "kd_loss"]
