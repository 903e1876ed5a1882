"""One call for both levels: the loss between what two models gave, and what it must be."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..functional import KDLossParts, kd_loss_with
from ..linear.functional import linear_kd_loss_with
from ..modules import KDLoss, LinearKDLoss
from .heads import IGNORED


def parts_of(
    loss: KDLoss | LinearKDLoss,
    student: Tensor,  # (B, S, V) logits, or (B, S, H_s) hidden states
    teacher: Tensor,  # (B, S, V), or (B, S, H_t)
    labels: Tensor | None,  # (B, S), aligned
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
    if labels is not None:
        _check_positions("student", student, labels)
        _check_positions("teacher", teacher, labels)
    options = replace(loss.options, return_parts=True)
    if heads is None:
        parts = kd_loss_with(options, student, teacher, labels, None, num_items)
    else:
        assert isinstance(loss, LinearKDLoss)
        of_student, (weight, bias) = ((head.weight, head.bias) for head in heads)
        # FSDP1's views of frozen weights have a graph.
        of_teacher = weight.detach(), None if bias is None else bias.detach()
        parts = linear_kd_loss_with(
            options, loss.chunks, (student, *of_student), (teacher, *of_teacher), None, labels,
            None, num_items, None,
        )  # fmt: skip
    assert isinstance(parts, KDLossParts)
    return parts


def _check_positions(name: str, given: Tensor, labels: Tensor) -> None:
    """Refuse logits or hidden states that are more or fewer than the labels."""
    rows = given.shape[:-1]
    if rows == labels.shape:
        return
    message = (
        f"{name}'s logits must have a row for each label, {tuple(labels.shape)}; got rows "
        f"{tuple(rows)}"
    )
    if len(rows) == labels.dim() == 2 and rows[1] > labels.shape[1]:
        message += (
            ": PEFT's prompt tuning and P-tuning, for example, put virtual tokens before the "
            "inputs, for which there are no labels; use LoRA or prefix tuning"
        )
    raise ValueError(message)


def check_loss(loss: KDLoss | LinearKDLoss, *, is_mean: bool) -> None:
    """Refuses a loss that does not fit labels that are shifted for it.

    Args:
        loss: what a user gives.
        is_mean: whether its denominator is counted for it, so that it must be a mean.

    Raises:
        TypeError: neither KDLoss nor LinearKDLoss.
        ValueError: another ignore_index than -100; another reduction than "mean".
    """
    if not isinstance(loss, (KDLoss, LinearKDLoss)):
        raise TypeError(f"loss must be KDLoss or LinearKDLoss; got {type(loss).__name__}")
    if loss.options.ignore_index != IGNORED:
        raise ValueError(
            "loss must have ignore_index=-100, since labels are shifted here and their ends "
            f"ignored by that; got {loss.options.ignore_index}"
        )
    if is_mean and loss.options.reduction != "mean":
        raise ValueError(
            "loss must have reduction='mean', whose denominator is counted for it; "
            f"got {loss.options.reduction!r}"
        )
