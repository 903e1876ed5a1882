// The kernels of kd_metrics: the columns of fused_kd.measures.Sums and Support, and the largest
// entries. One block per row, which reads each logit once. Rows that are off are not written.
//
// A thread's sums of a side are relative to its largest logit so far: both terms of an entropy are
// then not negative, and no exponential overflows at any temperature. The difference p - q is
// relative to the references of an earlier launch's statistics, since it needs their normalisers.
#pragma once

#include "classes.cuh"

namespace fused_kd {

// The sums of a softmax, of exponents a of 2 that are relative to a reference.
struct Softmax {
  float d = 0.0f, e = 0.0f;  // sum P, sum P a

  // Adds an element; returns P.
  FUSED_KD_DEVICE float add(float a) {
    const float P = exp2_fast(a);
    d += P;
    e = fmaf(P, fmaxf(a, LOWEST), e);  // of an entry that is -inf 0, not NaN
    return P;
  }
  FUSED_KD_DEVICE void add(const Softmax& other) {
    d += other.d;
    e += other.e;
  }
  // Makes the sums relative to another reference: every a changes by shift <= 0.
  FUSED_KD_DEVICE void rebase(float shift) {
    const float factor = exp2_fast(shift);
    e = factor == 0.0f ? 0.0f : factor * fmaf(shift, d, e);
    d *= factor;
  }
  FUSED_KD_DEVICE float log_sum() const { return static_cast<float>(LN2) * log2f(d); }
  FUSED_KD_DEVICE float entropy() const { return static_cast<float>(LN2) * (log2f(d) - e / d); }
};

// Returns the least number of a warp, in every lane.
FUSED_KD_DEVICE int warp_min(int x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const int lane = static_cast<int>(threadIdx.x % 32) ^ mask;
    const int other = static_cast<int>(shuffle(static_cast<uint32_t>(x), lane));
    x = other < x ? other : x;
  }
  return x;
}

// A side of a row. If a logit is NaN or +inf its sums are NaN, without a finite one 0; the index is
// then any.
struct Side {
  float m = -INF;  // the largest logit so far, which is the reference
  int at = 0;      // the first index where it is
  Softmax at_t, at_1;

  // Raises the reference; returns the factor by which exponentials at temperature 1 change.
  FUSED_KD_DEVICE float raise(float to, const Options& o) {
    const float shift = m == to || m == -INF ? 0.0f : m - to;
    m = to;
    at_t.rebase(shift * o.k);
    at_1.rebase(shift * o.k_1);
    return exp2_fast(shift * o.k_1);
  }

  // Raises the reference to a group's largest logit; returns as `raise`.
  FUSED_KD_DEVICE float find_largest(int group, const float (&x)[GROUP], const Options& o) {
    const float largest = max_of(x);
    if (!(largest > m)) return 1.0f;
#pragma unroll
    for (int e = GROUP - 1; e >= 0; --e)
      if (x[e] == largest) at = group * GROUP + e;
    return raise(largest, o);
  }

  // Adds a group, none of which is above the reference. P: its exponentials at temperature 1.
  FUSED_KD_DEVICE void add(const float (&x)[GROUP], const Options& o, float (&P)[GROUP]) {
    const float reference = m == -INF ? 0.0f : m;  // then all exponentials are 0, or NaN
    Softmax group_t, group_1;
#pragma unroll
    for (int e = 0; e < GROUP; ++e) P[e] = group_1.add((x[e] - reference) * o.k_1);
    if (o.k == o.k_1) {
      group_t = group_1;
    } else {
#pragma unroll
      for (int e = 0; e < GROUP; ++e) group_t.add((x[e] - reference) * o.k);
    }
    at_t.add(group_t);
    at_1.add(group_1);
  }

  // Merges the lanes of a warp, in every lane; returns as `raise`.
  FUSED_KD_DEVICE float merge_warp(const Options& o) {
    const float largest = warp_max(m);
    at = warp_min(m == largest ? at : INT32_MAX);
    const float factor = raise(largest, o);
    warp_sums(at_t.d, at_t.e, at_1.d, at_1.e);
    return factor;
  }

