"""The engines: how the rows of a pair of sides are processed. Each is a module of plain functions.

* :mod:`fused_kd.engines.whole_rows`: logits on both sides.
* :mod:`fused_kd.engines.chunked`: a Head on either side, one chunk of rows at a time.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from . import chunked, whole_rows
from .settings import ChunkSettings, Gradients, Inputs, Settings, settings_of

__all__ = ["ChunkSettings", "Engine", "Inputs", "Settings", "engine_of", "settings_of"]


class Engine(Protocol):
    """The functions of an engine.

    hard and soft are the unweighted terms of every row, (N,). stats are row statistics that a later
    backward reuses, or None.
    """

    def gradient_in_forward(self, settings: Settings, inputs: Inputs) -> bool:
        """Return True if the forward of a scalar loss computes the gradients."""

    def losses(self, settings: Settings, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hard, soft and stats, without gradients."""

    def losses_and_gradients(
        self, settings: Settings, inputs: Inputs, wanted: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None, Gradients]:
        """Return hard, soft, stats and the wanted gradients of Σ (w_hard·hard + w_soft·soft)."""

    def gradients(
        self, settings: Settings, inputs: Inputs, stats: Tensor | None, wanted: tuple[bool, ...]
    ) -> Gradients:
        """Return the wanted gradients of the same sum, computed from `losses`' stats.

        They have the dtypes of the student's tensors. An engine without stats computes all again.
        """

    def rescaled(
        self,
        settings: Settings,
        inputs: Inputs,
        stats: Tensor | None,
        forward_gradients: Gradients,
        scale: Tensor,  # 0-d
    ) -> Gradients:
        """Multiply the forward's gradients by `scale`, in their own memory, and return them."""


def engine_of(settings: Settings) -> Engine:
    """Return the engine: `chunked` if a side is a Head, else `whole_rows`."""
    return cast(Engine, whole_rows if settings.chunks is None else chunked)
