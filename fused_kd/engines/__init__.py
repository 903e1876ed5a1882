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

    hard and soft are the unweighted terms H and S = c(T)·D of every row, (N,); 0 if the term is off
    or its weight is 0. stats are the row statistics (N, STATS) that a later backward reuses, (N, 0)
    from the reference backend, None from an engine that keeps none. `wanted` says for each of the
    student's three tensors whether its gradient is computed. With ``settings.inplace`` the
    student's logits are overwritten by it.

    A memory_budget that does not hold one row raises ValueError.
    """

    def gradient_in_forward(self, settings: Settings, inputs: Inputs) -> bool:
        """Return True if the forward of a scalar loss is to compute the gradients."""

    def losses(self, settings: Settings, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hard, soft and stats, without gradients."""

    def losses_and_gradients(
        self, settings: Settings, inputs: Inputs, wanted: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None, Gradients]:
        """Return hard, soft, stats and the gradients of Σ (w_hard·hard + w_soft·soft).

        None for a gradient that is not wanted or in place. Those of weight and bias may have the
        dtype of their sums.
        """

    def gradients(
        self, settings: Settings, inputs: Inputs, stats: Tensor | None, wanted: tuple[bool, ...]
    ) -> Gradients:
        """Return the wanted gradients of the same sum, computed with the stats of the forward.

        That is `losses`, or for a second backward `losses_and_gradients` (not in place). They have
        the dtypes of the student's tensors; in place, the first is the student's logits. The
        weights may be other than in the forward, but must be 0 for the rows that had 0 there. An
        engine without stats computes all again.
        """

    def rescaled(
        self,
        settings: Settings,
        inputs: Inputs,
        stats: Tensor | None,
        forward_gradients: Gradients,
        scale: Tensor,  # 0-d
    ) -> Gradients:
        """Return `scale` times the gradients of `losses_and_gradients`, rounded again if needed.

        They have the dtypes of the student's tensors; in place, the first is the student's logits.
        Outside a trace `forward_gradients` are overwritten: do not use them again.
        """


def engine_of(settings: Settings) -> Engine:
    """Return the engine: `chunked` if a side is a Head, else `whole_rows`."""
    return cast(Engine, whole_rows if settings.chunks is None else chunked)
