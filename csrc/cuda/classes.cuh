// The kernels for a top-k teacher, which is given by the logits of its classes (fused_kd/classes.py):
// K tokens, the support, and the tail, which is all other entries together.
//
//     first pass     over the row without its support: the sums of the tail, relative to a reference
//                    of its own, and of the hard term
//     support        the first pass of a dense row over the pairs of logits in the support; then the
//                    tail is one more such pair. Each block processes the tokens in its slice, so
//                    that no block needs logits that another one overwrites
//     second pass    over these classes alone, if the divergence needs it
//     gradient       of the support, each from its own logit; then the gradient pass over the other
//                    entries, which is the same for every divergence: a constant times e^(s/T), and
//                    the hard term
//
// So the loops over the row are compiled once for all divergences; the divergence of the classes is
// selected when it runs. A block's mask of the support is in its shared memory: a bit for each entry
// of its slice.
#pragma once

#include "rows.cuh"
#include "support.cuh"

namespace fused_kd {

constexpr Divergence TAIL = Divergence::tail;  // reads the student alone

// Calls call(Rule<d>{}) with the rule of the classes' divergence, or of none; divergences of logits,
// which the operators refuse, are left out.
template <class Call>
FUSED_KD_DEVICE void with_class_rule(const Params& p, Call call) {
  with_rule(p.divergence, [&](auto rule) {
    if constexpr (rule.SOFTMAX == rule.READS_TEACHER) call(rule);
  });
}

// The statistics of a row, which are a row of stats.
struct ClassStats {
  // of the classes; d_s is NaN if the soft term's gradient is
  float m_s, m_t, d_s, d_t, w, x, y;
  // of the tail: its reference, and T dD/dz by its logit over its sum, which times P is the gradient
  // by an entry
  float m_tail, slope;
  // of all entries: the hard term's sum, relative to the larger of m_s and m_tail, or NaN
  float d_1, count;

  // Returns the record of a dense row that has the same gradient, for a reference and flags.
  FUSED_KD_DEVICE Record record(float m) const {
    // without a finite logit, for any reference: all exponentials are 0
    return {{m == -INF ? 0.0f : m, m_t, d_s, d_t, d_1, w, x, y, 0.0f, count}, 0.0f};
  }
  // Returns the factor that makes 1/d_1 relative to a reference.
  FUSED_KD_DEVICE float hard_factor(float m, const Options& o) const {
    return exp2_fast(shift_of(m, fmaxf(m_s, m_tail), o.k_1, o));
  }
};
static_assert(sizeof(ClassStats) == sizeof(Record), "the statistics are a row of stats");

// Makes a group of one element and absent ones, which the compiler leaves out.
FUSED_KD_DEVICE void alone(float (&x)[GROUP], float element) {
#pragma unroll
  for (int e = 0; e < GROUP; ++e) x[e] = e == 0 ? element : -INF;
}

// ------------------------------------------------------------------------------------- the tail

// The tail as one element of the formulas (kd_math.h), relative to references: P is its sum.
struct TailElement {
  float a = -INF, b = -INF, P = 0.0f, Q = 0.0f;  // of an absent element

