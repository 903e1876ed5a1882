"""The specification in plain torch: every term, its value and its gradient, written to be read.

Nothing here is fast and nothing is fused. Each formula stands as in ``docs/numerics.md``, every
gradient is written by hand and none relies on autograd. It computes in float64 if a side is
float64, else in float32, on any device, and it is the truth that other backends are tested by.

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
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import KDOptions


class Term(NamedTuple):
    """One term of the loss for every row."""

    value: Tensor  # (N,)
    gradient: Tensor  # (N, V), by the student's logits


class Pair(NamedTuple):
    """Both sides of some rows, softened by the temperature."""

    p: Tensor  # (N, V) student's probabilities
    q: Tensor  # (N, V) teacher's probabilities
    log_p_over_q: Tensor  # (N, V) finite wherever both logits are; 0 at absent entries
    only_student_absent: Tensor  # (N, V) bool: s = -inf while t is not
    only_teacher_absent: Tensor  # (N, V) bool: t = -inf while s is not


# ------------------------------------------------------------------------------- the hard term


def hard_term(s: Tensor, t: Tensor, y: Tensor, smoothing: float) -> Term:
    """H = -(1-ε)·log π_y - (ε/V)·Σ_v log π_v, always at temperature 1.

    V counts the entries that are present. ∂H/∂s_v = π_v - target_v, where the target is ε/V at
    present entries and (1-ε) more at y; an absent y keeps -(1-ε).
    """
    vocabulary = s.shape[-1]
    in_range = (y >= 0) & (y < vocabulary)
    index = torch.where(in_range, y, 0)[:, None]
    z, log_sum = _centred(s)
    value = (1 - smoothing) * (log_sum - z.gather(1, index)).squeeze(1)
    target = torch.zeros_like(s, dtype=torch.float64)
    if smoothing > 0:
        present = (s != -math.inf) | (t != -math.inf)
        count = present.sum(1, keepdim=True).double()
        value = value + smoothing * (_keep(log_sum - z, present) / count.to(s.dtype)).sum(1)
        target = present * (smoothing / count)
    is_label = torch.arange(vocabulary, device=y.device) == index
    target = torch.where(is_label, target + (1 - smoothing), target).to(s.dtype)
    gradient = (z - log_sum).exp() - target
    return _spoil_rows(Term(value, gradient), _unusable(s) | ~in_range)


# ------------------------------------------------------------------------------- the soft terms


def soft_term(s: Tensor, t: Tensor, options: KDOptions) -> Term:
    """S = c(T)·D; every block below returns D and T·∂D/∂s."""
    unit = SOFT_TERMS[options.divergence](s, t, options)
    factor = options.soft_factor
    term = Term(factor * unit.value, (factor / options.temperature) * unit.gradient)
    return _spoil_rows(term, _unusable(s) | _unusable(t))


def forward_kl(s: Tensor, t: Tensor, options: KDOptions) -> Term:
    """D = Σ q·log(q/p); T·∂D/∂s_v = p_v - q_v. Infinite where only the student is -inf."""
    row = soften(s, t, options.temperature)
    value = (-_weighted(row.q, row.log_p_over_q)).sum(1)
    infinite = row.only_student_absent.any(1)
    return Term(value.masked_fill(infinite, math.inf), row.p - row.q)


def reverse_kl(s: Tensor, t: Tensor, options: KDOptions) -> Term:
    """D = Σ p·log(p/q); T·∂D/∂s_v = p_v·(log(p_v/q_v) - D). Infinite where only the teacher is."""
    row = soften(s, t, options.temperature)
    value = _weighted(row.p, row.log_p_over_q).sum(1)
    gradient = _weighted(row.p, row.log_p_over_q - value[:, None])
    return _spoil_rows(Term(value, gradient), row.only_teacher_absent.any(1), math.inf)


def jsd(s: Tensor, t: Tensor, options: KDOptions) -> Term:
    """D = β·KL(q‖m) + (1-β)·KL(p‖m) with m = β·q + (1-β)·p. Always finite.

    T·∂D/∂s_v = (1-β)·p_v·(log(p_v/m_v) - KL(p‖m)).

    With r = log(p/q): log(m/q) = log1p((1-β)·(eʳ-1)) and log(m/p) = log1p(β·(e⁻ʳ-1)). Each is
    taken where its exponential cannot overflow; the other one follows, since they differ by r.
    """
    row = soften(s, t, options.temperature)
    beta, r = options.beta, row.log_p_over_q
    small_p = torch.log1p((1 - beta) * torch.expm1(r.clamp(max=0)))  # log(m/q) where p <= q
    small_q = torch.log1p(beta * torch.expm1(-r.clamp(min=0)))  # log(m/p) where p > q
    log_m_over_q = torch.where(r <= 0, small_p, small_q + r)
    log_m_over_p = torch.where(r <= 0, small_p - r, small_q)
    teacher_kl = -_weighted(row.q, log_m_over_q).sum(1)
    student_kl = -_weighted(row.p, log_m_over_p).sum(1)
    gradient = (1 - beta) * _weighted(row.p, -log_m_over_p - student_kl[:, None])
    return Term(beta * teacher_kl + (1 - beta) * student_kl, gradient)


def tvd(s: Tensor, t: Tensor, options: KDOptions) -> Term:
    """D = ½·Σ|p-q|; T·∂D/∂s_v = ½·p_v·(sgn(p_v-q_v) - Σ p·sgn(p-q)). Always finite."""
    row = soften(s, t, options.temperature)
    difference = row.p - row.q
    sign = difference.sign()
    mean_sign = (row.p * sign).sum(1, keepdim=True)
    return Term(0.5 * difference.abs().sum(1), 0.5 * row.p * (sign - mean_sign))


def mse(s: Tensor, t: Tensor, options: KDOptions) -> Term:
    """D = (1/V)·Σ (s_v-t_v)²/T², no softmax; T·∂D/∂s_v = 2·(s_v-t_v)/(V·T).

    V counts the entries that are present. Infinite where one side alone is -inf.
    """
    no_student, no_teacher = s == -math.inf, t == -math.inf
    present = ~(no_student & no_teacher)
    count = present.sum(1, keepdim=True)
    difference = _keep(s - t, present) / options.temperature
    term = Term((difference * difference / count).sum(1), 2 * difference / count)
    return _spoil_rows(term, (no_student != no_teacher).any(1), math.inf)


SOFT_TERMS: dict[str, Callable[[Tensor, Tensor, KDOptions], Term]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "tvd": tvd,
    "mse": mse,
}


# --------------------------------------------------------------------------------- their parts


def soften(s: Tensor, t: Tensor, temperature: float) -> Pair:
    """p, q and log(p/q) of every row.

    log(p/q) = ((s - max s) - (t - max t))/T - (log Σe^… - log Σe^…): differences relative to the
    maxima, so that large or shifted logits cost no accuracy and equal rows give exactly 0.
    """
    centred_s, log_sum_s = _centred(s, temperature)
    centred_t, log_sum_t = _centred(t, temperature)
    no_student, no_teacher = s == -math.inf, t == -math.inf
    raw = (s - s.amax(1, keepdim=True)) - (t - t.amax(1, keepdim=True))
    ratio = raw / temperature - (log_sum_s - log_sum_t)
    return Pair(
        p=(centred_s - log_sum_s).exp(),
        q=(centred_t - log_sum_t).exp(),
        log_p_over_q=_keep(ratio, ~(no_student & no_teacher)),
        only_student_absent=no_student & ~no_teacher,
        only_teacher_absent=no_teacher & ~no_student,
    )


def _centred(x: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """z = (x - max x)/T, and log Σ exp z, which lies in [0, log V]."""
    z = (x - x.amax(1, keepdim=True)) / temperature
    return z, z.exp().sum(1, keepdim=True).log()


def _weighted(probability: Tensor, x: Tensor) -> Tensor:
    """probability·x, and 0 where the probability is 0, whatever x is."""
    return _keep(probability * x, probability != 0)


def _keep(x: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _unusable(x: Tensor) -> Tensor:
    """(N,) bool: rows with a NaN or +inf logit, or with no finite one."""
    return ~x.amax(1).isfinite()


def _spoil_rows(term: Term, rows: Tensor, value: float = math.nan) -> Term:
    """`value` as these rows' value, NaN as their gradient."""
    gradient = term.gradient.masked_fill(rows[:, None], math.nan)
    return Term(term.value.masked_fill(rows, value), gradient)


