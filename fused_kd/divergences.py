"""The divergences: traits, reference formulas, and the eager composition in torch.

An entry of TABLE is all that Python needs of a divergence. The kernels have one block for each, in
``csrc/kd_math.h`` and ``fused_kd/backends/triton/rules.py``. No other code depends on which
divergence it is.

Notation, for one row: s and t are the logits of student and teacher, T the temperature;
p = softmax(s/T), q = softmax(t/T). A formula takes logits (N, V), float32 or float64, a 0-d
temperature and β, which only divergences with `needs_beta` read. It returns D and T·∂D/∂s of every
row, and follows the rules of :mod:`fused_kd.backends.reference` for logits of -inf. Rows that are
NaN by these rules are left to its caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Term(NamedTuple):
    """A divergence D, or a term of the loss (H or S = c(T)·D), of every row."""

    value: Tensor  # (N,)
    gradient: Tensor  # (N, V); of a divergence T·∂D/∂s, of a term its gradient by s


class Pair(NamedTuple):
    """The softmaxes of both sides at the temperature, and their log-ratio."""

    p: Tensor  # (N, V) student's probabilities
    q: Tensor  # (N, V) teacher's probabilities
    log_p_over_q: Tensor  # (N, V) finite if both logits are; 0 if both are -inf
    only_student_absent: Tensor  # (N, V) bool: s = -inf while t is not
    only_teacher_absent: Tensor  # (N, V) bool: t = -inf while s is not


# ------------------------------------------------------------------------------------- formulas


def forward_kl(s: Tensor, t: Tensor, temperature: Tensor, beta: float) -> Term:
    """Return D = Σ q·log(q/p) and T·∂D/∂s_v = p_v - q_v.

    D is infinite, and the gradient finite, if an entry is -inf for the student alone.
    """
    row = soften(s, t, temperature)
    value = (-_weighted(row.q, row.log_p_over_q)).sum(1)
    infinite = row.only_student_absent.any(1)
    return Term(value.masked_fill(infinite, math.inf), row.p - row.q)


def reverse_kl(s: Tensor, t: Tensor, temperature: Tensor, beta: float) -> Term:
    """Return D = Σ p·log(p/q) and T·∂D/∂s_v = p_v·(log(p_v/q_v) - D).

    D is infinite, and the row's gradient NaN, if an entry is -inf for the teacher alone.
    """
    row = soften(s, t, temperature)
    value = _weighted(row.p, row.log_p_over_q).sum(1)
    gradient = _weighted(row.p, row.log_p_over_q - value[:, None])
    return spoil_rows(Term(value, gradient), row.only_teacher_absent.any(1), math.inf)


def jsd(s: Tensor, t: Tensor, temperature: Tensor, beta: float) -> Term:
    """Return D = β·KL(q‖m) + (1-β)·KL(p‖m) of m = β·q + (1-β)·p, always finite, and T·∂D/∂s.

    T·∂D/∂s_v = (1-β)·p_v·(log(p_v/m_v) - KL(p‖m)).

    With r = log(p/q): log(m/q) = log1p((1-β)·(eʳ-1)) and log(m/p) = log1p(β·(e⁻ʳ-1)). The first is
    computed for r ≤ 0, the second for r > 0, so that no exponential overflows; they differ by r.
    """
    row = soften(s, t, temperature)
    r = row.log_p_over_q
    small_p = torch.log1p((1 - beta) * torch.expm1(r.clamp(max=0)))  # log(m/q) if p <= q
    small_q = torch.log1p(beta * torch.expm1(-r.clamp(min=0)))  # log(m/p) if p > q
    log_m_over_q = torch.where(r <= 0, small_p, small_q + r)
    log_m_over_p = torch.where(r <= 0, small_p - r, small_q)
    teacher_kl = -_weighted(row.q, log_m_over_q).sum(1)
    student_kl = -_weighted(row.p, log_m_over_p).sum(1)
    gradient = (1 - beta) * _weighted(row.p, -log_m_over_p - student_kl[:, None])
    return Term(beta * teacher_kl + (1 - beta) * student_kl, gradient)


def tvd(s: Tensor, t: Tensor, temperature: Tensor, beta: float) -> Term:
    """Return D = ½·Σ|p-q|, always finite, and T·∂D/∂s_v = ½·p_v·(sgn(p_v-q_v) - Σ p·sgn(p-q))."""
    row = soften(s, t, temperature)
    difference = row.p - row.q
    sign = difference.sign()
    mean_sign = (row.p * sign).sum(1, keepdim=True)
    return Term(0.5 * difference.abs().sum(1), 0.5 * row.p * (sign - mean_sign))


def mse(s: Tensor, t: Tensor, temperature: Tensor, beta: float) -> Term:
    """Return D = (1/V)·Σ (s_v-t_v)²/T², without softmax, and T·∂D/∂s_v = 2·(s_v-t_v)/(V·T).

    V counts the entries that are not -inf on both sides. D is infinite, and the row's gradient NaN,
    if an entry is -inf for one side alone.
    """
    no_student, no_teacher = s == -math.inf, t == -math.inf
    present = ~(no_student & no_teacher)
    count = present.sum(1, keepdim=True)
    difference = keep(s - t, present) / temperature
    term = Term((difference * difference / count).sum(1), 2 * difference / count)
    return spoil_rows(term, (no_student != no_teacher).any(1), math.inf)


# ------------------------------------------------------- what a careful user composes
# They return D of every row, (N,), from logits (N, V), without the rules for -inf.


def _eager_kl(log_of: Tensor, log_by: Tensor) -> Tensor:
    return F.kl_div(log_by, log_of, reduction="none", log_target=True).sum(-1)


def _log_softmaxes(s: Tensor, t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)


def _eager_forward_kl(s: Tensor, t: Tensor, temperature: float, beta: float) -> Tensor:
    log_p, log_q = _log_softmaxes(s, t, temperature)
    return _eager_kl(log_q, log_p)


def _eager_reverse_kl(s: Tensor, t: Tensor, temperature: float, beta: float) -> Tensor:
    log_p, log_q = _log_softmaxes(s, t, temperature)
    return _eager_kl(log_p, log_q)


def _eager_jsd(s: Tensor, t: Tensor, temperature: float, beta: float) -> Tensor:
    log_p, log_q = _log_softmaxes(s, t, temperature)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return beta * _eager_kl(log_q, log_m) + (1 - beta) * _eager_kl(log_p, log_m)


def _eager_tvd(s: Tensor, t: Tensor, temperature: float, beta: float) -> Tensor:
    log_p, log_q = _log_softmaxes(s, t, temperature)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def _eager_mse(s: Tensor, t: Tensor, temperature: float, beta: float) -> Tensor:
    return (s - t).square().mean(-1) / temperature**2


# ------------------------------------------------------------------------------------- the table


class Divergence(NamedTuple):
    """A divergence: its formulas and traits."""

    meaning: str  # D(q, p) as text, for the documentation
    formula: Callable[[Tensor, Tensor, Tensor, float], Term]  # of s, t, T, β
    eager: Callable[[Tensor, Tensor, float, float], Tensor]  # D (N,) of s, t, T, β; differentiable
    needs_beta: bool = False  # β must be in (0, 1); the others ignore it
    has_logarithm: bool = False  # the gradient contains log(p/q) or log(p/m)
    has_sign: bool = False  # the gradient contains the sign of p - q
    of_logits: bool = False  # compares logits; the others probabilities, of any set of classes
    is_linear: bool = False  # the gradient is linear in q
    needs_mass: bool = False  # infinite for every student if the teacher has a class of mass 0


#: The position of an entry is the code by which the kernels select it.
TABLE = {
    "forward_kl": Divergence("Σ q log(q/p)", forward_kl, _eager_forward_kl, is_linear=True),
    "reverse_kl": Divergence(
        "Σ p log(p/q)", reverse_kl, _eager_reverse_kl, has_logarithm=True, needs_mass=True
    ),
    "jsd": Divergence(
        "β KL(q‖m) + (1-β) KL(p‖m), m = βq + (1-β)p",
        jsd,
        _eager_jsd,
        needs_beta=True,
        has_logarithm=True,
    ),
    "tvd": Divergence("½ Σ |p-q|", tvd, _eager_tvd, has_sign=True),
    "mse": Divergence("(1/V) Σ (s-t)²/T²", mse, _eager_mse, of_logits=True),
}
DIVERGENCES = tuple(TABLE)
CODES = {name: code for code, name in enumerate(DIVERGENCES)}
NEEDS_BETA = frozenset(name for name, entry in TABLE.items() if entry.needs_beta)


# --------------------------------------------------------------------- what the formulas share


def soften(s: Tensor, t: Tensor, temperature: Tensor) -> Pair:
    """Return p, q, log(p/q) and the masks of one-sided -inf, for logits (N, V).

    log(p/q) = ((s - max s) - (t - max t))/T - (log Σe^… - log Σe^…). These are differences relative
    to the maxima, so that large or shifted logits cost no accuracy and equal rows give exactly 0.
    """
    centred_s, log_sum_s = centred(s, temperature)
    centred_t, log_sum_t = centred(t, temperature)
    no_student, no_teacher = s == -math.inf, t == -math.inf
    raw = (s - s.amax(1, keepdim=True)) - (t - t.amax(1, keepdim=True))
    ratio = raw / temperature - (log_sum_s - log_sum_t)
    return Pair(
        p=(centred_s - log_sum_s).exp(),
        q=(centred_t - log_sum_t).exp(),
        log_p_over_q=keep(ratio, ~(no_student & no_teacher)),
        only_student_absent=no_student & ~no_teacher,
        only_teacher_absent=no_teacher & ~no_student,
    )


def centred(x: Tensor, temperature: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Return z = (x - max x)/T (N, V) and log Σ exp z (N, 1), which is in [0, log V].

    The sum is NaN for a row with a NaN or +inf, or without a finite entry.
    """
    z = (x - x.amax(1, keepdim=True)) / temperature
    return z, z.exp().sum(1, keepdim=True).log()


def _weighted(probability: Tensor, x: Tensor) -> Tensor:
    return keep(
        probability * x, probability != 0
    )  # 0 for a probability of 0, even if x is infinite


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """Return x, with 0 for entries whose mask (bool) is False, even for NaN and infinity."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def spoil_rows(term: Term, rows: Tensor, value: float = math.nan) -> Term:
    """Return the term with some rows replaced: their value by `value`, their gradient by NaN.

    Args:
        term: the values and gradients; not modified.
        rows: bool (N,), True for the rows to replace.
        value: their new value.
    """
    gradient = term.gradient.masked_fill(rows[:, None], math.nan)
    return Term(term.value.masked_fill(rows, value), gradient)
