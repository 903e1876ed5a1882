"""The formulas of the Triton kernels: what csrc/kd_math.h is to C++. Nothing here loads or stores.

For one row, with s, t the logits and k = log2(e)/T, in units of log2:

    a = s·k - M_s    P = 2^a    p = P / d_s    d_s = Σ P    e1 = P^T    π = e1 / d_1    d_1 = Σ e1
    b = t·k - M_t    Q = 2^b    q = Q / d_t    d_t = Σ Q

Each of a and b is one fused multiply-add, rounded once. The references M_s, M_t are the rounded
products of k and the largest logits; any number near them would do, since only a, b and sums
relative to the same references enter a result. A maximum's own a is therefore not exactly 0, but
the rounding of its M, and every formula uses it as it is. Equal rows have exactly equal a and b.

References begin at LOWEST, so that no case needs a comparison: where no logit is above, P is 0.
A side whose every logit is below LOWEST/k, or one with a logit above -LOWEST/k, is NaN.

Infinity is decided on the logits; an entry that is -inf on both sides is absent. All tensors are
float32. The only contractions are those that are written as `fma`.
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
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
#: The first reference. A product of up to this size is rounded by at most 32, so 2^a stays finite.
LOWEST = tl.constexpr(-(2.0**30))
#: Beyond what an entry's log(p/q) may be: what a probability of exactly 0 is multiplied by.
BIG = tl.constexpr(1e30)
#: The largest of eight 16-bit numbers in four registers, as a float32.
_LARGEST = """
{{
    .reg .b32 x, y;
    {maximum} x, $8, $9;
    {maximum} y, $10, $11;
    {maximum} x, x, y;
    {widen}
    max.f32 $0, $0, $1;
    mov.b32 $1, $0; mov.b32 $2, $0; mov.b32 $3, $0;
    mov.b32 $4, $0; mov.b32 $5, $0; mov.b32 $6, $0; mov.b32 $7, $0;
}}
"""
_LARGEST_BF16 = tl.constexpr(
    _LARGEST.format(maximum="max.bf16x2", widen="shl.b32 $0, x, 16; and.b32 $1, x, 0xffff0000;")
)
_LARGEST_F16 = tl.constexpr(
    _LARGEST.format(
        maximum="max.f16x2",
        widen=".reg .b16 l, h; mov.b32 {l, h}, x; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;",
    )
)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# ------------------------------------------------------------------------------- first visit
# `sums`: M_s, M_t, d_s, d_t, d_1, w, differences, count; of every lane, a part or a row. w is the
# divergence's own sum, differences is Σ a and count the number of present entries. mse has its
# largest |s - t| as d_s. What a divergence does not need stays 0; T = 1 needs no d_1 besides d_s.


@triton.jit
def _rebase(
    sums, M_s, M_t, power,
    D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The sums relative to larger references."""
    old_s, old_t, d_s, d_t, d_1, w, differences, count = sums
    shift_s = old_s - M_s
    factor_s = tl.exp2(shift_s)
    if D < MSE:
        shift_t = old_t - M_t
        factor_t = tl.exp2(shift_t)
        d_s, d_t = d_s * factor_s, d_t * factor_t
        # d_t has shrunk before it meets the shift: a finite mask times a count would overflow
        if D == FORWARD_KL:
            w = tl.fma(shift_t - shift_s, d_t, w * factor_t)
        if D == REVERSE_KL:
            w = tl.fma(shift_s - shift_t, d_s, w * factor_s)
    if HAS_HARD:
        d_1 *= tl.exp2(shift_s * power)
    if SMOOTHING:
        differences += count * shift_s
    return M_s, M_t, d_s, d_t, d_1, w, differences, count


@triton.jit
def _larger(x, y, u, v):
    return tl.maximum(x, u), tl.maximum(y, v)


@triton.jit
def _added(x, y, z, w, u, v, r, q):
    return x + u, y + v, z + r, w + q


@triton.jit
def fold(sums, power, D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr):
    """Folds what is along axis 0, lanes or parts, into one."""
    zero = tl.full((), 0.0, tl.float32)
    if D == NONE:
        M_s, M_t = tl.max(sums[0], 0), zero
    else:
        M_s, M_t = tl.reduce((sums[0], sums[1]), 0, _larger)
    sums = _rebase(sums, M_s, M_t, power, D, HAS_HARD, SMOOTHING)
    _, _, d_s, d_t, d_1, w, differences, count = sums
    if D < MSE:
        d_s, d_t, d_1, w = tl.reduce((d_s, d_t, d_1, w), 0, _added)
    else:
        d_s, d_t = tl.max(d_s, 0) if D == MSE else zero, zero
        w = tl.sum(w, 0) if D == MSE else zero
        d_1 = tl.sum(d_1, 0) if HAS_HARD else zero
    differences = tl.sum(differences, 0) if SMOOTHING else zero
    count = tl.sum(count, 0) if SMOOTHING or D == MSE else zero
    return M_s, M_t, d_s, d_t, d_1, w, differences, count


