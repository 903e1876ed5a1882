"""Our losses as a user calls them, and what a careful user writes in plain torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_kd import Head, KDLoss
from fused_kd.backends import why_not
from fused_kd.options import MIB
from fused_kd.sides import Side
from fused_kd.testing import eager_kd_loss

from ..cases import Case
from .base import Loss, after_heads, on_heads, on_logits

#: Keys of methods with the automatic backend; with another its name is appended.
KDLOSS, IN_PLACE, FORWARD = "kdloss", "kdloss-inplace", "kdloss-forward"
WITH_HEADS = "kdloss-heads"
#: By key: memory budgets in MiB with which heads are measured in addition to the automatic one.
BUDGETED = {f"{WITH_HEADS}-{budget}": budget for budget in (64, 256, 1024)}
#: Rows of a checkpointed chunk, as TRL's trainer has it by default.
CHUNK_ROWS = 256
_CHECKPOINT = f"plain torch, checkpointed {CHUNK_ROWS}-row chunks"


def _why_not(case: Case, backend: str = "auto") -> str | None:
    """Return why a backend ("auto": any of the device) cannot run a case; None if it can."""
    if case.device == "cpu":
        return "a backend for GPUs" if backend == "triton" else why_not("cpu", "cpu")
    names = ("cuda", "triton") if backend == "auto" else (backend,)
    reasons = [why_not(name, case.device) for name in names]
    return None if None in reasons else reasons[0]


def _kd_loss(case: Case, **keywords: Any) -> Loss:
    return KDLoss(**keywords, **case.keywords)


def _forward(case: Case, **keywords: Any) -> Loss:
    return torch.no_grad()(KDLoss(**keywords, **case.keywords).forward)


for backend, end, words in (("auto", "", ""), ("triton", "-triton", ", triton backend")):
    ours: Any = {"is_ours": True, "why_not": partial(_why_not, backend=backend)}
    build = partial(_kd_loss, backend=backend)
    in_place, forward = partial(build, inplace=True), partial(_forward, backend=backend)
    on_logits(KDLOSS + end, "KDLoss" + words, **ours)(build)
    on_logits(IN_PLACE + end, "KDLoss(inplace=True)" + words, **ours)(in_place)
    title = "KDLoss, forward only" + words
    on_logits(FORWARD + end, title, compared=("loss",), **ours)(forward)
    on_heads(WITH_HEADS + end, "KDLoss, heads" + words, **ours)(build)
for key, budget in BUDGETED.items():
    build = partial(_kd_loss, memory_budget=budget * MIB)
    on_heads(key, f"KDLoss, heads, {budget} MiB", _why_not, is_ours=True)(build)


@on_heads("eager", "plain torch")
@on_logits("eager", "plain torch")
def _eager(case: Case) -> Loss:
    """Return the baseline; with Heads it computes the logits of both models first."""
    return after_heads(partial(eager_kd_loss, **case.keywords))


@on_heads("compile", "torch.compile of plain torch", compiles=True)
@on_logits("compile", "torch.compile of plain torch", compiles=True)
def _compiled(case: Case) -> Loss:
    """Return ``torch.compile`` of the baseline, for this size alone."""
    return torch.compile(_eager(case), dynamic=False)


@on_heads("checkpoint", _CHECKPOINT)
@on_logits("checkpoint", _CHECKPOINT)
def _checkpointed(case: Case) -> Loss:
    """Return the baseline over chunks of rows, each recomputed in the backward."""
    whole = _eager(case)

    def loss(student: Side, teacher: Side, labels: Tensor) -> Tensor:
        total: Any = 0.0
        for begin in range(0, len(labels), CHUNK_ROWS):
            rows = slice(begin, begin + CHUNK_ROWS)
            sides = (x.rows(rows) if isinstance(x, Head) else x[rows] for x in (student, teacher))
            share = len(labels[rows]) / len(labels)
            total = total + share * checkpoint(whole, *sides, labels[rows], use_reentrant=False)
        return total

    return loss
