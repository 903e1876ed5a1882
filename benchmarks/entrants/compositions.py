"""What a careful user writes in plain torch: whole, compiled, and in checkpointed chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_kd.testing import eager_kd_loss

from ..cases import HEADS, LOGITS, Case
from .base import Entrant, Loss

#: Rows of a checkpointed chunk, as TRL's trainer has it by default.
CHUNK_ROWS = 256


def eager(case: Case) -> Loss:
    """Return the baseline; with heads, after the logits of both models."""
    keywords = case.keywords

    def on_logits(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return eager_kd_loss(student, teacher, labels, **keywords)

    def from_hidden(
        hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, labels: Tensor
    ) -> Tensor:
        with torch.no_grad():
            teacher_logits = F.linear(teacher, head)
        return on_logits(F.linear(hidden, weight), teacher_logits, labels)

    return on_logits if case.level == LOGITS else from_hidden


def compiled(case: Case) -> Loss:
    """``torch.compile`` of that, for this size alone."""
    return torch.compile(eager(case), dynamic=False)


def checkpointed(case: Case) -> Loss:
    """The baseline over chunks of rows, each computed again in the backward."""
    whole, has_heads = eager(case), case.level == HEADS

    def loss(*tensors: Tensor) -> Tensor:
        labels, total = tensors[-1], tensors[0].new_zeros((), dtype=torch.float32)
        for begin in range(0, len(labels), CHUNK_ROWS):
            rows = slice(begin, begin + CHUNK_ROWS)
            here = [x if has_heads and i in (1, 3) else x[rows] for i, x in enumerate(tensors)]
            share = len(here[-1]) / len(labels)
            total = total + share * checkpoint(whole, *here, use_reentrant=False)
        return total

    return loss


def _both(key: str, title: str, build: object, **more: object) -> list[Entrant]:
    return [Entrant(key, title, level, build, **more) for level in (LOGITS, HEADS)]  # type: ignore[arg-type]


ENTRANTS = [
    *_both("eager", "eager torch", eager, matrices=9),
    *_both("compile", "torch.compile(eager)", compiled, matrices=4, compiles=True),
    *_both("checkpoint", f"eager, checkpointed {CHUNK_ROWS}-row chunks", checkpointed,
           matrices=11, most_rows=CHUNK_ROWS),
]  # fmt: skip
