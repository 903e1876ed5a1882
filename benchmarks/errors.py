"""How far an entrant is from the float64 reference of what it computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .entrants.base import Entrant, Loss
from .problems import Problem


def of(problem: Problem, entrant: Entrant, loss: Loss) -> dict[str, float | None]:
    """Relative errors on a few rows: of the loss, and of the worst gradient in norm.

    None: not compared (it has no gradient, or its loss has another constant).
    """
    got, exact = problem.outcome(loss), problem.exact(entrant.keywords(problem.case))
    found: dict[str, float | None] = {"loss": None, "gradients": None}
    if "loss" in entrant.compared:
        found["loss"] = distance(got.loss, exact.loss)
    if "gradients" in entrant.compared:
        pairs = zip(got.gradients, exact.gradients, strict=True)
        found["gradients"] = worst(distance(mine, theirs) for mine, theirs in pairs)
    return found


def worst(errors: Iterable[float | None]) -> float | None:
    """The largest of those that were compared; one that is not a number is worse than any."""
    found = [x for x in errors if x is not None]
    return next((x for x in found if x != x), max(found, default=None))


def distance(got: Tensor, exact: Tensor) -> float:
    """The norm of the difference, relative to that of the exact value unless that is 0."""
    exact = exact.double()
    size = exact.norm()
    return float((got.double() - exact).norm() / torch.where(size > 0, size, 1.0))
