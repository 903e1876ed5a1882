"""One call for both levels: what two models gave, and the loss between them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..functional import KDLossParts, kd_loss_with
from ..linear.functional import linear_kd_loss_with
from ..modules import KDLoss, LinearKDLoss


def parts_of(
    loss: KDLoss | LinearKDLoss,
    student: Tensor,  # (B, S, V) logits, or (B, S, H_s) hidden states
    teacher: Tensor,  # (B, S, V), or (B, S, H_t)
    labels: Tensor,  # (B, S), aligned
    num_items: float | Tensor | None,
    heads: tuple[nn.Linear, nn.Linear] | None = None,
) -> KDLossParts:
    """The loss with its hard and its soft part.

    Args:
        loss: of either level. Given logits, a LinearKDLoss does what a KDLoss of its options does.
        student: logits, or with `heads` what the student's is applied to.
        teacher: the same.
        labels: which tokens count, and what they should be.
        num_items: as in :func:`fused_kd.kd_loss`.
        heads: the lm_heads of student and teacher.
    """
    options = replace(loss.options, return_parts=True)
    if heads is None:
        parts = kd_loss_with(options, student, teacher, labels, None, num_items)
    else:
        assert isinstance(loss, LinearKDLoss)
        of_student, of_teacher = ((head.weight, head.bias) for head in heads)
        parts = linear_kd_loss_with(
            options, loss.chunks, (student, *of_student), (teacher, *of_teacher), None, labels,
            None, num_items, None,
        )  # fmt: skip
    assert isinstance(parts, KDLossParts)
    return parts
