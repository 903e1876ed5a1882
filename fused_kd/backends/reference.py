"""The backend `reference`: the specification of a row, in plain torch.

It follows the mathematics in ``docs/numerics.md``. Every gradient is written out; none relies on
autograd. It computes in float64 if a side is float64, else in float32, on any device. The other
backends are tested against it. The formulas of the divergences are in :mod:`fused_kd.divergences`.

Notation, for one row: s and t are the logits of student and teacher, y the label, T the
temperature; π = softmax(s), p = softmax(s/T), q = softmax(t/T).

Rules that hold for every term:

* Infinity is decided on the logits. A probability that underflowed to 0 contributes 0.
* An entry that is -inf on both sides is absent: it contributes nothing and is not counted.
* A row with a NaN or +inf logit, or without a finite one, on a side that the term reads: NaN.
* The gradient of an infinite term is its formula if that is finite (forward_kl, the hard term);
  else the row's gradient is NaN.
* A term of weight 0 is skipped for that row, not multiplied by 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..classes import NO_CLASS, Classes
from ..divergences import TABLE, Term, centred, keep, spoil_rows
from ..measures import sums_of_logits, support_of_logits
from ..options import Formula
from ..sides import arithmetic_dtype


def hard_term(s: Tensor, present: Tensor, y: Tensor, smoothing: float) -> Term:
    """Return H = -(1-ε)·log π_y - (ε/V)·Σ_v log π_v and its gradient, always at temperature 1.

    V counts the present entries. ∂H/∂s_v = π_v - target_v; the target is ε/V at present entries,
    plus (1-ε) at y, also if y is absent. A label outside [0, V) makes its row NaN. H is infinite if
    s is -inf at y, and with smoothing if it is at any present entry.

    Args:
        s: student's logits (N, V), float32 or float64: the arithmetic has this dtype.
        present: bool (N, V): entries that are not -inf on both sides.
        y: labels (N,), int64.
        smoothing: ε.
    """
    vocabulary = s.shape[-1]
    in_range = (y >= 0) & (y < vocabulary)
    index = torch.where(in_range, y, 0)[:, None]
    z, log_sum = centred(s)
    value = (1 - smoothing) * (log_sum - z.gather(1, index)).squeeze(1)
    target = torch.zeros_like(s, dtype=torch.float64)
    if smoothing > 0:
        count = present.sum(1, keepdim=True).double()
        value = value + smoothing * (keep(log_sum - z, present) / count.to(s.dtype)).sum(1)
        target = present * (smoothing / count)
    is_label = torch.arange(vocabulary, device=y.device) == index
    target = torch.where(is_label, target + (1 - smoothing), target).to(s.dtype)
    gradient = (z - log_sum).exp() - target
    return spoil_rows(Term(value, gradient), _unusable(s) | ~in_range)


def soft_term(s: Tensor, t: Tensor, formula: Formula) -> Term:
    """Return S = c(T)·D and its gradient by s, (N,) and (N, V); NaN for unusable rows.

    Args:
        s: student's logits (N, V), float32 or float64: the arithmetic has this dtype.
        t: teacher's logits (N, V), converted to the same dtype.
        formula: divergence, T, β and c(T).
    """
    unit = TABLE[formula.divergence].formula(s, t, formula.temperature, formula.beta)
    factor = formula.soft_factor()
    term = Term(factor * unit.value, (factor / formula.temperature) * unit.gradient)
    return spoil_rows(term, _unusable(s) | _unusable(t))


def classes_term(s: Tensor, classes: Classes, formula: Formula) -> Term:
    """Return S = c(T)·D of a top-k teacher and its gradient by s, (N,) and (N, V).

    It is :func:`soft_term` of the classes. The tail's logit is T·log Σ exp(s_v/T) over the tokens
    outside the support; its gradient by s_v is the softmax of s/T among these tokens. All logits
    are relative to the largest one that belongs to a class.

    Args:
        s: student's logits (N, V), float32 or float64: the arithmetic has this dtype.
        classes: of the teacher, N rows.
        formula: divergence, T, β and c(T).
    """
    t = classes.logits.reshape(len(s), classes.logits.shape[-1]).to(s.dtype)
    tail, temperature, shape = t[:, -1:], formula.temperature, s.shape
    unusable = _unusable(s)
    # absent entries read and write a column of their own, which is dropped
    at = torch.where(classes.token_ids >= 0, classes.token_ids, shape[1]).to(torch.int64)
    padded = torch.nn.functional.pad(s.masked_fill(unusable[:, None], 0.0), (0, 1), value=-math.inf)
    inside = padded.gather(1, at)
    has_class = tail != NO_CLASS
    outside = padded.scatter(1, at, -math.inf)[:, :-1].masked_fill(~has_class, -math.inf)
    largest = torch.cat([inside, outside], 1).amax(1, keepdim=True)
    outside = (outside - largest) / temperature
    log_sum = outside.logsumexp(1, keepdim=True)
    z = torch.cat([inside - largest, log_sum * temperature], 1)
    t = torch.cat([t[:, :-1], torch.where(has_class, tail, -math.inf)], 1)
    term = soft_term(z, t, formula)
    share = keep((outside - log_sum).exp(), outside != -math.inf)
    gradient = keep(share * term.gradient[:, -1:], has_class & (share != 0))
    gradient = torch.nn.functional.pad(gradient, (0, 1)).scatter(1, at, term.gradient[:, :-1])
    gradient = gradient[:, :-1].masked_fill(term.gradient.isnan().any(1, keepdim=True), math.nan)
    return spoil_rows(Term(term.value, gradient), unusable)


def present_entries(s: Tensor, teacher: Tensor | Classes) -> Tensor:
    """Return bool (N, V): False for entries that are absent.

    These are -inf for the student, and -inf for the teacher too: its logits (N, V), or an entry
    that is not in the support.
    """
    if isinstance(teacher, Tensor):
        return (s != -math.inf) | (teacher != -math.inf)
    ids = torch.where(teacher.token_ids >= 0, teacher.token_ids, s.shape[1]).to(torch.int64)
    in_support = torch.zeros(s.shape[0], s.shape[1] + 1, dtype=torch.bool, device=s.device)
    return (s != -math.inf) | in_support.scatter(1, ids, True)[:, :-1]


def _unusable(x: Tensor) -> Tensor:
    """Return bool (N,): True for rows with a NaN or +inf logit, or without a finite one."""
    return ~x.amax(1).isfinite()


# --------------------------------------------------------------- the functions of a backend


def why_not(device_type: str | None = None) -> str | None:
    """Return None, since the reference runs on every device."""
    return None


def refuse_inplace_with_out(inplace: bool) -> None:
    """Raise ValueError if `inplace` is True; for calls with `out`, which excludes it."""
    if inplace:
        raise ValueError(
            "inplace=True writes the gradient over the student's logits; got out as well: leave "
            "one of the two out"
        )


def forward_backward(
    student: Tensor,  # (B, S, V)
    teacher: Tensor | Classes,  # (B, S, V)
    labels: Tensor | None,  # (N,)
    w_hard: Tensor | None,  # (N,)
    w_soft: Tensor | None,  # (N,)
    formula: Formula,
    inplace: bool = False,
    out: Tensor | None = None,  # (B, S, V), separate memory
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both terms of every row, statistics for a later backward, and the gradient.

    Args:
        student: logits; N = B·S rows. Overwritten by the gradient if `inplace`.
        teacher: logits, of any supported dtype; the student again if no term reads a teacher; or
            the classes of a TopK.
        labels: int64; None needs w_hard=None.
        w_hard: weight of H in the gradient; 0: the term is off in this row, None: in all rows.
        w_soft: weight of S, likewise.
        formula: the options.
        inplace: write the gradient over the student's memory.
        out: memory for the gradient: of the student's dtype, or 16-bit for a float32 student.

    Returns:
        hard (N,) and soft (N,), unweighted, 0 if the term is off; statistics, here (N, 0); and the
        gradient (B, S, V), w_hard·∂H/∂s + w_soft·∂S/∂s, rounded once to the dtype of its memory.

    Raises:
        ValueError: `inplace` and `out` are both set.
    """
    vocabulary = student.shape[-1]
    dtype = arithmetic_dtype(student, teacher if isinstance(teacher, Tensor) else teacher.logits)
    s = student.reshape(-1, vocabulary).to(dtype)
    t = teacher.reshape(-1, vocabulary).to(dtype) if isinstance(teacher, Tensor) else teacher
    hard = soft = s.new_zeros(s.shape[0])
    gradient = torch.zeros_like(s)
    if w_hard is not None:
        assert labels is not None  # the checks have refused a hard weight without labels
        term = hard_term(s, present_entries(s, t), labels, formula.label_smoothing)
        hard = keep(term.value, w_hard != 0)
        gradient = keep(w_hard[:, None] * term.gradient, w_hard[:, None] != 0)
    if w_soft is not None:
        term = soft_term(s, t, formula) if isinstance(t, Tensor) else classes_term(s, t, formula)
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
    teacher: Tensor | Classes,  # (B, S, V)
    labels: Tensor | None,  # (N,)
    w_hard: Tensor | None,  # (N,)
    w_soft: Tensor | None,  # (N,)
    formula: Formula,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hard, soft and statistics of :func:`forward_backward`, without the gradient."""
    return forward_backward(student, teacher, labels, w_hard, w_soft, formula)[:3]


def backward(
    student: Tensor,  # (B, S, V)
    teacher: Tensor | Classes,  # (B, S, V)
    labels: Tensor | None,  # (N,)
    w_hard: Tensor | None,  # (N,)
    w_soft: Tensor | None,  # (N,)
    stats: Tensor,  # (N, 0)
    formula: Formula,
    inplace: bool = False,
) -> Tensor:
    """Return the gradient (B, S, V) of :func:`forward_backward`; `stats` are not read."""
    return forward_backward(student, teacher, labels, w_hard, w_soft, formula, inplace)[3]


def rescale(
    grad: Tensor,  # (B, S, V), overwritten
    scale: Tensor,  # 0-d
    student: Tensor,  # (B, S, V)
    teacher: Tensor | Classes,  # (B, S, V)
    labels: Tensor | None,  # (N,)
    w_hard: Tensor | None,  # (N,)
    w_soft: Tensor | None,  # (N,)
    stats: Tensor,  # (N, 0)
    formula: Formula,
) -> None:
    """Overwrite the gradient that forward_backward returned by `scale` times it, rounded once.

    A 16-bit gradient is recomputed from the logits, with weights times `scale`: it may not be in
    the memory of the student's logits.
    """
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
    """Multiply a gradient by `scale` in place, rounding again; 0 stays 0 for any scale."""
    grad.copy_(keep(grad * scale, grad != 0))


def measure(
    student: Tensor,  # (B, S, V)
    teacher: Tensor,  # (B, S, V)
    labels: Tensor,  # (N,)
    weight: Tensor,  # (N,)
    temperature: Tensor,  # 0-d
) -> tuple[Tensor, Tensor]:
    """Return :class:`fused_kd.measures.Sums` as columns (N, MEASURES), and the largest entries.

    These are (N, 2), int64: the first largest entry of the student, then of the teacher. `weight`
    is not read. About a dozen temporaries have the size of the logits.
    """
    dtype = arithmetic_dtype(student, teacher)
    s, t = (x.flatten(0, 1).to(dtype) for x in (student, teacher))
    columns = torch.stack(sums_of_logits(s, t, labels, temperature), 1)
    return columns, torch.stack([s.argmax(1), t.argmax(1)], 1)


def measure_support(
    student: Tensor,  # (B, S, V)
    token_ids: Tensor,  # (N, K)
    labels: Tensor,  # (N,)
    weight: Tensor,  # (N,)
    temperature: Tensor,  # 0-d
) -> tuple[Tensor, Tensor]:
    """Return :class:`fused_kd.measures.Support` as columns (N, 3), and the largest entries (N,)."""
    s = student.flatten(0, 1).to(arithmetic_dtype(student))
    columns, largest = support_of_logits(s, token_ids, labels, temperature)
    return torch.stack(columns, 1), largest
