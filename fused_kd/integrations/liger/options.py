"""Options of Liger's classes as attributes, and labels that only mask."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor, nn

from .._common.labels import mask_labels

SOFT_ALONE: dict[str, Any] = {"hard_weight": 0.0, "soft_weight": 1.0}
FORWARD_KL: dict[str, Any] = {**SOFT_ALONE, "divergence": "forward_kl", "soft_scale": "none"}


def mask(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Return labels that only say which rows count; None if all do."""
    return None if labels is None else mask_labels(labels, ignore_index)


def check_beta(beta: float) -> None:
    """Refuse a β outside [0, 1]; its type is checked with the other options.

    Raises:
        ValueError: It is outside.
    """
    if isinstance(beta, Real) and not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1]; got {beta}")


class Shown(nn.Module):
    """A module whose constructor's arguments are attributes, which may be changed and are shown."""

    def extra_repr(self) -> str:
        """Return the attributes."""
        own = (item for item in vars(self).items() if not item[0].startswith("_"))
        return ", ".join(f"{name}={value!r}" for name, value in own if name != "training")
