// One row of a problem: its pointers, the terms that are on, and how its exponentials are computed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "support.h"

namespace fused_kd {
namespace cpu {

// Entries of a row that one thread sums at a time; with few rows, threads share a row.
constexpr int64_t SEGMENT = 16 * BLOCK;

inline char* row_pointer(const Rows& rows, int64_t n) {
  const int64_t element =
      (n / rows.inner) * rows.outer_stride + (n % rows.inner) * rows.inner_stride;
  return static_cast<char*>(rows.data) + element * width(rows.dtype);
}

// In the passes LOWEST is the value of an entry without mass: of -inf. A logit of this value, which is
// how float32 logits are often masked, becomes the float above it.
inline float above_lowest(float x) { return x == LOWEST ? std::nextafter(LOWEST, 0.0f) : x; }

inline float read(const char* row, Dtype dtype, int64_t v, const Kernels& table) {
  float x;
  if (dtype == Dtype::bf16) {  // inline for the tokens of a top-k teacher
    uint16_t half;
    std::memcpy(&half, row + v * sizeof half, sizeof half);
    const uint32_t bits = uint32_t(half) << 16;
    std::memcpy(&x, &bits, sizeof x);
  } else {
    table.widen(dtype, row + v * width(dtype), &x, 1);
  }
  return above_lowest(x);
}

// Writes an entry that was converted to the row's element type.
inline void write(char* row, Dtype dtype, int64_t v, const void* element) {
  width(dtype) == 2 ? std::memcpy(row + 2 * v, element, 2) : std::memcpy(row + 4 * v, element, 4);
}

struct Row {
  const Problem& problem;
  const Kernels& table;
  int64_t n;
  const char *s, *t;
  Dtype s_dtype, t_dtype;
  bool hard, soft;
  Divergence divergence;  // none without a soft term
  bool two_passes;        // the divergence's
  Hard hard_mode;
  float k, k_1, k_max;
  // The tokens of a top-k teacher, which `divergence` leaves out; null: a dense teacher. Such a row's
  // t is s, and its divergence is `none`, or `tail` if the tail's sum is not the hard term's.
  const Support* support = nullptr;
  bool has_tail = false;  // the tokens outside the support are a class
  float s_label = 0;      // the student's logit at the label, if that is in [0, V)

  Row(const Problem& p, const Kernels& table, int64_t n) : problem(p), table(table), n(n) {
    hard = p.w_hard && p.w_hard[n] != 0;
    soft = p.w_soft && p.w_soft[n] != 0;
    s = row_pointer(p.student, n);
    s_dtype = p.student.dtype;
    // without a dense soft term the student replaces the teacher, whose memory is not read
    const bool dense = soft && !p.has_classes;
    t = dense ? row_pointer(p.teacher, n) : s;
    t_dtype = dense ? p.teacher.dtype : s_dtype;
    has_tail = soft && p.has_classes && class_logits()[p.K] != INF;
    divergence = dense                            ? p.divergence
                 : has_tail && p.temperature != 1 ? Divergence::tail
                                                  : Divergence::none;
    k_1 = float(LOG2E);
    k = divergence == Divergence::none ? k_1 : float(LOG2E / p.temperature);
    k_max = std::max(k, k_1);
    // before the gradient, or the low logit of a top-k teacher's token, is written there
    if (hard && label_in_range()) s_label = read(s, s_dtype, p.labels[n], table);
    with_rule(divergence, [&](auto rule) {
      two_passes = rule.TWO_PASSES;
      hard_mode = hard_mode_for(rule.SOFTMAX);
    });
  }
  bool label_in_range() const { return uint64_t(problem.labels[n]) < uint64_t(problem.V); }
  bool skipped() const { return !hard && !soft; }
  const float* class_logits() const {  // (K+1), of a top-k teacher
    return reinterpret_cast<const float*>(row_pointer(problem.teacher, n));
  }
  // Whether the kernels read float32 copies of its blocks.
  bool copies() const { return s_dtype != t_dtype || (s_dtype == Dtype::f16 && !table.reads_f16); }
  // Where the blocks end that are whole pairs of vectors. The few entries after them are a block that
  // is copied, so that the others need not be. The tokens of a support are grouped by whole blocks.
  int64_t whole_end() const { return support ? problem.V : problem.V / MAX_PAIR * MAX_PAIR; }
  int64_t segments() const { return (problem.V + SEGMENT - 1) / SEGMENT; }

 private:
  // The hard term's exponential is a power of P if the divergence has a P and T is 1, 2 or 4. Without
  // a divergence the one sum is that of the hard term, and of a tail at T = 1.
  Hard hard_mode_for(bool softmax) const {
    if (divergence == Divergence::none) return Hard::power1;
    if (!hard) return Hard::off;
    if (!softmax) return Hard::separate;
    if (problem.temperature == 1) return Hard::power1;
    if (problem.temperature == 2) return Hard::power2;
    if (problem.temperature == 4) return Hard::power4;
    return Hard::separate;
  }
};

// Calls body(begin, end) for each block of a segment: the block is at most BLOCK entries from begin on.
template <class Body>
void for_blocks(const Row& row, int64_t segment, Body body) {
  const int64_t end = std::min(row.problem.V, (segment + 1) * SEGMENT);
  const int64_t whole = std::min(row.whole_end(), end);
  for (int64_t begin = segment * SEGMENT; begin < whole; begin += BLOCK) body(begin, whole);
  if (whole < end) body(whole, end);
}

}  // namespace cpu
}  // namespace fused_kd
