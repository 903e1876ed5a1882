"""Apple's Cut Cross-Entropy: from hidden states, without the logits. It knows no teacher."""

from __future__ import annotations

from torch import Tensor

from ..cases import HEADS, Case
from .base import Entrant, Loss, cannot_import
from .torch_native import HARD_ALONE, hard_alone


def _build(case: Case) -> Loss:
    """Its kernels on a GPU; on a CPU the ``torch.compile`` of the composition that it brings."""
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if case.device == "cuda" else "torch_compile"

    def loss(
        hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, labels: Tensor
    ) -> Tensor:
        value: Tensor = linear_cross_entropy(hidden, weight, labels, impl=implementation)
        return 0.5 * value

    return loss


def _why_not(case: Case) -> str | None:
    if case.device == "cuda" and case.dtype == "fp32":
        return "its kernels have no float32"
    return cannot_import("cut_cross_entropy")


ENTRANTS = [
    Entrant("cut-cross-entropy", "Cut Cross-Entropy", HEADS, _build, _why_not,
            "cut-cross-entropy", computes=hard_alone, nearest=HARD_ALONE, compiles=True,
            matrices=1.5),
]  # fmt: skip
