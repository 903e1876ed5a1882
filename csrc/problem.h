// The arguments of a row kernel: rows of logits, options, and memory for the results. The same for
// CPU and GPU; torch-free.
#pragma once

#include <stdint.h>

#include "kd_math.h"

namespace fused_kd {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// Bytes of an element.
FUSED_KD_HD constexpr int width(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// N rows of V elements, last stride 1. Row n begins at (n / inner) * outer_stride + (n % inner) *
// inner_stride, in elements.
struct Rows {
  void* data;
  Dtype dtype;
  int64_t inner;
  int64_t outer_stride, inner_stride;
};

struct Problem {
  int64_t N, V;
  Rows student, teacher;
  // data == nullptr: no gradient. Else the student's memory, or memory that overlaps neither side;
  // there a float32 student may have a 16-bit gradient.
  Rows grad;
  // With has_classes the teacher's rows have K+1 entries: the float32 logits of the classes of a
  // top-k teacher (fused_kd/classes.py). An id outside [0, V) is that of an absent entry.
  int64_t K;
  const int32_t* token_ids;  // (N, K)
  bool has_classes;
  const int64_t* labels;  // (N), null without a hard term
  const float* w_hard;    // (N), weight of the hard term in the gradient; null: the term is off; 0:
                          // off for that row
  const float* w_soft;    // (N), the same for the divergence
  const float* scale;     // one number that multiplies both weights; null: 1
  Divergence divergence;
  double temperature, beta, soft_factor, label_smoothing;
  float* hard;   // (N)
  float* soft;   // (N)
  float* stats;  // (N, STATS)
};

// Columns of fused_kd.measures.Sums, and of Support.
constexpr int MEASURES = 11;
constexpr int SUPPORT_MEASURES = 3;

}  // namespace fused_kd
