"""The backend `reference`: the specification of a row, in plain torch.

Reads like the mathematics in ``docs/numerics.md``; every gradient is written out and none relies on
autograd. It computes in float64 if a side is float64, else in float32, on any device, and the other
backends are tested against it. The divergences' own formulas are in :mod:`fused_kd.divergences`.

Notation, for one row: s and t are the logits of student and teacher, y the label, T the
temperature; π = softmax(s), p = softmax(s/T), q = softmax(t/T).

Rules that hold for every term:

* Infinity is decided on the logits. A probability that underflowed to 0 contributes 0.
* An entry that is -inf on both sides is absent: it contributes nothing and is not counted.
* A row with a NaN or +inf logit, or without a finite one, on a side that the term reads: NaN.
* A gradient is the formula also where the value is infinite, if the formula is finite there
  (forward_kl, the hard term); else the whole row is NaN.
* A term of weight 0 is skipped for that row, not multiplied by 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..divergences import TABLE, Term, centred, keep, spoil_rows
from ..options import Formula
from ..sides import arithmetic_dtype


def hard_term(s: Tensor, t: Tensor, y: Tensor, smoothing: float) -> Term:
    """Return H = -(1-ε)·log π_y - (ε/V)·Σ_v log π_v, always at temperature 1.

    V counts the entries that are present. ∂H/∂s_v = π_v - target_v, where the target is ε/V at
    present entries and (1-ε) more at y; an absent y keeps -(1-ε).
    """
    vocabulary = s.shape[-1]
    in_range = (y >= 0) & (y < vocabulary)
    index = torch.where(in_range, y, 0)[:, None]
    z, log_sum = centred(s)
    value = (1 - smoothing) * (log_sum - z.gather(1, index)).squeeze(1)
    target = torch.zeros_like(s, dtype=torch.float64)
    if smoothing > 0:
        present = (s != -math.inf) | (t != -math.inf)
        count = present.sum(1, keepdim=True).double()
        value = value + smoothing * (keep(log_sum - z, present) / count.to(s.dtype)).sum(1)
        target = present * (smoothing / count)
    is_label = torch.arange(vocabulary, device=y.device) == index
    target = torch.where(is_label, target + (1 - smoothing), target).to(s.dtype)
    gradient = (z - log_sum).exp() - target
    return spoil_rows(Term(value, gradient), _unusable(s) | ~in_range)


def soft_term(s: Tensor, t: Tensor, formula: Formula) -> Term:
    """Return S = c(T)·D and its gradient, from D and T·∂D/∂s."""
    unit = TABLE[formula.divergence].formula(s, t, formula.temperature, formula.beta)
    factor = formula.soft_factor()
    term = Term(factor * unit.value, (factor / formula.temperature) * unit.gradient)
    return spoil_rows(term, _unusable(s) | _unusable(t))


def _unusable(x: Tensor) -> Tensor:
    """Return (N,) bool: rows with a NaN or +inf logit, or with no finite one."""
    return ~x.amax(1).isfinite()


# ------------------------------------------------------------------- what a backend must offer


def why_not(device_type: str | None = None) -> str | None:
    """Return None: the reference runs on every device."""
    return None


def refuse_inplace_with_out(inplace: bool) -> None:
    """Raise ValueError if the gradient is to be written to two places."""
    if inplace:
        raise ValueError(
            "inplace=True writes the gradient over the student's logits; got out as well: leave "
            "one of the two out"
        )


def forward_backward(
    student: Tensor,  # (B, S, V)
    teacher: Tensor,  # (B, S, V)
    labels: Tensor | None,  # (N,)
    w_hard: Tensor | None,  # (N,)
    w_soft: Tensor | None,  # (N,)
    formula: Formula,
    inplace: bool = False,
    out: Tensor | None = None,  # (B, S, V), in its own memory
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the unweighted terms of every row, statistics for a later backward, and the gradient.

    hard (N,) and soft (N,) are 0 where their weight is 0 or the term is off (None); the gradient
    (B, S, V) is w_hard·∂H/∂s + w_soft·∂S/∂s, rounded once: to the dtype of `out`, which is the
    student's, or a 16-bit one for a float32 student, else to the student's, over the student's
    memory if `inplace`. The reference keeps no statistics: (N, 0).
    """
    vocabulary = student.shape[-1]
    dtype = arithmetic_dtype(student, teacher)
    s, t = (x.reshape(-1, vocabulary).to(dtype) for x in (student, teacher))
    hard = soft = s.new_zeros(s.shape[0])
    gradient = torch.zeros_like(s)
    if w_hard is not None:
        assert labels is not None  # the checks have refused a hard weight without labels
        term = hard_term(s, t, labels, formula.label_smoothing)
        hard = keep(term.value, w_hard != 0)
        gradient = keep(w_hard[:, None] * term.gradient, w_hard[:, None] != 0)
    if w_soft is not None:
        term = soft_term(s, t, formula)
        soft = keep(term.value, w_soft != 0)
        gradient = gradient + keep(w_soft[:, None] * term.gradient, w_soft[:, None] != 0)
    gradient = gradient.view(student.shape)
    if out is not None:
        refuse_inplace_with_out(inplace)
        rounded = out.copy_(gradient)
    else:
        rounded = gradient.to(student.dtype)
        if inplace:
            rounded = student.copy_(rounded)
    return hard, soft, hard.new_empty((hard.shape[0], 0)), rounded


def forward(
    student: Tensor,  # (B, S, V)
    teacher: Tensor,  # (B, S, V)
    labels: Tensor | None,  # (N,)
    w_hard: Tensor | None,  # (N,)
    w_soft: Tensor | None,  # (N,)
    formula: Formula,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hard, soft and stats of :func:`forward_backward`."""
    return forward_backward(student, teacher, labels, w_hard, w_soft, formula)[:3]


def backward(
    student: Tensor,  # (B, S, V)
    teacher: Tensor,  # (B, S, V)
    labels: Tensor | None,  # (N,)
    w_hard: Tensor | None,  # (N,)
    w_soft: Tensor | None,  # (N,)
    stats: Tensor,  # (N, 0)
    formula: Formula,
    inplace: bool = False,
) -> Tensor:
    """Return the gradient of :func:`forward_backward`, from the logits and the statistics."""
    return forward_backward(student, teacher, labels, w_hard, w_soft, formula, inplace)[3]


def rescale(
    grad: Tensor,  # (B, S, V), overwritten
    scale: Tensor,  # 0-d
    student: Tensor,  # (B, S, V)
    teacher: Tensor,  # (B, S, V)
    labels: Tensor | None,  # (N,)
    w_hard: Tensor | None,  # (N,)
    w_soft: Tensor | None,  # (N,)
    stats: Tensor,  # (N, 0)
    formula: Formula,
) -> None:
    """Multiply a gradient of :func:`forward_backward` by `scale`, rounded once to its dtype."""
    if grad.dtype in (torch.float32, torch.float64):
        multiply(grad, scale)
        return
    scaled_hard = None if w_hard is None else keep(w_hard * scale, w_hard != 0)
    scaled_soft = None if w_soft is None else keep(w_soft * scale, w_soft != 0)
    grad.copy_(backward(student, teacher, labels, scaled_hard, scaled_soft, stats, formula))


def multiply(
    grad: Tensor,  # (B, S, V), overwritten
    scale: Tensor,  # 0-d
) -> None:
    """Multiply a gradient by `scale`, rounding it again. 0 stays 0 for an infinite scale too."""
    grad.copy_(keep(grad * scale, grad != 0))
