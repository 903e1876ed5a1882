"""The losses of this package, as a user calls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_kd import Head, KDLoss
from fused_kd.backends import why_not
from fused_kd.options import MIB

from ..cases import HEADS, LOGITS, Case
from .base import Entrant, Loss

#: Keys. On a GPU these are the automatic backend's; others append the backend's name.
KDLOSS, IN_PLACE, FORWARD = "kdloss", "kdloss-inplace", "kdloss-forward"
WITH_HEADS = "kdloss-heads"
#: The method that others are compared with, by level.
OURS = {LOGITS: KDLOSS, HEADS: WITH_HEADS}
#: Memory budgets in MiB that the loss of heads is measured with, besides the automatic one.
BUDGETS = (64, 256, 1024)
BUDGETED = {f"{WITH_HEADS}-{budget}": budget for budget in BUDGETS}


def _kdloss(backend: str, inplace: bool) -> Callable[[Case], Loss]:
    return lambda case: KDLoss(inplace=inplace, backend=backend, **case.keywords)


def _forward(backend: str) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        whole = _kdloss(backend, inplace=False)(case)

        def loss(*tensors: Tensor) -> Tensor:
            with torch.no_grad():
                return whole(*tensors)

        return loss

    return build


def with_heads(case: Case, **keywords: Any) -> Loss:
    """Return KDLoss as a function of hidden states and weights, with more of its keywords."""
    module = KDLoss(**keywords, **case.keywords)

    def loss(
        hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, labels: Tensor
    ) -> Tensor:
        value = module(Head(hidden, weight), Head(teacher, head), labels)
        assert isinstance(value, Tensor)
        return value

    return loss


def _available(backend: str) -> Callable[[Case], str | None]:
    """On the CPU the fastest backend takes part; on a GPU the automatic one and Triton's."""

    def why(case: Case) -> str | None:
        if backend != "auto" and case.device == "cpu":
            return "a backend for GPUs"
        if backend == "auto":
            names = ("cpu",) if case.device == "cpu" else ("cuda", "triton")
            reasons = [why_not(name, case.device) for name in names]
            return None if None in reasons else reasons[0]
        return why_not(backend, case.device)

    return why


def _entrants(backend: str) -> list[Entrant]:
    key, title = ("", "") if backend == "auto" else (f"-{backend}", f", {backend} backend")
    ours: dict[str, Any] = {"is_ours": True, "why_not": _available(backend)}
    return [
        Entrant(KDLOSS + key, "KDLoss" + title, LOGITS, _kdloss(backend, False), matrices=1,
                **ours),
        Entrant(IN_PLACE + key, "KDLoss, in place" + title, LOGITS, _kdloss(backend, True),
                matrices=0, **ours),
        Entrant(FORWARD + key, "KDLoss, forward only" + title, LOGITS, _forward(backend),
                compared=("loss",), matrices=0, **ours),
        Entrant(WITH_HEADS + key, "KDLoss, heads" + title, HEADS,
                partial(with_heads, backend=backend),
                matrices=2, most_rows=2048, **ours),
    ]  # fmt: skip


ENTRANTS = [
    *_entrants("auto"),
    *_entrants("triton"),
    *(
        Entrant(key, f"KDLoss, heads, {budget} MiB", HEADS,
                partial(with_heads, memory_budget=budget * MIB), _available("auto"), is_ours=True,
                matrices=2, most_rows=budget)
        for key, budget in BUDGETED.items()
    ),
]  # fmt: skip
