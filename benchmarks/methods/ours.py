"""Our losses as a user calls them, and what a careful user writes in plain torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_kd import Head, KDLoss
from fused_kd.backends import why_not
from fused_kd.divergences import TABLE
from fused_kd.options import MIB
from fused_kd.sides import Side
from fused_kd.testing import eager_kd_loss

from ..cases import TOPK, Case
from .base import DENSE, Loss, after_heads, on_heads, on_logits, on_topk

#: Keys of methods with the automatic backend; with another its name is appended.
KDLOSS, IN_PLACE, FORWARD = "kdloss", "kdloss-inplace", "kdloss-forward"
WITH_HEADS = "kdloss-heads"
#: With a top-k teacher: what its cost is compared with.
DENSE_TEACHER, HARD = "kdloss-dense", "kdloss-hard"
#: By key: memory budgets in MiB with which heads are measured in addition to the automatic one.
BUDGETED = {f"{WITH_HEADS}-{budget}": budget for budget in (64, 256, 1024)}
#: Rows of a checkpointed chunk, as TRL's trainer has it by default.
CHUNK_ROWS = 256
_CHECKPOINT = f"plain torch, checkpointed {CHUNK_ROWS}-row chunks"


def _not_of_classes(case: Case) -> str | None:
    is_of_logits = case.level == TOPK and TABLE[case.divergence].of_logits
    return f"it has no {case.divergence} of a top-k teacher" if is_of_logits else None


def _why_not(case: Case, backend: str = "auto") -> str | None:
    """Return why a backend ("auto": any of the device) cannot run a case; None if it can."""
    if (why := _not_of_classes(case)) is not None:
        return why
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
    for at_level in (on_logits, on_topk):
        at_level(KDLOSS + end, "KDLoss" + words, **ours)(build)
        at_level(IN_PLACE + end, "KDLoss(inplace=True)" + words, **ours)(in_place)
        title = "KDLoss, forward only" + words
        at_level(FORWARD + end, title, compared=("loss",), **ours)(forward)
    on_heads(WITH_HEADS + end, "KDLoss, heads" + words, **ours)(build)
for key, budget in BUDGETED.items():
    build = partial(_kd_loss, memory_budget=budget * MIB)
    on_heads(key, f"KDLoss, heads, {budget} MiB", _why_not, is_ours=True)(build)


@on_topk(
    DENSE_TEACHER,
    "KDLoss(inplace=True), dense teacher",
    _why_not,
    is_ours=True,
    nearest="the divergence from all of the teacher's logits",
    tail=DENSE,
)
def _dense(case: Case) -> Loss:
    return _kd_loss(case, inplace=True)


@on_topk(
    HARD,
    "KDLoss(inplace=True), hard term alone",
    _why_not,
    is_ours=True,
    nearest="the cross-entropy alone",
    computes=lambda case: {**case.keywords, "soft_weight": 0.0},
)
def _hard(case: Case) -> Loss:
    """Return the loss without a teacher: what one with a top-k teacher costs at least."""
    loss = _kd_loss(case, inplace=True, soft_weight=0.0)
    return lambda student, teacher, labels: loss(student, None, labels)


@on_heads("eager", "plain torch")
@on_logits("eager", "plain torch")
@on_topk("eager", "plain torch", _not_of_classes)
def _eager(case: Case) -> Loss:
    """Return the baseline; with Heads it computes the logits of both models first."""
    return after_heads(partial(eager_kd_loss, **case.keywords))


@on_heads("compile", "torch.compile of plain torch", compiles=True)
@on_logits("compile", "torch.compile of plain torch", compiles=True)
@on_topk("compile", "torch.compile of plain torch", _not_of_classes, compiles=True)
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