  FUSED_KD_DEVICE bool is_usable() const { return isfinite(m) && isfinite(at_1.d); }
};

// The difference p - q of an element times d_s, exactly 0 for equal rows.
struct Difference {
  Subtracted exponents;
  float d_s, ratio;

  FUSED_KD_DEVICE Difference(const Record& record, const Options& o)
      : exponents(record.r.m_s, record.r.m_t, o),
        d_s(record.r.d_s),
        ratio(record.r.d_s / record.r.d_t) {}
  FUSED_KD_DEVICE float of(float s, float t, const Options& o) const {
    const float P = exp2_fast(exponents.student(s, o)), Q = exp2_fast(exponents.teacher(t, o));
    return fmaf(-ratio, Q, P);
  }
  // Returns the label's; others: the sum of all other differences, which is minus the label's. If p
  // or q is large, it does not have the rounding error of that one.
  FUSED_KD_DEVICE float of_label(float s, float t, float others, const Options& o) const {
    const float P = exp2_fast(exponents.student(s, o)), Q = exp2_fast(exponents.teacher(t, o));
    return 2.0f * fmaxf(P, ratio * Q) > d_s ? -others : of(s, t, o);
  }
};

// The sums of student, teacher and label.
struct Measures {
  Side student, teacher;
  // Without the label: sums of P, P² and P D, where P is the student's at temperature 1, relative to
  // its reference, and D = d_s (p - q).
  float others = 0.0f, squares = 0.0f, products = 0.0f;
  // Likewise: sums of D² and D.
  float differences = 0.0f, difference = 0.0f;

  // label: its index in the group
  FUSED_KD_DEVICE void add(int group, const float (&s)[GROUP], const float (&t)[GROUP], int label,
                           const Difference& pair, const Options& o) {
    rescale(student.find_largest(group, s, o));
    teacher.find_largest(group, t, o);
    float P[GROUP], Q[GROUP];
    student.add(s, o, P);
    teacher.add(t, o, Q);
    float sums[5] = {};
#pragma unroll
    for (int e = 0; e < GROUP; ++e) {
      float D = pair.of(s[e], t[e], o);
      if (e == label) D = P[e] = 0.0f;
      sums[0] += P[e];
      sums[1] = fmaf(P[e], P[e], sums[1]);
      sums[2] = fmaf(P[e], D, sums[2]);
      sums[3] = fmaf(D, D, sums[3]);
      sums[4] += D;
    }
    others += sums[0];
    squares += sums[1];
    products += sums[2];
    differences += sums[3];
    difference += sums[4];
  }

  FUSED_KD_DEVICE void rescale(float factor) {
    others *= factor;
    squares *= factor * factor;
    products *= factor;
  }

  FUSED_KD_DEVICE void merge_warp(const Options& o) {
    rescale(student.merge_warp(o));
    teacher.merge_warp(o);
    warp_sums(others, squares, products, differences);
    difference = warp_sum(difference);
  }

  FUSED_KD_DEVICE void write(const Params& p, const Row& row, float d_s, float at_label) const {
    const float d_1 = student.at_1.d;
    const float results[MEASURES] = {
        p.hard[row.n],          p.soft[row.n],           others / d_1,
        squares / (d_1 * d_1),  differences / d_s / d_s, products / d_1 / d_s,
        at_label / d_s,         student.at_1.entropy(),  teacher.at_1.entropy(),
        student.at_t.entropy(), teacher.at_t.entropy()};
#pragma unroll
    for (int i = 0; i < MEASURES; ++i) p.columns[row.n * MEASURES + i] = results[i];
    p.largest[2 * row.n] = student.at;
    p.largest[2 * row.n + 1] = teacher.at;
  }
};

// The sums of a student's row, and of its entries outside the support of a top-k teacher.
struct TailMeasures {
  Side all, outside;

  // support: a bit for each entry of the group
  FUSED_KD_DEVICE void add(int group, const float (&s)[GROUP], uint32_t support, const Options& o) {
    float x[GROUP], P[GROUP];
#pragma unroll
    for (int e = 0; e < GROUP; ++e) x[e] = support >> e & 1 ? -INF : s[e];
    all.find_largest(group, s, o);
    outside.find_largest(group, x, o);
    all.add(s, o, P);
    outside.add(x, o, P);
  }

