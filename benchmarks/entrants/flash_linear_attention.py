"""Flash Linear Attention's losses from hidden states: Triton kernels on chunks of rows."""

from __future__ import annotations

from torch import Tensor

from ..cases import HEADS, Case
from .base import Entrant, Loss, cannot_import, needs_gpu, only


def _build(case: Case) -> Loss:
    """Its KL divergence has no temperature: hidden states over T give logits over T."""
    from fla.modules import FusedKLDivLoss, FusedLinearCrossEntropyLoss

    divergence, cross_entropy = FusedKLDivLoss(), FusedLinearCrossEntropyLoss()
    temperature = case.temperature

    def loss(
        hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, labels: Tensor
    ) -> Tensor:
        soft: Tensor = divergence(hidden / temperature, teacher / temperature, weight, head)
        hard: Tensor = cross_entropy(hidden, labels, weight)
        return 0.5 * hard + 0.5 * temperature**2 * soft

    return loss


def _why_not(case: Case) -> str | None:
    return only(case, "forward_kl") or needs_gpu(case) or cannot_import("fla.modules")


ENTRANTS = [
    Entrant("fla", "Flash Linear Attention", HEADS, _build, _why_not, "flash-linear-attention",
            most_rows=2048, matrices=3),
]  # fmt: skip
