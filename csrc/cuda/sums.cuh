// The statistics of a row: what a thread sums up, and how threads, warps and blocks merge.
//
// Read: each element once. Accumulated in float: eight elements by a tree, groups one after
// another, threads and blocks by trees of fixed shape, so that the bits depend on V and the dtypes
// alone. References are exact maxima of what a thread has seen: exponents are <= 0, the largest is
// exactly 0.
#pragma once

#include "elements.cuh"

namespace fused_kd {

constexpr float INF = INFINITY;
constexpr float LOWEST = -3.4028235e38f;

enum Flag : int {
  ALONE_S = 1,  // an entry is -inf for the student alone
  ALONE_T = 2,  // ... for the teacher alone
  BAD = 4,      // a NaN or +inf logit (only looked for where the sums would not show it)
};

// How the hard term's e^(s - m_s) is made: not at all, P itself (T = 1), P squared (T = 2), by an
// exponential of its own.
enum class Hard : int { off, power1, power2, separate };

// The same for every row of a launch.
struct Options {
  Shape<float> shape;
  float k, k_1;  // log2(e)/T and log2(e)
  Hard hard;
  bool smoothing;
};

// Everything that is known of a row or a part of it. `flags` is a set of Flag, as a number.
struct Record {
  RowSums<float> r;
  float flags;
};
static_assert(sizeof(Record) == STATS * sizeof(float), "a record is a row of stats");

template <Divergence D>
struct RuleOf : Rule<D> {};
// Only the hard term: the teacher is not read.
template <>
struct RuleOf<Divergence::none> {
  static constexpr bool SOFTMAX = false, TWO_VISITS = false;
};

FUSED_KD_DEVICE Record empty_record() {
  Record record = {};
  record.r.m_s = record.r.m_t = -INF;
  return record;
}

// Sums relative to m_s, m_t >= the record's own. Equal maxima, -inf included, are not subtracted.
template <Divergence D>
FUSED_KD_DEVICE void rebase(Record& record, float m_s, float m_t, const Options& o) {
  RowSums<float>& r = record.r;
  const float shift_s = r.m_s == m_s || r.m_s == -INF ? 0.0f : r.m_s - m_s;
  const float shift_t = r.m_t == m_t || r.m_t == -INF ? 0.0f : r.m_t - m_t;
  if constexpr (RuleOf<D>::SOFTMAX) {
    const float factor_s = exp2_fast(shift_s * o.k), factor_t = exp2_fast(shift_t * o.k);
    // what vanishes must not meet a shift so large that its product overflows
    const bool vanishes = (D == Divergence::forward_kl ? factor_t : factor_s) == 0.0f;
    r.w = vanishes ? 0.0f : RuleOf<D>::rebase(r, shift_s, shift_t, factor_s, factor_t);
    r.d_s *= factor_s;
    r.d_t *= factor_t;
  }
  if (o.hard != Hard::off) r.d_1 *= exp2_fast(shift_s * o.k_1);
  if (o.smoothing) r.differences += shift_s * r.count;
  r.m_s = m_s;
  r.m_t = m_t;
}

FUSED_KD_DEVICE float sum_of(const float (&x)[GROUP]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

FUSED_KD_DEVICE float max_of(const float (&x)[GROUP]) {
  return fmaxf(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])),
               fmaxf(fmaxf(x[4], x[5]), fmaxf(x[6], x[7])));
}

// e^(s - m_s) of a group whose a and P are known, over P. The branch is outside of the loops.
FUSED_KD_DEVICE void make_hard_exponentials(const float (&a)[GROUP], float (&P)[GROUP],
                                            const Options& o) {
  if (o.hard == Hard::separate) {
#pragma unroll
    for (int e = 0; e < GROUP; ++e) P[e] = exp2_fast(a[e] * o.k_1);
  } else if (o.hard == Hard::power2) {
#pragma unroll
    for (int e = 0; e < GROUP; ++e) P[e] *= P[e];
  }
}

