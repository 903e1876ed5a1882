// The gradient of a row, from its statistics.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "row_losses.h"

namespace fused_kd {
namespace cpu {

inline bool gradient_is_nan(const Row& row, const State& state) {
  if (state.flags & BAD_S) return true;
  if (row.hard && !row.label_in_range()) return true;
  if (!row.soft || row.support) return false;
  if (state.flags & BAD_T) return true;
  const bool finite = with_rule(row.divergence, [](auto rule) { return rule.FINITE_GRADIENT; });
  return !finite && soft_is_infinite(row, state);
}

// The gradient of a top-k teacher's soft term, from its classes.
struct ClassGradient {
  bool nan;
  double tail;          // the factor of P outside the support
  const float* tokens;  // (K): of each token's logit
};

// Computes a row's gradient: the constructor its scalars, then `segment` each segment, in any
// order, then `entries` those of the label and of a top-k teacher's tokens.
struct Gradient {
  const Row& row;
  const State& state;
  const ClassGradient* classes;  // null: a dense teacher
  char* out;
  Dtype dtype;
  bool nan;
  double w_hard = 0, w_soft = 0;
  Constants<float> soft{};
  float hard_scale = 0, hard_offset = 0, label_value = 0;
  std::vector<float> token_values;  // in the order of the support

  Gradient(const Row& row, const State& state, const ClassGradient* classes = nullptr)
      : row(row), state(state), classes(classes) {
    const Problem& p = row.problem;
    out = row_pointer(p.grad, row.n);
    dtype = p.grad.dtype;
    nan = gradient_is_nan(row, state) || (classes && classes->nan);
    if (nan) return;
    const double scale = p.scale ? *p.scale : 1.0;
    if (row.hard) w_hard = scale * p.w_hard[row.n];
    if (row.soft) w_soft = scale * p.w_soft[row.n];
    if (std::isnan(w_hard + w_soft)) nan = true;
    double factor = 0;
    if (row.hard) {
      // with a top-k teacher the exponentials are relative to the tail's reference
      const double shift = (hard_reference(row, state) - state.r.m_s) * row.k_1;
      factor = w_hard / (state.r.d_1 * exp2(shift));
      if (p.label_smoothing > 0) hard_offset = float(-w_hard * p.label_smoothing / state.r.count);
    }
    if (!classes) {
      if (row.soft) soft = soft_constants(row, state, w_soft);
    } else if (row.divergence == Divergence::tail) {
      soft.scale = float(classes->tail);
    } else {
      factor += classes->tail;
    }
    hard_scale = float(factor);
    if (row.hard && !nan) label_value = float(label_gradient());
    if (row.support && !nan) compute_tokens();
  }

  // Computes the entries of the tokens from their logits: the hard term's part by the block kernels,
  // as that of all other entries.
  void compute_tokens() {
    const Support::Group tokens = row.support->all();
    const float m = float(hard_reference(row, state));
    const float scale = row.hard ? float(w_hard / state.r.d_1) : 0.0f;
    token_values.resize(tokens.size());
    alignas(64) float s[BLOCK], g[BLOCK];
    for (int begin = 0; begin < tokens.size(); begin += BLOCK) {
      const int size = std::min(BLOCK, tokens.size() - begin);
      const int padded = (size + MAX_PAIR - 1) / MAX_PAIR * MAX_PAIR;
      const Support::Token* token = tokens.begin() + begin;
      for (int i = 0; i < padded; ++i) s[i] = i < size ? std::max(token[i].s, LOWEST) : LOWEST;
      row.table.gradient(Load::f32_any, Divergence::none, Hard::power1,
                         {s, s, padded, m, m, row.k_1, row.k_1}, {}, scale, hard_offset, g);
      for (int i = 0; i < size; ++i) {
        if (classes) g[i] += classes->tokens[token[i].position];
        token_values[begin + i] = g[i];
      }
    }
  }

  // Returns the hard term's gradient at an entry, without that of the label.
  double hard_gradient(float s, bool absent) const {
    const double exponent = (s - hard_reference(row, state)) * row.k_1;
    const double g = w_hard * exp2(std::max<double>(exponent, LOWEST)) / state.r.d_1;
    const double eps = row.problem.label_smoothing;
    return eps > 0 && !absent ? g - w_hard * eps / state.r.count : g;
  }

