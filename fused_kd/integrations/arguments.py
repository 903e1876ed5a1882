"""Checks of what a framework's classes are given, by the names that the framework has for it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from numbers import Integral, Real
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ..checks import check_dense, check_floating, may_look_at_values
from ..reduction import wide_labels

P = ParamSpec("P")
R = TypeVar("R")


def named(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that renames arguments in the messages of errors that a function raises.

    An error of the call itself, such as a keyword that the function does not have, is Python's own
    and has the names that the caller wrote: it stays as it is.

    Args:
        names: our name of an argument → the name that the framework's users know.
    """
    ours = re.compile(rf"\b({'|'.join(names)})\b")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> R:
            try:
                return function(*arguments, **keywords)
            except (TypeError, ValueError) as error:
                # a graph sets no attribute of an error; without fullgraph it is raised again here
                if not torch.compiler.is_compiling() and _is_raised_inside(error):
                    error.args = (ours.sub(lambda found: names[found[0]], str(error)),)
                raise

        return call

    return decorate


def _is_raised_inside(error: Exception) -> bool:
    """Return whether the function ran that was called where `error` is caught."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is not None


def count_of_tokens(given: float | Tensor | None) -> float | Tensor | None:
    """Return a denominator that may be 0: as a tensor, for which the loss is 0."""
    is_zero = isinstance(given, Real) and not isinstance(given, bool) and given == 0
    return torch.zeros(()) if is_zero else given


def counted(labels: Tensor, ignore_index: int) -> Tensor:
    """Return labels that only say which rows count: the ignored ones, and one class of all others.

    So -1, an entry beyond the vocabulary, a mask of bools are labels like any other, as they are
    to the frameworks.

    Args:
        labels: (...), of any dtype.
        ignore_index: of the rows that do not count.

    Raises:
        TypeError: not a tensor, or an `ignore_index` that is not an int.
    """
    check_dense("labels", labels)
    if not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index must be an int; got {ignore_index!r}")
    wide = wide_labels(labels)
    return torch.where(wide != ignore_index, int(ignore_index == 0), ignore_index)


def check_target(name: str, target: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a target that is not one number for every entry of the vocabulary.

    Raises:
        TypeError: not a dense floating tensor.
        ValueError: of another shape, or one that requires grad.
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
    """Refuse an entry below 0 in a row that counts; by value, so on the CPU only.

    Raises:
        ValueError: logits or log-probabilities.
    """
    if probabilities.numel() == 0 or not may_look_at_values(probabilities):
        return
    lowest = probabilities.amin(-1)
    low = (lowest if kept is None else torch.where(kept, lowest, 0)).min().item()
    if low < 0:
        raise ValueError(
            f"{name} must hold probabilities, which are at least 0; got {low:g}: of logits pass "
            "the softmax"
        )
