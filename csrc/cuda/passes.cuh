// The passes over a row, in global or in shared memory: a `Source` yields groups of elements, an
// `Exchange` merges the sums of threads and blocks.
//
//     first pass     statistics of both sides, the divergence's own sum
//     second pass    TWO_PASSES only: sums that need the normalisers
//     gradient pass  every element's gradient, rounded once
#pragma once

#include "sums.cuh"

namespace fused_kd {

// The arguments of a launch. Pointers are to device memory; problem.h documents most of them.
struct Params {
  int64_t first_row;  // of this launch
  uint32_t units;     // pairs of a row and a part in this launch
  int entries;        // V, at most MAX_V: positions in a row are 32 bits wide
  Rows student, teacher, grad;
  const int64_t* labels;
  const float *w_hard, *w_soft, *scale;
  Options options;
  float temperature, soft_factor, label_smoothing;
  float *hard, *soft, *stats;
  bool from_stats;    // no first pass: use the statistics of an earlier launch
  bool unless_exact;  // return if `scale` is a power of two, since the multiplication was exact
  int parts;          // blocks of a row
  int parts_log2;     // for a cluster
  int slice;          // groups of a row in one block
  int slices_end;     // the end of these groups in its shared memory, in bytes
  // The blocks of a row exchange records in global memory: zeroed counters, and a ring of records.
  uint32_t *tickets, *arrived, *finished;  // (1), (N), (N)
  Record* partials;                        // (2, ring, parts); with classes (3, ring, parts)
  int ring;                                // rows
  // The support of a top-k teacher, whose rows then have K+1 logits (problem.h).
  bool has_classes;
  const int32_t* token_ids;  // (N, K)
  int K;
  Divergence divergence;  // of the classes
  int rounds;             // exchanges of records: 2 if it needs two passes
  // The results of measure.cuh.
  float* columns;    // (N, MEASURES), with classes (N, SUPPORT_MEASURES)
  int64_t* largest;  // (N, 2), with classes (N)
};

// Returns whether multiplying a rounded gradient by `scale` is exact unless the result is
// subnormal: for a power of two, and 0.
FUSED_KD_DEVICE bool is_exact(float scale) {
  const uint32_t bits = same_bits<uint32_t>(scale);
  return (bits & 0x7fffffu) == 0 && (bits >> 23 & 0xffu) != 0xffu;
}

// A row: which terms are on, its weights and its label.
struct Row {
  int64_t n;
  RowIndex at;
  float w_hard, w_soft;  // weights in the gradient
  bool hard, soft;
  int label = -1;       // outside the vocabulary, or no hard term
  float s_label = NAN;  // the student's logit there, for the loss

  FUSED_KD_DEVICE Row(const Params& p, int64_t n) : n(n), at(n, p.student.inner) {
    const float w_h = p.w_hard ? p.w_hard[n] : 0.0f, w_s = p.w_soft ? p.w_soft[n] : 0.0f;
    const float scale = p.scale ? *p.scale : 1.0f;
    hard = w_h != 0.0f;
    soft = w_s != 0.0f;
    w_hard = w_h * scale;
    w_soft = w_s * scale;
  }

