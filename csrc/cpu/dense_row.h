// A whole row with a dense teacher, or without one.
#pragma once

#include "row_gradient.h"

namespace fused_kd {
namespace cpu {

// Adds all segments of a row, from an initial state.
inline State first_pass(const Row& row, const State& initial, Scratch& scratch) {
  State state = first_pass(row, 0, initial, scratch);
  for (int64_t i = 1; i < row.segments(); ++i)
    merge(row, state, first_pass(row, i, initial, scratch));
  return state;
}

inline void dense_row(const Row& row, Scratch& scratch) {
  State state = first_pass(row, initial_state(row, scratch), scratch);
  finish_statistics(row, state);
  if (row.two_passes) {
    for (int64_t i = 0; i < row.segments(); ++i) {
      double x, y;
      second_pass(row, state, i, scratch, &x, &y);
      state.r.x += x;
      state.r.y += y;
    }
  }
  write_losses(row, state);
  if (row.problem.grad.data) whole_row_gradient(row, state, scratch);
}

}  // namespace cpu
}  // namespace fused_kd
