"""Fused knowledge-distillation losses for large vocabularies."""

from .version import __version__

try:
    import torch  # noqa: F401
except (ImportError, OSError) as error:  # missing or broken: `python -m fused_kd.env` still runs
    _cause = error

    def _refuse(name: str) -> None:
        """Raise ImportError for a public name, AttributeError for any other."""
        if name in __all__:
            why = f"fused_kd needs torch>=2.10, and importing torch failed: {_cause}"
            raise ImportError(why) from _cause
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    # not by `def __getattr__`: mypy would then accept any name of this module
    globals()["__getattr__"] = _refuse
else:
    from .functional import KDLossParts, kd_loss
    from .metrics import KDMetrics, kd_metrics
    from .modules import KDLoss
    from .sides import Head, TopK

__all__ = [
    "Head",
    "KDLoss",
    "KDLossParts",
    "KDMetrics",
    "TopK",
    "__version__",
    "kd_loss",
    "kd_metrics",
]