  // Returns the label's entry in full precision, from its logits before they may be overwritten.
  // Adding -w to the stored, rounded value would lose all digits if pi_y is close to 1.
  double label_gradient() const {
    const Problem& p = row.problem;
    const int64_t y = p.labels[row.n];
    const float s = row.s_label;
    if (row.support) return label_gradient(*row.support, y, s);
    const float t = row.soft || p.label_smoothing > 0
                        ? read(row_pointer(p.teacher, row.n), p.teacher.dtype, y, row.table)
                        : s;
    const bool absent = s == -INF && t == -INF;
    const double g = hard_gradient(s, absent) - w_hard * (1 - p.label_smoothing);
    if (!row.soft || absent) return g;
    return g + with_rule(row.divergence, [&](auto rule) {
             const Constants<double> c =
                 rule.constants(state.r, w_soft * p.soft_factor / p.temperature, rule_options(p));
             if (!rule.SOFTMAX)
               return rule.gradient(double(s), double(t), 0.0, 0.0, double(row.k), c, 0.0);
             const double a = std::max<double>(s - state.r.m_s, LOWEST),
                          b = std::max<double>(t - state.r.m_t, LOWEST);
             return rule.gradient(a, b, exp2(a * row.k), exp2(b * row.k), double(row.k), c, 0.0);
           });
  }

  // The same with a top-k teacher: the label is one of its tokens, or in the tail.
  double label_gradient(const Support& support, int64_t y, float s) const {
    const double label = w_hard * (1 - row.problem.label_smoothing);
    for (const Support::Token& token : support.in_block(y / BLOCK * BLOCK))
      if (token.id == y)
        return hard_gradient(s, false) - label + (classes ? classes->tokens[token.position] : 0);
    const double g = hard_gradient(s, s == -INF) - label;
    if (!classes || s == -INF) return g;
    return g + classes->tail * exp2(std::max<double>((s - state.r.m_s) * row.k, LOWEST));
  }

  void segment(int64_t index, Scratch& scratch) const {
    for_blocks(row, index, [&](int64_t begin, int64_t end) {
      const int size = int(std::min<int64_t>(BLOCK, end - begin));
      char* to = out + begin * width(dtype);
      if (nan) {
        std::fill(scratch.g, scratch.g + size, NAN);
        row.table.narrow(dtype, scratch.g, to, size);
        return;
      }
      const Prepared block = prepare_again(row, state, begin, end, scratch);
      const bool direct = !block.copied && dtype == dtype_of(block.load);  // the kernel stores it
      Block work = kernel_block(row, block, state.r.m_s, state.r.m_t);
      if (row.n + 1 < row.problem.N) {
        if (row.copies())
          prefetch_block(row, row.n + 1, begin);
        else if (!block.copied)
          prefetch_next_row(begin, work);
      }
      void* to_kernel = direct ? static_cast<void*>(to) : scratch.g;
      row.table.gradient(block.load, row.divergence, row.hard_mode, work, soft, hard_scale,
                         hard_offset, to_kernel);
      if (direct) return;
      if (block.absent) clear_absent(begin, size, scratch);
      row.table.narrow(dtype, scratch.g, to, size);
    });
  }

  // This pass reads the row from the cache, so main memory is free to deliver the entries that the
  // next row's first pass will read.
  void prefetch_next_row(int64_t begin, Block& work) const {
    const Problem& p = row.problem;
    work.next_s = row_pointer(p.student, row.n + 1) + begin * width(row.s_dtype);
    if (row.t != row.s)
      work.next_t = row_pointer(p.teacher, row.n + 1) + begin * width(row.t_dtype);
  }

  // Sets the gradient of absent entries to 0, which label smoothing does not change.
  void clear_absent(int64_t begin, int size, Scratch& scratch) const {
    for (int i = 0; i < size; ++i) {
      if (scratch.s[i] != LOWEST) continue;
      const bool alone = row.soft
                             ? scratch.t[i] != LOWEST
                             : row.problem.label_smoothing > 0 && !row.problem.has_classes &&
                                   read(row_pointer(row.problem.teacher, row.n),
                                        row.problem.teacher.dtype, begin + i, row.table) != -INF;
      if (!alone) scratch.g[i] = 0;
    }
  }

  void entries() const {
    if (nan) return;
    if (row.support) store_tokens();
    if (row.hard)
      row.table.narrow(dtype, &label_value, out + row.problem.labels[row.n] * width(dtype), 1);
  }

  void store_tokens() const {
    const Support::Group tokens = row.support->all();
    if (tokens.size() == 0) return;
    std::vector<float> rounded(tokens.size());  // an array of the gradient's element type
    row.table.narrow(dtype, token_values.data(), rounded.data(), tokens.size());
    const char* from = reinterpret_cast<const char*>(rounded.data());
    for (const Support::Token& token : tokens) {
      write(out, dtype, token.id, from);
      from += width(dtype);
    }
  }
};

inline void zero_gradient(const Row& row) {
  const Rows& grad = row.problem.grad;
  std::memset(row_pointer(grad, row.n), 0, row.problem.V * width(grad.dtype));
}

inline void whole_row_gradient(const Row& row, const State& state, Scratch& scratch,
                               const ClassGradient* classes = nullptr) {
  const Gradient gradient(row, state, classes);
  for (int64_t i = row.segments(); i-- > 0;)
    gradient.segment(i, scratch);  // backwards: the end of the row is still in cache
  gradient.entries();
}

}  // namespace cpu
}  // namespace fused_kd
