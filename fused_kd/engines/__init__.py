"""The engines: how a pair of sides is visited. Each is a module of plain functions.

* :mod:`fused_kd.engines.whole_rows`: logits on both sides.
* :mod:`fused_kd.engines.chunked`: a Head on any side, the logits of one chunk of rows at a time.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from . import chunked, whole_rows
from .settings import ChunkSettings, Gradients, Inputs, Settings, settings_of

__all__ = ["ChunkSettings", "Engine", "Inputs", "Settings", "engine_of", "settings_of"]


class Engine(Protocol):
    """What an engine offers.

    hard and soft are (N,), unweighted; stats are statistics of the rows that a backward reuses.
    """

    def gradient_in_forward(self, settings: Settings, inputs: Inputs) -> bool:
        """Return True if a scalar loss computes its gradients in the forward."""

    def losses(self, settings: Settings, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hard, soft and stats."""

    def losses_and_gradients(
        self, settings: Settings, inputs: Inputs, wanted: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None, Gradients]:
        """Return hard, soft, stats and the gradients of Σ (w_hard·hard + w_soft·soft)."""

    def gradients(
        self, settings: Settings, inputs: Inputs, stats: Tensor | None, wanted: tuple[bool, ...]
    ) -> Gradients:
        """Return these gradients alone, in the dtypes of the student's tensors."""

    def rescaled(
        self,
        settings: Settings,
        inputs: Inputs,
        stats: Tensor | None,
        made: Gradients,
        scale: Tensor,  # 0-d
    ) -> Gradients:
        """Return `scale` times gradients that were made in the forward, in their memory."""


def engine_of(settings: Settings) -> Engine:
    """Return the engine for a pair of sides."""
    return cast(Engine, whole_rows if settings.chunks is None else chunked)