  FUSED_KD_DEVICE void merge_warp(const Options& o) {
    all.merge_warp(o);
    outside.merge_warp(o);
  }

  FUSED_KD_DEVICE void write(const Params& p, const Row& row) const {
    const bool usable = all.is_usable();
    // s_label is NaN without a label in [0, V)
    const float hard = usable ? all.at_1.log_sum() - (row.s_label - all.m) : NAN;
    const auto relative = [&](float log_sum) {
      return !usable ? NAN : outside.m == -INF ? -INF : (outside.m - all.m) + log_sum;
    };
    float* columns = p.columns + row.n * SUPPORT_MEASURES;
    columns[0] = hard;
    columns[1] = relative(p.temperature * outside.at_t.log_sum());
    columns[2] = relative(outside.at_1.log_sum());
    p.largest[row.n] = all.at;
  }
};

// Returns the sums of the block, in warp 0. T: Measures or TailMeasures.
template <class T>
FUSED_KD_DEVICE T merge_measures(T sums, const Options& o) {
  T* of_warps = reinterpret_cast<T*>(dynamic_shared());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  sums.merge_warp(o);
  if (lane == 0) of_warps[warp] = sums;
  block_sync();
  if (warp != 0) return sums;
  sums = lane < WARPS ? of_warps[lane] : T();
  sums.merge_warp(o);
  return sums;
}

// Bytes of shared memory before the mask of the support.
constexpr int MEASURED_BYTES = (WARPS * static_cast<int>(sizeof(Measures)) + 15) / 16 * 16;
static_assert(sizeof(TailMeasures) <= sizeof(Measures), "the mask begins too early");

// Grid: a block for each row. p.hard, p.soft and p.stats are those of forward_kl. Budget: 128
// registers.
template <Dtype S, bool SAME>
__global__ void __launch_bounds__(THREADS, GENERAL_BLOCKS)
    measure_rows(const __grid_constant__ Params p) {
  const Options& o = p.options;
  Row row(p, p.first_row + blockIdx.x);
  if (!row.soft) return;
  row.read_label(p, false);
  const Record& record = reinterpret_cast<const Record*>(p.stats)[row.n];
  const Difference difference(record, o);
  const GlobalRow<Divergence::forward_kl, S, SAME> source(p, row, 0);
  Measures sums;
  source.first([&](int group, const float (&s)[GROUP], const float (&t)[GROUP]) {
    // that of no label is in no group
    sums.add(group, s, t, row.label - group * GROUP, difference, o);
  });
  sums = merge_measures(sums, o);
  if (threadIdx.x != 0) return;
  float at_label = 0.0f;
  if (row.label >= 0)
    at_label = difference.of_label(source.student.element(row.label),
                                   source.teacher.element(row.label), sums.difference, o);
  sums.write(p, row, record.r.d_s, at_label);
}

// Grid: a block for each row, which processes one slice after another, each with a mask of the
// support in shared memory. No statistics are needed. Budget: 80 registers.
template <Dtype S>
__global__ void __launch_bounds__(THREADS, 3) measure_support(const __grid_constant__ Params p) {
  using Source = GlobalRow<TAIL, S, true>;
  const Options& o = p.options;
  Row row(p, p.first_row + blockIdx.x);
  if (!row.soft) return;
  row.read_label(p, threadIdx.x == 0);
  TailMeasures sums;
  for (int part = 0; part * p.slice * GROUP < p.entries; ++part) {
    const Source source(p, row, part);
    const Outside<Source> outside(source, dynamic_shared() + MEASURED_BYTES);
    block_sync();  // before the mask of another slice is overwritten
    Tokens<Outside<Source>>(p, row, outside).set_mask();
    source.first([&](int group, const float (&s)[GROUP], const float (&)[GROUP]) {
      sums.add(group, s, outside.bits(group), o);
    });
  }
  sums = merge_measures(sums, o);
  if (threadIdx.x == 0) sums.write(p, row);
}

}  // namespace fused_kd