  FUSED_KD_DEVICE TailElement() {}
  // tail: the student's sums; t: the teacher's logit, INF if the tail is no class.
  FUSED_KD_DEVICE TailElement(const Record& tail, float t, float m_s, float m_t, const Options& o) {
    if (t == INF) return;
    const float shift = shift_of(tail.r.m_s, m_s, o.k, o);
    a = shift + log2f(tail.r.d_s);
    P = tail.r.d_s * exp2_fast(shift);
    if (!(t > -INF)) return;
    b = Subtracted(m_s, m_t, o).teacher(t, o);
    Q = exp2_fast(b);
  }
};

// Returns the tail as the record of one class, relative to its own logits.
template <Divergence D>
FUSED_KD_DEVICE Record record_of_tail(const Record& tail, float t, const Options& o) {
  Record record = empty_record();
  // a logit outside of the support that is no number spoils the row, also if the tail is no class
  int flags = isfinite(tail.r.d_s) && !isnan(t) ? static_cast<int>(tail.flags) : BAD;
  if (t != INF) {
    const bool no_s = tail.r.m_s == -INF, no_t = !(t > -INF);
    if (no_s && !no_t) flags |= ALONE_S;
    if (no_t && !no_s) flags |= ALONE_T;
    record.r.m_s = tail.r.m_s;
    record.r.m_t = no_t ? -INF : t;
    const TailElement x(tail, t, record.r.m_s, record.r.m_t, o);
    record.r.d_s = x.P;
    record.r.d_t = x.Q;
    if constexpr (Rule<D>::OWN_SUM)
      if (!no_s && !no_t) record.r.w = Rule<D>::accumulate(x.a, x.b, x.P, x.Q, 0.0f);
  }
  record.flags = static_cast<float>(flags);
  return record;
}

// Merges two records, which all lanes of a warp have.
template <Divergence D>
FUSED_KD_DEVICE Record merged(const Record& one, const Record& other, const Options& o) {
  const int lane = threadIdx.x % 32;
  Record record = lane == 0 ? one : lane == 1 ? other : empty_record();
  merge_warp<D>(record, o);
  return record;
}

// Returns ClassStats::slope.
template <Divergence D>
FUSED_KD_DEVICE float slope_of(const Record& classes, const TailElement& x, float d_tail,
                               const Options& o) {
  if (d_tail == 0.0f || (Rule<D>::GRADIENT_HAS_DIFFERENCE && x.P == 0.0f)) return 0.0f;
  const Constants<float> c = Rule<D>::constants(classes.r, 1.0f, o.rule);
  return Rule<D>::gradient(x.a, x.b, x.P, x.Q, 1.0f, c, 0.0f) / d_tail;
}

template <Divergence D>
FUSED_KD_DEVICE ClassStats statistics_of(const Record& classes, const Record& all, float m_tail,
                                         float slope) {
  const RowSums<float>& r = classes.r;
  const bool is_nan =
      soft_is_nan<D>(classes) || (!Rule<D>::FINITE_GRADIENT && soft_is_infinite<D>(classes));
  const float d_1 = isfinite(all.r.m_s) ? all.r.d_1 : NAN;
  return {r.m_s, r.m_t, is_nan ? NAN : r.d_s, r.d_t, r.w, r.x, r.y, m_tail,
          slope, d_1,   all.r.count};
}

// ------------------------------------------------------------------------------------ gradients

// The scalars of the gradient by the support's logits.
template <Divergence D>
struct SupportGradient : Gradient<D> {
  FUSED_KD_DEVICE SupportGradient(const Params& p, const Row& row, const ClassStats& stats)
      : Gradient<D>(p, row, stats.record(stats.m_s)) {
    if (!row.soft) this->soft = {};
    this->hard_scale *= stats.hard_factor(stats.m_s, p.options);
  }
};

// The scalars of the gradient by all other logits.
struct TailGradient : Gradient<TAIL> {
  FUSED_KD_DEVICE TailGradient(const Params& p, const Row& row, const ClassStats& stats)
      : Gradient<TAIL>(p, row, stats.record(stats.m_tail)) {
    nan |= row.soft && isnan(stats.d_s);
    soft.scale = row.soft ? row.w_soft * p.soft_factor / p.temperature * stats.slope : 0.0f;
    hard_scale *= stats.hard_factor(stats.m_tail, p.options);
    m_t = m_s;
    fold = moderate(m_s, p.options);
  }
};

// Returns a thread's sums of the support.
template <Divergence D, class Source>
FUSED_KD_DEVICE Record sums_of_support(const Support<Source>& support, const Options& o) {
  Record record = empty_record();
  support.for_each([&](int, float s_v, float t_v) {
    float s[GROUP], t[GROUP];
    alone(s, s_v);
    alone(t, t_v);
    add_sums(record, add_carefully<D>(record, s, t, o), o.smoothing, o.smoothing);
  });
  return record;
}

// Adds a thread's part of the second pass, over the support alone.
template <Divergence D, class Source>
FUSED_KD_DEVICE void second_sums_of_support(const Support<Source>& support, const Options& o,
                                            const Second<D>& second, float& x, float& y) {
  const Subtracted exponents(second.m_s, second.m_t, o);
  x = y = 0.0f;
  support.for_each([&](int, float s, float t) {
    const float a = exponents.student(s, o), b = exponents.teacher(t, o);
    Rule<D>::accumulate2(a, b, exp2_fast(a), exp2_fast(b), 1.0f, second.c, x, y);
  });
}

// Stores the gradient of the support's entries in the slice, each rounded once.
template <Dtype S, Divergence D, class Source>
FUSED_KD_DEVICE void store_support(const Params& p, const Row& row, const Support<Source>& support,
                                   const SupportGradient<D>& gradient) {
  if (gradient.nan) return;  // the gradient pass stores NaN in the whole row
  const RowView grad(p.grad, S == Dtype::f32 ? p.grad.dtype : S, row.at, p.entries);
  const Subtracted exponents(gradient.m_s, gradient.m_t, p.options);
  support.for_each([&](int v, float s_v, float t_v) {
    float s[GROUP], t[GROUP], g[GROUP];
    alone(s, s_v);
    alone(t, t_v);
    gradient.of_group(s, t, exponents, p.options, g);
    store_element(grad, v, g[0] + (v == gradient.label ? gradient.label_term : 0.0f));
  });
}

// ------------------------------------------------------------------------------------- the row

// Processes the classes of a row: the second pass, losses and statistics. Returns whether the block
// continues. The records, in warp 0: the tail's and the support's, and of all entries, for the hard
// term. `stats` are set in the first thread.
template <Divergence D, class Source, class Exchange>
FUSED_KD_DEVICE bool process_classes(const Params& p, const Row& row,
                                     const Support<Source>& support, int part, Shared& shared,
                                     const Exchange& exchange, const Record (&records)[2],
                                     const Record& all, ClassStats& stats) {
  const Options& o = p.options;
  const Record &tail = records[0], &inside = records[1];
  const float t = support.tail();
  Record classes = inside;
  TailElement x;
  if (threadIdx.x < 32) {
    classes = merged<D>(inside, record_of_tail<D>(tail, t, o), o);
    x = TailElement(tail, t, classes.r.m_s, classes.r.m_t, o);
  }
  if constexpr (Rule<D>::TWO_PASSES) {
    const Second<D> second = broadcast_from_first<Second<D>>(p, row, classes, shared);
    Record sums[2] = {};
    second_sums_of_support<D>(support, o, second, sums[0].r.x, sums[0].r.y);
    sums[0] = merge_second_block(sums[0], shared);
    if (!exchange(sums, 2, [](Record(&r)[2]) { merge_second_warp(r[0]); })) return false;
    set_second(classes, {sums[0].r.x, sums[0].r.y});
    Rule<D>::accumulate2(x.a, x.b, x.P, x.Q, 1.0f, second.c, classes.r.x, classes.r.y);
  }
  if (threadIdx.x != 0) return true;
  const bool only_tail = inside.r.m_t == -INF && t < INF;  // then both sides are 1 there
  const float slope = only_tail ? 0.0f : slope_of<D>(classes, x, tail.r.d_s, o);
  stats = statistics_of<D>(classes, all, tail.r.m_s, slope);
  if (part != 0) return true;
  const float soft = soft_loss<D>(p, row, classes);
  p.hard[row.n] = hard_loss(p, row, shared.s_label, all);
  p.soft[row.n] = only_tail && !isnan(soft) ? 0.0f : soft;
  reinterpret_cast<ClassStats*>(p.stats)[row.n] = stats;
  return true;
}

// Computes losses and statistics of a row. Returns as process_classes.
template <class Source, class Exchange>
FUSED_KD_DEVICE bool losses_of_classes(const Params& p, const Row& row, const Source& outside,
                                       const Support<Source>& support, int part, Shared& shared,
                                       const Exchange& exchange, ClassStats& stats) {
  const Options& o = p.options;
  const Record tail = first_pass<TAIL>(outside, o);
  if (threadIdx.x == 0) shared.s_label = row.s_label;
  Record records[2] = {merge_block<TAIL>(tail, o, shared)};
  block_sync();  // before the warps write records again
  with_class_rule(p, [&](auto rule) {
    constexpr Divergence D = decltype(rule)::DIVERGENCE;
    records[1] = merge_block<D>(sums_of_support<D>(support, o), o, shared);
  });
  const auto merge = [&](Record(&r)[2]) {
    merge_warp<TAIL>(r[0], o);
    with_class_rule(p, [&](auto rule) { merge_warp<decltype(rule)::DIVERGENCE>(r[1], o); });
  };
  if (!exchange(records, 1, merge)) return false;
  Record all = records[1];
  if (threadIdx.x < 32) all = merged<Divergence::none>(records[1], records[0], o);
  bool continues = false;
  with_class_rule(p, [&](auto rule) {
    continues = process_classes<decltype(rule)::DIVERGENCE>(p, row, support, part, shared, exchange,
                                                            records, all, stats);
  });
  return continues;
}

// Computes the losses of a row, unless its statistics are known, and the gradient if there is one.
template <Dtype S, class Source, class Exchange>
FUSED_KD_DEVICE void process_row_of_classes(const Params& p, const Row& row, const Source& outside,
                                            int part, Shared& shared, const Exchange& exchange) {
  const Support<Source> support(p, row, outside);
  support.set_mask();
  ClassStats stats = {};
  if (p.from_stats)
    stats = reinterpret_cast<const ClassStats*>(p.stats)[row.n];
  else if (!losses_of_classes(p, row, outside, support, part, shared, exchange, stats))
    return;
  if (p.grad.data == nullptr) return;
  with_class_rule(p, [&](auto rule) {
    using Scalars = SupportGradient<decltype(rule)::DIVERGENCE>;
    store_support<S>(p, row, support, broadcast_from_first<Scalars>(p, row, stats, shared));
  });
  block_sync();  // before these entries are loaded, with their groups, and other scalars are written
  gradient_pass<TAIL, S>(p, row, outside,
                         broadcast_from_first<TailGradient>(p, row, stats, shared));
}

// rows_general and rows_cluster for rows of classes, with the same budgets. In shared memory the mask
// follows the head.
template <Dtype S>
__global__ void __launch_bounds__(THREADS, GENERAL_BLOCKS)
    rows_general_classes(const __grid_constant__ Params p) {
  if (p.unless_exact && is_exact(*p.scale)) return;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  unsigned char* mask = dynamic_shared() + sizeof(Shared);
  uint32_t unit = p.from_stats ? blockIdx.x : take_unit(p, shared);
  do {
    const int64_t n = p.first_row + unit / p.parts;
    const int part = static_cast<int>(unit % p.parts);
    Row row(p, n);
    const Outside<GlobalRow<TAIL, S, true>> outside({p, row, part}, mask);
    const GlobalExchange<2> exchange{p, n, part, p.rounds, shared};
    if (row.hard || row.soft) {
      if (threadIdx.x == 0) row.read_label(p, part == 0 && !p.from_stats);
      block_sync();  // before the mask of another row is overwritten
      process_row_of_classes<S>(p, row, outside, part, shared, exchange);
    } else if (p.from_stats) {
      zero_gradient<S>(p, row, outside);
    } else {
      exchange.skip();
      skip_row<S>(p, row, outside, part);
    }
    unit += gridDim.x;
  } while (p.from_stats && unit < p.units);
}

template <Dtype S>
__global__ void __launch_bounds__(THREADS, 3)
    rows_cluster_classes(const __grid_constant__ Params p) {
#ifdef FUSED_KD_HAS_CLUSTERS
  unsigned char* memory = dynamic_shared();
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  unsigned char *mask = memory + sizeof(Shared), *slice = mask + mask_bytes(p.slice);
  const int64_t n = p.first_row + (blockIdx.x >> p.parts_log2);
  const int part = static_cast<int>(cluster_rank());
  Row row(p, n);
  const Outside<SharedRow<TAIL, S, true>> outside({p, row, part, slice, shared.barriers}, mask);
  if (!row.hard && !row.soft) return skip_row<S>(p, row, outside, part);
  outside.load();
  const ClusterExchange<2> exchange(p, p.rounds, memory);
  if (threadIdx.x == 0) {
    exchange.prepare();
    row.read_label(p, part == 0);
  }
  exchange.arrive();
  process_row_of_classes<S>(p, row, outside, part, shared, exchange);
#elif defined(__CUDA_ARCH__)
  __trap();  // launch.cu never selects it for these devices
#endif
}

}  // namespace fused_kd
