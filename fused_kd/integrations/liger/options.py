"""Options of Liger's classes as attributes, and labels that only mask."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor, nn

from .._common.labels import mask_labels

SOFT_ALONE: dict[str, Any] = {"hard_weight": 0.0, "soft_weight": 1.0}
FORWARD_KL: dict[str, Any] = {**SOFT_ALONE, "divergence": "forward_kl", "soft_scale": "none"}


def mask(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Return labels that only say which rows count; None for None. Raises as mask_labels()."""
    return None if labels is None else mask_labels(labels, ignore_index)


def check_beta(beta: float) -> None:
    """Refuse a number outside [0, 1]; KDLoss refuses what is not a number.

    Raises:
        ValueError: `beta` is outside [0, 1].
    """
    if isinstance(beta, Real) and not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1]; got {beta}")


class Shown(nn.Module):
    """A module whose constructor's arguments are attributes to change, and are in its repr."""

    def extra_repr(self) -> str:
        """Return the constructor's arguments, for repr()."""
        own = (item for item in vars(self).items() if not item[0].startswith("_"))
        return ", ".join(f"{name}={value!r}" for name, value in own if name != "training")
