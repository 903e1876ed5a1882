"""The divergences of the Triton kernels: one class each. No other code depends on which it is.

For one row, with s, t the logits and k = log2(e)/T, in units of log2:

    a = s·k - M_s    P = 2^a    p = P / d_s    d_s = Σ P    e1 = P^T    π = e1 / d_1    d_1 = Σ e1
    b = t·k - M_t    Q = 2^b    q = Q / d_t    d_t = Σ Q

Each of a and b is one fused multiply-add, rounded once. The references M_s, M_t are the rounded
products of k and the largest logits. Any number near them would serve, since results contain only
a, b and sums relative to the same references. The a of the largest logit is therefore not exactly
0, but the rounding error of M_s, and every formula uses it unchanged. Equal rows have exactly equal
a and b.

All tensors are float32. The only contractions are those that are written as `fma`.
"""

# mypy: ignore-errors
from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import triton
import triton.language as tl

from fused_kd.divergences import DIVERGENCES

LN2 = tl.constexpr(math.log(2.0))
#: Larger than any log(p/q); the finite number that a probability of exactly 0 is multiplied by.
BIG = tl.constexpr(1e30)
YES, NO = tl.constexpr(True), tl.constexpr(False)


# ---------------------------------------------------------------- the arguments of the formulas


class Sums(NamedTuple):
    """Sums of the first pass: of every lane, a part or a row. A sum that is not needed stays 0."""

    M_s: tl.tensor
    M_t: tl.tensor
    d_s: tl.tensor  # without softmaxes: the largest |s - t|
    d_t: tl.tensor
    d_1: tl.tensor  # not needed at T = 1, where it is d_s
    w: tl.tensor  # the divergence's own sum
    differences: tl.tensor  # Σ a
    count: tl.tensor  # of the present entries


class Again(NamedTuple):
    """Sums of the second pass, whose meaning depends on the divergence."""

    x: tl.tensor
    y: tl.tensor


class Entry(NamedTuple):
    """Entries of the row. Read b, P and Q only with softmaxes, `difference` only without."""

    a: tl.tensor
    b: tl.tensor
    P: tl.tensor
    Q: tl.tensor
    difference: tl.tensor  # s - t, 0 if the entry is absent


class Shift(NamedTuple):
    """The change of one side's sums to a larger reference M."""

    by: tl.tensor  # old M - new M
    factor: tl.tensor  # 2^by
    d: tl.tensor  # relative to the new M


class References(NamedTuple):
    """The references of a row's entries, and the ratio of its normalisers."""

    M_s: tl.tensor
    M_t: tl.tensor
    ratio: tl.tensor  # d_s/d_t, exactly 1 for equal rows
    log_ratio: tl.tensor  # log2(d_t/d_s), exactly 0 for equal rows; 0 unless `logarithms`


class Constants(NamedTuple):
    """The constants of a term's gradient in a row; both 0 if the row's term is off."""

    scale: tl.tensor
    offset: tl.tensor


@triton.jit
def _above(x):
    """Return x, at least -BIG, also for -inf and NaN: its product with a P or Q of 0 is 0."""
    return tl.where(x > -BIG, x, -BIG)


@triton.jit
def _by_sign(x, positive, negative, zero):
    return tl.where(x > 0.0, positive, tl.where(x < 0.0, negative, zero))


@triton.jit
def _log2(x):
    """Return log2 of a positive normal number as exponent, f and y: it is exponent + f·y.

    The exponent is an integer; f is exactly 0 at 1. The sum, rounded once, is off by 2.2 ulp at
    most (1.7 up to 1). It takes half of the instructions of libdevice's.
    """
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
    return exponent.to(tl.float32), f, y


@triton.jit
def _log_mixture(a, b, log_ratio, beta):
    """Return log2(m/p), log2(m/q) of m = β·q + (1-β)·p; exactly 0 for equal rows."""
    # log2(q/p); beyond 60 the smaller of p and q, perhaps exactly 0, is nothing next to the other.
    # It is NaN where both are 0, and becomes 60.
    r = (b - a) - log_ratio
    r = tl.where(r < 60.0, tl.where(r > -60.0, r, -60.0), 60.0)
    exponent, f, y = _log2(tl.fma(beta, tl.exp2(r), 1.0 - beta))
    # if q is much the larger one, r and the exponent cancel: their difference first
    return tl.fma(f, y, exponent), tl.fma(f, y, exponent - r)


# ---------------------------------------------------------------------------------- the divergences


