"""Our losses as a user calls them, and what a careful user writes in plain torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_kd import Head, KDLoss
from fused_kd.backends import why_not
from fused_kd.options import MIB
from fused_kd.testing import eager_kd_loss

from ..cases import HEADS, LOGITS, Case
from .base import Loss, WhyNot, on_heads, on_logits

#: Keys. On a GPU these are the automatic backend's; others append the backend's name.
KDLOSS, IN_PLACE, FORWARD = "kdloss", "kdloss-inplace", "kdloss-forward"
WITH_HEADS = "kdloss-heads"
#: Memory budgets in MiB that the loss of heads is measured with, besides the automatic one.
BUDGETED = {f"{WITH_HEADS}-{budget}": budget for budget in (64, 256, 1024)}
#: Rows of a checkpointed chunk, as TRL's trainer has it by default.
CHUNK_ROWS = 256
_CHECKPOINT = f"eager, checkpointed {CHUNK_ROWS}-row chunks"


def _why_not(backend: str) -> WhyNot:
    """Return a check for the fastest backend of the CPU, the automatic one or Triton's of a GPU."""

    def why(case: Case) -> str | None:
        if backend == "triton":
            return "a backend for GPUs" if case.device == "cpu" else why_not(backend, case.device)
        names = ("cpu",) if case.device == "cpu" else ("cuda", "triton")
        reasons = [why_not(name, case.device) for name in names]
        return None if None in reasons else reasons[0]

    return why


def _logits(case: Case, **keywords: Any) -> Loss:
    return KDLoss(**keywords, **case.keywords)


def _forward(case: Case, **keywords: Any) -> Loss:
    return torch.no_grad()(_logits(case, **keywords).forward)


def _heads(case: Case, **keywords: Any) -> Loss:
    loss = _logits(case, **keywords)
    return lambda hidden, weight, teacher, head, labels: loss(
        Head(hidden, weight), Head(teacher, head), labels
    )


for backend, end, words in (("auto", "", ""), ("triton", "-triton", ", triton backend")):
    ours: Any = {"is_ours": True, "why_not": _why_not(backend)}
    for add, key, title, loss, options in (
        (on_logits, KDLOSS, "KDLoss", _logits, {}),
        (on_logits, IN_PLACE, "KDLoss, in place", _logits, {"inplace": True}),
        (on_logits, FORWARD, "KDLoss, forward only", _forward, {}),
        (on_heads, WITH_HEADS, "KDLoss, heads", _heads, {}),
    ):
        parts = ("loss",) if key == FORWARD else ("loss", "gradients")
        build = partial(loss, backend=backend, **options)
        add(key + end, title + words, compared=parts, **ours)(build)
for key, budget in BUDGETED.items():
    build, title = partial(_heads, memory_budget=budget * MIB), f"KDLoss, heads, {budget} MiB"
    on_heads(key, title, _why_not("auto"), is_ours=True)(build)


@on_heads("eager", "eager torch")
@on_logits("eager", "eager torch")
def _eager(case: Case) -> Loss:
    """Return the baseline; with heads, after the logits of both models."""

    def from_hidden(hidden, weight, teacher, head, labels):
        with torch.no_grad():
            teacher_logits = F.linear(teacher, head)
        return on_logits(F.linear(hidden, weight), teacher_logits, labels)

    on_logits = partial(eager_kd_loss, **case.keywords)
    return on_logits if case.level == LOGITS else from_hidden


@on_heads("compile", "torch.compile(eager)", compiles=True)
@on_logits("compile", "torch.compile(eager)", compiles=True)
def _compiled(case: Case) -> Loss:
    """Return ``torch.compile`` of the baseline, for this size alone."""
    return torch.compile(_eager(case), dynamic=False)


@on_heads("checkpoint", _CHECKPOINT)
@on_logits("checkpoint", _CHECKPOINT)
def _checkpointed(case: Case) -> Loss:
    """Return the baseline over chunks of rows, each recomputed in the backward."""
    whole, weights = _eager(case), (1, 3) if case.level == HEADS else ()

    def loss(*tensors: Tensor) -> Tensor:
        labels, total = tensors[-1], tensors[0].new_zeros((), dtype=torch.float32)
        for begin in range(0, len(labels), CHUNK_ROWS):
            rows = slice(begin, begin + CHUNK_ROWS)
            chunk = [x if i in weights else x[rows] for i, x in enumerate(tensors)]
            share = len(chunk[-1]) / len(labels)
            total = total + share * checkpoint(whole, *chunk, use_reentrant=False)
        return total

    return loss
