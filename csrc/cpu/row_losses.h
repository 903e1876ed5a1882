// The losses of a row, from its statistics.
#pragma once

#include <algorithm>
#include <cmath>

#include "row_statistics.h"

namespace fused_kd {
namespace cpu {

// The reference of the hard term's sums.
inline double hard_reference(const Row& row, const State& state) {
  return row.support ? state.r.m_t : state.r.m_s;
}

inline double hard_loss(const Row& row, const State& state) {
  if ((state.flags & BAD_S) || !row.label_in_range()) return NAN;
  const double eps = row.problem.label_smoothing;
  const float s_y = row.s_label;
  if (s_y == -INF || (eps > 0 && (state.flags & ALONE_S))) return INF;
  double loss = log(state.r.d_1) - (1 - eps) * (double(s_y) - hard_reference(row, state));
  if (eps > 0) loss -= eps / state.r.count * state.r.differences;
  return loss;
}

// Returns whether an entry that is -inf for one side alone makes the divergence infinite.
inline bool soft_is_infinite(const Row& row, const State& state) {
  return with_rule(row.divergence, [&](auto rule) {
    return is_infinite<decltype(rule)>(state.flags & ALONE_S, state.flags & ALONE_T);
  });
}

// The soft term of a row with a dense teacher.
inline double soft_loss(const Row& row, const State& state) {
  if (state.flags & (BAD_S | BAD_T)) return NAN;
  if (soft_is_infinite(row, state)) return INF;
  const Problem& p = row.problem;
  return p.soft_factor *
         with_rule(row.divergence, [&](auto rule) { return rule.value(state.r, rule_options(p)); });
}

inline void write_losses(const Row& row, State& state) {
  const Problem& p = row.problem;
  p.hard[row.n] = row.hard ? float(hard_loss(row, state)) : 0.0f;
  if (!row.support) p.soft[row.n] = row.soft ? float(soft_loss(row, state)) : 0.0f;
  float* stats = p.stats + row.n * STATS;
  save(state, stats);
  // rounded like the saved statistics, so that a gradient has the same bits now and in a backward
  state = restore(stats);
}

inline void write_skipped(const Row& row) {
  row.problem.hard[row.n] = row.problem.soft[row.n] = 0.0f;
  std::fill_n(row.problem.stats + row.n * STATS, STATS, 0.0f);
}

}  // namespace cpu
}  // namespace fused_kd
