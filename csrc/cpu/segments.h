// How the rows of a problem are divided among threads: whole rows, or with few rows their segments.
#pragma once

#include <vector>

#include "row_classes.h"

namespace fused_kd {
namespace cpu {

struct Workspace {  // of a thread
  Scratch scratch;
  ClassRow classes;
};

// Calls body(i, workspace) for all i in [0, n).
template <class Body>
void split(const Parallel& parallel, int64_t n, Body body) {
  parallel.split(
      n,
      [](void* context, int64_t begin, int64_t end) {
        Workspace work;
        Body& body = *static_cast<Body*>(context);
        for (int64_t i = begin; i < end; ++i) body(i, work);
      },
      &body);
}

// For few rows: all threads process the segments of all rows, one pass after the other.
struct BySegments {
  const Problem& problem;
  const Parallel& parallel;
  std::vector<Row> rows;
  std::vector<State> states;      // (N)
  std::vector<ClassRow> classes;  // (N), or none
  int64_t segments;

  BySegments(const Problem& problem, const Parallel& parallel)
      : problem(problem), parallel(parallel) {
    for (int64_t n = 0; n < problem.N; ++n) rows.emplace_back(problem, kernels(), n);
    states.resize(problem.N);
    classes.resize(problem.has_classes ? problem.N : 0);
    for (size_t n = 0; n < classes.size(); ++n)
      if (!rows[n].skipped()) classes[n].attach(rows[n]);
    segments = rows.front().segments();
  }

  template <class Body>
  void for_segments(Body body) {
    split(parallel, problem.N * segments, [&](int64_t i, Workspace& work) {
      if (!rows[i / segments].skipped()) body(i / segments, i % segments, work.scratch);
    });
  }

  // Computes the sums of every row, without the flags that depend on the whole row.
  void first_passes() {
    std::vector<State> parts(problem.N * segments);
    split(parallel, problem.N, [&](int64_t n, Workspace& work) {
      if (rows[n].skipped()) return;
      states[n] = initial_state(rows[n], work.scratch);
      if (rows[n].support) classes[n].lower(rows[n], states[n]);
    });
    for_segments([&](int64_t n, int64_t i, Scratch& scratch) {
      parts[n * segments + i] = first_pass(rows[n], i, states[n], scratch);
    });
    for (int64_t n = 0; n < problem.N; ++n) {
      states[n] = parts[n * segments];
      for (int64_t i = 1; i < segments; ++i) merge(rows[n], states[n], parts[n * segments + i]);
    }
  }
};

inline bool few_rows(const Problem& p, const Parallel& parallel) {
  return parallel.threads > 1 && p.N < 4 * int64_t(parallel.threads) && p.V > SEGMENT;
}

}  // namespace cpu
}  // namespace fused_kd
