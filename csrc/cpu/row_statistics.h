// Computes the statistics of a row: the passes over its blocks, and the merge of blocks and
// segments.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "row_blocks.h"

namespace fused_kd {
namespace cpu {

inline RuleOptions<double> rule_options(const Problem& p) { return {p.temperature, p.beta}; }

// Expresses a state's sums relative to larger references.
inline void rebase(const Row& row, State& state, double m_s, double m_t) {
  RowSums<double>& r = state.r;
  if (m_s == r.m_s && m_t == r.m_t) return;
  const double shift_s = r.m_s - m_s, shift_t = r.m_t - m_t;
  const double factor_s = exp2(shift_s * row.k), factor_t = exp2(shift_t * row.k);
  with_rule(row.divergence, [&](auto rule) {
    if constexpr (rule.OWN_SUM && rule.SOFTMAX)
      r.w = rule.rebase(r, shift_s, shift_t, factor_s, factor_t);
  });
  r.d_s *= factor_s;
  r.d_t *= factor_t;
  r.d_1 *= exp2(shift_s * row.k_1);
  if (r.count > 0) r.differences += r.count * (reference(r.m_s) - reference(m_s));
  r.m_s = m_s;
  r.m_t = m_t;
}

inline void add(RowSums<double>& to, const RowSums<double>& from) {
  to.d_s += from.d_s;
  to.d_t += from.d_t;
  to.d_1 += from.d_1;
  to.w += from.w;
  to.differences += from.differences;
  to.count += from.count;
}

inline void merge(const Row& row, State& to, State from) {
  const double m_s = std::max(to.r.m_s, from.r.m_s), m_t = std::max(to.r.m_t, from.r.m_t);
  rebase(row, to, m_s, m_t);
  rebase(row, from, m_s, m_t);
  add(to.r, from.r);
  to.min_s = std::min(to.min_s, from.min_s);
  to.min_t = std::min(to.min_t, from.min_t);
  to.flags |= from.flags;
}

// Returns the sum of s - m over the entries of a block, of a top-k teacher's tokens too, that are
// not -inf. Overwrites the block's copy.
inline double differences(const Row& row, int64_t begin, const Prepared& block, float m,
                          Scratch& scratch) {
  row.table.widen(row.s_dtype, row.s + begin * width(row.s_dtype), scratch.s, block.size);
  const float sum = row.table.differences(scratch.s, block.size, m);
  const bool is_ordinary = !(block.flags & IRREGULAR) && sum > -1e38f;  // a token may be any logit
  if (is_ordinary) return sum;
  double total = 0;
  for (int i = 0; i < block.size; ++i)
    if (scratch.s[i] != -INF) total += above_lowest(scratch.s[i]) - m;
  return total;
}

// Returns the state from which all segments of a row start: the maxima of its first block.
inline State initial_state(const Row& row, Scratch& scratch) {
  const int64_t end = row.whole_end() > 0 ? row.whole_end() : row.problem.V;
  const Prepared block = prepare(row, 0, end, LOWEST, LOWEST, scratch);
  State state;
  state.r.m_s = block.range.max_s;
  state.r.m_t = block.range.max_t;
  return state;
}

// A reference may stay this far below the row's largest logit. It is a logit of the row, the
// largest of the blocks that set it. So in a row with an entry of probability above e^4/(1 + e^4) =
// 0.982 it is that entry's logit, and the cross-entropy of a confident row is the logarithm of a
// sum that is exactly 1 or more.
constexpr float SLACK = 4.0f;
// The same in powers of two, for low temperatures: exponentials must stay far from overflow.
constexpr float SLACK_EXPONENT = 32.0f;

// The logit that replaces a token of a top-k teacher has two exponents, in powers of two: at T and at
// temperature 1. The lower one is this or less,
constexpr float LOW_EXPONENT = -100.0f;
// and the higher one this or less, after the rounding of the logit too;
constexpr float HIGHEST_LOW_EXPONENT = -20.0f;
// or this, if the kernels take such a lower one: what thousands of tokens add, and is subtracted again,
// is then below the rounding of the sums.
constexpr float NEGLIGIBLE_EXPONENT = -40.0f;
// The lower one is never between these, where exponentials are subnormal, and slow.
constexpr float SUBNORMAL[] = {-152.0f, -125.0f};

// Returns the logit that replaces the tokens of a top-k teacher, so low that it adds next to nothing
// to a sum but not too low for the plain kernels, from the reference of the row's first block.
inline float low_logit(const Row& row, double m_s) {
  const float ratio = row.k_max / std::min(row.k, row.k_1);
  float exponent = std::min(LOW_EXPONENT, NEGLIGIBLE_EXPONENT * ratio);
  if (exponent < SUBNORMAL[1]) exponent = std::min(exponent, SUBNORMAL[0]);
  if (-exponent > row.table.exponent_range)
    exponent = std::min(LOW_EXPONENT, (HIGHEST_LOW_EXPONENT - 2) * ratio);
  float low = reference(m_s) + exponent / row.k_max;
  if (row.s_dtype != Dtype::f32) {
    uint16_t rounded;
    row.table.narrow(row.s_dtype, &low, &rounded, 1);
    row.table.widen(row.s_dtype, &rounded, &low, 1);
  }
  return low;
}

// Returns how far below the reference that logit is; 0: the plain kernels cannot use it, since the
// reference has risen or is too large for the element type, or, without AVX-512, T is too far from 1.
inline float low_distance(const Row& row, double m_s) {
  const float distance = row.support->low - reference(m_s);
  const bool is_low = distance * std::min(row.k, row.k_1) <= HIGHEST_LOW_EXPONENT;
  return is_low && -distance * row.k_max <= row.table.exponent_range ? distance : 0.0f;
}

// Writes that logit over the tokens in a copy of the block, whose element type stays the same.
inline void lower_tokens(const Row& row, const Support::Group& tokens, int64_t begin,
                         Scratch& scratch, Prepared& block) {
  const Dtype dtype = dtype_of(block.load);
  char* const copy = reinterpret_cast<char*>(scratch.s);
  char low[sizeof(float)];
  row.table.narrow(dtype, &row.support->low, low, 1);
  if (!block.copied) {
    std::memcpy(copy, block.s, block.size * width(dtype));
    block.s = block.t = copy;
  }
  for (const Support::Token& token : tokens) write(copy, dtype, token.id - begin, low);
}

// Sums the block by the plain kernels, which assume that its entries are finite and near the
// references. Returns false if they are not; the caller then discards `sums`.
inline bool add_plain(const Row& row, int64_t begin, Prepared& block, State& state, BlockSums& sums,
                      Scratch& scratch) {
  if (block.padded != block.size || state.r.m_s == LOWEST || state.r.m_t == LOWEST) return false;
  const Support::Group tokens = support_in(row, begin);
  float distance = 0;
  if (tokens.size() > 0) {
    distance = low_distance(row, state.r.m_s);
    if (distance == 0) return false;
    if (!row.support->is_lowered) lower_tokens(row, tokens, begin, scratch, block);
  }
  row.table.sums(block.load, row.divergence, row.hard_mode,
                 kernel_block(row, block, state.r.m_s, state.r.m_t), &sums);
  if (distance != 0) {  // at most 2^-20 of each token, subtracted to float32's accuracy
    sums.d_s -= tokens.size() * std::exp2(distance * row.k);
    sums.d_1 -= tokens.size() * std::exp2(distance * row.k_1);
  }
  const float lowest = std::min(sums.min_a, sums.min_b), highest = std::max(sums.max_a, sums.max_b);
  return std::isfinite(sums.canary) && highest <= SLACK && highest * row.k_max <= SLACK_EXPONENT &&
         -lowest * row.k_max <= row.table.exponent_range;
}

// Sums any block: inspects it first, raises the references to its maxima, replaces infinities, and
// uses exponentials that may underflow.
inline Prepared add_any(const Row& row, int64_t begin, int64_t end, State& state, BlockSums& sums,
                        Scratch& scratch) {
  const Prepared block = prepare(row, begin, end, state.r.m_s, state.r.m_t, scratch);
  rebase(row, state, std::max<double>(state.r.m_s, block.range.max_s),
         std::max<double>(state.r.m_t, block.range.max_t));
  row.table.sums(block.load, row.divergence, row.hard_mode,
                 kernel_block(row, block, state.r.m_s, state.r.m_t), &sums);
  sums.min_a = block.range.min_s - reference(state.r.m_s);
  sums.min_b = block.range.min_t - reference(state.r.m_t);
  return block;
}

// Requests a block of both sides from memory. A copy of a block otherwise waits for all of its cache
// lines, while the kernels, which need no copy, compute as the lines arrive.
inline void prefetch_block(const Row& row, int64_t n, int64_t begin) {
  const int64_t end = std::min(row.problem.V, begin + BLOCK);
  const auto request = [&](const char* x, int bytes) {
    for (int64_t at = begin * bytes; at < end * bytes; at += 64) __builtin_prefetch(x + at);
  };
  request(row_pointer(row.problem.student, n), width(row.s_dtype));
  if (row.t != row.s) request(row_pointer(row.problem.teacher, n), width(row.t_dtype));
}

inline State first_pass(const Row& row, int64_t segment, State state, Scratch& scratch) {
  for_blocks(row, segment, [&](int64_t begin, int64_t end) {
    BlockSums sums;
    const bool lowers_copies = row.support && !row.support->is_lowered;
    if (lowers_copies || row.copies()) prefetch_block(row, row.n, begin + BLOCK);
    Prepared block = view(row, begin, end, scratch);
    if (!add_plain(row, begin, block, state, sums, scratch))
      block = add_any(row, begin, end, state, sums, scratch);
    RowSums<double> more{};
    more.d_s = sums.d_s;
    more.d_t = sums.d_t;
    more.d_1 = sums.d_1;
    more.w = sums.w;
    more.count = block.size - block.absent;
    if (row.hard && row.problem.label_smoothing > 0)
      more.differences = differences(row, begin, block, reference(state.r.m_s), scratch);
    add(state.r, more);
    state.min_s = std::min(state.min_s, sums.min_a + reference(state.r.m_s));
    state.min_t = std::min(state.min_t, sums.min_b + reference(state.r.m_t));
    state.flags |= block.flags;
  });
  return state;
}

inline Constants<float> soft_constants(const Row& row, const State& state, double weight) {
  const Problem& p = row.problem;
  const Constants<double> c = with_rule(row.divergence, [&](auto rule) {
    return rule.constants(state.r, weight * p.soft_factor / p.temperature, rule_options(p));
  });
  return {float(c.scale), float(c.ratio), float(c.offset), float(c.beta), float(c.log_ratio)};
}

inline void second_pass(const Row& row, const State& state, int64_t segment, Scratch& scratch,
                        double* x, double* y) {
  const Constants<float> c = soft_constants(row, state, 1.0);
  *x = *y = 0;
  for_blocks(row, segment, [&](int64_t begin, int64_t end) {
    const Prepared block = prepare_again(row, state, begin, end, scratch);
    float bx = 0, by = 0;
    row.table.sums2(block.load, row.divergence, kernel_block(row, block, state.r.m_s, state.r.m_t),
                    c, &bx, &by);
    *x += bx;
    *y += by;
  });
}

// Sets the flags that depend on the whole row.
inline void finish_statistics(const Row& row, State& state) {
  if (state.r.m_s == LOWEST && (state.flags & IRREGULAR) && state.min_s == LOWEST)
    state.flags |= BAD_S;
  if (state.r.m_t == LOWEST && (state.flags & IRREGULAR) && state.min_t == LOWEST)
    state.flags |= BAD_T;
  const double spread = std::max(state.r.m_s - state.min_s, state.r.m_t - state.min_t);
  if (!(spread * row.k_max <= row.table.exponent_range)) state.flags |= IRREGULAR;
}

}  // namespace cpu
}  // namespace fused_kd
