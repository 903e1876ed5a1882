"""The fields of :class:`fused_kd.KDMetrics`, of rows of logits or from what a kernel has summed.

Notation, for one row: π = softmax(s), τ = softmax(t), p = softmax(s/T), q = softmax(t/T); y is the
label.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .classes import NO_CLASS, Classes
from .divergences import centred, forward_kl, keep


class Sums(NamedTuple):
    """The columns of the operator `measure`, (N,) each.

    The sums leave out the label, whose terms follow from `others` and `at_label`; with a label
    outside [0, V) they are over all entries, and `at_label` is 0. The entropies of a side with a
    NaN or +inf logit, or without a finite one, are NaN.
    """

    hard: Tensor  # that of the loss
    soft: Tensor  # that of the loss, T² times the forward KL divergence
    others: Tensor  # Σ π
    squares: Tensor  # Σ π²
    differences: Tensor  # Σ (p - q)²
    products: Tensor  # Σ π·(p - q)
    at_label: Tensor  # p_y - q_y
    student_entropy: Tensor  # of π
    teacher_entropy: Tensor  # of τ
    student_entropy_at_t: Tensor  # of p
    teacher_entropy_at_t: Tensor  # of q


class Support(NamedTuple):
    """The columns of the operator `measure_support`, (N,) each; NaN as in :class:`Sums`."""

    hard: Tensor
    tail: Tensor  # T·log Σ exp(s/T) outside the support, minus the largest s of the row
    tail_1: Tensor  # the same at temperature 1


class _Sides(NamedTuple):
    """What is compared in a row: B classes, which are V entries, or those of a TopK."""

    student: Tensor  # (C, B) logits for exponentials at T; -inf for a tail that is no class
    student_1: Tensor  # (C, B) the same at temperature 1
    whole_1: Tensor  # (C, B) student_1 with any tail
    teacher: Tensor  # (C, B) logits, for both temperatures
    label: Tensor | None  # (C,) the class of the label; one outside [0, B) is none


def fields_of_sums(
    sums: Sums,
    largest: tuple[Tensor, Tensor],  # (N,) the first largest entries of student and teacher
    y: Tensor | None,  # (N,)
    vocabulary: int,
    temperature: Tensor,
    masses: tuple[Tensor, Tensor] | None = None,  # (N,) of the support of a TopK
) -> Tensor:
    """Return all fields but the weight, (14, N)."""
    no_student, no_teacher = sums.student_entropy.isnan(), sums.teacher_entropy_at_t.isnan()
    no_soft = no_student | no_teacher
    zero = torch.zeros_like(sums.soft)
    hard = accuracy = hard_square = product = zero
    if y is not None:
        hard = sums.hard
        no_hard = no_student | (y < 0) | (y >= vocabulary)
        accuracy = (largest[0] == y).to(zero.dtype).masked_fill(no_hard, math.nan)
        # at the label π - y is minus the other π, without the rounding of a π near 1
        hard_square = (sums.squares + sums.others.square()).masked_fill(no_hard, math.nan)
        product = temperature * (sums.products - sums.others * sums.at_label)
        product = product.masked_fill(no_hard | no_soft, math.nan)
    soft_square = temperature.square() * (sums.differences + sums.at_label.square())
    agreement = (largest[0] == largest[1]).to(zero.dtype)
    of_student, of_teacher = masses or 2 * (torch.ones_like(zero),)
    return torch.stack(
        [
            hard,
            sums.soft,
            *sums[-4:],
            agreement.masked_fill(no_soft, math.nan),
            accuracy,
            hard_square,
            soft_square.masked_fill(no_soft, math.nan),
            product,
            (product < 0).to(zero.dtype).masked_fill(product.isnan(), math.nan),
            of_student.masked_fill(no_student, math.nan),
            of_teacher.masked_fill(no_teacher, math.nan),
        ]
    )


def sums_of_logits(s: Tensor, t: Tensor, y: Tensor, temperature: Tensor) -> Sums:
    """Return the sums of rows of logits (C, V) of both sides."""
    return _sums(_Sides(s, s, s, t, y), temperature)._replace(hard=_hard(s, y))


def support_of_logits(
    s: Tensor,  # (C, V)
    token_ids: Tensor,  # (C, K)
    y: Tensor,  # (C,)
    temperature: Tensor,
) -> tuple[Support, Tensor]:
    """Return the columns of rows of logits, and their largest entries (C,)."""
    top, largest = s.max(1)
    z = (s - top[:, None]).masked_fill(~top.isfinite()[:, None], math.nan)
    at = torch.where(token_ids >= 0, token_ids, s.shape[1]).to(torch.int64)
    z = torch.nn.functional.pad(z, (0, 1)).scatter(1, at, -math.inf)[:, :-1]
    tail = temperature * (z / temperature).logsumexp(1)
    return Support(_hard(s, y), tail, z.logsumexp(1)), largest


def fields_of_support(
    of_support: Support,
    largest: Tensor,  # (N,)
    s: Tensor,  # (N, K+1) the student's logits of the support and, last, the row's largest
    classes: Classes,  # of N rows
    y: Tensor | None,  # (N,)
    vocabulary: int,
    temperature: Tensor,
) -> Tensor:
    """Return all fields but the weight, (14, N), of a TopK: those of its classes."""
    ids, t = classes.token_ids, classes.logits
    has_class = t[:, -1:] != NO_CLASS
    t = torch.cat([t[:, :-1], torch.where(has_class, t[:, -1:], -math.inf)], 1)
    inside, top = s[:, :-1].masked_fill(ids < 0, -math.inf), s[:, -1:]
    # relative to the largest logit that belongs to a class: a large one costs no accuracy
    of_class = torch.where(has_class, top, -math.inf)
    reference = torch.cat([inside, of_class], 1).amax(1, keepdim=True)
    reference = torch.where(reference == -math.inf, 0.0, reference)
    inside, shift = inside - reference, top - reference
    whole, whole_1 = (torch.cat([inside, x[:, None] + shift], 1) for x in of_support[1:])
    is_tail = torch.arange(t.shape[1], device=t.device) == ids.shape[1]
    no_class = is_tail & ~has_class
    label = None
    if y is not None:  # the first True: that of its token, else the tail
        is_label = torch.cat([ids == y[:, None], torch.ones_like(has_class)], 1)
        label = is_label.to(torch.uint8).argmax(1)
    student, student_1 = (x.masked_fill(no_class, -math.inf) for x in (whole, whole_1))
    sums = _sums(_Sides(student, student_1, whole_1, t, label), temperature)
    sums = sums._replace(hard=of_support.hard)
    support = t.masked_fill(is_tail, -math.inf)
    is_largest = (support == support.amax(1, keepdim=True)) & (support != -math.inf)
    tokens = torch.nn.functional.pad(ids, (0, 1), value=vocabulary)
    token = torch.where(is_largest, tokens, vocabulary).amin(1)
    masses = _support_mass(whole / temperature), _support_mass(t / temperature)
    return fields_of_sums(sums, (largest, token), y, vocabulary, temperature, masses)


def masses_are_unknown(classes: Classes, is_drawn: bool) -> Tensor:
    """Return bool (N,): those at another temperature do not follow, for a tail or draws."""
    has_entries = (classes.token_ids >= 0).any(1)
    return has_entries & (classes.logits[:, -1].isfinite() | is_drawn)


# ------------------------------------------------------------------------------- a row of logits


def _sums(sides: _Sides, temperature: Tensor) -> Sums:
    """Return the sums of classes, with `hard` of 0."""
    value, difference = forward_kl(sides.student, sides.teacher, temperature, 0.0)
    logits = [sides.student_1, sides.teacher]
    if torch.compiler.is_compiling() or temperature != 1:  # a trace does not read it
        logits += [sides.student / temperature, sides.teacher / temperature]
    log_masses = [x.log_softmax(1) for x in logits]
    entropies = [_entropy(x, x.exp()) for x in log_masses]
    entropies *= 4 // len(entropies)
    unusable = ~sides.whole_1.amax(1).isfinite(), ~sides.teacher.amax(1).isfinite()
    entropies = [x.masked_fill(unusable[i % 2], math.nan) for i, x in enumerate(entropies)]
    pi, at_label = sides.whole_1.softmax(1), torch.zeros_like(value)
    if sides.label is not None:
        is_label = torch.arange(pi.shape[1], device=pi.device) == sides.label[:, None]
        at_label = keep(difference, is_label).sum(1)
        pi, difference = (keep(x, ~is_label) for x in (pi, difference))
    return Sums(
        torch.zeros_like(value),
        (temperature.square() * value).masked_fill(unusable[0] | unusable[1], math.nan),
        pi.sum(1),
        pi.square().sum(1),
        difference.square().sum(1),
        (pi * difference).sum(1),
        at_label,
        *entropies,
    )


def _hard(s: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy with the label, NaN for one outside [0, V) and for unusable rows."""
    label = torch.where((y >= 0) & (y < s.shape[1]), y, 0)
    z, log_sum = centred(s)
    value = (log_sum - z.gather(1, label[:, None])).squeeze(1)
    return value.masked_fill(~s.amax(1).isfinite() | (y != label), math.nan)


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    """Return -Σ p·log p (C,); a mass of 0 adds nothing."""
    return -(p * log_p).nansum(1)


def _support_mass(logits: Tensor) -> Tensor:
    return logits.softmax(1)[:, :-1].sum(1)
