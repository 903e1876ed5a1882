"""torch's own cross-entropy: from hidden states, and as the hard half of peers that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import HEADS, Case
from .base import Entrant, Loss

#: What a peer without a teacher is compared with and called.
HARD_ALONE = "the cross-entropy alone"


def hard_alone(case: Case) -> dict[str, Any]:
    """The keywords of the half that a peer without a teacher computes."""
    return {"hard_weight": 0.5, "soft_weight": 0.0}


def with_cross_entropy(soft: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """Half a peer's divergence on logits, T² included, and half the cross-entropy of its users.

    That is the one of transformers, which takes the logits to float32 first.
    """

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(student.float(), labels) + 0.5 * soft(student, teacher, labels)

    return loss


def _linear_cross_entropy(case: Case) -> Loss:
    """In chunks of rows; its gradients are made in the forward."""
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(
        hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, labels: Tensor
    ) -> Tensor:
        value: Tensor = F.linear_cross_entropy(hidden, weight, labels, options=options)
        return 0.5 * value

    return loss


def _why_not(case: Case) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has none in chunks"


ENTRANTS = [
    Entrant("torch-linear-ce", "F.linear_cross_entropy", HEADS, _linear_cross_entropy, _why_not,
            computes=hard_alone, nearest=HARD_ALONE, matrices=1.5),
]  # fmt: skip
