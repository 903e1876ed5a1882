"""The formulas of a row that all divergences share. Nothing here loads or stores.

:mod:`.rules` explains the symbols, and defines sums, again, refs and constants; :mod:`.parameters`
defines numbers and terms. `power` is ``numbers.power``; on_soft: the row's soft term has a weight.

References start at LOWEST, so that no comparison is needed: P is 0 until a logit is above it. A
side is NaN if all its logits are below LOWEST/k, or one is above -LOWEST/k.

Infinity is decided on the logits. An entry that is -inf on both sides is absent.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .rules import LN2, Again, Constants, Entry, References, Shift, Sums

INF = tl.constexpr(float("inf"))
#: The first reference. A product of up to this size is rounded by at most 32, so 2^a stays finite.
LOWEST = tl.constexpr(-(2.0**30))


# -------------------------------------------------------------------------------- the first pass


@triton.jit
def _rebase(sums, M_s, M_t, power, terms):
    """Return the sums relative to the references M_s, M_t, which are at least their own."""
    old_s, old_t, d_s, d_t, d_1, w, differences, count = sums
    shift_s = old_s - M_s
    factor_s = tl.exp2(shift_s)
    if terms.rule.softmax and not terms.rule.teacher:
        d_s *= factor_s
    elif terms.rule.softmax:
        shift_t = old_t - M_t
        factor_t = tl.exp2(shift_t)
        d_s, d_t = d_s * factor_s, d_t * factor_t
        if terms.rule.own_sum:
            s, t = Shift(shift_s, factor_s, d_s), Shift(shift_t, factor_t, d_t)
            w = terms.rule.rebase(w, s, t)
    if terms.HAS_HARD:
        d_1 *= tl.exp2(shift_s * power)
    if terms.SMOOTHING:
        differences += count * shift_s
    return Sums(M_s, M_t, d_s, d_t, d_1, w, differences, count)


@triton.jit
def _larger(x, y, u, v):
    return tl.maximum(x, u), tl.maximum(y, v)


@triton.jit
def _added(x, y, z, w, u, v, r, q):
    return x + u, y + v, z + r, w + q


@triton.jit
def fold(sums, power, terms):
    """Return the sums along axis 0 (lanes or parts) merged into one."""
    zero = tl.full((), 0.0, tl.float32)
    if terms.rule.teacher:
        M_s, M_t = tl.reduce((sums.M_s, sums.M_t), 0, _larger)
    else:
        M_s, M_t = tl.max(sums.M_s, 0), zero
    _, _, d_s, d_t, d_1, w, differences, count = _rebase(sums, M_s, M_t, power, terms)
    if terms.rule.softmax and terms.rule.teacher:
        d_s, d_t, d_1, w = tl.reduce((d_s, d_t, d_1, w), 0, _added)
    else:
        if terms.rule.softmax:
            d_s = tl.sum(d_s, 0)
        else:
            d_s = tl.max(d_s, 0) if terms.rule.differences else zero
        d_t = zero
        w = tl.sum(w, 0) if terms.rule.differences else zero
        d_1 = tl.sum(d_1, 0) if terms.HAS_HARD else zero
    differences = tl.sum(differences, 0) if terms.SMOOTHING else zero
    count = tl.sum(count, 0) if terms.SMOOTHING or terms.rule.differences else zero
    return Sums(M_s, M_t, d_s, d_t, d_1, w, differences, count)


@triton.jit
def hard_sum(sums, power, terms):
    """Return d_1 of a row, which is d_s at T = 1."""
    if terms.rule.softmax:
        return tl.where(power == 1.0, sums.d_s, sums.d_1)
    return sums.d_1


@triton.jit
def add_tile(
    sums,
    s,  # COUNT x (LANES,)
    t,
    tops,  # the largest entry of s, and of t
    numbers,
    terms,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return the sums of the lanes with a tile added, which may raise their references.

    COUNT must be a multiple of GROUP, the number of entries processed together.
    """
    k, power, top_s, top_t = numbers.k, numbers.power, tops[0], tops[1]
    M_s, M_t = tl.maximum(sums.M_s, top_s * k), sums.M_t
    if terms.rule.teacher:
        M_t = tl.maximum(M_t, top_t * k)
    _, _, d_s, d_t, d_1, w, differences, count = _rebase(sums, M_s, M_t, power, terms)
    for first in tl.static_range(0, COUNT, GROUP):
        exponents, probabilities = (), ()
        for i in tl.static_range(first, first + GROUP):
            a = tl.fma(s[i], k, -M_s)
            P = tl.exp2(a) if terms.rule.softmax or terms.HAS_HARD else a
            exponents, probabilities = exponents + (a,), probabilities + (P,)
            b, Q, x = a, P, a
            if terms.rule.softmax and not terms.rule.teacher:
                d_s += P
            elif terms.rule.softmax:
                b = tl.fma(t[i], k, -M_t)
                Q = tl.exp2(b)
                d_s += P
                d_t += Q
            if terms.rule.differences or terms.SMOOTHING:
                present = (s[i] != -INF) | (t[i] != -INF)
                count += present.to(tl.float32)
            if terms.rule.differences:
                x = tl.where(present, s[i] - t[i], 0.0)
            if terms.rule.own_sum:
                w = terms.rule.add(w, Entry(a, b, P, Q, x))
            if terms.rule.differences:
                d_s = tl.maximum(d_s, tl.abs(x))
            if terms.SMOOTHING:
                differences += tl.where(present, a, 0.0)
        if terms.HAS_HARD:
            if not terms.rule.softmax:
                for i in tl.static_range(GROUP):
                    d_1 += probabilities[i]
            elif power == 2.0:
                for i in tl.static_range(GROUP):
                    d_1 = tl.fma(probabilities[i], probabilities[i], d_1)
            elif power != 1.0:
                for i in tl.static_range(GROUP):
                    d_1 += tl.exp2(exponents[i] * power)
    return Sums(M_s, M_t, d_s, d_t, d_1, w, differences, count)