// Entry by entry, for a group with an entry that is not finite: infinity is decided on the logits,
// and an entry that is -inf on both sides is absent. Makes w and differences anew.
template <Divergence D>
FUSED_KD_DEVICE void add_carefully(Record& record, const float (&s)[GROUP], const float (&t)[GROUP],
                                   const Options& o, float& w, float& differences) {
  RowSums<float>& r = record.r;
  int flags = static_cast<int>(record.flags);
  w = differences = 0.0f;
#pragma unroll
  for (int e = 0; e < GROUP; ++e) {
    const bool no_s = s[e] == -INF, no_t = t[e] == -INF;
    if (no_s && !no_t) flags |= ALONE_S;
    if (no_t && !no_s) flags |= ALONE_T;
    if (!(s[e] < INF) || !(t[e] < INF)) flags |= BAD;
    if (no_s && no_t) r.count -= 1.0f;
    if (!no_s) differences += s[e] - r.m_s;
    if (no_s || no_t) continue;
    if constexpr (D == Divergence::mse) {
      w = Rule<D>::accumulate(s[e], t[e], 0.0f, 0.0f, w);
    } else if constexpr (D == Divergence::forward_kl || D == Divergence::reverse_kl) {
      const float a = s[e] - r.m_s, b = t[e] - r.m_t;
      const float P = exp2_fast(a * o.k), Q = exp2_fast(b * o.k);
      if ((D == Divergence::forward_kl ? Q : P) != 0.0f) w = Rule<D>::accumulate(a, b, P, Q, w);
    }
  }
  record.flags = static_cast<float>(flags);
}

// One group into a thread's record. `true_teacher` mends t for a look at what is absent.
template <Divergence D, class TrueTeacher>
FUSED_KD_DEVICE void add_group(Record& record, const float (&s)[GROUP], float (&t)[GROUP],
                               const Options& o, TrueTeacher true_teacher) {
  constexpr bool SOFT = D != Divergence::none, SOFTMAX = RuleOf<D>::SOFTMAX;
  RowSums<float>& r = record.r;
  const float m_s = fmaxf(r.m_s, max_of(s)), m_t = SOFT ? fmaxf(r.m_t, max_of(t)) : r.m_t;
  if (m_s != r.m_s || m_t != r.m_t) rebase<D>(record, m_s, m_t, o);
  // without a finite entry yet, any reference will do
  const float ref_s = m_s == -INF ? 0.0f : m_s, ref_t = m_t == -INF ? 0.0f : m_t;
  float P[GROUP], Q[GROUP], a[GROUP], w[2] = {0.0f, 0.0f};
#pragma unroll
  for (int e = 0; e < GROUP; ++e) {
    a[e] = s[e] - ref_s;
    const float b = SOFT ? t[e] - ref_t : 0.0f;
    P[e] = SOFTMAX || o.hard != Hard::off ? exp2_fast(a[e] * o.k) : 0.0f;
    Q[e] = SOFTMAX ? exp2_fast(b * o.k) : 0.0f;
    if constexpr (D == Divergence::mse)
      w[e % 2] = Rule<D>::accumulate(s[e], t[e], 0.0f, 0.0f, w[e % 2]);
    else if constexpr (SOFT)
      w[e % 2] = Rule<D>::accumulate(a[e], b, P[e], Q[e], w[e % 2]);
  }
  float group_w = w[0] + w[1];
  float group_differences = o.smoothing ? sum_of(a) : 0.0f;
  r.count += GROUP;
  if (!isfinite(group_w + group_differences)) {
    true_teacher(s, t);
    add_carefully<D>(record, s, t, o, group_w, group_differences);
  }
  r.w += group_w;
  r.differences += group_differences;
  if constexpr (SOFTMAX) {
    r.d_s += sum_of(P);
    r.d_t += sum_of(Q);
  }
  if (o.hard != Hard::off) {
    make_hard_exponentials(a, P, o);
    r.d_1 += sum_of(P);
  }
}

// ------------------------------------------------------------------------------------- merging

FUSED_KD_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

FUSED_KD_DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

// Each flag is counted in digits of its own, so that one sum does.
FUSED_KD_DEVICE float union_of_flags(int flags) {
  const int counts = static_cast<int>(
      warp_sum(static_cast<float>((flags & 1) + (flags & 2) * 32 + (flags & 4) * 1024)));
  return static_cast<float>((counts & 63 ? 1 : 0) + (counts & 63 * 64 ? 2 : 0) +
                            (counts >> 12 ? 4 : 0));
}

// The records of a warp's lanes become one, in every lane.
template <Divergence D>
FUSED_KD_DEVICE void merge_warp(Record& record, const Options& o) {
  RowSums<float>& r = record.r;
  rebase<D>(record, warp_max(r.m_s), warp_max(r.m_t), o);
  if constexpr (RuleOf<D>::SOFTMAX) {
    r.d_s = warp_sum(r.d_s);
    r.d_t = warp_sum(r.d_t);
  }
  if constexpr (D != Divergence::none && !RuleOf<D>::TWO_VISITS) r.w = warp_sum(r.w);
  if (o.hard != Hard::off) r.d_1 = warp_sum(r.d_1);
  if (o.smoothing) r.differences = warp_sum(r.differences);
  if (o.smoothing || D == Divergence::mse) r.count = warp_sum(r.count);
  record.flags = union_of_flags(static_cast<int>(record.flags));
}

}  // namespace fused_kd
