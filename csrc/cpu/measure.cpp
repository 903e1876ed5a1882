// A row is measured by the first pass of the losses, without the hard term, and by one more pass. The
// label's entry is left out of that pass: what concerns it follows from the sums of the others, so
// that a probability near 1 costs no digits.
#include "measure.h"

#include "row_losses.h"
#include "segments.h"

namespace fused_kd {

using namespace cpu;

namespace {

// The first largest entry so far.
struct Largest {
  float value = -INF;
  int64_t at = 0;

  void add(const Largest& other) {
    if (other.value > value || (other.value == value && other.at < at)) *this = other;
  }

  // Adds a block's entries; `most`: the largest of them, or a number below it if all are -inf.
  void add_block(const Kernels& table, const Prepared& block, const void* entries, float most,
                 int64_t begin) {
    if (!(most > value)) return;
    const char* at = static_cast<const char*>(entries);
    const int bytes = width(dtype_of(block.load));
    for (int i = 0; i < block.size; i += FEW) {  // a copy is padded to FEW
      if (table.largest(block.load, at + i * bytes, FEW) != most) continue;
      while (i < block.size && read(table, at + i * bytes, block.load) != most) ++i;
      if (i < block.size) *this = {most, begin + i};  // else NaN and what a copy is padded with
      return;
    }
  }

 private:
  static constexpr int FEW = MAX_PAIR;

  static float read(const Kernels& table, const char* entry, Load load) {
    float x;
    table.widen(dtype_of(load), entry, &x, 1);
    return x;
  }
};

// The sums of a segment, then of a row; those of BlockMeasures, without the label.
struct RowMeasures {
  double E = 0, EE = 0, D = 0, DD = 0, ED = 0, G = 0, Pa = 0, Ea = 0, Qb = 0, Gb = 0;
  Largest s, t;