  // Called by the thread that computes the row's scalars, while the row's logits are loading. The
  // label's logit must be read before the blocks of a row exchange records: afterwards, in place,
  // another block may overwrite it.
  FUSED_KD_DEVICE void read_label(const Params& p, bool with_logit) {
    if (!hard) return;
    const int64_t y = p.labels[n];
    if (y < 0 || y >= p.entries) return;
    label = static_cast<int>(y);
    if (with_logit) s_label = RowView(p.student, p.student.dtype, at, p.entries).element(label);
  }
};

// -------------------------------------------------------------------------------------- losses

// Return whether a term is NaN, in its value and its gradient.
FUSED_KD_DEVICE bool hard_is_nan(const Row& row, const Record& record) {
  return row.label < 0 || !isfinite(record.r.m_s) || !isfinite(record.r.d_1);
}

template <Divergence D>
FUSED_KD_DEVICE bool soft_is_nan(const Record& record) {
  const RowSums<float>& r = record.r;
  if (!isfinite(r.m_s) || !isfinite(r.m_t)) return true;
  if (Rule<D>::SOFTMAX && !(isfinite(r.d_s) && isfinite(r.d_t))) return true;
  return static_cast<int>(record.flags) & BAD;
}

// Returns whether an entry that is -inf for one side alone makes the soft term of a row infinite.
template <Divergence D>
FUSED_KD_DEVICE bool soft_is_infinite(const Record& record) {
  const int flags = static_cast<int>(record.flags);
  return is_infinite<Rule<D>>(flags & ALONE_S, flags & ALONE_T);
}

// Return a term of a row, 0 if it is off. s_label: the student's logit at the label.
FUSED_KD_DEVICE float hard_loss(const Params& p, const Row& row, float s_label,
                                const Record& record) {
  if (!row.hard) return 0.0f;
  const Options& o = p.options;
  const RowSums<float>& r = record.r;
  const Subtracted m(r.m_s, r.m_t, o);
  const float log_sum = log2f(r.d_1), eps = p.label_smoothing;
  // not below 0, in spite of the rounding of an exponential and its logarithm
  float hard = (1.0f - eps) * fmaxf(log_sum - m.hard(s_label, o), 0.0f);
  if (eps > 0.0f) {
    // the mean of the hard term's exponents, from the mean of the softened exponents
    const float mean = (r.differences / r.count - m.added_s) * (o.k_1 / o.k);
    hard += eps * (log_sum - (mean + m.added_1));
  }
  hard *= static_cast<float>(LN2);
  if (s_label == -INF || (eps > 0.0f && static_cast<int>(record.flags) & ALONE_S)) hard = INF;
  if (hard_is_nan(row, record)) hard = NAN;
  return hard;
}

template <Divergence D>
FUSED_KD_DEVICE float soft_loss(const Params& p, const Row& row, const Record& record) {
  if (!Rule<D>::READS_TEACHER || !row.soft) return 0.0f;
  float soft = p.soft_factor * Rule<D>::value(record.r, p.options.rule);
  if (soft_is_infinite<D>(record)) soft = INF;
  if (soft_is_nan<D>(record)) soft = NAN;
  return soft;
}

template <Divergence D>
FUSED_KD_DEVICE void write_losses(const Params& p, const Row& row, float s_label,
                                  const Record& record) {
  p.hard[row.n] = hard_loss(p, row, s_label, record);
  p.soft[row.n] = soft_loss<D>(p, row, record);
  reinterpret_cast<Record*>(p.stats)[row.n] = record;
}

// ------------------------------------------------------------------------------------- passes

// Adds all groups of a thread to its record. SMOOTHING is a template parameter, so that the loop
// does not test for it.
template <Divergence D, bool SMOOTHING, class Source>
FUSED_KD_DEVICE void add_groups(const Source& source, const Options& o, Record& record) {
  Folded m = Folded::if_moderate(record.r.m_s, record.r.m_t, o);
  source.first([&](int group, const float (&s)[GROUP], float (&t)[GROUP]) {
    add_group<D, SMOOTHING>(record, m, s, t, o, [&](const float (&s)[GROUP], float (&t)[GROUP]) {
      source.true_teacher(group, s, t);
    });
  });
}

template <Divergence D, class Source>
FUSED_KD_DEVICE Record first_pass(const Source& source, const Options& o) {
  Record record = empty_record();
  float m_s = -INF, m_t = -INF;
  source.peek([&](int, const float (&s)[GROUP], const float (&t)[GROUP]) {
    m_s = max_of(s);
    m_t = max_of(t);
  });
  set_references(record, m_s, m_t);
  if (o.smoothing)
    add_groups<D, true>(source, o, record);
  else
    add_groups<D, false>(source, o, record);
  return record;
}

// Returns whether the passes after the first may fold the references; else they subtract them.
template <Divergence D>
FUSED_KD_DEVICE bool can_fold(const Record& record, const Options& o) {
  return moderate(record.r.m_s, o) && (!Rule<D>::SOFTMAX || moderate(record.r.m_t, o));
}

// The scalars of the second pass.
template <Divergence D>
struct Second {
  Constants<float> c;
  float m_s, m_t;
  bool fold;

