"""Everything that can be measured, ours first; a new peer is a module with a list ENTRANTS."""

from . import (
    compositions,
    cut_cross_entropy,
    flash_linear_attention,
    liger,
    model_optimizer,
    ours,
    torch_native,
    torchtune,
    trl,
)
from .base import Entrant, Loss

ENTRANTS: dict[str, Entrant] = {}
for _module in (
    ours,
    compositions,
    torch_native,
    liger,
    trl,
    torchtune,
    model_optimizer,
    cut_cross_entropy,
    flash_linear_attention,
):
    for _entrant in _module.ENTRANTS:
        ENTRANTS[f"{_entrant.level}/{_entrant.key}"] = _entrant

__all__ = ["ENTRANTS", "Entrant", "Loss"]
