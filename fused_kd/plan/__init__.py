"""Compare the levels' memory and work: :func:`plan`, ``python -m fused_kd.plan``."""

from .levels import Level, Plan, plan

__all__ = ["Level", "Plan", "plan"]
