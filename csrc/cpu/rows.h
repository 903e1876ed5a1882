// The row kernels of the CPU: what a backend calls. Torch-free.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace fused_kd {

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
