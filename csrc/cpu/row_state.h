// The statistics of a row or of a part of it, and how they are stored between forward and backward.
#pragma once

#include "../problem.h"

namespace fused_kd {
namespace cpu {

enum Flag : int {
  BAD_S = 1,       // the student has NaN or +inf, or no finite logit
  BAD_T = 2,       // the same of the teacher
  ALONE_S = 4,     // an entry is -inf for the student alone
  ALONE_T = 8,     // an entry is -inf for the teacher alone
  IRREGULAR = 16,  // a block has infinities, or exponents beyond the range of the plain kernels
};

// Of a segment, then of a row. With a top-k teacher m_s, d_s are those of the tail, and when the row is
// finished m_t is the reference of d_1 and `differences`, which are sums over the whole row.
struct State {
  RowSums<double> r{LOWEST, LOWEST, 0, 0, 0, 0, 0, 0, 0, 0};
  float min_s = -LOWEST, min_t = -LOWEST;
  int flags = 0;
};

static_assert(sizeof(RowSums<double>) == (STATS - 1) * sizeof(double),
              "the statistics are RowSums and the flags");

inline void save(const State& state, float* stats) {
  const double* values = &state.r.m_s;
  for (int i = 0; i < STATS - 1; ++i) stats[i] = float(values[i]);
  stats[STATS - 1] = float(state.flags);
}

inline State restore(const float* stats) {
  State state;
  double* values = &state.r.m_s;
  for (int i = 0; i < STATS - 1; ++i) values[i] = stats[i];
  state.flags = int(stats[STATS - 1]);
  return state;
}

}  // namespace cpu
}  // namespace fused_kd
