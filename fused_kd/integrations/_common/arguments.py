"""Checks of a framework's arguments, under the names that the framework has for them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from numbers import Real
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ...checks import check_floating, may_read_values

P = ParamSpec("P")
R = TypeVar("R")


#: Our name of a side → the one that most frameworks have. It is an ordinary word too, so it is
#: replaced only where a message begins with it, after "of", and where a method of it is called.
SIDES = {"student": "student_logits", "teacher": "teacher_logits"}


def named(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that renames arguments in a function's TypeErrors and ValueErrors.

    Messages stay unchanged under ``torch.compile``, and for an error of the call itself, such as an
    unknown keyword, in which Python uses the names that the caller wrote.

    Args:
        names: our name of an argument → the name that the framework's users know; added to SIDES.
    """
    names = SIDES | names
    sides, others = "|".join(SIDES), "|".join(map(re.escape, sorted(names.keys() - SIDES)))
    ours = re.compile(
        rf"(?:^|(?<=\bof )|(?<=^student and ))(?:{sides})(?=[ ,])|\b(?:{sides})(?=\.\w+\(\))"
        rf"|\b(?:{others or '(?!)'})\b"
    )

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> R:
            try:
                return function(*arguments, **keywords)
            except (TypeError, ValueError) as error:
                # a graph sets no attribute of an error; without fullgraph it is raised again here
                if not torch.compiler.is_compiling() and _is_raised_inside(error):
                    error.args = (ours.sub(lambda match: names[match[0]], str(error)),)
                raise

        return call

    return decorate


def _is_raised_inside(error: Exception) -> bool:
    """Return whether the called function had begun when `error` was raised in it."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is not None


def allow_zero(num_items: float | Tensor | None) -> float | Tensor | None:
    """Return `num_items`; a Python 0 becomes a 0-d tensor, since KDLoss refuses only the number."""
    is_zero = isinstance(num_items, Real) and not isinstance(num_items, bool) and num_items == 0
    return torch.zeros(()) if is_zero else num_items


def check_target(name: str, target: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a teacher's tensor that is not of this shape; messages call it `name`.

    Raises:
        TypeError: `target` is not a dense floating tensor.
        ValueError: `target` has another shape, or requires grad.
    """
    check_floating(name, target)
    if target.shape != shape:
        raise ValueError(
            f"{name} must have the student's leading shape and vocabulary, {shape}; "
            f"got {tuple(target.shape)}"
        )
    if target.requires_grad:
        raise ValueError(
            f"{name} must not require grad, since the teacher gets no gradient; got a tensor that "
            "does: detach it"
        )


def check_not_negative(
    name: str,
    probabilities: Tensor,  # (..., V)
    kept: Tensor | None,  # (...), bool; None: all rows
) -> None:
    """Refuse negative entries in kept rows, as in logits; messages call the tensor `name`.

    Values are not read on a GPU (unless FUSED_KD_DEBUG=1) or under ``torch.compile``.

    Raises:
        ValueError: An entry is negative (not found if a kept row has a NaN).
    """
    if probabilities.numel() == 0 or not may_read_values(probabilities):
        return
    lowest = probabilities.amin(-1)
    low = (lowest if kept is None else torch.where(kept, lowest, 0)).min().item()
    if low < 0:
        raise ValueError(
            f"{name} must hold probabilities, which are at least 0; got {low:g}: if these are "
            "logits, pass logits.softmax(-1)"
        )