# --------------------------------------------------------------- second pass, value, gradient


@triton.jit
def add_tile_again(again, s, t, refs, numbers, terms, COUNT: tl.constexpr):
    """Return the second pass's sums of the lanes with a tile added, for rules with two passes."""
    x, y = again
    for i in tl.static_range(COUNT):
        a, b = tl.fma(s[i], numbers.k, -refs.M_s), tl.fma(t[i], numbers.k, -refs.M_t)
        P, Q = tl.exp2(a), tl.exp2(b)
        x, y = terms.rule.add_again(x, y, Entry(a, b, P, Q, a), refs, numbers.beta)
    return Again(x, y)


@triton.jit
def references(sums, on_soft, terms):
    """Return the references of a row, and d_s/d_t: exactly 1 for equal rows, its logarithm 0.

    If the row's soft term is off, the teacher's reference is the student's, and the ratio 1.
    """
    one, zero = tl.full((), 1.0, tl.float32), tl.full((), 0.0, tl.float32)
    ratio = one
    if terms.rule.softmax:
        ratio = tl.where(on_soft, tl.div_rn(sums.d_s, sums.d_t), 1.0)
    log_ratio = -tl.log2(ratio) if terms.rule.logarithms else zero
    return References(sums.M_s, tl.where(on_soft, sums.M_t, sums.M_s), ratio, log_ratio)


@triton.jit
def unusable(M):
    """Return True if a side's reference M shows only absent logits, or a logit of +inf.

    A NaN among other logits shows in the sums instead.
    """
    return (M <= LOWEST) | (M >= -LOWEST)


@triton.jit
def _soft_is_infinite(sums, rule: tl.constexpr):
    if not rule.infinite:
        return False
    if rule.softmax:
        return ~(tl.abs(sums.w) < INF)
    return sums.d_s == INF