@triton.jit
def hard_sum(sums, power, D: tl.constexpr):
    """Returns d_1 of a row; at T = 1 it is d_s."""
    if D < MSE:
        return tl.where(power == 1.0, sums[2], sums[4])
    return sums[4]


@triton.jit
def _above(x):
    """x, but a finite number for -inf and NaN: what a P or Q of exactly 0 is multiplied by."""
    return tl.where(x > -BIG, x, -BIG)


@triton.jit
def add_tile(
    sums,
    s,  # COUNT x (LANES,)
    t,
    top_s,  # the largest of each
    top_t,
    k,
    power,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    HAS_HARD: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """Adds a tile to the sums of the lanes."""
    M_s, M_t = tl.maximum(sums[0], top_s * k), sums[1]
    if D != NONE:
        M_t = tl.maximum(M_t, top_t * k)
    sums = _rebase(sums, M_s, M_t, power, D, HAS_HARD, SMOOTHING)
    _, _, d_s, d_t, d_1, w, differences, count = sums
    for first in tl.static_range(0, COUNT, GROUP):
        exponents, probabilities = (), ()
        for i in tl.static_range(first, first + GROUP):
            a = tl.fma(s[i], k, -M_s)
            P = tl.exp2(a) if D < MSE or HAS_HARD else a
            exponents, probabilities = exponents + (a,), probabilities + (P,)
            if D < MSE:
                b = tl.fma(t[i], k, -M_t)
                Q = tl.exp2(b)
                d_s += P
                d_t += Q
            if D == MSE or SMOOTHING:
                present = (s[i] != -INF) | (t[i] != -INF)
                count += present.to(tl.float32)
            # +inf, where one side alone is absent, survives in w and marks the row
            if D == FORWARD_KL:
                w = tl.fma(Q, _above(b - a), w)
            if D == REVERSE_KL:
                w = tl.fma(P, _above(a - b), w)
            if D == MSE:
                x = tl.where(present, s[i] - t[i], 0.0)
                w = tl.fma(x, x, w)
                d_s = tl.maximum(d_s, tl.abs(x))
            if SMOOTHING:
                differences += tl.where(present, a, 0.0)
        if HAS_HARD:
            if D >= MSE:
                for i in tl.static_range(GROUP):
                    d_1 += probabilities[i]
            elif power == 2.0:
                for i in tl.static_range(GROUP):
                    d_1 = tl.fma(probabilities[i], probabilities[i], d_1)
            elif power != 1.0:
                for i in tl.static_range(GROUP):
                    d_1 += tl.exp2(exponents[i] * power)
    return M_s, M_t, d_s, d_t, d_1, w, differences, count


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
def _log_mixture(a, b, log_ratio, beta):
    """log2(m/p), log2(m/q) of m = β·q + (1-β)·p. Exactly 0 where the rows are equal."""
    # log2(p/q), made finite where P or Q is exactly 0
    r = (a - b) + log_ratio
    r = tl.where(r < BIG, _above(r), BIG)
    # m over the larger of p and q, a mixture of 1 and 2^-|r|: one logarithm, of a normal number
    c = tl.where(r <= 0.0, beta, 1.0 - beta)
    log_m = _log2(tl.fma(1.0 - c, tl.exp2(-tl.abs(r)), c))
    return log_m - tl.minimum(r, 0.0), log_m + tl.maximum(r, 0.0)


@triton.jit
def _by_sign(x, positive, negative, zero):
    return tl.where(x > 0.0, positive, tl.where(x < 0.0, negative, zero))


@triton.jit
def add_tile_again(sums, s, t, refs, k, beta, COUNT: tl.constexpr, D: tl.constexpr):
    """Adds a tile to x, y: Σ P·log2(m/p), Σ Q·log2(m/q) for jsd; Σ |p - q|·d_s, Σ P·sgn for tvd."""
    x, y = sums
    M_s, M_t, ratio, log_ratio = refs
    for i in tl.static_range(COUNT):
        a, b = tl.fma(s[i], k, -M_s), tl.fma(t[i], k, -M_t)
        P, Q = tl.exp2(a), tl.exp2(b)
        if D == JSD:
            m_over_p, m_over_q = _log_mixture(a, b, log_ratio, beta)
            x = tl.fma(P, m_over_p, x)
            y = tl.fma(Q, m_over_q, y)
        else:
            d = tl.fma(-ratio, Q, P)  # (p - q)·d_s; exactly 0 for equal rows: ratio is 1
            x += tl.abs(d)
            y += _by_sign(d, P, -P, 0.0)
    return x, y


@triton.jit
def references(sums, on_soft, D: tl.constexpr):
    """Returns what entries are relative to; d_s/d_t is exactly 1 for equal rows, its logarithm 0.

    Where the row's soft term is off, the student stands in for the teacher.
    """
    M_s, M_t, d_s, d_t, _, _, _, _ = sums
    one, zero = tl.full((), 1.0, tl.float32), tl.full((), 0.0, tl.float32)
    ratio = tl.where(on_soft, tl.div_rn(d_s, d_t), 1.0) if D < MSE else one
    log_ratio = -tl.log2(ratio) if D == JSD else zero
    return M_s, tl.where(on_soft, M_t, M_s), ratio, log_ratio


@triton.jit
def unusable(M):
    """A side without a logit that counts, or with +inf."""
    return (M <= LOWEST) | (M >= -LOWEST)


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
    M_s, M_t, d_s, d_t, _, w, _, _ = sums
    nan = unusable(M_s) | unusable(M_t) | (d_s != d_s) | (d_t != d_t)
    return nan | (w != w) if D == MSE else nan


@triton.jit
def soft_value(sums, x, y, temperature, beta, soft_factor, D: tl.constexpr):
    _, _, d_s, d_t, _, w, _, count = sums
    if D == FORWARD_KL:
        value = LN2 * tl.div_rn(w, d_t) + tl.log(tl.div_rn(d_s, d_t))
    elif D == REVERSE_KL:
        value = LN2 * tl.div_rn(w, d_s) + tl.log(tl.div_rn(d_t, d_s))
    elif D == JSD:
        value = 0.0 - LN2 * (beta * tl.div_rn(y, d_t) + (1.0 - beta) * tl.div_rn(x, d_s))
    elif D == TVD:
        value = 0.5 * tl.div_rn(x, d_s)
    else:
        value = tl.div_rn(tl.div_rn(w, count), temperature * temperature)
    value = tl.where(_soft_is_infinite(sums, D), INF, soft_factor * value)
    return tl.where(_soft_is_nan(sums, D), float("nan"), value)


@triton.jit
def hard_value(sums, s_y, smoothing, k, power, D: tl.constexpr, SMOOTHING: tl.constexpr):
    """Returns the hard term of a row without NaN whose label's logit is s_y."""
    log_sum = tl.log(hard_sum(sums, power, D))
    unit = power * LN2  # of a and b in the hard term
    # the largest probability may be rounded up, which a confident row would show
    value = log_sum - unit * tl.fma(s_y, k, -sums[0])
    value = tl.where(value < 0.0, 0.0, value)
    if SMOOTHING:
        mean = unit * tl.div_rn(sums[6], sums[7])
        value = (1.0 - smoothing) * value + smoothing * (log_sum - mean)
    return value


@triton.jit
def soft_constants(sums, x, y, on_soft, weight, temperature, beta, D: tl.constexpr):
    """Returns what the gradient of the soft term needs, for a weight of w_soft·c(T)/T.

    NaN for a NaN row, 0 for one whose soft term is off, whatever its teacher holds.
    """
    _, _, d_s, d_t, _, w, _, count = sums
    offset = tl.full((), 0.0, tl.float32)
    if D == FORWARD_KL:
        scale = tl.div_rn(weight, d_s)
    elif D == REVERSE_KL:
        scale, offset = tl.div_rn(weight * LN2, d_s), tl.div_rn(w, d_s)
    elif D == JSD:
        scale, offset = tl.div_rn(-(1.0 - beta) * LN2 * weight, d_s), tl.div_rn(x, d_s)
    elif D == TVD:
        scale, offset = tl.div_rn(0.5 * weight, d_s), tl.div_rn(y, d_s)
    else:
        scale = tl.div_rn(2.0 * weight, temperature * count)
    nan = _soft_is_nan(sums, D)
    if D == REVERSE_KL or D == MSE:  # infinite, and its gradient has no finite formula
        nan = nan | _soft_is_infinite(sums, D)
    scale = tl.where(nan, float("nan"), scale)
    other = -scale * offset
    if D == FORWARD_KL:
        other = -scale * tl.div_rn(d_s, d_t)
    return tl.where(on_soft, scale, 0.0), tl.where(on_soft, other, 0.0)


@triton.jit
def _soft_gradient(a, b, P, refs, soft, beta, D: tl.constexpr):
    """Returns w_soft·c(T)·∂D/∂s of some entries, divided by P."""
    scale, other = soft
    _, _, ratio, log_ratio = refs
    if D == REVERSE_KL:  # p (log(p/q) - D): the normalisers cancel
        return tl.fma(scale, _above(a - b), other)
    if D == JSD:  # (1-β) p (log(p/m) - KL(p|m))
        m_over_p, _ = _log_mixture(a, b, log_ratio, beta)
        return tl.fma(scale, m_over_p, other)
    # tvd: 1/2 p (sgn(p-q) - Σ p sgn(p-q))
    d = tl.fma(-ratio, tl.exp2(b), P)
    return _by_sign(d, scale + other, other - scale, other)


@triton.jit
def gradient(
    s, t, refs, soft, hard, on_soft, k, power, beta,
    D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr, STANDS_IN: tl.constexpr,
):  # fmt: skip
    """Returns the row's gradient of some entries, but for the -(1-ε) at the label.

    STANDS_IN: t is the student's logits where the soft term is off. Else t is the teacher's there,
    and what is made of it must be dropped.
    """
    a, b = tl.fma(s, k, -refs[0]), tl.fma(t, k, -refs[1])
    P = tl.exp2(a)
    DROPS: tl.constexpr = HAS_HARD and not STANDS_IN
    # g = P·x + y + what the hard term adds; no negations, of which triton 3.6 makes instructions
    if D == FORWARD_KL:  # p - q
        Q = tl.exp2(b)
        if not HAS_HARD:
            return soft[0] * tl.fma(-refs[2], Q, P)  # exactly 0 for equal rows
        x, y = soft[0], soft[1] * Q
        if DROPS:
            y = tl.where(on_soft, y, 0.0)
    elif D < MSE:
        x, y = _soft_gradient(a, b, P, refs, soft, beta, D), 0.0
        if not HAS_HARD:
            return x * P
        if DROPS:
            x = tl.where(on_soft, x, 0.0)
    elif D == MSE:  # 2 (s - t) / (V T)
        y = soft[0] * tl.where((s == -INF) & (t == -INF), 0.0, s - t)
        if not HAS_HARD:
            return y
        if DROPS:
            y = tl.where(on_soft, y, 0.0)
    scale, offset = hard
    if D == NONE:
        g = scale * P
    elif D == MSE:
        g = tl.fma(scale, P, y)
    elif power == 2.0:
        g = tl.fma(P, tl.fma(scale, P, x), y)
    elif power == 1.0:
        g = tl.fma(P, scale + x, y)
    else:
        g = tl.fma(scale, tl.exp2(a * power), tl.fma(P, x, y))
    if SMOOTHING:
        g += tl.where((s != -INF) | (t != -INF), offset, 0.0)
    return g


# ------------------------------------------------------------------------------------- numbers


@triton.jit
def entries_of(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Splits (LANES, VECTOR) into tensors (LANES,): registers of a thread, in a fixed order."""
    if VECTOR == 1:
        return (tl.reshape(x, (LANES,)),)
    else:
        even, odd = tl.split(tl.reshape(x, (LANES, VECTOR // 2, 2)))
        return entries_of(even, LANES, VECTOR // 2) + entries_of(odd, LANES, VECTOR // 2)


@triton.jit
def widened(x, VECTOR: tl.constexpr, CUDA: tl.constexpr):
    """Returns logits as float32. Left alone, NVIDIA's compiler takes three instructions for two."""
    if CUDA > 0 and VECTOR > 1 and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=&r,r",
            [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@triton.jit
def largest(
    x,  # UNROLL x (LANES, VECTOR), as loaded
    entries,  # the same, widened
    UNROLL: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """Returns the largest entry of each lane, a number unless all are NaN.

    NVIDIA's GPUs compare two 16-bit numbers with one instruction.
    """
    if CUDA >= 80 and VECTOR == 8 and x[0].dtype != tl.float32:
        BRAIN: tl.constexpr = x[0].dtype == tl.bfloat16
        top = x[0]
        for u in tl.static_range(1, UNROLL):
            top = tl.inline_asm_elementwise(
                "max.bf16x2 $0, $1, $2;" if BRAIN else "max.f16x2 $0, $1, $2;", "=&r,r,r",
                [top, x[u]], dtype=x[0].dtype, is_pure=True, pack=2,
            )  # fmt: skip
        # one result, eight times
        one = tl.inline_asm_elementwise(
            _LARGEST_BF16 if BRAIN else _LARGEST_F16, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r",
            [top], dtype=tl.float32, is_pure=True, pack=8,
        )  # fmt: skip
        return entries_of(one, LANES, VECTOR)[0]
    else:
        top = entries[0]
        for i in tl.static_range(1, UNROLL * VECTOR):
            top = tl.maximum(top, entries[i])
        return top


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
