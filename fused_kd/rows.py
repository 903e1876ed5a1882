"""The rows of a call: their labels and weights, and logits as rows with two strides."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import KDOptions
from .sides import Side, row_shape, rows_tensor

LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Weights(NamedTuple):
    """The weight of each row, (N,); 0 if the row is ignored."""

    row: Tensor  # in the reduced loss: token_weight or 1, for "mean" over the denominator
    hard: Tensor | None  # row · hard_weight; None: the term is off
    soft: Tensor | None  # row · soft_weight; None: the term is off


# ------------------------------------------------------------------------------ labels, weights


def labels_and_kept(labels: Any, options: KDOptions) -> tuple[Any, Tensor | None]:
    """Return the labels as int64, and a mask (...) of those that are not ignore_index.

    int64 before the comparison, since ignore_index may not fit a narrower type. None, and what is
    not a dense tensor of integers (the checks refuse it later), is returned unchanged with a mask
    of None.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in LABEL_DTYPES:
        return labels, None
    if labels.layout != torch.strided or labels.is_nested:
        return labels, None
    labels = labels.to(torch.int64)
    return labels, labels != options.ignore_index


def label_rows(labels: Tensor | None, options: KDOptions) -> Tensor | None:
    """Return int64 labels (...) as (N,), contiguous, a view if possible; None without hard term."""
    if labels is None or options.hard_weight == 0.0:
        return None
    is_row = labels.dim() == 1 and labels.is_contiguous()
    return labels if is_row else labels.reshape(-1).contiguous()


def row_weights(
    student: Side,
    dtype: torch.dtype,
    kept: Tensor | None,  # (...), bool
    token_weight: Tensor | None,  # (...)
    options: KDOptions,
    num_items: float | Tensor | None,
    kept_rows: int | None,
) -> Weights:
    """Return the weight of each row in the loss and in each term.

    Args:
        student: the side that has the leading shape and the device of the rows.
        dtype: dtype of the weights.
        kept: the rows that are not ignored; None: all.
        token_weight: the caller's weights; None: 1.
        options: reduction and the weights of the terms.
        num_items: the denominator of "mean"; None: the sum of the weights. If it is a tensor of 0,
            or no row is kept, all weights are 0. Other reductions do not read it.
        kept_rows: an upper bound of the rows in `kept`, or None. If there are more, all weights are
            NaN; not compared if `kept` is None.
    """
    if token_weight is not None:
        w = token_weight.to(dtype)
        w = w if kept is None else torch.where(kept, w, 0.0)
    elif kept is not None:
        w = kept.to(dtype)
    else:
        w = torch.ones(row_shape(student), dtype=dtype, device=rows_tensor(student).device)
    if w.dim() != 1:
        w = w.reshape(-1)
    if options.reduction == "mean":
        w = _over_denominator(w, token_weight is None, num_items)
    else:
        w = w.contiguous()
    if kept_rows is not None and kept is not None:
        w = torch.where(kept.sum() > kept_rows, torch.nan, w)
    return _term_weights(w, options)


def _over_denominator(w: Tensor, is_count: bool, num_items: float | Tensor | None) -> Tensor:
    """Return w over num_items, None: over Σ w; 0 for a tensor of 0. is_count: w is 0 or 1."""
    if num_items is None and is_count:
        return w / w.sum().clamp_(min=1)
    # float64, since the sum of finite float32 weights may overflow
    denominator = w.sum(dtype=torch.float64) if num_items is None else num_items
    if isinstance(denominator, Tensor):
        denominator = torch.where(denominator == 0, math.inf, denominator.to(torch.float64))
        return (w.to(torch.float64) / denominator).to(w.dtype)
    return w / float(denominator)


def _term_weights(w: Tensor, options: KDOptions) -> Weights:
    """Return w and its products with both weights; outside a trace they may be one tensor."""
    hard, soft = options.hard_weight, options.soft_weight
    if torch.compiler.is_compiling():  # no shortcuts: each would be a guard, and compile again
        w_hard = None if hard == 0.0 else w * hard
        return Weights(w, w_hard, None if soft == 0.0 else w * soft)
    w_hard = None if hard == 0.0 else w if hard == 1.0 else w * hard
    if soft == hard:
        return Weights(w, w_hard, w_hard)
    return Weights(w, w_hard, None if soft == 0.0 else w if soft == 1.0 else w * soft)


# --------------------------------------------------------------------------------------- logits


def writes_in_place(student: Side, options: KDOptions) -> bool:
    """Return True if this call overwrites the student's logits by their gradient.

    That needs `inplace`, enabled gradients, and non-empty logits that require grad; in a trace it
    is False.
    """
    return (
        options.inplace
        and torch.is_grad_enabled()
        and isinstance(student, Tensor)
        and student.requires_grad
        and not torch.compiler.is_compiling()
        and student.numel() > 0
    )


def logit_rows(
    student: Tensor,  # (..., V)
    teacher: Tensor | None,  # (..., V)
) -> tuple[Tensor, Tensor | None]:
    """Return both logits as (B, S, V) with the same B and S and a last stride of 1.

    Fewer dimensions get leading dimensions of size 1; more are folded into two. Logits are copied
    only if their last stride is not 1, or if more than three dimensions do not fold (the teacher's:
    like the student's); else the results are views. Both must have the same shape, of at least one
    dimension. A teacher of None stays None.
    """
    if student.stride(-1) != 1:
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


def are_rows(logits: Tensor) -> bool:
    """Return True if :func:`logit_rows` does not copy these logits of a student."""
    return logits.stride(-1) == 1 and (logits.dim() <= 3 or bool(_foldable_splits(logits)))


def _copy(logits: Tensor) -> Tensor:
    """Return a contiguous copy; ``contiguous()`` would keep the strides of an empty tensor."""
    return logits.clone(memory_format=torch.contiguous_format)


def _foldable_splits(logits: Tensor) -> set[int]:
    """Return every i such that dims [0, i) and [i, last) each fold into one, without a copy."""
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
