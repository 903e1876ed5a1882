"""The baseline for errors and speed: the loss composed from torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergences import TABLE
from ..sides import Head, Side, arithmetic_dtype


def eager_kd_loss(
    student: Side,  # (..., V)
    teacher: Side | None,  # (..., V); None needs soft_weight=0
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
) -> Tensor:
    """Compute the loss of :func:`fused_kd.kd_loss` from torch operations, in eager mode.

    The arguments are those of kd_loss. All arithmetic on logits is in float32 (float64 if an input
    is), and autograd rounds their gradient once to the student's dtype; a Head's logits are
    computed in its own dtype. Without kd_loss's rules for -inf and for batches whose rows are all
    ignored; arguments are not checked, and without labels the hard term is left out. It can be
    differentiated twice. A teacher that requires grad gets a gradient.

    Raises:
        ValueError: `teacher` is None and `soft_weight` is not 0.
        KeyError: `divergence` is unknown and `soft_weight` is not 0.
    """
    if teacher is None and soft_weight != 0.0:
        raise ValueError(
            f"teacher must be given; got None with soft_weight={soft_weight}: pass soft_weight=0"
        )
    logits, other = _logits(student), _logits(student if teacher is None else teacher)
    dtype, vocabulary = arithmetic_dtype(logits, other), logits.shape[-1]
    s, t = (x.to(dtype).reshape(-1, vocabulary) for x in (logits, other))
    w = torch.ones_like(s[:, 0]) if token_weight is None else token_weight.flatten().to(dtype)
    if labels is not None:
        w = torch.where(labels.flatten() != ignore_index, w, 0.0)
    row = torch.zeros_like(w)
    if hard_weight != 0.0 and labels is not None:
        target = labels.flatten().long()
        row = row + hard_weight * F.cross_entropy(
            s, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
        )
    if soft_weight != 0.0:
        factor = temperature**2 if soft_scale == "t2" else 1.0
        row = row + (soft_weight * factor) * eager_divergence(s, t, divergence, temperature, beta)
    row = w * row
    if reduction == "none":
        return row.view(logits.shape[:-1])
    if reduction == "sum":
        return row.sum()
    return row.sum() / (w.sum() if num_items is None else num_items)


def _logits(side: Side) -> Tensor:
    if isinstance(side, Head):
        return F.linear(side.hidden, side.weight, side.bias) * side.scale
    return side


def eager_divergence(
    s: Tensor,  # (N, V)
    t: Tensor,  # (N, V)
    divergence: str,
    temperature: float,
    beta: float,
) -> Tensor:
    """Return D(q, p) of every row, (N,), without the factor c(T); differentiable.

    Computed in the dtype of `s`, without kd_loss's rules for -inf. Notation as in
    :mod:`fused_kd.divergences`.

    Args:
        s: student's logits.
        t: teacher's logits, in the dtype of `s`.
        divergence: a key of :data:`fused_kd.divergences.TABLE`.
        temperature: T of both sides.
        beta: β of "jsd", in (0, 1); ignored by the others.

    Raises:
        KeyError: The divergence is unknown.
    """
    return TABLE[divergence].eager(s, t, temperature, beta)
