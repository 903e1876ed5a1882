"""Logits in what a model returned."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def logits_of(output: Any) -> Tensor:
    """Return a model's output if it is a tensor, else its attribute ``logits``.

    Raises:
        TypeError: The output is no tensor, and has no tensor ``logits``.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "a model must return a tensor of logits, or an object with the attribute logits; got "
            f"{type(output).__name__}"
        )
    return logits


def logits_in(output: Any) -> Any:
    """Return the entry "logits" of a model's output, a dict or tuple; None if it has none.

    The entry of a dict may be of any type. In a tuple it is the first tensor of at least two
    dimensions, since a loss may precede it.
    """
    if isinstance(output, dict):
        return output.get("logits")
    return next((x for x in output if isinstance(x, Tensor) and x.dim() >= 2), None)
