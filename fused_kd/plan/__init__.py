"""Predict memory and work of the loss: :func:`plan`, ``python -m fused_kd.plan``."""

from .levels import Level, Plan, plan

__all__ = ["Level", "Plan", "plan"]
