"""The memory and work of each level for your sizes: :func:`plan`, ``python -m fused_kd.plan``."""

from .levels import Level, Plan, plan

__all__ = ["Level", "Plan", "plan"]