class Rule:
    """A soft term: traits, which are compile-time constants, and formulas, which are inlined.

    A formula of a trait that is off is never called, and may be missing. The docstring of a rule
    has D, T·∂D/∂s_v, which it calls the gradient, and the own sums.
    """

    name: str  # in DIVERGENCES

    soft = YES  # there is a soft term
    teacher = YES  # the passes over the row read its teacher
    softmax = YES  # compares two softmaxes; else differences of logits
    own_sum = NO  # has `add`, and `rebase` if there are softmaxes
    two_passes = NO  # has `add_again`
    logarithms = NO  # takes one of every entry: log_ratio is set, and threads get more registers
    #: It may be infinite: `w` is then infinite or NaN; without softmaxes, the largest difference.
    infinite = NO
    finite_gradient = YES  # its gradient is finite if its value is infinite; else NaN

    @property
    def differences(self):
        """Return True for a soft term of differences of logits, which also needs the count."""
        return tl.constexpr(bool(self.soft) and not self.softmax)

    @triton.jit
    def add(w, e):
        """Return the own sum w with entry e added.

        An entry that is absent on one side alone must make it infinite or NaN, which marks the row.
        """

    @triton.jit
    def rebase(w, s, t):
        """Return the own sum w relative to larger references; s, t: a Shift of either side."""

    @triton.jit
    def add_again(x, y, e, refs, beta):
        """Return the sums x, y of the second pass with entry e added."""

    @triton.jit
    def loss(sums, again, temperature, beta):
        """Return D, without c(T), of a row; its callers replace infinite and NaN rows."""

    @triton.jit
    def constants(sums, again, weight, temperature, beta):
        """Return the constants of `gradient`: its scale, and its offset divided by -scale.

        The weight is w_soft·c(T)/T.
        """

    @triton.jit
    def gradient(e, refs, constants, beta):
        """Return x, y of w_soft·c(T)·∂D/∂s = P·x + y; without softmaxes x is 0.

        Written without negations, since triton 3.6 compiles them to instructions.
        """

    @triton.jit
    def gradient_alone(e, refs, constants, x, y):
        """Return w_soft·c(T)·∂D/∂s from the x, y of `gradient`, in a kernel without a hard term.

        This one is for rules whose y is 0; the others must override it. Exactly 0 for equal rows.
        """
        return x * e.P

    def __repr__(self) -> str:
        """Return the name and a digest of traits and formulas.

        Triton's cache keys contain it for every rule, so that a kernel is compiled again after a
        change of any rule.
        """
        return f"{self.name}_{self._digest()}"

    def _digest(self) -> str:
        members = {name: getattr(self, name) for name in dir(self) if not name.startswith("_")}
        text = str({name: getattr(x, "cache_key", x) for name, x in members.items()})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __deepcopy__(self, memo: object) -> Rule:
        """Return the rule itself: Triton copies the globals of a kernel, a rule never changes."""
        return self


class ForwardKL(Rule):
    """Σ q·log(q/p), gradient p - q; w = Σ Q·(b - a)."""

    name = "forward_kl"
    own_sum = YES
    infinite = YES

    @triton.jit
    def add(w, e):
        return tl.fma(e.Q, _above(e.b - e.a), w)

    @triton.jit
    def rebase(w, s, t):
        # d_t is rebased before the shift multiplies it: a finite mask times a count would overflow
        return tl.fma(t.by - s.by, t.d, w * t.factor)

    @triton.jit
    def loss(sums, again, temperature, beta):
        return LN2 * tl.div_rn(sums.w, sums.d_t) + tl.log(tl.div_rn(sums.d_s, sums.d_t))

    @triton.jit
    def constants(sums, again, weight, temperature, beta):
        return tl.div_rn(weight, sums.d_s), tl.div_rn(sums.d_s, sums.d_t)

    @triton.jit
    def gradient(e, refs, constants, beta):
        return constants.scale, constants.offset * e.Q

    @triton.jit
    def gradient_alone(e, refs, constants, x, y):
        return constants.scale * tl.fma(-refs.ratio, e.Q, e.P)


class ReverseKL(Rule):
    """Σ p·log(p/q), gradient p·(log(p/q) - D), in which the normalisers cancel; w = Σ P·(a - b)."""

    name = "reverse_kl"
    own_sum = YES
    infinite = YES
    finite_gradient = NO

    @triton.jit
    def add(w, e):
        return tl.fma(e.P, _above(e.a - e.b), w)

    @triton.jit
    def rebase(w, s, t):
        # d_s is rebased before the shift multiplies it: a finite mask times a count would overflow
        return tl.fma(s.by - t.by, s.d, w * s.factor)

    @triton.jit
    def loss(sums, again, temperature, beta):
        return LN2 * tl.div_rn(sums.w, sums.d_s) + tl.log(tl.div_rn(sums.d_t, sums.d_s))

    @triton.jit
    def constants(sums, again, weight, temperature, beta):
        return tl.div_rn(weight * LN2, sums.d_s), tl.div_rn(sums.w, sums.d_s)

    @triton.jit
    def gradient(e, refs, constants, beta):
        return tl.fma(constants.scale, _above(e.a - e.b), constants.offset), 0.0


