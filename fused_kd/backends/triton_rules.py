"""The formulas of the Triton kernels: what csrc/kd_math.h is to C++. Nothing here loads or stores.

For one row, with s, t the logits, m_s, m_t references (maxima) and k = log2(e)/T:

    a = s - m_s    P = 2^(a·k)    p = P / d_s    d_s = Σ P    e1 = 2^(a·log2 e)    d_1 = Σ e1
    b = t - m_t    Q = 2^(b·k)    q = Q / d_t    d_t = Σ Q    π = e1 / d_1

Subtracted first and multiplied then: the maximum's P is exactly 1, and equal rows have exactly
equal P and Q. Infinity is decided on the logits; an entry that is -inf on both sides is absent.
All tensors are float32. The only contractions are those that are written as `fma`.
"""

# mypy: ignore-errors
# ruff: noqa: SIM109
from __future__ import annotations

import triton
import triton.language as tl

# the soft term D: positions in fused_kd.options.DIVERGENCES, and NONE if it is off
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
TVD = tl.constexpr(3)
MSE = tl.constexpr(4)
NONE = tl.constexpr(5)

SUMS = tl.constexpr(8)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
BIG = tl.constexpr(1e38)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# ------------------------------------------------------------------------------- first visit
# `sums`: m_s, m_t, d_s, d_t, d_1, w, differences, count; of every lane, a part or a row. w is the
# divergence's own sum, differences is Σ (s - m_s) and count the number of present entries. mse has
# its largest |s - t| as d_s. What a divergence does not need stays 0.


@triton.jit
def _rebase(sums, m_s, m_t, k, D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr):
    """The sums relative to larger references."""
    old_s, old_t, d_s, d_t, d_1, w, differences, count = sums
    # without a finite logit so far the sums are 0, relative to anything
    shift_s = tl.where(old_s == -INF, 0.0, old_s - m_s)
    if D < MSE:
        shift_t = tl.where(old_t == -INF, 0.0, old_t - m_t)
        factor_s, factor_t = tl.exp2(shift_s * k), tl.exp2(shift_t * k)
        d_s, d_t = d_s * factor_s, d_t * factor_t
        # d_t has shrunk before it meets the shift: a finite mask times a count would overflow
        if D == FORWARD_KL:
            w = w * factor_t + (shift_t - shift_s) * d_t
        if D == REVERSE_KL:
            w = w * factor_s + (shift_s - shift_t) * d_s
    if HAS_HARD:
        d_1 = d_1 * tl.exp2(shift_s * LOG2E)
    if SMOOTHING:
        differences += count * shift_s
    return m_s, m_t, d_s, d_t, d_1, w, differences, count


@triton.jit
def fold(sums, k, D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr):
    """One of what is along axis 0: lanes, or parts."""
    zero = tl.full((), 0.0, tl.float32)
    m_s = tl.max(sums[0], 0)
    m_t = tl.max(sums[1], 0) if D != NONE else zero
    _, _, d_s, d_t, d_1, w, differences, count = _rebase(sums, m_s, m_t, k, D, HAS_HARD, SMOOTHING)
    if D < MSE:
        d_s, d_t = tl.sum(d_s, 0), tl.sum(d_t, 0)
    else:
        d_s, d_t = tl.max(d_s, 0) if D == MSE else zero, zero
    w = tl.sum(w, 0) if D == FORWARD_KL or D == REVERSE_KL or D == MSE else zero
    d_1 = tl.sum(d_1, 0) if HAS_HARD else zero
    differences = tl.sum(differences, 0) if SMOOTHING else zero
    count = tl.sum(count, 0) if SMOOTHING or D == MSE else zero
    return m_s, m_t, d_s, d_t, d_1, w, differences, count


@triton.jit
def _finite_reference(m):
    """What to subtract: where no logit is finite so far, any number, since every P is 0."""
    return tl.where(m == -INF, 0.0, m)


@triton.jit
def _above(x):
    """x, but a finite number for -inf and NaN: what a P or Q of exactly 0 is multiplied by."""
    return tl.where(x > -BIG, x, -BIG)


@triton.jit
def _hard_exponential(a, P, power):
    """e^a: for T = 1, 2 a power of e^(a/T), which is there; `power` is the same for all rows."""
    if power == 1:
        e = P
    elif power == 2:
        e = P * P
    else:
        e = tl.exp2(a * LOG2E)
    return e


