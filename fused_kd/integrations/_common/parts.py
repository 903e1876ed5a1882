"""The loss between two models' outputs at either level, and what a user's loss must be."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ...functional import KDLossParts, kd_loss_with
from ...linear.functional import linear_kd_loss_with
from ...modules import KDLoss, LinearKDLoss
from .labels import IGNORE_INDEX


def parts_of(
    loss: KDLoss | LinearKDLoss,
    student: Tensor,  # (B, S, V) logits, or (B, S, H_s) hidden states
    teacher: Tensor,  # (B, S, V), or (B, S, H_t)
    labels: Tensor | None,  # (B, S), aligned
    num_items: float | Tensor | None,
    heads: tuple[nn.Linear, nn.Linear] | None = None,
) -> KDLossParts:
    """Return the loss with its hard and its soft part.

    Args:
        loss: of either level. With logits a LinearKDLoss does what a KDLoss of its options does.
        student: logits; with `heads` the hidden states that the student's head is applied to.
        teacher: the same for the teacher.
        labels: which tokens count, and their classes.
        num_items: as in :func:`fused_kd.kd_loss`.
        heads: the lm_heads of student and teacher.

    Raises:
        ValueError: There are more or fewer rows than labels.
    """
    if labels is not None:
        _check_positions("student", student, labels)
        _check_positions("teacher", teacher, labels)
    options = replace(loss.options, return_parts=True)
    if heads is None:
        parts = kd_loss_with(options, student, teacher, labels, None, num_items)
    else:
        assert isinstance(loss, LinearKDLoss)
        student_head, (weight, bias) = ((head.weight, head.bias) for head in heads)
        # FSDP1's views of frozen weights have a graph.
        teacher_head = weight.detach(), None if bias is None else bias.detach()
        parts = linear_kd_loss_with(
            options, loss.chunks, (student, *student_head), (teacher, *teacher_head), None, labels,
            None, num_items, None,
        )  # fmt: skip
    assert isinstance(parts, KDLossParts)
    return parts


def as_tensor(loss: object) -> Tensor:
    """Return the loss of a call without return_parts, for the type checker."""
    assert isinstance(loss, Tensor)
    return loss


def _check_positions(name: str, output: Tensor, labels: Tensor) -> None:
    """Refuse logits or hidden states with more or fewer rows than there are labels.

    Raises:
        ValueError: Their leading shape is not that of the labels.
    """
    rows = output.shape[:-1]
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
    """Refuse a loss that does not fit labels that the adapter shifts.

    Args:
        loss: the user's loss.
        is_mean: whether the adapter counts the denominator, so that the loss must be a mean.

    Raises:
        TypeError: It is neither KDLoss nor LinearKDLoss.
        ValueError: Its ignore_index is not -100, or its reduction is not "mean".
    """
    if not isinstance(loss, (KDLoss, LinearKDLoss)):
        raise TypeError(f"loss must be KDLoss or LinearKDLoss; got {type(loss).__name__}")
    if loss.options.ignore_index != IGNORE_INDEX:
        raise ValueError(
            "loss must have ignore_index=-100, since labels are shifted here and -100 is put at "
            f"their ends; got {loss.options.ignore_index}"
        )
    if is_mean and loss.options.reduction != "mean":
        raise ValueError(
            "loss must have reduction='mean', since its denominator is counted here; "
            f"got {loss.options.reduction!r}"
        )
