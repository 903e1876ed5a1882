"""The baseline for errors and speed: the loss composed from torch operations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergences import TABLE
from ..sides import Head, Side, Teacher, TopK, arithmetic_dtype

#: The log-probability of a class without mass: finite, since 0·(-inf) is NaN, and far below those
#: that float32 logits lead to.
_NO_MASS = -1e30


def eager_kd_loss(
    student: Side,  # (..., V)
    teacher: Teacher | None,  # (..., V); None needs soft_weight=0
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
    computed in its own dtype, a TopK's classes as in :func:`eager_topk_divergence`. Without
    kd_loss's rules for -inf and for batches whose rows are all ignored; arguments are not checked,
    and without labels the hard term is left out. It can be differentiated twice. A teacher that
    requires grad gets a gradient.

    Raises:
        ValueError: `teacher` is None and `soft_weight` is not 0.
        KeyError: `divergence` is unknown and `soft_weight` is not 0.
    """
    if teacher is None and soft_weight != 0.0:
        raise ValueError(
            f"teacher must be given; got None with soft_weight={soft_weight}: pass soft_weight=0"
        )
    logits = _logits(student)
    other = logits if teacher is None else _logits(teacher)
    dtype, vocabulary = arithmetic_dtype(logits, other), logits.shape[-1]
    s = logits.to(dtype).reshape(-1, vocabulary)
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
        if isinstance(teacher, TopK):
            d = eager_topk_divergence(s, teacher, divergence, temperature, beta)
        else:
            t = other.to(dtype).reshape(-1, vocabulary)
            d = eager_divergence(s, t, divergence, temperature, beta)
        row = row + (soft_weight * factor) * d
    row = w * row
    if reduction == "none":
        return row.view(logits.shape[:-1])
    if reduction == "sum":
        return row.sum()
    return row.sum() / (w.sum() if num_items is None else num_items)


def _logits(side: Teacher) -> Tensor:
    """Return the logits of a side, of a TopK the log-probabilities."""
    if isinstance(side, Head):
        return F.linear(side.hidden, side.weight, side.bias) * side.scale
    return side.logprobs if isinstance(side, TopK) else side


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


def eager_topk_divergence(
    s: Tensor,  # (N, V)
    teacher: TopK,
    divergence: str,
    temperature: float,
    beta: float,
) -> Tensor:
    """Return D of every row, (N,), for a top-k teacher; differentiable.

    It is the divergence between the K+1 classes. The student's log-probabilities are gathered at
    the support; that of its tail is the logsumexp of the others. Computed in the dtype of `s`, with
    tensors of its size, and without kd_loss's rules for -inf.

    Args:
        s: student's logits.
        teacher: N rows, in any leading shape; not checked. For "sampled" the result is -Σ q̂·log p,
            regardless of the divergence.
        divergence: a key of :data:`fused_kd.divergences.TABLE`.
        temperature: T of both sides.
        beta: as in :func:`eager_divergence`.

    Raises:
        KeyError: The divergence is unknown.
    """
    (rows, vocabulary), k = s.shape, teacher.logprobs.shape[-1]
    logprobs = teacher.logprobs.reshape(rows, k).to(s.dtype)
    absent = logprobs == -math.inf
    ids = torch.where(absent, 0, teacher.token_ids.reshape(rows, k)).long()
    log_p = F.log_softmax(s / temperature, -1)
    inside = log_p.gather(1, ids)
    if teacher.tail == "sampled":
        return -torch.where(absent, 0.0, logprobs.exp() * inside).sum(-1)
    in_support = torch.zeros(rows, vocabulary + 1, dtype=torch.bool, device=s.device)
    in_support.scatter_(1, torch.where(absent, vocabulary, ids), True)  # the last is for the absent
    in_support = in_support[:, :-1]
    outside = log_p.masked_fill(in_support, -math.inf).logsumexp(-1)
    no_class = in_support.all(-1) | (teacher.tail == "renormalize")
    absent = torch.cat([absent, no_class[:, None]], 1)
    log_p = torch.cat([inside, outside[:, None]], 1).masked_fill(absent, _NO_MASS)
    log_q = torch.cat([logprobs, _tail(teacher, logprobs)[:, None]], 1)
    log_q = (log_q * (teacher.temperature / temperature)).masked_fill(absent, _NO_MASS)
    return TABLE[divergence].eager(log_p, log_q.clamp(min=_NO_MASS), 1.0, beta)


def _tail(teacher: TopK, logprobs: Tensor) -> Tensor:
    """Return the teacher's log-probability of the tail, (N,); 0 for a row without entries."""
    if teacher.tail != "bucket":
        tail = logprobs.new_full(logprobs.shape[:1], _NO_MASS)
    elif teacher.tail_logprob is not None:
        tail = teacher.tail_logprob.reshape(-1).to(logprobs.dtype)
    else:
        tail = (1 - logprobs.double().exp().sum(-1)).log().to(logprobs.dtype)
    return torch.where((logprobs == -math.inf).all(-1), 0.0, tail)