class JSD(Rule):
    """β·KL(q‖m) + (1-β)·KL(p‖m) of m = β·q + (1-β)·p, gradient (1-β)·p·(log(p/m) - KL(p‖m)).

    x = Σ P·log2(m/p), y = Σ Q·log2(m/q).
    """

    name = "jsd"
    two_passes = YES
    logarithms = YES

    @triton.jit
    def add_again(x, y, e, refs, beta):
        m_over_p, m_over_q = _log_mixture(e.a, e.b, refs.log_ratio, beta)
        return tl.fma(e.P, m_over_p, x), tl.fma(e.Q, m_over_q, y)

    @triton.jit
    def loss(sums, again, temperature, beta):
        x, y = tl.div_rn(again.x, sums.d_s), tl.div_rn(again.y, sums.d_t)
        return 0.0 - LN2 * (beta * y + (1.0 - beta) * x)

    @triton.jit
    def constants(sums, again, weight, temperature, beta):
        scale = tl.div_rn(-(1.0 - beta) * LN2 * weight, sums.d_s)
        return scale, tl.div_rn(again.x, sums.d_s)

    @triton.jit
    def gradient(e, refs, constants, beta):
        m_over_p, _ = _log_mixture(e.a, e.b, refs.log_ratio, beta)
        return tl.fma(constants.scale, m_over_p, constants.offset), 0.0


class TVD(Rule):
    """½ Σ |p - q|, gradient ½·p·(sgn(p - q) - Σ p·sgn(p - q)).

    x = Σ |p - q|·d_s, y = Σ P·sgn(p - q).
    """

    name = "tvd"
    two_passes = YES

    @triton.jit
    def add_again(x, y, e, refs, beta):
        d = tl.fma(-refs.ratio, e.Q, e.P)  # (p - q)·d_s; exactly 0 for equal rows: ratio is 1
        return x + tl.abs(d), y + _by_sign(d, e.P, -e.P, 0.0)

    @triton.jit
    def loss(sums, again, temperature, beta):
        return 0.5 * tl.div_rn(again.x, sums.d_s)

    @triton.jit
    def constants(sums, again, weight, temperature, beta):
        return tl.div_rn(0.5 * weight, sums.d_s), tl.div_rn(again.y, sums.d_s)

    @triton.jit
    def gradient(e, refs, constants, beta):
        scale, offset = constants
        d = tl.fma(-refs.ratio, e.Q, e.P)
        return _by_sign(d, scale + offset, offset - scale, offset), 0.0


class MSE(Rule):
    """Σ (s - t)²/(V·T²), gradient 2·(s - t)/(V·T); w = Σ (s - t)²."""

    name = "mse"
    softmax = NO
    own_sum = YES
    infinite = YES
    finite_gradient = NO

    @triton.jit
    def add(w, e):
        return tl.fma(e.difference, e.difference, w)

    @triton.jit
    def loss(sums, again, temperature, beta):
        return tl.div_rn(tl.div_rn(sums.w, sums.count), temperature * temperature)

    @triton.jit
    def constants(sums, again, weight, temperature, beta):
        return tl.div_rn(2.0 * weight, temperature * sums.count), 0.0

    @triton.jit
    def gradient(e, refs, constants, beta):
        return 0.0, constants.scale * e.difference

    @triton.jit
    def gradient_alone(e, refs, constants, x, y):
        return y


class NoSoftTerm(Rule):
    """The rule of a loss without a soft term."""

    name = "none"
    soft = NO
    teacher = NO
    softmax = NO


class Tail(Rule):
    """The rule of the entries outside the support of a top-k teacher; see :mod:`.classes`.

    The passes over the row sum P; the gradient of such an entry is P times a constant.
    """

    name = "tail"
    teacher = NO

    @triton.jit
    def gradient(e, refs, constants, beta):
        return constants.scale, 0.0


def _in_order() -> tuple[Rule, ...]:
    """Return the rules in the order of the divergences' codes, then those of NONE and TAIL.

    Raises:
        ImportError: A divergence has no rule.
    """
    rules = {rule.name: rule() for rule in Rule.__subclasses__()}
    missing = [name for name in DIVERGENCES if name not in rules]
    if missing:
        raise ImportError(f"the triton kernels have no rule for {', '.join(missing)}")
    return *(rules[name] for name in DIVERGENCES), rules["none"], rules["tail"]


RULES = tl.constexpr(_in_order())
NONE = len(DIVERGENCES)  # the code of no soft term
TAIL = tl.constexpr(NONE + 1)  # the code of the entries outside the support of a top-k teacher


@triton.constexpr_function
def rule_of(code):
    """Return the rule of a divergence's code, of NONE or of TAIL."""
    return RULES.value[code]
