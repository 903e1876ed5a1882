"""The losses of this package, as a user calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fused_kd import Head, KDLoss
from fused_kd.backends import why_not
from fused_kd.options import MIB

from ..cases import HEADS, LOGITS, Case
from .base import Loss, Method

#: Keys. On a GPU these are the automatic backend's; others append the backend's name.
KDLOSS, IN_PLACE, FORWARD = "kdloss", "kdloss-inplace", "kdloss-forward"
WITH_HEADS = "kdloss-heads"
#: Memory budgets in MiB that the loss of heads is measured with, besides the automatic one.
BUDGETED = {f"{WITH_HEADS}-{budget}": budget for budget in (64, 256, 1024)}


def _logits(case: Case, **keywords: Any) -> Loss:
    return KDLoss(**keywords, **case.keywords)


def _forward(case: Case, **keywords: Any) -> Loss:
    return torch.no_grad()(_logits(case, **keywords).forward)


def with_heads(case: Case, **keywords: Any) -> Loss:
    """Return KDLoss as a function of hidden states and weights, with more of its keywords."""
    module = KDLoss(**keywords, **case.keywords)
    return lambda hidden, weight, teacher, head, labels: module(
        Head(hidden, weight), Head(teacher, head), labels
    )


def _why_not(backend: str) -> Callable[[Case], str | None]:
    """Return a check for the fastest backend of the CPU, the automatic one or Triton's of a GPU."""

    def why(case: Case) -> str | None:
        if backend == "auto":
            names = ("cpu",) if case.device == "cpu" else ("cuda", "triton")
            reasons = [why_not(name, case.device) for name in names]
            return None if None in reasons else reasons[0]
        return "a backend for GPUs" if case.device == "cpu" else why_not(backend, case.device)

    return why


def _methods() -> Iterator[Method]:
    for backend, key, title in (("auto", "", ""), ("triton", "-triton", ", triton backend")):
        ours: dict[str, Any] = {"is_ours": True, "why_not": _why_not(backend)}
        build, heads = partial(_logits, backend=backend), partial(with_heads, backend=backend)
        in_place, forward = partial(build, inplace=True), partial(_forward, backend=backend)
        yield Method(KDLOSS + key, f"KDLoss{title}", LOGITS, build, matrices=1, **ours)
        yield Method(
            IN_PLACE + key, f"KDLoss, in place{title}", LOGITS, in_place, matrices=0, **ours
        )
        yield Method(
            FORWARD + key,
            f"KDLoss, forward only{title}",
            LOGITS,
            forward,
            compared=("loss",),
            matrices=0,
            **ours,
        )
        yield Method(
            WITH_HEADS + key,
            f"KDLoss, heads{title}",
            HEADS,
            heads,
            matrices=2,
            most_rows=2048,
            **ours,
        )
    ours = {"is_ours": True, "why_not": _why_not("auto"), "matrices": 2}
    for key, budget in BUDGETED.items():
        build = partial(with_heads, memory_budget=budget * MIB)
        yield Method(key, f"KDLoss, heads, {budget} MiB", HEADS, build, most_rows=budget, **ours)


METHODS = list(_methods())