  FUSED_KD_DEVICE Second(const Params& p, const Row&, const Record& record)
      : c(Rule<D>::constants(record.r, 1.0f, p.options.rule)),
        m_s(record.r.m_s),
        m_t(record.r.m_t),
        fold(can_fold<D>(record, p.options)) {}
};

template <Divergence D, class Source>
FUSED_KD_DEVICE void second_pass(const Source& source, const Options& o, const Second<D>& second,
                                 float& x, float& y) {
  x = y = 0.0f;
  const auto pass = [&](const auto& exponents) {
    source.again([&](int, const float (&s)[GROUP], float (&t)[GROUP]) {
      float group_x = 0.0f, group_y = 0.0f;
#pragma unroll
      for (int e = 0; e < GROUP; ++e) {
        const float a = exponents.student(s[e], o), b = exponents.teacher(t[e], o);
        Rule<D>::accumulate2(a, b, exp2_fast(a), exp2_fast(b), 1.0f, second.c, group_x, group_y);
      }
      x += group_x;
      y += group_y;
    });
  };
  if (second.fold)
    pass(Folded(second.m_s, second.m_t, o));
  else
    pass(Subtracted(second.m_s, second.m_t, o));
}

// The scalars of the gradient pass.
template <Divergence D>
struct Gradient {
  Constants<float> soft = {};
  float m_s, m_t, hard_scale, label_term, smoothing_term;
  int label;
  bool nan, some_absent, fold;

  FUSED_KD_DEVICE Gradient(const Params& p, const Row& row, const Record& record)
      : m_s(record.r.m_s), m_t(record.r.m_t), fold(can_fold<D>(record, p.options)) {
    const RowSums<float>& r = record.r;
    const bool hard = row.hard;
    label = row.label;
    nan = hard && hard_is_nan(row, record);
    if constexpr (Rule<D>::READS_TEACHER) {
      nan |= row.soft && soft_is_nan<D>(record);
      nan |= row.soft && !Rule<D>::FINITE_GRADIENT && soft_is_infinite<D>(record);
      soft = Rule<D>::constants(r, row.w_soft * p.soft_factor / p.temperature, p.options.rule);
    }
    hard_scale = hard ? row.w_hard / r.d_1 : 0.0f;
    label_term = hard ? -(1.0f - p.label_smoothing) * row.w_hard : 0.0f;
    smoothing_term = hard && p.options.smoothing ? -row.w_hard * p.label_smoothing / r.count : 0.0f;
    some_absent = p.options.smoothing && r.count != static_cast<float>(p.entries);
  }

  FUSED_KD_DEVICE int label_group() const { return label < 0 ? -1 : label / GROUP; }
  // The label's index in a group: one number to compare the group's elements with.
  FUSED_KD_DEVICE int label_in(int group) const { return label - group * GROUP; }

  // Sets the gradient of absent entries to 0, which label smoothing does not change.
  FUSED_KD_DEVICE void nothing_for_absent(int group, const float (&s)[GROUP],
                                          const float (&t)[GROUP], float (&g)[GROUP]) const {
    const int label_here = label_in(group);
#pragma unroll
    for (int e = 0; e < GROUP; ++e)
      if (s[e] == -INF && t[e] == -INF) g[e] = e == label_here ? label_term : 0.0f;
  }

  // Adds the hard term's part, 0 for a row without it; P: exponentials of the softened student.
  template <class Exponents>
  FUSED_KD_DEVICE void add_hard(const float (&s)[GROUP], const float (&P)[GROUP],
                                const Exponents& exponents, const Options& o,
                                float (&g)[GROUP]) const {
    if (o.hard == Hard::power2) {  // tested first, as the most frequent case
#pragma unroll
      for (int e = 0; e < GROUP; ++e) g[e] = fmaf(hard_scale * P[e], P[e], g[e]);
    } else if (o.hard == Hard::separate) {
#pragma unroll
      for (int e = 0; e < GROUP; ++e)
        g[e] = fmaf(hard_scale, exp2_fast(exponents.hard(s[e], o)), g[e]);
    } else if (o.hard == Hard::power1) {
#pragma unroll
      for (int e = 0; e < GROUP; ++e) g[e] = fmaf(hard_scale, P[e], g[e]);
    }
  }

