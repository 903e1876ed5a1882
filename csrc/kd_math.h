// The formulas of every divergence, written once for the CPU vectors, a GPU thread and the tests.
// Torch-free.
//
// Letters: p = softmax(s/T) student, q = softmax(t/T) teacher, pi = softmax(s) student at T = 1.
// Logits enter relative to a reference near their row's maximum (`m_s`, `m_t`):
//     a = s - m_s      P = e^(a/T)     p = P / d_s      d_s = sum P
//     b = t - m_t      Q = e^(b/T)     q = Q / d_t      d_t = sum Q
// so nothing depends on how large the logits are, and equal rows give exactly equal P and Q.
//
// A divergence is one struct `Rule<D>`:
//     accumulate    one element into the first visit's sum `w`
//     rebase        what `w` becomes when the references grow: a and b move by shift_s and
//                   shift_t <= 0, P and Q shrink by the factors
//     accumulate2   one element into the sums of a second visit (TWO_VISITS only; needs the
//                   normalisers); ANY: P may have underflowed; k: log2(e)/T
//     value         the row's divergence D from its sums
//     constants     what `gradient` needs, scaled by `weight` = upstream * c(T) / T
//     gradient      weight * T * dD/ds_v of one element, plus `offset`
// F is the element type (a vector, float); R the type of a row's scalars (double on the CPU, float
// on a GPU).
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define FUSED_KD_HD __host__ __device__ __forceinline__
#else
#define FUSED_KD_HD inline __attribute__((always_inline))
#endif

