// The row driver. A row is cut into segments of SEGMENT entries, and these into blocks. Sums are
// merged block by block, then segment by segment, always in this order, so that a row's bits depend
// on V and the element types alone. A thread processes whole rows (statistics, then the gradient
// while the row is in cache) or, with few rows, segments.
#include "rows.h"

#include "segments.h"

namespace fused_kd {

using namespace cpu;

namespace {

// The statistics and losses of a top-k teacher's row, from those of the first pass.
void finish_class_row(const Row& row, ClassRow& classes, State& state, Scratch& scratch) {
  classes.finish_statistics(row, state);
  write_losses(row, state);
  row.problem.soft[row.n] = row.soft ? float(classes.solve(row, state, scratch)) : 0.0f;
}

// The gradient of such a row, after `solve` if it has a soft term.
void class_row_gradient(const Row& row, const State& state, Workspace& work) {
  if (!row.soft) return whole_row_gradient(row, state, work.scratch);
  const ClassGradient gradient = work.classes.gradient(row, state);
  whole_row_gradient(row, state, work.scratch, &gradient);
}

// Statistics, losses, and the gradient if there is one.
void class_row(Row& row, Workspace& work) {
  work.classes.attach(row);
  const State initial = initial_state(row, work.scratch);
  work.classes.lower(row, initial);
  State state = first_pass(row, initial, work.scratch);
  finish_class_row(row, work.classes, state, work.scratch);
  if (!row.problem.grad.data) return;
  class_row_gradient(row, state, work);
}

void whole_row(Row row, Workspace& work) {
  if (row.skipped()) {
    write_skipped(row);
    if (row.problem.grad.data) zero_gradient(row);
  } else if (row.problem.has_classes) {
    class_row(row, work);
  } else {
    dense_row(row, work.scratch);
  }
}

// The gradient of a row from the statistics of an earlier forward.
void whole_row_gradient_again(Row row, Workspace& work) {
  if (row.skipped()) return zero_gradient(row);
  const State state = restore(row.problem.stats + row.n * STATS);
  if (!row.problem.has_classes) return whole_row_gradient(row, state, work.scratch);
  work.classes.attach(row);
  if (row.soft) work.classes.solve(row, state, work.scratch);
  class_row_gradient(row, state, work);
}

struct LossesBySegments : BySegments {
  using BySegments::BySegments;

  void forward() {
    Scratch scratch;
    first_passes();
    for (int64_t n = 0; n < problem.N; ++n)
      if (!rows[n].support) finish_statistics(rows[n], states[n]);
    std::vector<RowSums<double>> parts(problem.N * segments);
    for_segments([&](int64_t n, int64_t i, Scratch& scratch) {
      RowSums<double>& r = parts[n * segments + i];
      if (rows[n].two_passes) second_pass(rows[n], states[n], i, scratch, &r.x, &r.y);
    });
    for (int64_t n = 0; n < problem.N; ++n) {
      if (rows[n].skipped()) {
        write_skipped(rows[n]);
        continue;
      }
      if (rows[n].support) {
        finish_class_row(rows[n], classes[n], states[n], scratch);
        continue;
      }
      for (int64_t i = 0; i < segments; ++i) {
        states[n].r.x += parts[n * segments + i].x;
        states[n].r.y += parts[n * segments + i].y;
      }
      write_losses(rows[n], states[n]);
    }
  }

  // Reads the statistics of an earlier forward.
  void restore_states() {
    Scratch scratch;
    for (int64_t n = 0; n < problem.N; ++n) {
      states[n] = restore(problem.stats + n * STATS);
      if (rows[n].support && rows[n].soft) classes[n].solve(rows[n], states[n], scratch);
    }
  }

  void backward() {
    std::vector<ClassGradient> of_classes(problem.N);
    std::vector<Gradient> gradients;
    for (int64_t n = 0; n < problem.N; ++n) {
      const bool has_classes = rows[n].support && rows[n].soft;
      if (has_classes) of_classes[n] = classes[n].gradient(rows[n], states[n]);
      gradients.emplace_back(rows[n], states[n], has_classes ? &of_classes[n] : nullptr);
    }
    for_segments([&](int64_t n, int64_t i, Scratch& scratch) { gradients[n].segment(i, scratch); });
    for (int64_t n = 0; n < problem.N; ++n)
      rows[n].skipped() ? zero_gradient(rows[n]) : gradients[n].entries();
  }
};

}  // namespace

void rows_forward(const Problem& problem, const Parallel& parallel) {
  if (problem.N == 0) return;
  if (few_rows(problem, parallel)) {
    LossesBySegments work(problem, parallel);
    work.forward();
    if (problem.grad.data) work.backward();
    return;
  }
  const Kernels& table = kernels();
  split(parallel, problem.N,
        [&](int64_t n, Workspace& work) { whole_row(Row(problem, table, n), work); });
}

void rows_backward(const Problem& problem, const Parallel& parallel) {
  if (problem.N == 0) return;
  if (few_rows(problem, parallel)) {
    LossesBySegments work(problem, parallel);
    work.restore_states();
    work.backward();
    return;
  }
  const Kernels& table = kernels();
  split(parallel, problem.N, [&](int64_t n, Workspace& work) {
    whole_row_gradient_again(Row(problem, table, n), work);
  });
}

void scale_row(const Rows& grad, int64_t n, int64_t V, float factor) {
  kernels().scale(grad.dtype, row_pointer(grad, n), V, factor);
}

}  // namespace fused_kd
