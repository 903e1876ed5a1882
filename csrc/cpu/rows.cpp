// The row driver. A row is cut into segments of SEGMENT entries, and these into blocks. Sums are
// merged block by block, then segment by segment, always in this order, so that a row's bits depend
// on V and the element types alone. A thread processes whole rows (statistics, then the gradient
// while the row is in cache) or, with few rows, segments.
#include "rows.h"

#include <vector>

#include "row_gradient.h"

namespace fused_kd {

using namespace cpu;

namespace {

void whole_row(const Row& row, Scratch& scratch) {
  if (row.skipped()) {
    write_skipped(row);
    if (row.problem.grad.data) zero_gradient(row);
    return;
  }
  const State initial = initial_state(row, scratch);
  State state = first_pass(row, 0, initial, scratch);
  for (int64_t i = 1; i < row.segments(); ++i)
    merge(row, state, first_pass(row, i, initial, scratch));
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

template <class Body>
void split(const Parallel& parallel, int64_t n, Body body) {
  parallel.split(
      n,
      [](void* context, int64_t begin, int64_t end) {
        Scratch scratch;
        Body& body = *static_cast<Body*>(context);
        for (int64_t i = begin; i < end; ++i) body(i, scratch);
      },
      &body);
}

// For few rows: all threads process the segments of all rows, one pass after the other.
struct BySegments {
  const Problem& problem;
  const Parallel& parallel;
  std::vector<Row> rows;
  std::vector<State> states;  // (N)
  int64_t segments;

  BySegments(const Problem& problem, const Parallel& parallel)
      : problem(problem), parallel(parallel) {
    for (int64_t n = 0; n < problem.N; ++n) rows.emplace_back(problem, kernels(), n);
    states.resize(problem.N);
    segments = rows.front().segments();
  }

  template <class Body>
  void for_segments(Body body) {
    split(parallel, problem.N * segments, [&](int64_t i, Scratch& scratch) {
      if (!rows[i / segments].skipped()) body(i / segments, i % segments, scratch);
    });
  }

  void forward() {
    std::vector<State> parts(problem.N * segments);
    split(parallel, problem.N, [&](int64_t n, Scratch& scratch) {
      if (!rows[n].skipped()) states[n] = initial_state(rows[n], scratch);
    });
    for_segments([&](int64_t n, int64_t i, Scratch& scratch) {
      parts[n * segments + i] = first_pass(rows[n], i, states[n], scratch);
    });
    for (int64_t n = 0; n < problem.N; ++n) {
      states[n] = parts[n * segments];
      for (int64_t i = 1; i < segments; ++i) merge(rows[n], states[n], parts[n * segments + i]);
      finish_statistics(rows[n], states[n]);
    }
    for_segments([&](int64_t n, int64_t i, Scratch& scratch) {
      RowSums<double>& r = parts[n * segments + i].r;
      if (rows[n].two_passes) second_pass(rows[n], states[n], i, scratch, &r.x, &r.y);
    });
    for (int64_t n = 0; n < problem.N; ++n) {
      if (rows[n].skipped()) {
        write_skipped(rows[n]);
        continue;
      }
      for (int64_t i = 0; i < segments; ++i) {
        states[n].r.x += parts[n * segments + i].r.x;
        states[n].r.y += parts[n * segments + i].r.y;
      }
      write_losses(rows[n], states[n]);
    }
  }

  void backward() {
    std::vector<Gradient> gradients;
    for (int64_t n = 0; n < problem.N; ++n) gradients.emplace_back(rows[n], states[n]);
    for_segments([&](int64_t n, int64_t i, Scratch& scratch) { gradients[n].segment(i, scratch); });
    for (int64_t n = 0; n < problem.N; ++n)
      rows[n].skipped() ? zero_gradient(rows[n]) : gradients[n].label();
  }
};

bool few_rows(const Problem& p, const Parallel& parallel) {
  return parallel.threads > 1 && p.N < 4 * int64_t(parallel.threads) && p.V > SEGMENT;
}

}  // namespace

void rows_forward(const Problem& problem, const Parallel& parallel) {
  if (problem.N == 0) return;
  if (few_rows(problem, parallel)) {
    BySegments work(problem, parallel);
    work.forward();
    if (problem.grad.data) work.backward();
    return;
  }
  const Kernels& table = kernels();
  split(parallel, problem.N,
        [&](int64_t n, Scratch& scratch) { whole_row(Row(problem, table, n), scratch); });
}

void rows_backward(const Problem& problem, const Parallel& parallel) {
  if (problem.N == 0) return;
  if (few_rows(problem, parallel)) {
    BySegments work(problem, parallel);
    for (int64_t n = 0; n < problem.N; ++n) work.states[n] = restore(problem.stats + n * STATS);
    work.backward();
    return;
  }
  const Kernels& table = kernels();
  split(parallel, problem.N, [&](int64_t n, Scratch& scratch) {
    const Row row(problem, table, n);
    row.skipped() ? zero_gradient(row)
                  : whole_row_gradient(row, restore(problem.stats + n * STATS), scratch);
  });
}

void scale_row(const Rows& grad, int64_t n, int64_t V, float factor) {
  kernels().scale(grad.dtype, row_pointer(grad, n), V, factor);
}

}  // namespace fused_kd
