// What kd_metrics needs of a row beside its losses: the interface for a backend. Torch-free.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace fused_kd {

// Computes the columns of fused_kd.measures.Sums (N, MEASURES), and the first largest entry of each
// side (N, 2), for a problem whose divergence is forward_kl. Rows that are off are not written.
void measure_rows(const Problem&, float* sums, int64_t* largest, const Parallel&);
// Computes the columns of fused_kd.measures.Support (N, SUPPORT_MEASURES), and the student's first
// largest entry (N), for a problem with classes whose tail is one of them.
void measure_support(const Problem&, float* sums, int64_t* largest, const Parallel&);

}  // namespace fused_kd
