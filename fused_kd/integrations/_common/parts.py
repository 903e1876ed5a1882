"""The loss between two models' outputs, and what a user's loss must be."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...functional import KDLossParts, kd_loss_with
from ...modules import KDLoss
from ...sides import Head, Side, Teacher, TopK, row_shape
from .labels import IGNORE_INDEX

#: Keywords that a call refuses if both sides are logits, which have no chunks.
_FOR_HEADS = ("memory_budget", "chunk_rows", "grad_accum_dtype")


def parts_of(
    loss: KDLoss,
    student: Side,  # (B, S, V)
    teacher: Teacher,  # (B, S, V)
    labels: Tensor | None,  # (B, S), aligned
    num_items: float | Tensor | None,
) -> KDLossParts:
    """Return the loss between two models' outputs, with its hard and its soft part.

    Args:
        loss: its return_parts is ignored; so are its keywords for heads if both sides are logits,
            as in an evaluation.
        student: logits or a Head.
        teacher: logits, a Head, whose weight and bias are detached, or a TopK.
        labels: classes of the tokens, -100 for a token that does not count; None: all count.
        num_items: as in :func:`fused_kd.kd_loss`.

    Raises:
        TypeError, RuntimeError: As :func:`fused_kd.kd_loss`.
        ValueError: The same; or the leading shape of a side is not that of the labels.
    """
    if labels is not None:
        _check_positions("student", student, labels)
        _check_positions("teacher", teacher, labels)
    options = replace(loss.options, return_parts=True)
    if isinstance(teacher, Head):  # FSDP1's views of frozen weights have a graph
        bias = None if teacher.bias is None else teacher.bias.detach()
        teacher = teacher._replace(weight=teacher.weight.detach(), bias=bias)
    elif not isinstance(student, Head):
        options = replace(options, memory_budget=None, chunk_rows=None, grad_accum_dtype=None)
    parts = kd_loss_with(options, student, teacher, labels, None, num_items)
    assert isinstance(parts, KDLossParts)
    return parts


def as_tensor(loss: object) -> Tensor:
    """Return `loss`, which is a tensor in a call without return_parts, for the type checker."""
    assert isinstance(loss, Tensor)
    return loss


def _check_positions(name: str, side: Teacher, labels: Tensor) -> None:
    """Refuse a side with more or fewer rows than there are labels.

    Raises:
        ValueError: The leading shape of `side` is not that of the labels.
    """
    rows = row_shape(side)
    if rows == labels.shape:
        return
    what = "TopK" if isinstance(side, TopK) else "logits"
    message = (
        f"{name}'s {what} must have a row for each label, {tuple(labels.shape)}; got rows "
        f"{tuple(rows)}"
    )
    if what == "logits" and len(rows) == labels.dim() == 2 and rows[1] > labels.shape[1]:
        message += (
            ": PEFT's prompt tuning and P-tuning, for example, put virtual tokens before the "
            "inputs, for which there are no labels; use LoRA or prefix tuning"
        )
    raise ValueError(message)


def check_loss(loss: KDLoss, *, heads: bool, is_mean: bool) -> None:
    """Refuse a loss that does not fit the sides or the labels that the adapter passes to it.

    Args:
        loss: the user's loss.
        heads: whether a training step passes a Head for each side.
        is_mean: whether the adapter counts the denominator, so that the loss must be a mean.

    Raises:
        TypeError: `loss` is no KDLoss.
        ValueError: Its ignore_index is not -100; with `is_mean` its reduction is not "mean"; it has
            inplace with `heads`, or a keyword for the chunks of a Head without.
    """
    if not isinstance(loss, KDLoss):
        raise TypeError(f"loss must be a KDLoss; got {type(loss).__name__}")
    if loss.options.ignore_index != IGNORE_INDEX:
        raise ValueError(
            "loss must have ignore_index=-100, since labels are shifted here and -100 is put at "
            f"their ends; got {loss.options.ignore_index}: set the labels to be ignored to -100"
        )
    if is_mean and loss.options.reduction != "mean":
        raise ValueError(
            "loss must have reduction='mean', since its denominator is counted here; "
            f"got {loss.options.reduction!r}: use KDLoss(reduction='mean')"
        )
    for name in ("inplace",) if heads else _FOR_HEADS:
        if value := getattr(loss.options, name):
            raise ValueError(
                f"loss must not have {name} with heads={heads}; got {value}: leave it out, or pass "
                f"heads={not heads}"
            )
