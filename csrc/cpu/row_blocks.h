// Prepares a row's blocks for the kernels: as stored if the element type allows it, else as float32
// copies; infinities are replaced.
#pragma once

#include <algorithm>
#include <cmath>

#include "row.h"
#include "row_state.h"

namespace fused_kd {
namespace cpu {

struct Prepared {
  Load load;
  const void *s, *t;
  int size, padded;
  Range range;
  int flags = 0;
  int absent = 0;
  bool copied;  // `s` and `t` are both the float32 copies in Scratch
};

struct Scratch {
  alignas(64) float s[BLOCK];
  alignas(64) float t[BLOCK];
  alignas(64) float g[BLOCK];
};

// Inspects each entry. -inf becomes LOWEST, whose exponential is exactly 0, so that an absent entry
// contributes nothing to any sum; finite values stay above it.
inline void replace_infinities(const Row& row, int64_t begin, Scratch& scratch, Prepared& block) {
  const bool read_teacher =
      !row.soft && row.problem.label_smoothing > 0 && !row.problem.has_classes;
  const char* teacher = read_teacher ? row_pointer(row.problem.teacher, row.n) : nullptr;
  Range r{LOWEST, -LOWEST, 0, LOWEST, -LOWEST, 0};
  for (int i = 0; i < block.size; ++i) {
    float &s = scratch.s[i], &t = scratch.t[i];
    const bool none_s = s == -INF;
    bool none_t = t == -INF;
    if (read_teacher && none_s)
      none_t = read(teacher, row.problem.teacher.dtype, begin + i, row.table) == -INF;
    if (none_s && none_t)
      ++block.absent;
    else if (none_s)
      block.flags |= ALONE_S;
    else if (none_t)
      block.flags |= ALONE_T;
    if (!(s < INF)) block.flags |= BAD_S;
    if (!(t < INF)) block.flags |= BAD_T;
    s = none_s ? LOWEST : above_lowest(s);
    t = none_t ? LOWEST : above_lowest(t);
    r.max_s = std::max(r.max_s, s);
    r.max_t = std::max(r.max_t, t);
  }
  r.min_s = r.min_t = LOWEST;
  block.range = r;
  block.flags |= IRREGULAR;
}

inline void copy_block(const Row& row, int64_t begin, Scratch& scratch, Prepared& block) {
  row.table.widen(row.s_dtype, row.s + begin * width(row.s_dtype), scratch.s, block.size);
  row.table.widen(row.t_dtype, row.t + begin * width(row.t_dtype), scratch.t, block.size);
  block.padded = (block.size + MAX_PAIR - 1) / MAX_PAIR * MAX_PAIR;
  for (int i = block.size; i < block.padded; ++i) scratch.s[i] = scratch.t[i] = LOWEST;
  block.s = scratch.s;
  block.t = scratch.t;
  block.load = Load::f32;
  block.copied = true;
}

// Returns an operand of a block of whole pairs for float32 kernels: as stored, or a copy.
inline const void* as_f32(const Row& row, const char* from, Dtype dtype, int size, float* copy) {
  if (dtype == Dtype::f32) return from;
  row.table.widen(dtype, from, copy, size);
  return copy;
}

// Returns the block as stored if the kernels can read it, else with float32 copies: of both sides if
// it has no whole pairs, otherwise of those that are not float32.
inline Prepared view(const Row& row, int64_t begin, int64_t end, Scratch& scratch) {
  Prepared block;
  block.size = block.padded = int(std::min<int64_t>(BLOCK, end - begin));
  block.copied = false;
  const char* s = row.s + begin * width(row.s_dtype);
  const char* t = row.t + begin * width(row.t_dtype);
  if (block.size % MAX_PAIR != 0) {
    copy_block(row, begin, scratch, block);
  } else if (row.copies()) {
    block.load = Load::f32;
    block.copied = row.s_dtype != Dtype::f32 && row.t_dtype != Dtype::f32;
    block.s = as_f32(row, s, row.s_dtype, block.size, scratch.s);
    block.t = as_f32(row, t, row.t_dtype, block.size, scratch.t);
  } else {
    block.load = row.s_dtype == Dtype::bf16  ? Load::bf16
                 : row.s_dtype == Dtype::f16 ? Load::f16
                                             : Load::f32;
    block.s = s;
    block.t = t;
  }
  return block;
}

inline void measure(const Row& row, const Scratch& scratch, Prepared& block) {
  Range& r = block.range;
  const int whole = block.size / MAX_PAIR * MAX_PAIR;
  row.table.range(block.load, block.s, block.t, whole, &r);
  for (int i = whole; i < block.size; ++i) {  // such a block was copied
    r.max_s = std::max(r.max_s, scratch.s[i]);
    r.min_s = std::min(r.min_s, scratch.s[i]);
    r.max_t = std::max(r.max_t, scratch.t[i]);
    r.min_t = std::min(r.min_t, scratch.t[i]);
    r.sum_s += scratch.s[i];
    r.sum_t += scratch.t[i];
  }
}

inline Support::Group support_in(const Row& row, int64_t begin) {
  return row.support ? row.support->in_block(begin) : Support::Group{nullptr, nullptr};
}

// Without a finite logit so far any reference works, since every exponential is 0.
inline float reference(double m) { return m == LOWEST ? 0.0f : float(m); }

// Gives the tokens of a top-k teacher another logit in the float32 copies of a block.
inline void replace_tokens(const Support::Group& tokens, int64_t begin, float logit,
                           Scratch& scratch) {
  for (const Support::Token& token : tokens)
    scratch.s[token.id - begin] = scratch.t[token.id - begin] = logit;
}

inline bool all_above_lowest(const Range& r) {
  return std::isfinite(r.sum_s) && std::isfinite(r.sum_t) && r.min_s > LOWEST && r.min_t > LOWEST;
}

// Returns a block that the kernels can process for any entries, in which the tokens of a top-k
// teacher are LOWEST. Nothing depends on the logits that they have. `m_s`, `m_t`: the references so
// far; they and the block's maxima decide the range of the exponents.
inline Prepared prepare(const Row& row, int64_t begin, int64_t end, double m_s, double m_t,
                        Scratch& scratch) {
  Prepared block = view(row, begin, end, scratch);
  const Support::Group tokens = support_in(row, begin);
  const bool excludes = tokens.size() > 0;
  if (excludes) {
    if (!block.copied) copy_block(row, begin, scratch, block);
    replace_tokens(tokens, begin, reference(m_s), scratch);  // a number like those of the others
  }
  measure(row, scratch, block);
  if (!all_above_lowest(block.range)) {
    if (!block.copied) copy_block(row, begin, scratch, block);
    replace_infinities(row, begin, scratch, block);
  }
  if (excludes) {
    replace_tokens(tokens, begin, LOWEST, scratch);
    const Range before = block.range;
    measure(row, scratch, block);
    block.range.min_s = before.min_s;
    block.range.min_t = before.min_t;
  }
  const Range& r = block.range;
  const double spread = std::max<double>(reference(std::max<double>(m_s, r.max_s)) - r.min_s,
                                         reference(std::max<double>(m_t, r.max_t)) - r.min_t);
  if (block.padded != block.size || excludes || !(spread * row.k_max <= row.table.exponent_range)) {
    if (!block.copied) copy_block(row, begin, scratch, block);
    block.load = Load::f32_any;
  }
  return block;
}

// The same for a row whose references are final: only an irregular row is inspected again.
inline Prepared prepare_again(const Row& row, const State& state, int64_t begin, int64_t end,
                              Scratch& scratch) {
  const bool irregular =
      (state.flags & IRREGULAR) || (std::min<int64_t>(BLOCK, end - begin) % MAX_PAIR);
  return irregular ? prepare(row, begin, end, state.r.m_s, state.r.m_t, scratch)
                   : view(row, begin, end, scratch);
}

inline Block kernel_block(const Row& row, const Prepared& block, double m_s, double m_t) {
  return {block.s, block.t, block.padded, reference(m_s), reference(m_t), row.k, row.k_1};
}

}  // namespace cpu
}  // namespace fused_kd