def _common(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in the dtype of the computation."""
    double = torch.float64 in (student.dtype, teacher.dtype)
    dtype = torch.float64 if double else torch.float32
    return student.to(dtype), teacher.to(dtype)


# ------------------------------------------------------------------- what a backend must offer


def why_not(device_type: str | None = None) -> str | None:
    """None: the reference runs on every device."""
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
    options: KDOptions,
    inplace: bool = False,
    out: Tensor | None = None,  # (B, S, V), in memory of its own
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The unweighted terms of every row, statistics for a later backward, and the gradient.

    hard (N,) and soft (N,) are 0 where their weight is 0 or the term is off (None); the gradient
    (B, S, V) is w_hard·∂H/∂s + w_soft·∂S/∂s, rounded once: to the dtype of `out`, which is the
    student's or 16-bit beside a float32 student, else to the student's, over the student's memory
    if `inplace`. The reference keeps no statistics: (N, 0).
    """
    vocabulary = student.shape[-1]
    s, t = _common(student.reshape(-1, vocabulary), teacher.reshape(-1, vocabulary))
    hard = soft = s.new_zeros(s.shape[0])
    gradient = torch.zeros_like(s)
    if w_hard is not None:
        assert labels is not None  # the checks have refused a hard weight without labels
        term = hard_term(s, t, labels, options.label_smoothing)
        hard = _keep(term.value, w_hard != 0)
        gradient = _keep(w_hard[:, None] * term.gradient, w_hard[:, None] != 0)
    if w_soft is not None:
        term = soft_term(s, t, options)
        soft = _keep(term.value, w_soft != 0)
        gradient = gradient + _keep(w_soft[:, None] * term.gradient, w_soft[:, None] != 0)
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
    options: KDOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """hard, soft and stats of :func:`forward_backward`."""
    return forward_backward(student, teacher, labels, w_hard, w_soft, options)[:3]


def backward(
    student: Tensor,  # (B, S, V)
    teacher: Tensor,  # (B, S, V)
    labels: Tensor | None,  # (N,)
    w_hard: Tensor | None,  # (N,)
    w_soft: Tensor | None,  # (N,)
    stats: Tensor,  # (N, 0)
    options: KDOptions,
    inplace: bool = False,
) -> Tensor:
    """The gradient of :func:`forward_backward`, from the logits and the statistics."""
    return forward_backward(student, teacher, labels, w_hard, w_soft, options, inplace)[3]


def rescale(
    grad: Tensor,  # (B, S, V), overwritten
    scale: Tensor,  # 0-d
    student: Tensor | None,  # (B, S, V); None: grad lies over the student's memory
    teacher: Tensor,  # (B, S, V)
    labels: Tensor | None,  # (N,)
    w_hard: Tensor | None,  # (N,)
    w_soft: Tensor | None,  # (N,)
    stats: Tensor,  # (N, 0)
    options: KDOptions,
) -> None:
    """Turns a gradient made in the forward into `scale` times it, rounded once where possible."""
    if student is None or grad.dtype in (torch.float32, torch.float64):
        grad.copy_(_keep(grad * scale, grad != 0))  # an ignored row stays 0 if scale is infinite
        return
    scaled_hard = None if w_hard is None else _keep(w_hard * scale, w_hard != 0)
    scaled_soft = None if w_soft is None else _keep(w_soft * scale, w_soft != 0)
    grad.copy_(backward(student, teacher, labels, scaled_hard, scaled_soft, stats, options))
