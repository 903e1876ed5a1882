"""NVIDIA Model Optimizer's distillation of logits. Its T² is inside."""

from __future__ import annotations

from torch import Tensor

from ..cases import LOGITS, Case
from .base import Entrant, Loss, cannot_import, only
from .torch_native import with_cross_entropy


def _build(case: Case) -> Loss:
    """Its default reduction divides by N·V; "batchmean" by the rows."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    divergence = LogitsDistillationLoss(case.temperature, reduction="batchmean")

    def soft(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = divergence(student, teacher)
        return result

    return with_cross_entropy(soft)


def _why_not(case: Case) -> str | None:
    return only(case, "forward_kl") or cannot_import("modelopt.torch.distill.losses")


ENTRANTS = [
    Entrant("modelopt", "NVIDIA Model Optimizer", LOGITS, _build, _why_not, "nvidia-modelopt",
            matrices=6),
]  # fmt: skip
