"""Logits in what a model returned."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def logits_of(output: Any) -> Tensor:
    """Return a model's output if it is a tensor, else its attribute ``logits``.

    Raises:
        TypeError: It is neither a tensor nor has logits.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"a model must return its logits, or an object with logits; got {type(output).__name__}"
        )
    return logits


def logits_in(output: Any) -> Any:
    """Return the logits in a model's dict or tuple; None if there are none.

    In a tuple they are the first tensor with rows: a loss may precede them.
    """
    if isinstance(output, dict):
        return output.get("logits")
    return next((x for x in output if isinstance(x, Tensor) and x.dim() >= 2), None)
