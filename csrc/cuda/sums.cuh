// The statistics of a row: the sums of a thread, and their merge over threads, warps and blocks.
//
// Each element is read once. Sums are in float: eight elements by a tree or a chain, groups one
// after another, threads and blocks by trees of fixed shape, so that the bits depend on V and the
// dtypes alone.
//
// Exponents are of 2, relative to a reference m that is a logit of the row: a = fma(s, k, -M) with
// M = m k, rounded. The rounding error of M is the same in all exponents, so M is an exact
// reference and a is rounded once. A reference need not be the maximum: a warp takes the largest
// logit of its first groups, and keeps it until a sum exceeds LIMIT, which never happens in
// ordinary rows. If M is so large that its rounding error spans powers of 2 (masks of -1e30), m is
// subtracted instead.
#pragma once

#include "stores.cuh"

namespace fused_kd {

// Limit of a group's sums of exponentials (of the softened exponentials if T = 1 or 2: those of the
// hard term are at most their squares). Beyond it, the reference rises to the group's maximum. So
// the sums of a row stay far from the largest float, and quotients by them far from the smallest.
constexpr float LIMIT = 16777216.0f;

enum Flag : int {
  ALONE_S = 1,  // an entry is -inf for the student alone
  ALONE_T = 2,  // ... for the teacher alone
  BAD = 4,      // a logit is NaN or +inf (set only if the sums would not show it)
};

// How the hard term's e^(s - m_s) is computed: not at all, as P (T = 1), as P squared (T = 2), or
// by a separate exponential.
enum class Hard : int { off, power1, power2, separate };

// Options that are the same for every row of a launch.
struct Options {
  RuleOptions<float> rule;
  float k, k_1;    // log2(e)/T and log2(e)
  float moderate;  // references below it are folded
  Hard hard;
  bool smoothing;
};

// The statistics of a row or a part of it. `flags` is a set of Flag stored as a float;
// `differences` sums the exponents a.
struct Record {
  RowSums<float> r;
  float flags;
};
static_assert(sizeof(Record) == STATS * sizeof(float), "a record is a row of stats");

FUSED_KD_DEVICE Record empty_record() {
  Record record = {};
  record.r.m_s = record.r.m_t = -INF;
  return record;
}

// Returns whether a reference is small enough that folding it into a multiply-add is as accurate as
// subtracting it. False for a side without a reference yet (-inf).
FUSED_KD_DEVICE bool moderate(float m, const Options& o) { return fabsf(m) < o.moderate; }

// Computes exponents by one multiply-add, with folded references.
struct Folded {
  float s, t, s_1;

  FUSED_KD_DEVICE Folded(float m_s, float m_t, const Options& o)
      : s(m_s * o.k), t(m_t * o.k), s_1(m_s * o.k_1) {}
  // For any references; if one is not moderate, every exponent is NaN, and so are a group's sums.
  FUSED_KD_DEVICE static Folded if_moderate(float m_s, float m_t, const Options& o) {
    return {moderate(m_s, o) ? m_s : NAN, moderate(m_t, o) ? m_t : NAN, o};
  }
  FUSED_KD_DEVICE float student(float x, const Options& o) const { return fmaf(x, o.k, -s); }
  FUSED_KD_DEVICE float teacher(float x, const Options& o) const { return fmaf(x, o.k, -t); }
  FUSED_KD_DEVICE float hard(float x, const Options& o) const { return fmaf(x, o.k_1, -s_1); }
};

// Returns the rounding error that a folded reference adds to every exponent of its side.
FUSED_KD_DEVICE float added(float m, float k, const Options& o) {
  return moderate(m, o) ? fmaf(m, k, -(m * k)) : 0.0f;
}

// Computes the same exponents for any logit and reference, by a subtraction.
struct Subtracted {
  float m_s, m_t, added_s, added_t, added_1;

