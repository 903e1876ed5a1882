"""Two peers with one loss each: NVIDIA Model Optimizer and Flash Linear Attention."""

from __future__ import annotations

from ..cases import HEADS, LOGITS, Case
from .base import Loss, Method, needs, with_cross_entropy


def _modelopt(case: Case) -> Loss:
    """Return its loss, T² included; its default reduction divides by N·V, "batchmean" by rows."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    divergence = LogitsDistillationLoss(case.temperature, reduction="batchmean")
    return with_cross_entropy(lambda student, teacher, labels: divergence(student, teacher))


def _fla(case: Case) -> Loss:
    """Return its loss; it has no temperature, so hidden states over T give logits over T."""
    from fla.modules import FusedKLDivLoss, FusedLinearCrossEntropyLoss

    divergence, cross_entropy = FusedKLDivLoss(), FusedLinearCrossEntropyLoss()
    t = case.temperature

    def loss(hidden, weight, teacher, head, labels):
        soft = divergence(hidden / t, teacher / t, weight, head)
        return 0.5 * cross_entropy(hidden, labels, weight) + 0.5 * t**2 * soft

    return loss


_MODELOPT = needs("modelopt.torch.distill.losses", "forward_kl")
_FLA = needs("fla.modules", "forward_kl", gpu=True)
METHODS = [
    Method("modelopt", "NVIDIA Model Optimizer", LOGITS, _modelopt, _MODELOPT, "nvidia-modelopt"),
    Method(
        "fla",
        "Flash Linear Attention",
        HEADS,
        _fla,
        _FLA,
        "flash-linear-attention",
        matrices=3,
        most_rows=2048,
    ),
]