namespace fused_kd {

enum class Divergence : int { forward_kl = 0, reverse_kl = 1, jsd = 2, tvd = 3, mse = 4, none = 5 };

// What one row's visits have summed up; `count` is the number of entries that are present.
template <class R>
struct RowSums {
  R m_s, m_t;     // references
  R d_s, d_t;     // sum P, sum Q
  R d_1;          // sum e^(s - m_s): the hard term's normaliser
  R w;            // the divergence's own first-visit sum
  R x, y;         // the divergence's second-visit sums
  R differences;  // sum (s - m_s), label smoothing only
  R count;
};

// Scalars that elements need. `ratio` and the normalisers are exactly equal for equal rows, which
// makes their gradient exactly 0.
template <class F>
struct Constants {
  F scale, ratio, offset;
  F inverse_s, inverse_t, beta;
};

// What the formulas ask of an element type, for one number; vectors bring their own (and have them
// declared before this file).
FUSED_KD_HD double max(double a, double b) { return a > b ? a : b; }
FUSED_KD_HD double magnitude(double x) { return fabs(x); }
FUSED_KD_HD double signed_like(double x, double d) {
  return d > 0 ? x : d < 0 ? -x : 0.0;
}  // 0 where d is 0
// finite at 0, as the vectors' is: a probability that underflowed times its logarithm is then 0
FUSED_KD_HD double log2(double x) { return ::log2(max(x, 1e-300)); }
FUSED_KD_HD float max(float a, float b) { return fmaxf(a, b); }
FUSED_KD_HD float magnitude(float x) { return fabsf(x); }
FUSED_KD_HD float signed_like(float x, float d) { return d > 0 ? x : d < 0 ? -x : 0.0f; }
FUSED_KD_HD float log2(float x) { return log2f(fmaxf(x, 1.2e-38f)); }
using ::exp2;
using ::fma;
using ::log;

template <class R>
FUSED_KD_HD constexpr R ln2() {
  return R(0.69314718055994530942);
}

// The options that a row's scalars depend on.
template <class R>
struct Shape {
  R temperature, beta;
};

template <Divergence D>
struct Rule;

// D = sum q log(q/p) = sum q (b - a)/T + log d_s - log d_t;  T dD/ds = p - q
template <>
struct Rule<Divergence::forward_kl> {
  static constexpr bool SOFTMAX = true, TWO_VISITS = false;
  template <class F>
  FUSED_KD_HD static F accumulate(F a, F b, F, F Q, F w) {
    return fma(Q, b - a, w);
  }
  template <class R>
  FUSED_KD_HD static R rebase(const RowSums<R>& r, R shift_s, R shift_t, R, R factor_t) {
    return factor_t * (r.w + (shift_t - shift_s) * r.d_t);
  }
  template <class R>
  FUSED_KD_HD static R value(const RowSums<R>& r, const Shape<R>& o) {
    return r.w / (o.temperature * r.d_t) + log(r.d_s / r.d_t);
  }
  template <class R>
  FUSED_KD_HD static Constants<R> constants(const RowSums<R>& r, R weight, const Shape<R>&) {
    return {weight / r.d_s, r.d_s / r.d_t, R(0), R(0), R(0), R(0)};
  }
  // p - q = (P - Q d_s/d_t) / d_s
  template <class F>
  FUSED_KD_HD static F gradient(F, F, F P, F Q, const Constants<F>& c, F offset) {
    return fma(c.scale, fma(-c.ratio, Q, P), offset);
  }
};

// D = sum p log(p/q);  T dD/ds = p (log(p/q) - D) = p ((a - b) - w/d_s) / T: the normalisers cancel
template <>
struct Rule<Divergence::reverse_kl> {
  static constexpr bool SOFTMAX = true, TWO_VISITS = false;
  template <class F>
  FUSED_KD_HD static F accumulate(F a, F b, F P, F, F w) {
    return fma(P, a - b, w);
  }
  template <class R>
  FUSED_KD_HD static R rebase(const RowSums<R>& r, R shift_s, R shift_t, R factor_s, R) {
    return factor_s * (r.w + (shift_s - shift_t) * r.d_s);
  }
  template <class R>
  FUSED_KD_HD static R value(const RowSums<R>& r, const Shape<R>& o) {
    return r.w / (o.temperature * r.d_s) + log(r.d_t / r.d_s);
  }
  template <class R>
  FUSED_KD_HD static Constants<R> constants(const RowSums<R>& r, R weight, const Shape<R>& o) {
    return {weight / (o.temperature * r.d_s), R(0), r.w / r.d_s, R(0), R(0), R(0)};
  }
  template <class F>
  FUSED_KD_HD static F gradient(F a, F b, F P, F, const Constants<F>& c, F offset) {
    return fma(c.scale * P, (a - b) - c.offset, offset);
  }
};

// m = beta q + (1-beta) p;  D = beta KL(q|m) + (1-beta) KL(p|m);  T dD/ds = (1-beta) p (log(p/m) -
// KL(p|m))
template <>
struct Rule<Divergence::jsd> {
  static constexpr bool SOFTMAX = true, TWO_VISITS = true;
  // p + beta (q - p) is exactly p where q = p; the floor keeps 0/0 (both underflowed) away from the
  // logarithm
  template <class F>
  FUSED_KD_HD static F mixture(F p, F q, F beta) {
    return max(fma(beta, q - p, p), F{} + 1.2e-38f);
  }
  template <class F>
  FUSED_KD_HD static F accumulate(F, F, F, F, F w) {
    return w;
  }
  template <class R>
  FUSED_KD_HD static R rebase(const RowSums<R>& r, R, R, R, R) {
    return r.w;
  }
  // log(q/m) = log(p/m) + log(q/p), and log(q/p) is linear in the logits: one logarithm instead of
  // two, where p is a number that has one.
  template <bool ANY, class F>
  FUSED_KD_HD static void accumulate2(F a, F b, F P, F Q, F k, const Constants<F>& c, F& x, F& y) {
    const F p = P * c.inverse_s, q = Q * c.inverse_t, m = mixture(p, q, c.beta);
    const F p_over_m = log2(p / m);
    const F q_over_m = ANY ? log2(q / m) : p_over_m + fma(b - a, k, c.ratio);
    x = fma(p, p_over_m, x);
    y = fma(q, q_over_m, y);
  }
  template <class R>
  FUSED_KD_HD static R value(const RowSums<R>& r, const Shape<R>& o) {
    return ln2<R>() * (o.beta * r.y + (R(1) - o.beta) * r.x);
  }
  template <class R>
  FUSED_KD_HD static Constants<R> constants(const RowSums<R>& r, R weight, const Shape<R>& o) {
    const R ratio = log2(r.d_s / r.d_t);
    return {weight * (R(1) - o.beta) * ln2<R>(), ratio, r.x, R(1) / r.d_s, R(1) / r.d_t, o.beta};
  }
  template <class F>
  FUSED_KD_HD static F gradient(F, F, F P, F Q, const Constants<F>& c, F offset) {
    const F p = P * c.inverse_s, q = Q * c.inverse_t, m = mixture(p, q, c.beta);
    return fma(c.scale * p, log2(p / m) - c.offset, offset);
  }
};

// D = 1/2 sum |p - q|;  T dD/ds = 1/2 p (sgn(p-q) - sum p sgn(p-q))
template <>
struct Rule<Divergence::tvd> {
  static constexpr bool SOFTMAX = true, TWO_VISITS = true;
  template <class F>
  FUSED_KD_HD static F accumulate(F, F, F, F, F w) {
    return w;
  }
  template <class R>
  FUSED_KD_HD static R rebase(const RowSums<R>& r, R, R, R, R) {
    return r.w;
  }
  template <bool ANY, class F>
  FUSED_KD_HD static void accumulate2(F, F, F P, F Q, F, const Constants<F>& c, F& x, F& y) {
    const F p = P * c.inverse_s, d = p - Q * c.inverse_t;
    x = x + magnitude(d);
    y = y + signed_like(p, d);
  }
  template <class R>
  FUSED_KD_HD static R value(const RowSums<R>& r, const Shape<R>&) {
    return R(0.5) * r.x;
  }
  template <class R>
  FUSED_KD_HD static Constants<R> constants(const RowSums<R>& r, R weight, const Shape<R>&) {
    return {R(0.5) * weight, R(0), r.y, R(1) / r.d_s, R(1) / r.d_t, R(0)};
  }
  template <class F>
  FUSED_KD_HD static F gradient(F, F, F P, F Q, const Constants<F>& c, F offset) {
    const F p = P * c.inverse_s, d = p - Q * c.inverse_t;
    return fma(c.scale, fma(-c.offset, p, signed_like(p, d)), offset);
  }
};

// D = 1/V sum (s-t)^2 / T^2;  T dD/ds = 2 (s-t) / (V T).  Here a, b are the logits themselves.
template <>
struct Rule<Divergence::mse> {
  static constexpr bool SOFTMAX = false, TWO_VISITS = false;
  template <class F>
  FUSED_KD_HD static F accumulate(F a, F b, F, F, F w) {
    const F d = a - b;
    return fma(d, d, w);
  }
  template <class R>
  FUSED_KD_HD static R rebase(const RowSums<R>& r, R, R, R, R) {
    return r.w;
  }
  template <class R>
  FUSED_KD_HD static R value(const RowSums<R>& r, const Shape<R>& o) {
    return r.w / (o.temperature * o.temperature * r.count);
  }
  template <class R>
  FUSED_KD_HD static Constants<R> constants(const RowSums<R>& r, R weight, const Shape<R>& o) {
    return {R(2) * weight / (o.temperature * r.count), R(0), R(0), R(0), R(0), R(0)};
  }
  template <class F>
  FUSED_KD_HD static F gradient(F a, F b, F, F, const Constants<F>& c, F offset) {
    return fma(c.scale, a - b, offset);
  }
};

}  // namespace fused_kd
