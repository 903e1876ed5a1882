// A row with a top-k teacher: a dense row of K+1 classes, whose last is the tail. The row's own passes
// leave the teacher's tokens out; see fused_kd/classes.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "dense_row.h"

namespace fused_kd {
namespace cpu {

// The classes of one row. The logits of the tokens are read first, since in place other values are
// written over them.
class ClassRow {
 public:
  // Makes the row leave the tokens out. Absent ones stay -inf on both sides.
  void attach(Row& row) {
    const Problem& p = row.problem;
    support_.set(p.token_ids + row.n * p.K, p.K, p.V,
                 [&](int32_t id) { return read(row.s, row.s_dtype, id, row.table); });
    row.support = &support_;
    s_.assign(p.K + 1, -INF);
    t_.assign(p.K + 1, -INF);
    g_.resize(p.K + 1);
    const float* logits = row.class_logits();
    for (const Support::Token& token : support_.all()) t_[token.position] = logits[token.position];
    if (row.has_tail) t_[p.K] = logits[p.K];
  }

  // Chooses the logit that the first pass reads in place of the tokens'. In place it is written over
  // them, so that the pass needs no copy of their blocks; label smoothing reads the logits themselves.
  // `initial`: the row's initial state.
  void lower(const Row& row, const State& initial) {
    const Problem& p = row.problem;
    if (initial.r.m_s == LOWEST) return;
    support_.low = low_logit(row, initial.r.m_s);
    support_.is_lowered =
        p.grad.data == p.student.data && p.label_smoothing == 0 && !row.copies();  // of every block
    if (!support_.is_lowered) return;
    char low[sizeof(float)];
    row.table.narrow(row.s_dtype, &support_.low, low, 1);
    for (const Support::Token& token : support_.all())
      write(row_pointer(p.grad, row.n), row.s_dtype, token.id, low);
  }

  // Adds the tokens to the hard term's sums, and sets the flags that depend on the whole row.
  void finish_statistics(const Row& row, State& state) {
    RowSums<double>& r = state.r;
    double largest = r.m_s;
    for (const Support::Token& token : support_.all()) {
      const float s = token.s;
      if (!(s < INF)) state.flags |= BAD_S;
      if (s == -INF) state.flags |= ALONE_S;
      largest = std::max<double>(largest, s);
    }
    if (largest == LOWEST) state.flags |= BAD_S;
    if ((r.m_s - state.min_s) * row.k_max > row.table.exponent_range) state.flags |= IRREGULAR;
    r.m_t = largest;
    r.differences += r.count * (reference(r.m_s) - largest);
    if (row.hard && !(state.flags & BAD_S))
      r.d_1 = r.d_1 * exp2((r.m_s - largest) * row.k_1) + tokens_sum(row, float(largest));
  }

  // Computes the soft term of the classes, and its gradient if the problem has one.
  double solve(const Row& row, const State& state, Scratch& scratch) {
    const Problem& p = row.problem;
    if (state.flags & BAD_S) return NAN;
    // the tail's sum needs a reference; without it a larger logit outside would only cost digits
    const double largest = row.has_tail ? state.r.m_t : 0;
    for (const Support::Token& token : support_.all())
      s_[token.position] = float(token.s - largest);
    if (row.has_tail && state.r.d_s > 0)
      s_[p.K] = float((state.r.m_s - largest) + p.temperature * log(state.r.d_s));
    float hard, soft, stats[STATS];
    Problem classes = p;
    classes.N = 1;
    classes.V = p.K + 1;
    classes.student = {s_.data(), Dtype::f32, 1, 0, 0};
    classes.teacher = {t_.data(), Dtype::f32, 1, 0, 0};
    if (p.grad.data) classes.grad = {g_.data(), Dtype::f32, 1, 0, 0};
    classes.has_classes = false;
    classes.w_hard = nullptr;
    classes.w_soft = p.w_soft + row.n;
    classes.hard = &hard;
    classes.soft = &soft;
    classes.stats = stats;
    dense_row(Row(classes, row.table, 0), scratch);
    return soft;
  }

  // Returns the gradient that `solve` has computed; the row is NaN if one entry is.
  ClassGradient gradient(const Row& row, const State& state) const {
    const bool has_tail = row.has_tail && state.r.d_s > 0;
    const bool nan = std::any_of(g_.begin(), g_.end(), [](float g) { return std::isnan(g); });
    return {nan, has_tail ? g_[row.problem.K] / state.r.d_s : 0.0, g_.data()};
  }

 private:
  // Returns the sum of e^(s - m) over the tokens.
  float tokens_sum(const Row& row, float m) const {
    const Support::Group tokens = support_.all();
    alignas(64) float block[BLOCK];
    float total = 0;
    for (int begin = 0; begin < tokens.size(); begin += BLOCK) {
      const int size = std::min(BLOCK, tokens.size() - begin);
      const int padded = (size + MAX_PAIR - 1) / MAX_PAIR * MAX_PAIR;
      for (int i = 0; i < padded; ++i)
        block[i] = i < size ? std::max(tokens.begin()[begin + i].s, LOWEST) : LOWEST;
      BlockSums sums;
      row.table.sums(Load::f32_any, Divergence::none, Hard::power1,
                     {block, block, padded, m, m, row.k_1, row.k_1}, &sums);
      total += sums.d_1;
    }
    return total;
  }

  Support support_;
  // of the K+1 classes: the student's logits, which `solve` makes relative to the row's largest; the
  // teacher's logits; the gradient by the student's
  std::vector<float> s_, t_, g_;
};

}  // namespace cpu
}  // namespace fused_kd
