// The formulas of every divergence, written once for the CPU vectors, a GPU thread and the tests.
// Torch-free.
//
// Notation: p = softmax(s/T) of the student, q = softmax(t/T) of the teacher, pi = softmax(s) of
// the student at T = 1. Logits are relative to a reference near their row's maximum (`m_s`, `m_t`),
// in a unit that the caller chooses: `unit` is the value of s/T = 1 (T for a = s - m_s; log2(e) for
// exponents of 2):
//     a = (s - m_s) unit/T     P = e^(a/unit)     p = P / d_s      d_s = sum P
//     b = (t - m_t) unit/T     Q = e^(b/unit)     q = Q / d_t      d_t = sum Q
// So nothing depends on the size of the logits, and equal rows give exactly equal P and Q.
//
// A divergence is one struct `Rule<D>` and its name in FUSED_KD_DIVERGENCES, both in this file. The
// rest of the code never compares a Divergence with a name: it reads the rule's traits (see
// `Traits`) and calls its functions:
//     accumulate    adds one element to the first pass's sum `w` (OWN_SUM only)
//     weight        returns P or Q: the factor of a - b there (OWN_SUM and SOFTMAX only)
//     rebase        returns `w` relative to larger references: a and b change by shift_s and
//                   shift_t <= 0, P and Q by the factors (OWN_SUM and SOFTMAX only)
//     accumulate2   adds one element to the sums of the second pass, which needs the normalisers
//                   (TWO_PASSES only); k: log2(e)/unit
//     value         returns the row's divergence D from its sums
//     constants     returns the scalars of `gradient`, scaled by `weight` = upstream * c(T) / T
//     gradient      returns weight * T * dD/ds_v of one element, plus `offset`; k: log2(e)/unit
// F is the element type (a vector, float); R the type of a row's scalars (double on the CPU, float
// on a GPU).
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FUSED_KD_HD __host__ __device__ __forceinline__
#else
#define FUSED_KD_HD inline __attribute__((always_inline))
#endif