@triton.jit
def _soft_is_nan(sums, rule: tl.constexpr):
    nan = unusable(sums.M_s) | unusable(sums.M_t)
    nan = nan | (sums.d_s != sums.d_s) | (sums.d_t != sums.d_t)
    return nan if rule.softmax else nan | (sums.w != sums.w)


@triton.jit
def soft_value(sums, again, numbers, rule: tl.constexpr):
    """Return the soft term c(T)·D of a row, infinite and NaN rows included."""
    value = rule.loss(sums, again, numbers.temperature, numbers.beta)
    value = tl.where(_soft_is_infinite(sums, rule), INF, numbers.soft_factor * value)
    return tl.where(_soft_is_nan(sums, rule), float("nan"), value)


@triton.jit
def hard_value(sums, s_y, numbers, terms):
    """Return the hard term of a row from its label's logit s_y; the caller replaces NaN rows."""
    log_sum = tl.log(hard_sum(sums, numbers.power, terms))
    unit = numbers.power * LN2  # converts a and b to the units of the hard term
    # not below 0: a confident row's largest probability may have been rounded up
    value = log_sum - unit * tl.fma(s_y, numbers.k, -sums.M_s)
    value = tl.where(value < 0.0, 0.0, value)
    if terms.SMOOTHING:
        mean = unit * tl.div_rn(sums.differences, sums.count)
        value = (1.0 - numbers.smoothing) * value + numbers.smoothing * (log_sum - mean)
    return value


@triton.jit
def soft_constants(sums, again, on_soft, weight, numbers, rule: tl.constexpr):
    """Return the constants of the soft term's gradient; `weight` is w_soft·c(T)/T.

    They are NaN for a NaN row, and 0 for a row whose soft term is off, regardless of the teacher.
    """
    scale, offset = rule.constants(sums, again, weight, numbers.temperature, numbers.beta)
    nan = _soft_is_nan(sums, rule)
    if rule.infinite and not rule.finite_gradient:
        nan = nan | _soft_is_infinite(sums, rule)
    scale = tl.where(nan, float("nan"), scale)
    offset = -scale * offset
    return Constants(tl.where(on_soft, scale, 0.0), tl.where(on_soft, offset, 0.0))


@triton.jit
def gradient(s, t, refs, soft, hard, on_soft, numbers, terms):
    """Return the gradient of some entries of a row, without the -w_hard·(1-ε) at the label.

    Without STANDS_IN, t are the teacher's logits even if the row's soft term is off, and results
    from them are dropped. With a soft term alone, `hard` and `on_soft` are not read.
    """
    a, b = tl.fma(s, numbers.k, -refs.M_s), tl.fma(t, numbers.k, -refs.M_t)
    P = tl.exp2(a)
    # g = P·x + y + the hard term's part
    if terms.rule.soft:
        Q, difference = P, a
        if terms.rule.softmax:
            Q = tl.exp2(b)
        else:
            difference = tl.where((s == -INF) & (t == -INF), 0.0, s - t)
        e = Entry(a, b, P, Q, difference)
        x, y = terms.rule.gradient(e, refs, soft, numbers.beta)
        if not terms.HAS_HARD:
            return terms.rule.gradient_alone(e, refs, soft, x, y)
        if not terms.STANDS_IN:
            x, y = tl.where(on_soft, x, 0.0), tl.where(on_soft, y, 0.0)
    if not terms.rule.soft:
        g = hard.scale * P
    elif not terms.rule.softmax:
        g = tl.fma(hard.scale, P, y)
    elif numbers.power == 2.0:
        g = tl.fma(P, tl.fma(hard.scale, P, x), y)
    elif numbers.power == 1.0:
        g = tl.fma(P, hard.scale + x, y)
    else:
        g = tl.fma(hard.scale, tl.exp2(a * numbers.power), tl.fma(P, x, y))
    if terms.SMOOTHING:
        g += tl.where((s != -INF) | (t != -INF), hard.offset, 0.0)
    return g
