"""kd_loss: checks, views the logits as rows, weighs the rows, calls autograd, reduces."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .autograd import kd_row_losses, kd_scalar_loss
from .backends import choose
from .options import KDOptions
from .reduction import arithmetic_dtype, label_rows, row_weights, wide_labels


class KDLossParts(NamedTuple):
    """What ``return_parts=True`` gives: loss = hard_weight·hard + soft_weight·soft."""

    loss: Tensor
    hard: Tensor
    soft: Tensor


def kd_loss(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor | None,  # (..., V)
    labels: Tensor | None = None,  # (...)
    *,
    temperature: float = 1.0,
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    soft_scale: str = "t2",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,  # (...)
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    return_parts: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | KDLossParts:
    """Knowledge distillation: cross-entropy with labels plus a divergence from the teacher.

    For each row, with π = softmax(s), p = softmax(s/T), q = softmax(t/T)::

        loss = hard_weight · H + soft_weight · c(T) · D(q, p)
        H    = -(1-ε) log π_y - (ε/V) Σ log π          always at temperature 1

    Equivalent to::

        kept = labels != ignore_index
        log_p = F.log_softmax(student_logits.float() / temperature, -1)
        log_q = F.log_softmax(teacher_logits.float() / temperature, -1)
        soft = temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        hard = F.cross_entropy(
            student_logits.float().flatten(0, -2), labels.flatten(),
            ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none",
        ).view(labels.shape)
        loss = (hard_weight * hard + soft_weight * soft)[kept].mean()

    The logits are float32, bfloat16 or float16, each side for itself. All arithmetic is float32,
    the loss too; the gradient has the student's dtype and is rounded once. float64 logits run on
    the reference backend and give a float64 loss. Autocast changes nothing. Nothing of the size
    of the logits is created but the gradient, except a copy where the last stride is not 1 or the
    leading dimensions do not collapse to two strides.

    An entry that is -inf on both sides is absent: padding a vocabulary so changes nothing. With
    ``soft_weight=0`` the teacher is not read, and an entry that is -inf for the student is absent.
    A row with a NaN or +inf logit is NaN, in no other row. Terms and rows of weight 0 are skipped.

    Args:
        student_logits: (..., V); 1-D is a single row.
        teacher_logits: (..., V), without grad; None needs ``soft_weight=0``.
        labels: (...), integers aligned with the logits (nothing is shifted); None needs
            ``hard_weight=0``. On a GPU a label outside [0, V) makes its row NaN
            (FUSED_KD_DEBUG=1: an error that names it, at the cost of a synchronisation).
        temperature: T > 0 of the soft term.
        hard_weight: weight of H; a term of weight 0 is not computed and reported as 0.
        soft_weight: weight of c(T)·D.
        divergence: D(q, p): "forward_kl" Σ q log(q/p); "reverse_kl" Σ p log(p/q);
            "jsd" β KL(q‖m) + (1-β) KL(p‖m), m = βq + (1-β)p; "tvd" ½ Σ |p-q|;
            "mse" (1/V) Σ (s-t)²/T².
        beta: β of "jsd", the teacher's weight, in (0, 1).
        soft_scale: c(T): "t2" for T², "none" for 1.
        label_smoothing: ε in [0, 1).
        ignore_index: rows with this label do not count, in either term.
        token_weight: (...), a weight w ≥ 0 for each row, bool, int or float.
        reduction: "mean" Σ w·row / Σ w over the kept rows, or / num_items if given;
            "sum" Σ w·row; "none" w·row, shaped like the labels. With no kept row, or with a
            denominator that is a zero tensor, the loss is 0 with zero gradients.
        num_items: denominator of "mean": a number > 0 or a 0-d tensor. Gradient accumulation
            passes the number of kept tokens of the whole batch.
        return_parts: return ``KDLossParts(loss, hard, soft)``; hard and soft are detached, not
            multiplied by hard_weight and soft_weight, and reduced like the loss; soft includes
            c(T).
        inplace: write the gradient over the student logits' memory (in the forward; for float16
            in the backward). What autograd saved of them before raises in its backward, what is
            read of them after is the gradient, and a second backward raises. Not for leaves.
            Nothing is written without gradients, nor under ``torch.compile``.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see ``python -m fused_kd.env``.

    Returns:
        The loss: 0-d, or shaped like the labels for "none"; or KDLossParts.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a value, shape or device that does not fit; the message names the argument.
        RuntimeError: a backend asked for by name cannot run; under a transform of ``torch.func``
            outside ``torch.compile``; in the backward, when it is differentiated again or run twice
            after ``inplace=True``.
    """
    options = KDOptions(
        temperature=temperature,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        divergence=divergence,
        beta=beta,
        soft_scale=soft_scale,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        inplace=inplace,
        return_parts=return_parts,
        backend=backend,
    )
    return kd_loss_with(options, student_logits, teacher_logits, labels, token_weight, num_items)


def kd_loss_with(
    options: KDOptions,
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor | None,  # (..., V)
    labels: Tensor | None = None,  # (...)
    token_weight: Tensor | None = None,  # (...)
    num_items: float | Tensor | None = None,
) -> Tensor | KDLossParts:
    """:func:`kd_loss` with its options already built and checked."""
    labels = wide_labels(labels)
    kept, inplace = _check(options, student_logits, teacher_logits, labels, token_weight, num_items)
    if options.soft_weight == 0.0:
        teacher_logits = None  # its dtype and its -inf entries decide nothing
    backend = choose(options.backend, student_logits, teacher_logits)
    student, teacher = _as_rows(student_logits, teacher_logits, inplace)
    dtype = arithmetic_dtype(student, teacher)
    w = row_weights(student_logits, dtype, kept, token_weight, options, num_items)
    rows = label_rows(labels, options)
    if options.reduction == "none":
        losses = kd_row_losses(student, teacher, rows, w, options, backend)
    else:
        losses = kd_scalar_loss(student, teacher, rows, w, options, backend, inplace)
    return returned(losses, w, options, student_logits.shape[:-1])


def returned(
    losses: tuple[Tensor, Tensor, Tensor], w: Tensor, options: KDOptions, shape: torch.Size
) -> Tensor | KDLossParts:
    """Return what the caller asked for, from the loss and the terms of every row.

    Args:
        losses: the loss, 0-d or (N,); hard (N,) and soft (N,).
        w: (N,), the weights of the reduction.
        options: reduction and return_parts.
        shape: of the labels.
    """
    loss, *terms = losses
    per_row = options.reduction == "none"
    loss = loss.view(shape) if per_row else loss
    if not options.return_parts:
        return loss
    hard, soft = ((w * x).view(shape) if per_row else (w * x).sum() for x in terms)
    return KDLossParts(loss, hard, soft)


def _check(
    options: KDOptions,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    token_weight: Tensor | None,
    num_items: float | Tensor | None,
) -> tuple[Tensor | None, bool]:
    """All checks; returns which rows are kept (None: all) and whether to write in place."""
    checks.refuse_transforms()
    checks.check_logits(student, teacher, options.soft_weight)
    vocabulary = student.shape[-1]
    kept = checks.check_rows(labels, token_weight, num_items, options, student, vocabulary)
    inplace = (
        options.inplace
        and torch.is_grad_enabled()
        and student.requires_grad
        and not torch.compiler.is_compiling()
        and student.numel() > 0
    )
    if inplace:
        checks.check_inplace(student, teacher)
    return kept, inplace


def _as_rows(
    student: Tensor, teacher: Tensor | None, inplace: bool
) -> tuple[Tensor, Tensor | None]:
    """Both logits as (B, S, V) with the same B and S and a last stride of 1, copied only if needed.

    Three-dimensional logits are used as they lie; fewer dimensions get leading ones; of more, the
    leading ones are folded where both tensors allow it.
    """
    if student.stride(-1) != 1:
        if inplace:
            checks.refuse_copy_inplace(student)
        student = _copy(student)
    if teacher is not None and teacher.stride(-1) != 1:
        teacher = _copy(teacher)
    if student.dim() <= 3:
        while student.dim() < 3:
            student = student.unsqueeze(0)
            teacher = None if teacher is None else teacher.unsqueeze(0)
        return student, teacher
    splits = _foldable_splits(student)
    if not splits:
        if inplace:
            checks.refuse_copy_inplace(student)
        student = _copy(student)
        splits = _foldable_splits(student)
    common = splits if teacher is None else splits & _foldable_splits(teacher)
    if teacher is not None and not common:
        teacher = _copy(teacher)
        common = splits
    split = min(common)
    shape = (
        math.prod(student.shape[:split]),
        math.prod(student.shape[split:-1]),
        student.shape[-1],
    )
    return student.view(shape), None if teacher is None else teacher.view(shape)


def _copy(logits: Tensor) -> Tensor:
    """Return a contiguous copy. ``contiguous()`` keeps the strides of a tensor without rows."""
    return logits.clone(memory_format=torch.contiguous_format)


def _foldable_splits(logits: Tensor) -> set[int]:
    """The i for which dims [0, i) and dims [i, last) each fold into one dimension as they lie."""
    shape, strides = logits.shape[:-1], logits.stride()[:-1]
    if logits.numel() == 0:
        return set(range(1, len(shape)))
    breaks = set()
    for i in range(1, len(shape)):
        before = [k for k in range(i) if shape[k] != 1]
        if before and shape[i] != 1:
            inner = [k for k in range(before[-1] + 1, i + 1) if shape[k] != 1]
            if strides[before[-1]] != strides[inner[0]] * shape[inner[0]]:
                breaks.add((before[-1] + 1, i))
    return {i for i in range(1, len(shape)) if all(low <= i <= high for low, high in breaks)}
