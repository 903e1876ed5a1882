"""The losses of this package, as a user calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_kd import KDLoss, LinearKDLoss
from fused_kd.backends import why_not
from fused_kd.options import MIB

from ..cases import LINEAR, LOGITS, Case
from .base import Entrant, Loss

#: The one that others are compared with, by level, and how it is called where it goes ahead of
#: the backends of a GPU.
KDLOSS, IN_PLACE, FORWARD = "kdloss", "kdloss-inplace", "kdloss-forward"
LINEARKDLOSS = "linearkdloss"
OURS = {LOGITS: KDLOSS, LINEAR: LINEARKDLOSS}
#: Memory budgets in MiB that the linear level is measured with, besides its automatic one.
BUDGETS = (64, 256, 1024)
BUDGETED = {f"{LINEARKDLOSS}-{budget}": budget for budget in BUDGETS}


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


def _linear(backend: str, **settings: Any) -> Callable[[Case], Loss]:
    return lambda case: LinearKDLoss(backend=backend, **settings, **case.keywords)


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
        Entrant(LINEARKDLOSS + key, "LinearKDLoss" + title, LINEAR, _linear(backend),
                matrices=2, most_rows=2048, **ours),
    ]  # fmt: skip


ENTRANTS = [
    *_entrants("auto"),
    *_entrants("triton"),
    *(
        Entrant(key, f"LinearKDLoss, {budget} MiB", LINEAR,
                _linear("auto", memory_budget=budget * MIB), _available("auto"), is_ours=True,
                matrices=2, most_rows=budget)
        for key, budget in BUDGETED.items()
    ),
]  # fmt: skip