namespace fused_kd {

// Every divergence, in the order of the codes that the operators take, which is the order of the
// Python table.
#define FUSED_KD_DIVERGENCES(X) X(forward_kl) X(reverse_kl) X(jsd) X(tvd) X(mse)

enum class Divergence : int {
#define FUSED_KD_ENUMERATOR(name) name,
  FUSED_KD_DIVERGENCES(FUSED_KD_ENUMERATOR)
#undef FUSED_KD_ENUMERATOR
      none,  // the soft term is off
  tail       // no divergence: what a top-k teacher's tail takes of a row
};
constexpr int NUMBER_OF_DIVERGENCES = static_cast<int>(Divergence::none);

constexpr double LOG2E = 1.4426950408889634074;
constexpr double LN2 = 0.69314718055994530942;
constexpr float LOWEST = -3.4028234663852886e38f;  // of the finite floats
constexpr float INF = INFINITY;

// The sums of one row; `count` is the number of entries that are present.
template <class R>
struct RowSums {
  R m_s, m_t;     // references
  R d_s, d_t;     // sum P, sum Q
  R d_1;          // sum e^(s - m_s): the hard term's normaliser
  R w;            // the divergence's own first-pass sum
  R x, y;         // the divergence's second-pass sums
  R differences;  // sum (s - m_s), label smoothing only
  R count;
};

// Number of floats per row that the forward stores for the backward: RowSums in order, then flags.
constexpr int STATS = sizeof(RowSums<float>) / sizeof(float) + 1;

// The scalars of an element's gradient. For equal rows `ratio` is exactly 1 and `log_ratio`, its
// logarithm to base 2, exactly 0, which makes their gradient exactly 0.
template <class F>
struct Constants {
  F scale, ratio, offset, beta, log_ratio;
};

// The functions that the formulas call, for one number; those for vectors must be declared before
// this file is included.
FUSED_KD_HD double max(double a, double b) { return a > b ? a : b; }
FUSED_KD_HD double min(double a, double b) { return a < b ? a : b; }
FUSED_KD_HD double magnitude(double x) { return fabs(x); }
// x with the sign of d; 0 if d is 0
FUSED_KD_HD double signed_like(double x, double d) { return d > 0 ? x : d < 0 ? -x : 0.0; }
FUSED_KD_HD double log2(double x) { return ::log2(x); }
// 2^x for |x| <= 60
FUSED_KD_HD double exp2_moderate(double x) { return ::exp2(x); }
FUSED_KD_HD float max(float a, float b) { return fmaxf(a, b); }
FUSED_KD_HD float min(float a, float b) { return fminf(a, b); }
FUSED_KD_HD float magnitude(float x) { return fabsf(x); }
FUSED_KD_HD float signed_like(float x, float d) { return d > 0 ? x : d < 0 ? -x : 0.0f; }
FUSED_KD_HD float exp2_moderate(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
// log2 of a positive normal number in two parts: an integer, and the rest, which is returned; exactly
// 0 at 1
FUSED_KD_HD double log2(double x, double& integer) {
  integer = 0;
  return ::log2(x);
}
FUSED_KD_HD float log2(float x, float& integer) {
  union {
    float number;
    int32_t bits;
  } u = {x};
  const int32_t exponent = (u.bits - 0x3f3504f3) >> 23;  // the rest is in [sqrt(1/2), sqrt(2))
  u.bits -= static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23);
  const float f = u.number - 1.0f;
  // log2(1 + f)/f, least relative error
  float y = fmaf(f, 0.12583644688129425f, -0.20726945996284485f);
  y = fmaf(f, y, 0.215715691447258f);
  y = fmaf(f, y, -0.238944873213768f);
  y = fmaf(f, y, 0.28791624307632446f);
  y = fmaf(f, y, -0.3607036769390106f);
  y = fmaf(f, y, 0.48091062903404236f);
  y = fmaf(f, y, -0.7213473320007324f);
  y = fmaf(f, y, 1.4426950216293335f);
  integer = static_cast<float>(exponent);
  return f * y;
}
// to 2.2 units in the last place
FUSED_KD_HD float log2(float x) {
  float integer;
  const float rest = log2(x, integer);
  return integer + rest;
}
using ::exp2;
using ::fma;
using ::log;

// The options that a rule's scalars depend on.
template <class R>
struct RuleOptions {
  R unit, beta;
};

// The entries that make a divergence infinite: those that are -inf ...
enum class Infinite {
  never,
  student_absent,  // for the student alone
  teacher_absent,  // for the teacher alone
  either           // for one of them alone
};

// The traits that have a default. Each rule defines the others:
//     SOFTMAX     compares probabilities; else logits, and a, b are s, t
//     OWN_SUM     sums `w` in the first pass
//     TWO_PASSES  needs a second pass over the row, for `x` and `y`, before its value and gradient
//     INFINITE    an enum Infinite
template <Divergence D>
struct Traits {
  static constexpr Divergence DIVERGENCE = D;
  // reads the teacher's logits: true for all but `none`
  static constexpr bool READS_TEACHER = true;
  // the gradient's formula is finite if the value is infinite; else the row's gradient is NaN
  static constexpr bool FINITE_GRADIENT = false;
  // the formulas use RowSums::count
  static constexpr bool USES_COUNT = false;
  // the gradient multiplies P by a - b, which may be infinite when P is 0
  static constexpr bool GRADIENT_HAS_DIFFERENCE = false;
  // bound by arithmetic: on a GPU, more registers help more than more blocks
  static constexpr bool BOUND_BY_ARITHMETIC = false;
  // accumulate2 and gradient take logarithms, and have overloads that take them as parameters, for
  // callers that compute them in a loop of their own (see Rule<jsd>)
  static constexpr bool HAS_LOGARITHM = false;
};

template <Divergence D>
struct Rule;

// The rule of a term that is off.
template <>
struct Rule<Divergence::none> : Traits<Divergence::none> {
  static constexpr bool SOFTMAX = false, OWN_SUM = false, TWO_PASSES = false;
  static constexpr bool READS_TEACHER = false;
  static constexpr Infinite INFINITE = Infinite::never;
  template <class R>
  FUSED_KD_HD static R value(const RowSums<R>&, const RuleOptions<R>&) {
    return R(0);
  }
  template <class R>
  FUSED_KD_HD static Constants<R> constants(const RowSums<R>&, R, const RuleOptions<R>&) {
    return {};
  }
  template <class F>
  FUSED_KD_HD static F gradient(F, F, F, F, F, const Constants<F>&, F offset) {
    return offset;
  }
};

// The student's entries outside the support of a top-k teacher: their sum d_s, and a gradient that is
// `scale` times P. No teacher is read.
template <>
struct Rule<Divergence::tail> : Rule<Divergence::none> {
  static constexpr Divergence DIVERGENCE = Divergence::tail;
  static constexpr bool SOFTMAX = true;
  template <class F>
  FUSED_KD_HD static F gradient(F, F, F P, F, F, const Constants<F>& c, F offset) {
    return fma(c.scale, P, offset);
  }
};

// D = sum q log(q/p) = sum q (b - a)/T + log d_s - log d_t;  T dD/ds = p - q
template <>
struct Rule<Divergence::forward_kl> : Traits<Divergence::forward_kl> {
  static constexpr bool SOFTMAX = true, OWN_SUM = true, TWO_PASSES = false;
  static constexpr Infinite INFINITE = Infinite::student_absent;
  static constexpr bool FINITE_GRADIENT = true;  // P = 0 there
  template <class F>
  FUSED_KD_HD static F accumulate(F a, F b, F, F Q, F w) {
    return fma(Q, b - a, w);
  }
  template <class F>
  FUSED_KD_HD static F weight(F, F Q) {
    return Q;
  }
  template <class R>
  FUSED_KD_HD static R rebase(const RowSums<R>& r, R shift_s, R shift_t, R, R factor_t) {
    return factor_t * (r.w + (shift_t - shift_s) * r.d_t);
  }
  template <class R>
  FUSED_KD_HD static R value(const RowSums<R>& r, const RuleOptions<R>& o) {
    return r.w / (o.unit * r.d_t) + log(r.d_s / r.d_t);
  }
  template <class R>
  FUSED_KD_HD static Constants<R> constants(const RowSums<R>& r, R weight, const RuleOptions<R>&) {
    return {weight / r.d_s, r.d_s / r.d_t, R(0), R(0), R(0)};
  }
  // p - q = (P - Q d_s/d_t) / d_s
  template <class F>
  FUSED_KD_HD static F gradient(F, F, F P, F Q, F, const Constants<F>& c, F offset) {
    return fma(c.scale, fma(-c.ratio, Q, P), offset);
  }
};

// D = sum p log(p/q);  T dD/ds = p (log(p/q) - D) = p ((a - b) - w/d_s) / T: the normalisers cancel
template <>
struct Rule<Divergence::reverse_kl> : Traits<Divergence::reverse_kl> {
  static constexpr bool SOFTMAX = true, OWN_SUM = true, TWO_PASSES = false;
  static constexpr Infinite INFINITE = Infinite::teacher_absent;
  static constexpr bool GRADIENT_HAS_DIFFERENCE = true;
  template <class F>
  FUSED_KD_HD static F accumulate(F a, F b, F P, F, F w) {
    return fma(P, a - b, w);
  }
  template <class F>
  FUSED_KD_HD static F weight(F P, F) {
    return P;
  }
  template <class R>
  FUSED_KD_HD static R rebase(const RowSums<R>& r, R shift_s, R shift_t, R factor_s, R) {
    return factor_s * (r.w + (shift_s - shift_t) * r.d_s);
  }
  template <class R>
  FUSED_KD_HD static R value(const RowSums<R>& r, const RuleOptions<R>& o) {
    return r.w / (o.unit * r.d_s) + log(r.d_t / r.d_s);
  }
  template <class R>
  FUSED_KD_HD static Constants<R> constants(const RowSums<R>& r, R weight,
                                            const RuleOptions<R>& o) {
    return {weight / (o.unit * r.d_s), R(0), r.w / r.d_s, R(0), R(0)};
  }
  template <class F>
  FUSED_KD_HD static F gradient(F a, F b, F P, F, F, const Constants<F>& c, F offset) {
    return fma(c.scale * P, (a - b) - c.offset, offset);
  }
};

// m = beta q + (1-beta) p;  D = beta KL(q|m) + (1-beta) KL(p|m);  T dD/ds = (1-beta) p (log(p/m) -
// KL(p|m)).  The normalisers are left out of the sums and come in at the end.
template <>
struct Rule<Divergence::jsd> : Traits<Divergence::jsd> {
  static constexpr bool SOFTMAX = true, OWN_SUM = false, TWO_PASSES = true;
  static constexpr Infinite INFINITE = Infinite::never;
  static constexpr bool BOUND_BY_ARITHMETIC = true;
  static constexpr bool HAS_LOGARITHM = true;
  template <class F>
  struct Logarithms {
    F p_over_m, q_over_m;
  };
  // log2(q/p), which is linear in the logits. Entries that are -inf on one side have a huge one, on
  // both any; beyond 60 the smaller of p and q is nothing next to the other.
  template <class F>
  FUSED_KD_HD static F log_ratio(F a, F b, F k, const Constants<F>& c) {
    const F most = F{} + 60.0f;
    return min(max(fma(b - a, k, c.log_ratio), -most), most);
  }
  // m/p, exactly 1 for equal rows
  template <class F>
  FUSED_KD_HD static F mixture(F log_ratio, const Constants<F>& c) {
    return fma(c.beta, exp2_moderate(log_ratio), (F{} + 1.0f) - c.beta);
  }
  // log2(p/m), log2(q/m). If q is much the larger one, the integers in log2(q/p) and log2(m/p) cancel.
  template <class F>
  FUSED_KD_HD static Logarithms<F> logarithms(F log_ratio, F mixture) {
    F integer;
    const F rest = log2(mixture, integer);
    return {-(integer + rest), (log_ratio - integer) - rest};
  }
  template <class F>
  FUSED_KD_HD static void accumulate2(const Logarithms<F>& over, F P, F Q, F& x, F& y) {
    x = fma(P, over.p_over_m, x);
    y = fma(Q, over.q_over_m, y);
  }
  template <class F>
  FUSED_KD_HD static void accumulate2(F a, F b, F P, F Q, F k, const Constants<F>& c, F& x, F& y) {
    const F r = log_ratio(a, b, k, c);
    accumulate2(logarithms(r, mixture(r, c)), P, Q, x, y);
  }
  template <class R>
  FUSED_KD_HD static R value(const RowSums<R>& r, const RuleOptions<R>& o) {
    return R(LN2) * (o.beta * (r.y / r.d_t) + (R(1) - o.beta) * (r.x / r.d_s));
  }
  template <class R>
  FUSED_KD_HD static Constants<R> constants(const RowSums<R>& r, R weight,
                                            const RuleOptions<R>& o) {
    return {weight * (R(1) - o.beta) * R(LN2) / r.d_s, R(0), r.x / r.d_s, o.beta,
            log2(r.d_s / r.d_t)};
  }
  template <class F>
  FUSED_KD_HD static F gradient(F p_over_m, F P, const Constants<F>& c, F offset) {
    return fma(c.scale * P, p_over_m - c.offset, offset);
  }
  template <class F>
  FUSED_KD_HD static F gradient(F a, F b, F P, F, F k, const Constants<F>& c, F offset) {
    return gradient(-log2(mixture(log_ratio(a, b, k, c), c)), P, c, offset);
  }
};

// D = 1/2 sum |p - q|;  T dD/ds = 1/2 p (sgn(p-q) - sum p sgn(p-q)).  x and y are d_s times these
// sums.
template <>
struct Rule<Divergence::tvd> : Traits<Divergence::tvd> {
  static constexpr bool SOFTMAX = true, OWN_SUM = false, TWO_PASSES = true;
  static constexpr Infinite INFINITE = Infinite::never;
  template <class F>
  FUSED_KD_HD static void accumulate2(F, F, F P, F Q, F, const Constants<F>& c, F& x, F& y) {
    const F d = fma(-c.ratio, Q, P);
    x = x + magnitude(d);
    y = y + signed_like(P, d);
  }
  template <class R>
  FUSED_KD_HD static R value(const RowSums<R>& r, const RuleOptions<R>&) {
    return R(0.5) * r.x / r.d_s;
  }
  template <class R>
  FUSED_KD_HD static Constants<R> constants(const RowSums<R>& r, R weight, const RuleOptions<R>&) {
    const R ratio = r.d_s / r.d_t;
    return {R(0.5) * weight / r.d_s, ratio, r.y / r.d_s, R(0), log2(ratio)};
  }
  // the sign of p - q is that of log(p/q), which needs no exponential
  template <class F>
  FUSED_KD_HD static F gradient(F a, F b, F P, F, F k, const Constants<F>& c, F offset) {
    const F log_p_over_q = fma(a - b, k, -c.log_ratio);
    return fma(c.scale, fma(-c.offset, P, signed_like(P, log_p_over_q)), offset);
  }
};

// D = 1/V sum (s-t)^2 / T^2;  T dD/ds = 2 (s-t) / (V T).  Here a, b are the logits themselves.
template <>
struct Rule<Divergence::mse> : Traits<Divergence::mse> {
  static constexpr bool SOFTMAX = false, OWN_SUM = true, TWO_PASSES = false;
  static constexpr Infinite INFINITE = Infinite::either;
  static constexpr bool USES_COUNT = true;
  template <class F>
  FUSED_KD_HD static F accumulate(F a, F b, F, F, F w) {
    const F d = a - b;
    return fma(d, d, w);
  }
  template <class R>
  FUSED_KD_HD static R value(const RowSums<R>& r, const RuleOptions<R>& o) {
    return r.w / (o.unit * o.unit * r.count);
  }
  template <class R>
  FUSED_KD_HD static Constants<R> constants(const RowSums<R>& r, R weight,
                                            const RuleOptions<R>& o) {
    return {R(2) * weight / (o.unit * r.count), R(0), R(0), R(0), R(0)};
  }
  template <class F>
  FUSED_KD_HD static F gradient(F a, F b, F, F, F, const Constants<F>& c, F offset) {
    return fma(c.scale, a - b, offset);
  }
};

// Returns whether an entry that is -inf for one side alone makes this divergence infinite.
template <class AnyRule>
FUSED_KD_HD constexpr bool is_infinite(bool student_alone, bool teacher_alone) {
  return AnyRule::INFINITE == Infinite::student_absent   ? student_alone
         : AnyRule::INFINITE == Infinite::teacher_absent ? teacher_alone
         : AnyRule::INFINITE == Infinite::either         ? student_alone || teacher_alone
                                                         : false;
}

// Calls call(Rule<d>{}) with the rule of a divergence that is known at run time; on a GPU if `call` is
// a function of the device.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Call>
FUSED_KD_HD auto with_rule(Divergence d, Call call) {
  switch (d) {
#define FUSED_KD_CASE(name) \
  case Divergence::name: return call(Rule<Divergence::name>{});
    FUSED_KD_DIVERGENCES(FUSED_KD_CASE)
#undef FUSED_KD_CASE
    case Divergence::tail: return call(Rule<Divergence::tail>{});
    case Divergence::none: break;
  }
  return call(Rule<Divergence::none>{});
}

}  // namespace fused_kd