  // Computes a group's gradients, without the label's own term.
  template <class Exponents>
  FUSED_KD_DEVICE void of_group(const float (&s)[GROUP], const float (&t)[GROUP],
                                const Exponents& exponents, const Options& o,
                                float (&g)[GROUP]) const {
    constexpr bool SOFT = Rule<D>::READS_TEACHER, SOFTMAX = Rule<D>::SOFTMAX;
    float P[GROUP];
#pragma unroll
    for (int e = 0; e < GROUP; ++e) {
      const float a = exponents.student(s[e], o), b = SOFTMAX ? exponents.teacher(t[e], o) : 0.0f;
      P[e] = SOFTMAX || o.hard != Hard::off ? exp2_fast(a) : 0.0f;
      const float Q = SOFTMAX ? exp2_fast(b) : 0.0f;
      g[e] = smoothing_term;
      if constexpr (SOFTMAX)
        g[e] = Rule<D>::gradient(a, b, P[e], Q, 1.0f, soft, smoothing_term);
      else if constexpr (SOFT)  // an absent entry has a difference of 0
        g[e] = Rule<D>::gradient(fmaxf(s[e], LOWEST), fmaxf(t[e], LOWEST), 0.0f, 0.0f, 1.0f, soft,
                                 smoothing_term);
      // P (a - b) with P = 0 is NaN if a - b is infinite
      if (Rule<D>::GRADIENT_HAS_DIFFERENCE && P[e] == 0.0f) g[e] = smoothing_term;
    }
    add_hard(s, P, exponents, o, g);
  }

  // Adds the label's own term to a group's gradients, before they are rounded.
  FUSED_KD_DEVICE void add_label(int group, float (&g)[GROUP]) const {
    const int label_here = label_in(group);
#pragma unroll
    for (int e = 0; e < GROUP; ++e)
      if (e == label_here) g[e] += label_term;
  }
};

template <Divergence D, Dtype S, class Source>
FUSED_KD_DEVICE void gradient_pass(const Params& p, const Row& row, const Source& source,
                                   const Gradient<D>& gradient) {
  const RowView grad(p.grad, S == Dtype::f32 ? p.grad.dtype : S, row.at, p.entries);
  float g[GROUP];
  if (gradient.nan) {
#pragma unroll
    for (int e = 0; e < GROUP; ++e) g[e] = NAN;
    source.indices(
        [&](int group) { store_gradient<S, false>(grad, group, source.slice.together(group), g); });
    return;
  }
  const Options& o = p.options;
  const auto any = [&](const auto& exponents, int group, bool together, const float (&s)[GROUP],
                       float (&t)[GROUP]) {
    gradient.of_group(s, t, exponents, o, g);
    if (group == gradient.label_group()) gradient.add_label(group, g);
    if (gradient.some_absent) {
      source.true_teacher(group, s, t);
      gradient.nothing_for_absent(group, s, t, g);
    }
    source.template store<S, false>(grad, group, together, g);
  };
  const auto slowly = [&](const auto& exponents) {
    source.again([&](int group, const float (&s)[GROUP], float (&t)[GROUP]) {
      any(exponents, group, source.slice.together(group), s, t);
    });
  };
  if (!gradient.fold) return slowly(Subtracted(gradient.m_s, gradient.m_t, o));
  const Folded folded(gradient.m_s, gradient.m_t, o);
  if (!Source::STAYS || !grad.is_plain() || gradient.some_absent) return slowly(folded);
  source.again([&](int group, const float (&s)[GROUP], float (&t)[GROUP]) {
    gradient.of_group(s, t, folded, o, g);
    source.template store<S, true>(grad, group, source.slice.together(group), g);
  });
  // the label's group is computed again, instead of a test in the loop; the warp synchronises
  // first, since a neighbour may have written a half of it
  warp_sync();
  if (gradient.label >= 0 && source.is_mine(gradient.label_group()))
    source.for_group(gradient.label_group(),
                     [&](int group, const float (&s)[GROUP], float (&t)[GROUP]) {
                       any(folded, group, false, s, t);
                     });
}

template <Dtype S, class Source>
FUSED_KD_DEVICE void zero_gradient(const Params& p, const Row& row, const Source& source) {
  const RowView grad(p.grad, S == Dtype::f32 ? p.grad.dtype : S, row.at, p.entries);
  const float zeros[GROUP] = {};
  source.indices([&](int group) {
    store_gradient<S, false>(grad, group, source.slice.together(group), zeros);
  });
}

}  // namespace fused_kd