@triton.jit
def add_tile(
    sums,
    s,  # UNROLL x (LANES, VECTOR)
    t,
    k,
    power,
    UNROLL: tl.constexpr,
    D: tl.constexpr,
    HAS_HARD: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """Adds a tile to the sums of the lanes."""
    top_s, top_t = s[0], t[0]
    for u in tl.static_range(1, UNROLL):
        top_s, top_t = tl.maximum(top_s, s[u]), tl.maximum(top_t, t[u])
    m_s, m_t = tl.maximum(sums[0], tl.max(top_s, 1)), sums[1]
    if D != NONE:
        m_t = tl.maximum(m_t, tl.max(top_t, 1))
    _, _, d_s, d_t, d_1, w, differences, count = _rebase(sums, m_s, m_t, k, D, HAS_HARD, SMOOTHING)
    ref_s, ref_t = _finite_reference(m_s)[:, None], _finite_reference(m_t)[:, None]
    products = 0.0
    for u in tl.static_range(UNROLL):
        a = s[u] - ref_s
        P = a
        if D < MSE:
            b = t[u] - ref_t
            P, Q = tl.exp2(a * k), tl.exp2(b * k)
            d_s += tl.sum(P, 1)
            d_t += tl.sum(Q, 1)
        if D == MSE or SMOOTHING:
            present = (s[u] != -INF) | (t[u] != -INF)
            count += tl.sum(present.to(tl.float32), 1)
        # w is a sum of x·y; +inf, where one side alone is absent, survives in it and marks the row
        if D == FORWARD_KL:
            x, y = Q, _above(b - a)
        if D == REVERSE_KL:
            x, y = P, _above(a - b)
        if D == MSE:
            x = tl.where(present, s[u] - t[u], 0.0)
            y = x
            d_s = tl.maximum(d_s, tl.max(tl.abs(x), 1))
        if D == FORWARD_KL or D == REVERSE_KL or D == MSE:
            products = x * y if u == 0 else tl.fma(x, y, products)
        if HAS_HARD:
            d_1 += tl.sum(_hard_exponential(a, P, power), 1)
        if SMOOTHING:
            differences += tl.sum(tl.where(present, a, 0.0), 1)
    if D == FORWARD_KL or D == REVERSE_KL or D == MSE:
        w += tl.sum(products, 1)
    return m_s, m_t, d_s, d_t, d_1, w, differences, count


# --------------------------------------------------------------- second visit, value, gradient


@triton.jit
def _log2(x):
    """log2 of a positive normal number, to 2 ulp; exactly 0 at 1. Half of what libdevice spends."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of x/√½, so that the rest is in [√½, √2)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    # log2(1 + f)/f, least relative error
    y = tl.fma(f, 0.12583644688129425, -0.20726945996284485)
    y = tl.fma(f, y, 0.215715691447258)
    y = tl.fma(f, y, -0.238944873213768)
    y = tl.fma(f, y, 0.28791624307632446)
    y = tl.fma(f, y, -0.3607036769390106)
    y = tl.fma(f, y, 0.48091062903404236)
    y = tl.fma(f, y, -0.7213473320007324)
    y = tl.fma(f, y, 1.4426950216293335)
    return tl.fma(f, y, exponent.to(tl.float32))


@triton.jit
def _log_mixture(a, b, k, log_ratio, beta):
    """log2(m/p), log2(m/q) of m = β·q + (1-β)·p. Exactly 0 where the rows are equal."""
    # log2(p/q), made finite where P or Q is exactly 0
    r = tl.fma(a - b, k, log_ratio)
    r = tl.where(r < BIG, _above(r), BIG)
    # m over the larger of p and q, a mixture of 1 and 2^-|r|: one logarithm, of a normal number
    c = tl.where(r <= 0.0, beta, 1.0 - beta)
    log_m = _log2(tl.fma(1.0 - c, tl.exp2(-tl.abs(r)), c))
    return log_m - tl.minimum(r, 0.0), log_m + tl.maximum(r, 0.0)


@triton.jit
def _signed(P, Q, ratio):
    """P·sgn(p - q), and p - q times d_s. The sign is exact for equal rows: ratio is 1."""
    d = tl.fma(-ratio, Q, P)
    return tl.where(d > 0.0, P, tl.where(d < 0.0, -P, 0.0)), d


@triton.jit
def add_tile_again(sums, s, t, refs, k, beta, UNROLL: tl.constexpr, D: tl.constexpr):
    """Adds a tile to x, y: Σ P·log2(p/m), Σ Q·log2(q/m) for jsd; Σ |p - q|·d_s, Σ P·sgn for tvd."""
    x, y = sums
    ref_s, ref_t, ratio, log_ratio = refs
    for u in tl.static_range(UNROLL):
        a, b = s[u] - ref_s, t[u] - ref_t
        P, Q = tl.exp2(a * k), tl.exp2(b * k)
        if D == JSD:
            m_over_p, m_over_q = _log_mixture(a, b, k, log_ratio, beta)
            x -= tl.sum(P * m_over_p, 1)
            y -= tl.sum(Q * m_over_q, 1)
        else:
            signed, d = _signed(P, Q, ratio)
            x += tl.sum(tl.abs(d), 1)
            y += tl.sum(signed, 1)
    return x, y


@triton.jit
def references(sums, D: tl.constexpr):
    """What entries are relative to; d_s/d_t is exactly 1 for equal rows, its logarithm 0."""
    ratio = tl.div_rn(sums[2], sums[3]) if D < MSE else tl.full((), 0.0, tl.float32)
    log_ratio = -tl.log2(ratio) if D == JSD else tl.full((), 0.0, tl.float32)
    return _finite_reference(sums[0]), _finite_reference(sums[1]), ratio, log_ratio


@triton.jit
def unusable(m):
    """A side without a finite logit, or with +inf."""
    return (m == -INF) | (m == INF) | (m != m)


@triton.jit
def _soft_is_infinite(sums, D: tl.constexpr):
    d_s, w = sums[2], sums[5]
    if D == FORWARD_KL or D == REVERSE_KL:
        return ~(tl.abs(w) < INF)
    if D == MSE:
        return d_s == INF
    return False


@triton.jit
def _soft_is_nan(sums, D: tl.constexpr):
    m_s, m_t, d_s, d_t, _, w, _, _ = sums
    nan = unusable(m_s) | unusable(m_t) | (d_s != d_s) | (d_t != d_t)
    return nan | (w != w) if D == MSE else nan


@triton.jit
def soft_value(sums, x, y, temperature, beta, soft_factor, D: tl.constexpr):
    _, _, d_s, d_t, _, w, _, count = sums
    if D == FORWARD_KL:
        value = tl.div_rn(w, temperature * d_t) + tl.log(tl.div_rn(d_s, d_t))
    elif D == REVERSE_KL:
        value = tl.div_rn(w, temperature * d_s) + tl.log(tl.div_rn(d_t, d_s))
    elif D == JSD:
        value = LN2 * (beta * tl.div_rn(y, d_t) + (1.0 - beta) * tl.div_rn(x, d_s))
    elif D == TVD:
        value = 0.5 * tl.div_rn(x, d_s)
    else:
        value = tl.div_rn(tl.div_rn(w, count), temperature * temperature)
    value = tl.where(_soft_is_infinite(sums, D), INF, soft_factor * value)
    return tl.where(_soft_is_nan(sums, D), float("nan"), value)


@triton.jit
def soft_constants(sums, x, y, weight, temperature, beta, D: tl.constexpr):
    """scale and offset of _soft_gradient, for a weight of w_soft·c(T)/T; NaN for a NaN row."""
    _, _, d_s, _, _, w, _, count = sums
    offset = tl.full((), 0.0, tl.float32)
    if D == FORWARD_KL:
        scale = tl.div_rn(weight, d_s)
    elif D == REVERSE_KL:
        scale, offset = tl.div_rn(weight, temperature * d_s), tl.div_rn(w, d_s)
    elif D == JSD:
        scale, offset = tl.div_rn(weight * (1.0 - beta) * LN2, d_s), tl.div_rn(x, d_s)
    elif D == TVD:
        scale, offset = tl.div_rn(0.5 * weight, d_s), tl.div_rn(y, d_s)
    else:
        scale = tl.div_rn(2.0 * weight, temperature * count)
    nan = _soft_is_nan(sums, D)
    if D == REVERSE_KL or D == MSE:  # infinite, and its gradient has no finite formula
        nan = nan | _soft_is_infinite(sums, D)
    return tl.where(nan, float("nan"), scale), offset


@triton.jit
def _soft_gradient(s, t, a, b, P, refs, soft, k, beta, D: tl.constexpr):
    """w_soft·c(T)·∂D/∂s of some entries."""
    scale, offset = soft
    _, _, ratio, log_ratio = refs
    if D == MSE:  # 2 (s - t) / (V T)
        return scale * tl.where((s == -INF) & (t == -INF), 0.0, s - t)
    if D == REVERSE_KL:  # p (log(p/q) - D): the normalisers cancel
        return (scale * P) * (_above(a - b) - offset)
    if D == JSD:  # (1-β) p (log(p/m) - KL(p|m))
        m_over_p, _ = _log_mixture(a, b, k, log_ratio, beta)
        return (scale * P) * (-m_over_p - offset)
    Q = tl.exp2(b * k)
    if D == TVD:  # 1/2 p (sgn(p-q) - Σ p sgn(p-q))
        signed, _ = _signed(P, Q, ratio)
        return scale * tl.fma(-offset, P, signed)
    return scale * tl.fma(-ratio, Q, P)  # p - q


@triton.jit
def gradient(
    s, t, refs, soft, hard, on_soft, k, power, beta,
    D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The row's gradient of some entries, but for the -(1-ε) at the label."""
    a, b = s - refs[0], t - refs[1]
    g, P = 0.0, a
    if D < MSE:
        P = tl.exp2(a * k)
    if D != NONE:
        g = _soft_gradient(s, t, a, b, P, refs, soft, k, beta, D)
    if HAS_HARD:
        scale, offset = hard
        if D != NONE:  # a teacher's NaN has no part in a row whose soft term is off
            g = tl.where(on_soft, g, 0.0)
        if SMOOTHING:
            g += tl.where((s != -INF) | (t != -INF), offset, 0.0)
        g = tl.fma(scale, _hard_exponential(a, P, power), g)
    return g


# ------------------------------------------------------------------------------------- numbers


@triton.jit
def is_power_of_two(x):
    """Multiplying by it is exact: 0 or a normal number with an empty mantissa."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return ((bits & 0x7FFFFF) == 0) & (bits != 0x7F800000)


@triton.jit
def rounded(x, ptr):
    """x in the dtype of ptr, to nearest even. Triton's interpreter would cut bfloat16 off."""
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, bits).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(ptr.dtype.element_ty)
