"""Labels and weights of the rows, as every loss of the package takes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import LABEL_DTYPES
from .options import KDOptions


def wide_labels(labels: Tensor | None) -> Tensor | None:
    """int64 before any comparison: ignore_index may not fit a narrower type."""
    if isinstance(labels, Tensor) and labels.dtype in LABEL_DTYPES:
        return labels.to(torch.int64)
    return labels


def label_rows(labels: Tensor | None, options: KDOptions) -> Tensor | None:
    """(N,), contiguous; None without a hard term."""
    if labels is None or options.hard_weight == 0.0:
        return None
    return labels.reshape(-1).contiguous()


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def row_weights(
    student: Tensor,  # (..., anything)
    dtype: torch.dtype,
    kept: Tensor | None,  # (...), bool
    token_weight: Tensor | None,  # (...)
    options: KDOptions,
    num_items: float | Tensor | None,
) -> Tensor:
    """(N,): the weight of each row in the reduced loss, denominator included, 0 if ignored."""
    if token_weight is not None:
        w = token_weight.to(dtype)
        w = w if kept is None else torch.where(kept, w, 0.0)
    elif kept is not None:
        w = kept.to(dtype)
    else:
        w = torch.ones(student.shape[:-1], dtype=dtype, device=student.device)
    w = w.reshape(-1)
    if options.reduction != "mean":
        return w.contiguous()
    if num_items is None and token_weight is None:
        return w / w.sum().clamp_(min=1)  # a count
    # the sum of weights that are each finite need not be, in float32
    denominator = w.sum(dtype=torch.float64) if num_items is None else num_items
    if isinstance(denominator, Tensor):
        denominator = torch.where(denominator == 0, math.inf, denominator.to(torch.float64))
        return (w.to(torch.float64) / denominator).to(dtype)
    return w / float(denominator)
