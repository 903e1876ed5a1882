"""How far a method is from the float64 reference of what it computes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .methods.base import Loss, Method
from .problems import Problem

#: Relative errors beyond which a method is wrong: by float32 and by 16-bit inputs.
WRONG = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}


def of(problem: Problem, method: Method, loss: Loss) -> dict[str, float | None]:
    """Return relative errors on a few rows: of the loss, and of the worst gradient in norm.

    None: not compared (it has no gradient, or its loss has another constant).
    """
    got, exact = problem.outcome(loss), problem.exact(method.keywords(problem.case))
    pairs = zip(got.gradients, exact.gradients, strict=False)
    errors = {
        "loss": distance(got.loss, exact.loss),
        "gradients": worst(distance(mine, theirs) for mine, theirs in pairs),
    }
    return {part: error if part in method.compared else None for part, error in errors.items()}


def worst(errors: Iterable[float | None]) -> float | None:
    """Return the largest that was compared; infinity for one that is no number."""
    compared = [math.inf if error != error else error for error in errors if error is not None]
    return max(compared, default=None)


def distance(got: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, relative to that of the exact value unless that is 0."""
    exact = exact.double()
    size = exact.norm()
    return float((got.double() - exact).norm() / torch.where(size > 0, size, 1.0))
