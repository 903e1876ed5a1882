"""What a careful user writes in plain torch: whole, compiled, and in checkpointed chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_kd.testing import eager_kd_loss

from ..cases import HEADS, LOGITS, Case
from .base import Loss, Method

#: Rows of a checkpointed chunk, as TRL's trainer has it by default.
CHUNK_ROWS = 256


def eager(case: Case) -> Loss:
    """Return the baseline; with heads, after the logits of both models."""
    keywords = case.keywords

    def on_logits(student, teacher, labels):
        return eager_kd_loss(student, teacher, labels, **keywords)

    def from_hidden(hidden, weight, teacher, head, labels):
        with torch.no_grad():
            teacher_logits = F.linear(teacher, head)
        return on_logits(F.linear(hidden, weight), teacher_logits, labels)

    return on_logits if case.level == LOGITS else from_hidden


def compiled(case: Case) -> Loss:
    """Return ``torch.compile`` of the baseline, for this size alone."""
    return torch.compile(eager(case), dynamic=False)


def checkpointed(case: Case) -> Loss:
    """Return the baseline over chunks of rows, each recomputed in the backward."""
    whole, weights = eager(case), (1, 3) if case.level == HEADS else ()

    def loss(*tensors: Tensor) -> Tensor:
        labels, total = tensors[-1], tensors[0].new_zeros((), dtype=torch.float32)
        for begin in range(0, len(labels), CHUNK_ROWS):
            rows = slice(begin, begin + CHUNK_ROWS)
            chunk = [x if i in weights else x[rows] for i, x in enumerate(tensors)]
            share = len(chunk[-1]) / len(labels)
            total = total + share * checkpoint(whole, *chunk, use_reentrant=False)
        return total

    return loss


_TITLE = f"eager, checkpointed {CHUNK_ROWS}-row chunks"
METHODS = [
    method
    for level in (LOGITS, HEADS)
    for method in (
        Method("eager", "eager torch", level, eager, matrices=9),
        Method("compile", "torch.compile(eager)", level, compiled, matrices=4, compiles=True),
        Method("checkpoint", _TITLE, level, checkpointed, matrices=11, most_rows=CHUNK_ROWS),
    )
]