  FUSED_KD_DEVICE Subtracted(float m_s, float m_t, const Options& o)
      : m_s(m_s),
        m_t(m_t),
        added_s(added(m_s, o.k, o)),
        added_t(added(m_t, o.k, o)),
        added_1(added(m_s, o.k_1, o)) {}
  FUSED_KD_DEVICE float student(float x, const Options& o) const {
    return fmaf(x - m_s, o.k, added_s);
  }
  FUSED_KD_DEVICE float teacher(float x, const Options& o) const {
    return fmaf(x - m_t, o.k, added_t);
  }
  FUSED_KD_DEVICE float hard(float x, const Options& o) const {
    return fmaf(x - m_s, o.k_1, added_1);
  }
};

// Returns the change of a side's exponents with a new reference m >= old. Equal references,
// including -inf, are not subtracted.
FUSED_KD_DEVICE float shift_of(float old, float m, float k, const Options& o) {
  if (old == m || old == -INF) return 0.0f;
  return fmaf(old - m, k, added(m, k, o) - added(old, k, o));
}

// Makes a record's sums relative to m_s, m_t, which are at least its own references.
template <Divergence D>
FUSED_KD_DEVICE void rebase(Record& record, float m_s, float m_t, const Options& o) {
  RowSums<float>& r = record.r;
  const float shift_s = shift_of(r.m_s, m_s, o.k, o);
  if constexpr (Rule<D>::SOFTMAX) {
    const float shift_t = shift_of(r.m_t, m_t, o.k, o);
    const float factor_s = exp2_fast(shift_s), factor_t = exp2_fast(shift_t);
    if constexpr (Rule<D>::OWN_SUM) {
      // a sum that vanishes must not be multiplied by a shift so large that the product overflows
      const float weight = Rule<D>::weight(factor_s, factor_t) * Rule<D>::weight(r.d_s, r.d_t);
      r.w = weight == 0.0f ? 0.0f : Rule<D>::rebase(r, shift_s, shift_t, factor_s, factor_t);
    }
    r.d_s *= factor_s;
    r.d_t *= factor_t;
  }
  if (o.hard != Hard::off) r.d_1 *= exp2_fast(shift_of(r.m_s, m_s, o.k_1, o));
  if (o.smoothing && r.count != 0.0f) r.differences += shift_s * r.count;
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

// Sets the first references of a warp's lanes: the largest logits of their first groups.
FUSED_KD_DEVICE void set_references(Record& record, float m_s, float m_t) {
  record.r.m_s = warp_max(m_s);
  record.r.m_t = warp_max(m_t);
}

// The sums of a group, to be added to a record. `canary` is finite if every summand is;
// `exponentials` is at least the largest exponential.
struct GroupSums {
  float d_s = 0.0f, d_t = 0.0f, d_1 = 0.0f, w = 0.0f, differences = 0.0f;
  float canary = 0.0f, exponentials = 0.0f;
};

// Assumes that every entry is finite and no exponential too large; else the sums are not `usable`.
template <Divergence D, bool SMOOTHING>
FUSED_KD_DEVICE GroupSums sums_of_group(const float (&s)[GROUP], const float (&t)[GROUP],
                                        const Folded& m, const Options& o) {
  constexpr bool OWN_SUM = Rule<D>::OWN_SUM, SOFTMAX = Rule<D>::SOFTMAX;
  constexpr bool TEACHER = SOFTMAX && Rule<D>::READS_TEACHER;
  GroupSums sums;
  float a[GROUP], P[GROUP], Q[GROUP];
#pragma unroll
  for (int e = 0; e < GROUP; ++e) {
    a[e] = m.student(s[e], o);
    P[e] = SOFTMAX || o.hard != Hard::off ? exp2_fast(a[e]) : 0.0f;
    const float b = TEACHER ? m.teacher(t[e], o) : 0.0f;
    Q[e] = TEACHER ? exp2_fast(b) : 0.0f;
    if constexpr (OWN_SUM && SOFTMAX)
      sums.w = Rule<D>::accumulate(a[e], b, P[e], Q[e], sums.w);
    else if constexpr (OWN_SUM)
      sums.w = Rule<D>::accumulate(s[e], t[e], 0.0f, 0.0f, sums.w);
  }
  sums.canary = sums.w;
  if constexpr (SOFTMAX) {
    sums.d_s = sum_of(P);
    sums.d_t = sum_of(Q);
    sums.exponentials = sums.d_s + sums.d_t;
  }
  if (o.hard == Hard::power2) {
#pragma unroll
    for (int e = 0; e < GROUP; ++e) sums.d_1 = fmaf(P[e], P[e], sums.d_1);
  } else if (o.hard == Hard::separate) {
#pragma unroll
    for (int e = 0; e < GROUP; ++e) P[e] = exp2_fast(m.hard(s[e], o));
    sums.d_1 = sum_of(P);
    sums.exponentials += sums.d_1;
  } else if (o.hard == Hard::power1) {
    sums.d_1 = SOFTMAX ? sums.d_s : sum_of(P);
    if (!SOFTMAX) sums.exponentials = sums.d_1;
  }
  if constexpr (SMOOTHING) {
    sums.differences = sum_of(a);
    sums.canary += sums.differences;
  }
  return sums;
}

// Returns whether the assumptions of sums_of_group hold. A divergence of logits has no exponentials
// that would show a side without a reference, so its references are tested.
template <Divergence D>
FUSED_KD_DEVICE bool usable(const GroupSums& sums, const Folded& m) {
  constexpr bool LOGITS = Rule<D>::READS_TEACHER && !Rule<D>::SOFTMAX;
  const bool all_have_one = !LOGITS || (m.s == m.s && m.t == m.t);
  // 1e-35: any finite canary is negligible; infinity and NaN fail the comparison
  return fmaf(fabsf(sums.canary), 1e-35f, sums.exponentials) < LIMIT && all_have_one;
}

// Sums a group entry by entry, if an entry is not finite or far above the reference: raises the
// references, and decides infinity on the logits; an entry that is -inf on both sides is absent.
template <Divergence D>
FUSED_KD_DEVICE GroupSums add_carefully(Record& record, const float (&s)[GROUP],
                                        const float (&t)[GROUP], const Options& o) {
  constexpr bool SOFT = Rule<D>::READS_TEACHER, SOFTMAX = Rule<D>::SOFTMAX;
  RowSums<float>& r = record.r;
  rebase<D>(record, fmaxf(r.m_s, max_of(s)), SOFT ? fmaxf(r.m_t, max_of(t)) : r.m_t, o);
  const Subtracted m(r.m_s, r.m_t, o);
  GroupSums sums;
  int flags = static_cast<int>(record.flags);
#pragma unroll
  for (int e = 0; e < GROUP; ++e) {
    const float s_e = s[e], t_e = t[e];
    const bool no_s = s_e == -INF, no_t = t_e == -INF;
    if (no_s && !no_t) flags |= ALONE_S;
    if (no_t && !no_s) flags |= ALONE_T;
    if (!(s_e < INF) || !(t_e < INF)) flags |= BAD;
    if (no_s && no_t) r.count -= 1.0f;
    // an absent entry's exponentials are 0
    const float a = m.student(s_e, o), b = m.teacher(t_e, o);
    const float P = no_s ? 0.0f : exp2_fast(a), Q = no_t || !SOFT ? 0.0f : exp2_fast(b);
    if constexpr (SOFTMAX) {
      sums.d_s += P;
      sums.d_t += Q;
    }
    if (o.hard != Hard::off && !no_s) sums.d_1 += exp2_fast(m.hard(s_e, o));
    if (o.smoothing && !no_s) sums.differences += a;
    if (no_s || no_t) continue;
    if constexpr (Rule<D>::OWN_SUM && !SOFTMAX)
      sums.w = Rule<D>::accumulate(s_e, t_e, 0.0f, 0.0f, sums.w);
    else if constexpr (Rule<D>::OWN_SUM)
      if (Rule<D>::weight(P, Q) != 0.0f) sums.w = Rule<D>::accumulate(a, b, P, Q, sums.w);
  }
  record.flags = static_cast<float>(flags);
  return sums;
}

// Adds the sums of a group to a record; counts: whether its entries are counted.
FUSED_KD_DEVICE void add_sums(Record& record, const GroupSums& sums, bool smoothing, bool counts) {
  RowSums<float>& r = record.r;
  r.d_s += sums.d_s;
  r.d_t += sums.d_t;
  r.d_1 += sums.d_1;
  r.w += sums.w;
  if (smoothing) r.differences += sums.differences;
  if (counts) r.count += GROUP;
}

// Adds a group to a thread's record. `true_teacher` corrects t at absent entries. SMOOTHING: that
// of the options.
template <Divergence D, bool SMOOTHING, class TrueTeacher>
FUSED_KD_DEVICE void add_group(Record& record, Folded& m, const float (&s)[GROUP],
                               float (&t)[GROUP], const Options& o, TrueTeacher true_teacher) {
  GroupSums sums = sums_of_group<D, SMOOTHING>(s, t, m, o);
  if (!usable<D>(sums, m)) {
    true_teacher(s, t);
    sums = add_carefully<D>(record, s, t, o);
    m = Folded::if_moderate(record.r.m_s, record.r.m_t, o);
  }
  add_sums(record, sums, SMOOTHING, SMOOTHING || Rule<D>::USES_COUNT);
}

// ------------------------------------------------------------------------------------- merging

FUSED_KD_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Four sums over a warp in about the time of two: the lanes share them, then each adds up one.
FUSED_KD_DEVICE void warp_sums(float& a, float& b, float& c, float& d) {
  const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
  const float first = (upper ? c : a) + shuffle_xor(upper ? a : c, 16);
  const float second = (upper ? d : b) + shuffle_xor(upper ? b : d, 16);
  float sum = (odd ? second : first) + shuffle_xor(odd ? first : second, 8);
#pragma unroll
  for (int mask = 4; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  const auto of_lane = [&](int lane) {
    return same_bits<float>(shuffle(same_bits<uint32_t>(sum), lane));
  };
  a = of_lane(0);
  b = of_lane(8);
  c = of_lane(16);
  d = of_lane(24);
}

FUSED_KD_DEVICE float union_of_flags(float flags) {
  const int mine = static_cast<int>(flags);
  if (!warp_any(mine != 0)) return 0.0f;
  return static_cast<float>((warp_any(mine & ALONE_S) ? ALONE_S : 0) |
                            (warp_any(mine & ALONE_T) ? ALONE_T : 0) |
                            (warp_any(mine & BAD) ? BAD : 0));
}

// Merges the records of a warp's lanes into one, in every lane.
template <Divergence D>
FUSED_KD_DEVICE void merge_warp(Record& record, const Options& o) {
  RowSums<float>& r = record.r;
  const float m_s = warp_max(r.m_s), m_t = warp_max(r.m_t);
  if (warp_any(m_s != r.m_s || m_t != r.m_t)) rebase<D>(record, m_s, m_t, o);
  warp_sums(r.d_s, r.d_t, r.d_1, r.w);
  if (o.smoothing) r.differences = warp_sum(r.differences);
  if (o.smoothing || Rule<D>::USES_COUNT) r.count = warp_sum(r.count);
  record.flags = union_of_flags(record.flags);
}

}  // namespace fused_kd