  void add(const BlockMeasures& block) {
    E += block.E, EE += block.EE, D += block.D, DD += block.DD, ED += block.ED, G += block.G;
    Pa += block.Pa, Ea += block.Ea, Qb += block.Qb, Gb += block.Gb;
  }
  void add(const RowMeasures& other) {
    E += other.E, EE += other.EE, D += other.D, DD += other.DD, ED += other.ED, G += other.G;
    Pa += other.Pa, Ea += other.Ea, Qb += other.Qb, Gb += other.Gb;
    s.add(other.s);
    t.add(other.t);
  }
};

Hard exponential_at_1(const Problem& p) {
  return p.temperature == 1   ? Hard::power1
         : p.temperature == 2 ? Hard::power2
         : p.temperature == 4 ? Hard::power4
                              : Hard::separate;
}

// Measures a segment, after finish_statistics.
RowMeasures measure_segment(const Row& row, const State& state, int64_t segment, Scratch& scratch) {
  const Problem& p = row.problem;
  const float ratio = float(state.r.d_s / state.r.d_t);
  const int64_t label = row.label_in_range() ? p.labels[row.n] : -1;
  RowMeasures measures;
  for_blocks(row, segment, [&](int64_t begin, int64_t end) {
    Prepared block = prepare_again(row, state, begin, end, scratch);
    if (begin <= label && label < begin + block.size) {
      if (!block.copied) copy_block(row, begin, scratch, block);
      block.load = Load::f32_any;
      scratch.s[label - begin] = scratch.t[label - begin] = LOWEST;
    }
    BlockMeasures sums;
    row.table.measure(block.load, exponential_at_1(p),
                      kernel_block(row, block, state.r.m_s, state.r.m_t), ratio, &sums);
    measures.add(sums);
    measures.s.add_block(row.table, block, block.s, sums.max_s, begin);
    measures.t.add_block(row.table, block, block.t, sums.max_t, begin);
  });
  return measures;
}

// Sums over the entries of one side at one temperature: e^(x/T), and its product with x, a logit
// relative to the side's reference.
struct Softened {
  double sum, product;
  // Not below 0, in spite of the sums' rounding; NaN stays NaN.
  double entropy(double temperature) const {
    const double entropy = log(sum) - product / (temperature * sum);
    return entropy < 0 ? 0 : entropy;
  }
};

// Writes a row's columns.
void write(const Row& row, State& state, RowMeasures& m, float* sums, int64_t* largest) {
  const Problem& p = row.problem;
  RowSums<double>& r = state.r;
  const double T = p.temperature;
  double a = -INF, b = -INF;  // the label's logits, relative to their references
  if (row.label_in_range()) {
    const int64_t y = p.labels[row.n];
    const float s = row.s_label, t = read(row.t, row.t_dtype, y, row.table);
    m.s.add({s, y});
    m.t.add({t, y});
    a = double(s) - reference(r.m_s);
    b = double(t) - reference(r.m_t);
  }
  const auto product = [](double weight, double x) { return weight == 0 ? 0.0 : weight * x; };
  const double P = exp(a / T), Q = exp(b / T), E = exp(a), G = exp(b);
  const Softened p_{r.d_s, m.Pa + product(P, a)}, q{r.d_t, m.Qb + product(Q, b)};
  r.d_1 = m.E + E;
  const Softened pi = T == 1 ? p_ : Softened{r.d_1, m.Ea + product(E, a)};
  const Softened tau = T == 1 ? q : Softened{m.G + G, m.Gb + product(G, b)};
  // p - q at the label; if one of them is large its rounding would be, and the sum of the others' tells
  double at_label = P / r.d_s - Q / r.d_t;
  if (2 * P > r.d_s || 2 * Q > r.d_t) at_label = -m.D / r.d_s;
  const bool bad_s = state.flags & BAD_S, bad_t = state.flags & BAD_T;
  const double columns[MEASURES] = {
      hard_loss(row, state),
      soft_loss(row, state),
      m.E / r.d_1,
      m.EE / (r.d_1 * r.d_1),
      m.DD / (r.d_s * r.d_s),
      m.ED / (r.d_1 * r.d_s),
      at_label,
      bad_s ? NAN : pi.entropy(1),
      bad_t ? NAN : tau.entropy(1),
      bad_s ? NAN : p_.entropy(T),
      bad_t ? NAN : q.entropy(T),
  };
  for (int i = 0; i < MEASURES; ++i) sums[row.n * MEASURES + i] = float(columns[i]);
  largest[row.n * 2] = m.s.at;
  largest[row.n * 2 + 1] = m.t.at;
}

// The largest entry of a segment.
Largest largest_of_segment(const Row& row, int64_t segment, Scratch& scratch) {
  Largest largest;
  for_blocks(row, segment, [&](int64_t begin, int64_t end) {
    const Prepared block = view(row, begin, end, scratch);
    const float most = row.table.largest(block.load, block.s, block.padded);
    largest.add_block(row.table, block, block.s, most, begin);
  });
  return largest;
}

// Writes a row's columns; the state is that of the first pass, of all entries outside the support.
void write_support(const Row& row, ClassRow& classes, State& state, const Largest& largest,
                   float* sums, int64_t* at) {
  const double tail = state.r.m_s - above_lowest(largest.value), d = state.r.d_s, d_1 = state.r.d_1;
  classes.finish_statistics(row, state);
  const bool bad = state.flags & BAD_S;
  const double T = row.problem.temperature;
  const double columns[SUPPORT_MEASURES] = {
      hard_loss(row, state),
      bad     ? NAN
      : d > 0 ? tail + T * log(d)
              : -INF,
      bad       ? NAN
      : d_1 > 0 ? tail + log(d_1)
                : -INF,
  };
  for (int i = 0; i < SUPPORT_MEASURES; ++i) sums[row.n * SUPPORT_MEASURES + i] = float(columns[i]);
  at[row.n] = largest.at;
}

}  // namespace

void measure_rows(const Problem& problem, float* sums, int64_t* largest, const Parallel& parallel) {
  if (problem.N == 0) return;
  if (few_rows(problem, parallel)) {
    BySegments work(problem, parallel);
    for (Row& row : work.rows) row.hard_mode = Hard::off;
    work.first_passes();
    for (int64_t n = 0; n < problem.N; ++n) finish_statistics(work.rows[n], work.states[n]);
    std::vector<RowMeasures> parts(problem.N * work.segments);
    work.for_segments([&](int64_t n, int64_t i, Scratch& scratch) {
      parts[n * work.segments + i] = measure_segment(work.rows[n], work.states[n], i, scratch);
    });
    for (int64_t n = 0; n < problem.N; ++n) {
      if (work.rows[n].skipped()) continue;
      RowMeasures& row = parts[n * work.segments];
      for (int64_t i = 1; i < work.segments; ++i) row.add(parts[n * work.segments + i]);
      write(work.rows[n], work.states[n], row, sums, largest);
    }
    return;
  }
  split(parallel, problem.N, [&](int64_t n, Workspace& work) {
    Row row(problem, kernels(), n);
    row.hard_mode = Hard::off;
    if (row.skipped()) return;
    State state = first_pass(row, initial_state(row, work.scratch), work.scratch);
    finish_statistics(row, state);
    RowMeasures measures = measure_segment(row, state, 0, work.scratch);
    for (int64_t i = 1; i < row.segments(); ++i)
      measures.add(measure_segment(row, state, i, work.scratch));
    write(row, state, measures, sums, largest);
  });
}

void measure_support(const Problem& problem, float* sums, int64_t* at, const Parallel& parallel) {
  if (problem.N == 0) return;
  if (few_rows(problem, parallel)) {
    BySegments work(problem, parallel);
    work.first_passes();
    std::vector<Largest> parts(problem.N * work.segments);
    work.for_segments([&](int64_t n, int64_t i, Scratch& scratch) {
      parts[n * work.segments + i] = largest_of_segment(work.rows[n], i, scratch);
    });
    for (int64_t n = 0; n < problem.N; ++n) {
      if (work.rows[n].skipped()) continue;
      Largest& largest = parts[n * work.segments];
      for (int64_t i = 1; i < work.segments; ++i) largest.add(parts[n * work.segments + i]);
      write_support(work.rows[n], work.classes[n], work.states[n], largest, sums, at);
    }
    return;
  }
  const Kernels& table = kernels();
  split(parallel, problem.N, [&](int64_t n, Workspace& work) {
    Row row(problem, table, n);
    if (row.skipped()) return;
    work.classes.attach(row);
    const State initial = initial_state(row, work.scratch);
    work.classes.lower(row, initial);
    State state = first_pass(row, initial, work.scratch);
    Largest largest = largest_of_segment(row, 0, work.scratch);
    for (int64_t i = 1; i < row.segments(); ++i)
      largest.add(largest_of_segment(row, i, work.scratch));
    write_support(row, work.classes, state, largest, sums, at);
  });
}

}  // namespace fused_kd
