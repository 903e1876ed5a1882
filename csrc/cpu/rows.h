// The row kernels of the CPU: the interface for a backend. Torch-free.
#pragma once

#include <stdint.h>

#include "kernels.h"
#include "parallel.h"

namespace fused_kd {

// Computes losses and statistics; also the gradient if the problem has one.
void rows_forward(const Problem&, const Parallel&);
// Computes the gradient from the statistics of an earlier forward.
void rows_backward(const Problem&, const Parallel&);
// Multiplies row n of a gradient by a number.
void scale_row(const Rows& grad, int64_t n, int64_t V, float factor);

}  // namespace fused_kd
