// The row kernels of the CPU: what a backend calls. Torch-free.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace fused_kd {

// N rows of V elements, last stride 1. Row n lies at (n / inner) * outer_stride + (n % inner) *
// inner_stride, in elements.
struct Rows {
  void* data;
  Dtype dtype;
  int64_t inner;
  int64_t outer_stride, inner_stride;
};

// Floats of row statistics that the forward leaves for the backward: RowSums in order, then flags.
constexpr int STATS = 11;

struct Problem {
  int64_t N, V;
  Rows student, teacher;
  Rows grad;              // may be the student's memory; data == nullptr: no gradient
  const int64_t* labels;  // (N), null without a hard term
  const float* w_hard;    // (N), weight of the hard term in the gradient; null: the term is off; 0:
                          // off for that row
  const float* w_soft;    // (N), the same for the divergence
  Divergence divergence;
  double temperature, beta, soft_factor, label_smoothing;
  float* hard;   // (N)
  float* soft;   // (N)
  float* stats;  // (N, STATS)
};

// Splits [0, n) over threads and calls body(context, begin, end) for each part.
struct Parallel {
  void (*split)(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  int threads;
};

// Losses and statistics; also the gradient if the problem has one.
void rows_forward(const Problem&, const Parallel&);
// The gradient from the statistics of an earlier forward.
void rows_backward(const Problem&, const Parallel&);
// Multiplies row n of a gradient by a number.
void scale_row(const Rows& grad, int64_t n, int64_t V, float factor);

}  // namespace fused_kd
